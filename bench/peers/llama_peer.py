#!/usr/bin/env python3
"""The generation of `rlhf bench` in llama.cpp, through llama-cpp-python.

    llama_peer.py --threads 2 generate/gpt2/batch1/f32 generate/llama-8m/batch8/bf16 ...
    llama_peer.py --check

common.py tells of names and results. A GGUF file with random weights is written and read; names
that end in /bf16 have matrices in bf16. Tokens go through llama_decode, all sequences of a batch in
one call, and llama.cpp's own sampler draws them at temperature 1, from the whole vocabulary or, for
sample/..., with top_k 50 and top_p 0.9. Cache (f16) and attention are its defaults, which are the
fastest for this work.
"""

import ctypes
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp as lib
import numpy as np

from common import POSITIONS, SHAPES, Shape, forget_peak, main, median_time

# ---- Models --------------------------------------------------------------------------------------


def weights(s, scale=0.02):
    """{name: array} of a random model, as GGUF names them."""
    g = np.random.default_rng(1)
    hd = s.d // s.heads
    gpt = s.kind == "gpt2"

    def matrix(rows, cols):
        return scale * g.standard_normal((rows, cols), dtype=np.float32)

    def norm(name):
        out = {name + ".weight": np.ones(s.d, np.float32)}
        return {**out, name + ".bias": np.zeros(s.d, np.float32)} if gpt else out

    def linear(name, rows, cols, bias):
        out = {name + ".weight": matrix(rows, cols)}
        return {**out, name + ".bias": scale * g.standard_normal(rows, np.float32)} if bias else out

    w = {"token_embd.weight": matrix(s.vocab, s.d), **norm("output_norm")}
    if gpt:
        w["position_embd.weight"] = matrix(POSITIONS, s.d)
    for i in range(s.layers):
        b = f"blk.{i}."
        w |= norm(b + "attn_norm") | norm(b + "ffn_norm")
        w |= linear(b + "attn_output", s.d, s.d, gpt)
        w |= linear(b + "ffn_up", s.ff, s.d, gpt) | linear(b + "ffn_down", s.d, s.ff, gpt)
        if gpt:
            w |= linear(b + "attn_qkv", 3 * s.d, s.d, True)
        else:
            w |= linear(b + "ffn_gate", s.ff, s.d, False)
            for x, heads in (("q", s.heads), ("k", s.groups), ("v", s.groups)):
                w |= linear(b + "attn_" + x, heads * hd, s.d, s.bias)
    return w


def write(path, s, w, bf16):
    """Without a tokenizer: only ids go in and out. The output matrix is the embedding."""
    arch = "gpt2" if s.kind == "gpt2" else "qwen2" if s.bias else "llama"
    f = gguf.GGUFWriter(path, arch)
    f.add_tokenizer_model("no_vocab")
    f.add_vocab_size(s.vocab)
    f.add_context_length(POSITIONS)
    f.add_embedding_length(s.d)
    f.add_block_count(s.layers)
    f.add_feed_forward_length(s.ff)
    f.add_head_count(s.heads)
    if s.kind == "gpt2":
        f.add_layer_norm_eps(1e-5)
    else:
        f.add_head_count_kv(s.groups)
        f.add_layer_norm_rms_eps(1e-6)
        f.add_rope_dimension_count(s.d // s.heads)
        f.add_rope_freq_base(10000.0)
    low = gguf.GGMLQuantizationType.BF16
    for name, x in w.items():
        if bf16 and x.ndim > 1 and name != "position_embd.weight":
            f.add_tensor(name, gguf.quants.quantize(x, low), raw_dtype=low)
        else:
            f.add_tensor(name, x)
    f.write_header_to_file()
    f.write_kv_data_to_file()
    f.write_tensors_to_file()
    f.close()


@lib.llama_log_callback
def on_log(level, text, _):
    if level == 4:  # errors
        sys.stderr.write(text.decode())


class Llama:
    """A model and room for a batch of sequences; some: they draw from the likely tokens only."""

    def __init__(self, path, s, batch, length, threads, some):
        self.vocab, self.count = s.vocab, batch
        self.model = lib.llama_model_load_from_file(bytes(path), lib.llama_model_default_params())
        c = lib.llama_context_default_params()
        c.n_ctx, c.n_seq_max, c.n_batch = batch * length, batch, batch * length
        if threads:
            c.n_threads = c.n_threads_batch = threads
        self.context = self.model and lib.llama_init_from_model(self.model, c)
        if not self.context:
            sys.exit("llama.cpp does not take the model")
        self.tokens = lib.llama_batch_init(batch * length, 0, 1)
        self.sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if some:
            lib.llama_sampler_chain_add(self.sampler, lib.llama_sampler_init_top_k(50))
            lib.llama_sampler_chain_add(self.sampler, lib.llama_sampler_init_top_p(0.9, 1))
        lib.llama_sampler_chain_add(self.sampler, lib.llama_sampler_init_dist(1))

    def close(self):
        lib.llama_sampler_free(self.sampler)
        lib.llama_batch_free(self.tokens)
        lib.llama_free(self.context)
        lib.llama_model_free(self.model)

    def forget(self):
        lib.llama_memory_clear(lib.llama_get_memory(self.context), False)

    def feed(self, rows, past, everywhere=False):
        """Appends each row to its sequence; returns where in the batch their last tokens are."""
        b, i, last = self.tokens, 0, []
        for row, ids in enumerate(rows):
            for t, token in enumerate(ids):
                b.token[i], b.pos[i] = token, past + t
                b.n_seq_id[i], b.seq_id[i][0] = 1, row
                b.logits[i] = everywhere or t == len(ids) - 1
                i += 1
            last.append(i - 1)
        b.n_tokens = i
        if lib.llama_decode(self.context, b):
            sys.exit("llama_decode failed")
        return last

    def logits(self, i):
        p = lib.llama_get_logits_ith(self.context, i)
        return np.ctypeslib.as_array(ctypes.cast(p, ctypes.POINTER(ctypes.c_float)), (self.vocab,))

    def generate(self, prompts, new, greedy=False):
        """[batch][new] ids."""
        self.forget()
        feed, past, out = prompts, 0, []
        for _ in range(new):
            last = self.feed(feed, past)
            past += len(feed[0])
            if greedy:
                drawn = [int(self.logits(i).argmax()) for i in last]
            else:
                drawn = [lib.llama_sampler_sample(self.sampler, self.context, i) for i in last]
            out.append(drawn)
            feed = [[x] for x in drawn]
        return [list(x) for x in zip(*out)]


@contextmanager
def model(s, w, bf16, batch, length, threads, some=False):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write(path, s, w, bf16)
        del w  # the peak of memory begins without them
        forget_peak()
        m = Llama(path, s, batch, length, threads, some)
        yield m
        m.close()


def random_ids(s, batch, length):
    return np.random.default_rng(7).integers(s.vocab, size=(batch, length)).tolist()


def measure(work, name, numbers, bf16, a):
    if work not in ("generate", "sample"):
        return None
    s, (batch,) = SHAPES[name], numbers
    with model(s, weights(s), bf16, batch, 128, a.threads, work == "sample") as m:
        prompts = random_ids(s, batch, 64)
        # The prompt and the first token are taken off.
        t = median_time(lambda: m.generate(prompts, 64), a.quick)
        t -= median_time(lambda: m.generate(prompts, 1), a.quick)
    return batch * 63 / t, "tok/s"


# ---- Checking ------------------------------------------------------------------------------------


def turn(s, x, halves):
    """Rotary embedding of [length][heads][head size]; pairs are halves of a head or neighbours."""
    half = x.shape[-1] // 2
    angle = np.outer(np.arange(len(x)), 10000.0 ** (-np.arange(half) / half))[:, None]
    a, b = (x[..., :half], x[..., half:]) if halves else (x[..., ::2], x[..., 1::2])
    c, d = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return np.concatenate((c, d), -1) if halves else np.stack((c, d), -1).reshape(x.shape)


def forward(s, w, ids):
    """Logits of one sequence in plain NumPy: what llama.cpp's are compared with."""
    gpt, hd, n = s.kind == "gpt2", s.d // s.heads, len(ids)

    def norm(x, name):
        if gpt:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + (1e-5 if gpt else 1e-6))
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    x = w["token_embd.weight"][ids].astype(np.float64)
    if gpt:
        x = x + w["position_embd.weight"][:n]
    for i in range(s.layers):
        b = f"blk.{i}."
        y = norm(x, b + "attn_norm")
        if gpt:
            qkv = np.split(linear(y, b + "attn_qkv"), 3, -1)
            q, k, v = (z.reshape(n, s.heads, hd) for z in qkv)
        else:
            q, k, v = (linear(y, b + "attn_" + z).reshape(n, -1, hd) for z in "qkv")
            q, k = turn(s, q, s.bias), turn(s, k, s.bias)
        k, v = (np.repeat(z, s.heads // s.groups, 1) for z in (k, v))
        p = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(hd)
        p = np.where(np.tri(n, dtype=bool), p, -np.inf)
        p = np.exp(p - p.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hij,jhd->ihd", p, v).reshape(n, s.d), b + "attn_output")
        y = norm(x, b + "ffn_norm")
        up = linear(y, b + "ffn_up")
        if gpt:
            up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up ** 3)))
        else:
            gate = linear(y, b + "ffn_gate")
            up = gate / (1 + np.exp(-gate)) * up
        x = x + linear(up, b + "ffn_down")
    return norm(x, "output_norm") @ w["token_embd.weight"].T


def check(report, a):
    """Seconds."""
    small = Shape("llama", 128, 3, 8, 256, 500, kv=2, bias=True)
    for name, s in (("gpt2-14m", SHAPES["gpt2-14m"]), ("llama-8m", SHAPES["llama-8m"]),
                    ("grouped heads", small)):
        for bf16 in (False, True):
            kind = name + (" bf16" if bf16 else "")
            # Sharper than the bench's, so that no two tokens are nearly as likely.
            w = weights(s, 0.1)
            with model(s, w, bf16, 3, 21, a.threads) as m:
                prompts = random_ids(s, 3, 9)
                whole = [p + x for p, x in zip(prompts, m.generate(prompts, 12, greedy=True))]
                m.forget()
                m.feed(whole, 0, everywhere=True)
                rows = [[m.logits(r * 21 + t).copy() for t in range(21)] for r in range(3)]
                same = sum(int(rows[r][t].argmax()) == whole[r][t + 1]
                           for r in range(3) for t in range(8, 20))
                report(same >= (34 if bf16 else 36),
                       f"{kind}: greedy with cache = argmax of a whole pass, {same} of 36")
                want = np.stack([forward(s, w, row) for row in whole])
                off = np.abs(np.array(rows) - want).mean() / want.std()
                report(off < (0.05 if bf16 else 0.005),
                       f"{kind}: logits are NumPy's within {off:.1e} of their spread")
                drawn = m.generate(prompts, 12)
                report(drawn != m.generate(prompts, 12), f"{kind}: sampling is random")


def setup(threads):
    lib.llama_log_set(on_log, None)
    lib.llama_backend_init()


if __name__ == "__main__":
    main("llama.cpp " + version("llama-cpp-python"), setup, measure, check)
