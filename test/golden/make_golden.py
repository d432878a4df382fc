#!/usr/bin/env python3
"""Golden vectors for the C tests: tiny models and what PyTorch computes with them.

Run      python3 test/golden/make_golden.py [OUTPUT_DIR]      (default: the folder this file lies in)
Needs    Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0. The C build and its tests need none of them:
         they read the committed files. Two runs write the same bytes. Another version of these packages may draw the same
         weights and differ in the last printed digits only; regenerate all files together.
Takes    about ten seconds on one core.

Writes
  <family>/config.json, model.safetensors, generation_config.json      a Hugging Face directory as save_pretrained writes it
  <family>.json      logits, one SFT batch, one reward-model batch, one PPO update of that model
  unit.json          GAE, whitening, KL controller, schedules, AdamW, log-sigmoid, softmax, PPO loss on a few given numbers
  families.json      logits, log-probabilities, greedy tokens and SFT gradients of further families, each with a directory of its
                     own whose weights are bfloat16: qwen3, smollm3, gpt_neox, gemma, gemma2, gemma3_text
Families: gpt2; llama (GQA 4:2, untied); llama_tied (MQA 4:1, tied, `rope_theta` at top level as transformers 4 wrote it).

How the numbers are made
  Weights are float32; every result is computed from them in float64, so that a golden value carries no rounding of its own and
  a test's tolerance is the tolerance of the engine alone. transformers' modules force float32 inside RMSNorm, RoPE and softmax,
  therefore the forward pass is written out below, and the script refuses to write a family unless transformers' own float32
  model agrees with it (logits, SFT gradients of every tensor, reward-model scores). Gradients come from autograd, the
  optimiser steps from torch.optim.AdamW and torch.nn.utils.clip_grad_norm_.

Conventions, the same in all families
  ids            sequences are ragged and computed alone; there is no padding and no dropout
  tensor names   as in model.safetensors; the head of reward and value model is `score.weight` [1, d], without bias, applied to
                 the hidden state after the final norm; those two models have no lm_head tensor
  tensor entry   {"norm": L2 norm over the tensor, "first": values at flat index 0..7, "spread": values at flat index
                 i*(numel-1)//7 for i = 0..7}; an update (new - old) adds "tol" and "ntol", absolute tolerances of a value and of
                 the norm. Adam divides by |g|, so an element whose true gradient is ~0 (the key part of GPT-2's c_attn.bias:
                 softmax does not see a shift of all keys) moves by up to lr in a direction that is rounding noise. Such
                 values are null, to be skipped. The tolerances hold what float32-like noise in the gradients does to the
                 others, measured here; "after_tol" does the same for the losses, rewards, log-probabilities and values
                 computed after a step.
  accumulate     loss and gradients are those of the whole batch (or minibatch), however it is cut into micro-batches

SFT      position p of a sequence is a label when p >= 1 and p >= loss_from; loss = sum of cross-entropies / number of labels;
         accuracy = share of labels that are the argmax. AdamW lr 1e-3, betas .9 .999, eps 1e-8, weight decay 0.01 on tensors of
         two dimensions (embeddings included; biases and norm weights excluded), gradient clipped to global norm 1
         (factor min(1, 1 / (norm + 1e-6))), constant lr. `update` is that of step 1; `losses` are those seen by steps 1, 2, 3.
RM       r = score(hidden state of the last token), which is EOS. loss = mean_i( w_i * -logsigmoid(rc_i - rr_i - margin_i) )
         + center_coef * mean_i( (rc_i + rr_i)^2 ): divided by the number of pairs, not by the sum of weights; the centering
         term is not weighted. One AdamW step as for SFT.
PPO      policy = the model; reference = float32(0.9 * w) for every tensor w; value = the model's trunk as a network of its own
         with `value_head` as score.weight. All distributions are softmax(logits / T), exactly T.
         score_i - (missing_eos_penalty if row i does not end with EOS) goes to the last kept token (reward at n itself, the value
         after it is 0). V_t = value at the position before response token t. KL in the reward is k1. Advantages are whitened over
         all tokens of the rollout: (A - mean) / sqrt(var + 1e-8), unbiased variance. Returns are from before whitening.
         One epoch, minibatches of rows (0,1) then (2,3), not shuffled; one AdamW (lr 1e-3, eps 1e-8, no decay) over policy and
         value, clipped to joint norm 1. Per minibatch, means over its tokens: pg = mean max(-A r, -A clip(r, 1 +- .2)),
         vf = 1/2 mean max((v - R)^2, (clip(v, V +- .2) - R)^2), loss = pg + vf_coef * vf, approxkl = 1/2 mean (new - old)^2,
         clipfrac = share of tokens where the clipped policy term is the larger, entropy = mean entropy of the distributions.
"""

import json
import math
import os
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config,
                          GPT2ForSequenceClassification, GPT2LMHeadModel, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM,
                          LlamaForSequenceClassification, Qwen3Config, SmolLM3Config)
from transformers import optimization as hf_schedules
from transformers.utils import logging as hf_logging

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

BOS, EOS, PAD, VOCAB = 1, 2, 96, 97
F64 = torch.float64


# ---------------------------------------------------------------------------------------------- JSON

def number(x, digits):
    """A real in `digits` significant digits, always recognisable as a real (never "0" or "-0")."""
    if isinstance(x, bool):
        return "true" if x else "false"
    if isinstance(x, int):
        return str(x)
    if not math.isfinite(x):
        raise ValueError("not finite")
    s = f"{x + 0.0:.{digits}g}" if x != 0 else "0.0"
    return s if any(c in s for c in ".e") else s + ".0"


def render(x, digits, indent=0):
    """Objects one key per line, lists of numbers on one line: diffs stay readable and files small."""
    if torch.is_tensor(x):
        x = x.detach().tolist()
    if isinstance(x, dict):
        flat = all(not isinstance(v, (dict, list)) or (isinstance(v, list) and len(v) <= 8
                   and not any(isinstance(e, (dict, list)) for e in v)) for v in x.values()) and ("first" in x or "spread" in x)
        if flat:
            digits = min(digits, 6)    # tensor entries are compared at 1e-4 or worse; three digits less keep the folder small
            return "{" + ", ".join(f"{json.dumps(k)}: {render(v, digits)}" for k, v in x.items()) + "}"
        pad = " " * (indent + 1)
        return "{\n" + ",\n".join(f"{pad}{json.dumps(k)}: {render(v, digits, indent + 1)}" for k, v in x.items()) \
            + "\n" + " " * indent + "}"
    if isinstance(x, (list, tuple)):
        if any(isinstance(e, (dict, list, tuple)) or torch.is_tensor(e) for e in x):
            pad = " " * (indent + 1)
            return "[\n" + ",\n".join(pad + render(e, digits, indent + 1) for e in x) + "\n" + " " * indent + "]"
        return "[" + ", ".join(render(e, digits) for e in x) + "]"
    if x is None or isinstance(x, str):
        return json.dumps(x)
    return number(x, digits)


def write_json(path, x, digits):
    text = render(x, digits) + "\n"
    json.loads(text)
    with open(path, "w") as f:
        f.write(text)


# ---------------------------------------------------------------------------------------------- models

def gpt2_hidden(p, cfg, ids):
    """Hidden states [T, d] after the final norm."""
    d, nh = cfg.n_embd, cfg.n_head
    hd, n = d // nh, len(ids)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    x = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][:n]
    norm = lambda v, name: F.layer_norm(v, (d,), p[name + ".weight"], p[name + ".bias"], cfg.layer_norm_epsilon)
    conv = lambda v, name: v @ p[name + ".weight"] + p[name + ".bias"]
    for i in range(cfg.n_layer):
        h = f"transformer.h.{i}."
        q, k, v = (t.view(n, nh, hd).transpose(0, 1) for t in conv(norm(x, h + "ln_1"), h + "attn.c_attn").split(d, dim=-1))
        s = (q @ k.transpose(1, 2) / math.sqrt(hd)).masked_fill(~causal, -math.inf)
        x = x + conv((s.softmax(-1) @ v).transpose(0, 1).reshape(n, d), h + "attn.c_proj")
        x = x + conv(F.gelu(conv(norm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh"), h + "mlp.c_proj")
    return norm(x, "transformer.ln_f")


def llama_hidden(p, cfg, ids):
    """Hidden states [T, d] after the final norm."""
    nh, kv, n = cfg.num_attention_heads, cfg.num_key_value_heads, len(ids)
    hd = cfg.hidden_size // nh
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    x = p["model.embed_tokens.weight"][ids]
    dt = x.dtype
    inv = cfg.rope_parameters["rope_theta"] ** (-torch.arange(0, hd, 2, dtype=F64) / hd)
    angle = torch.arange(n, dtype=F64)[:, None] * inv
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(dt) for f in (torch.cos, torch.sin))

    def norm(v, name):
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + cfg.rms_norm_eps) * p[name + ".weight"]

    def heads(v, name, count, rotate):
        v = (v @ p[name + ".weight"].T).view(n, count, hd).transpose(0, 1)
        if rotate:
            v = v * cos + torch.cat([-v[..., hd // 2:], v[..., :hd // 2]], -1) * sin
        return v

    for i in range(cfg.num_hidden_layers):
        h = f"model.layers.{i}."
        y = norm(x, h + "input_layernorm")
        q = heads(y, h + "self_attn.q_proj", nh, True)
        k = heads(y, h + "self_attn.k_proj", kv, True).repeat_interleave(nh // kv, 0)
        v = heads(y, h + "self_attn.v_proj", kv, False).repeat_interleave(nh // kv, 0)
        s = (q @ k.transpose(1, 2) / math.sqrt(hd)).masked_fill(~causal, -math.inf)
        x = x + (s.softmax(-1) @ v).transpose(0, 1).reshape(n, nh * hd) @ p[h + "self_attn.o_proj.weight"].T
        y = norm(x, h + "post_attention_layernorm")
        y = F.silu(y @ p[h + "mlp.gate_proj.weight"].T) * (y @ p[h + "mlp.up_proj.weight"].T)
        x = x + y @ p[h + "mlp.down_proj.weight"].T
    return norm(x, "model.norm")


class Family:
    def __init__(self, name, seed, cfg, lm_class, rm_class, hidden, embedding):
        self.name, self.seed, self.cfg, self.hidden_fn = name, seed, cfg, hidden
        self.lm_class, self.rm_class, self.embedding = lm_class, rm_class, embedding

    def hidden(self, p, ids):
        return self.hidden_fn(p, self.cfg, torch.tensor(ids))

    def logits(self, p, ids):
        return self.hidden(p, ids) @ p.get("lm_head.weight", p[self.embedding]).T


def families():
    common = dict(vocab_size=VOCAB, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    llama = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, attention_bias=False,
                 mlp_bias=False, **common)
    return [
        Family("gpt2", 11, GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=52, n_positions=64, resid_pdrop=0.0,
                                      embd_pdrop=0.0, attn_pdrop=0.0, **common),
               GPT2LMHeadModel, GPT2ForSequenceClassification, gpt2_hidden, "transformer.wte.weight"),
        Family("llama", 23, LlamaConfig(intermediate_size=52, num_key_value_heads=2, tie_word_embeddings=False, rms_norm_eps=1e-5,
                                        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **llama),
               LlamaForCausalLM, LlamaForSequenceClassification, llama_hidden, "model.embed_tokens.weight"),
        Family("llama_tied", 33, LlamaConfig(intermediate_size=56, num_key_value_heads=1, tie_word_embeddings=True,
                                             rms_norm_eps=1e-6,
                                             rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **llama),
               LlamaForCausalLM, LlamaForSequenceClassification, llama_hidden, "model.embed_tokens.weight"),
    ]


def save_family(fam, out):
    """Draw the weights, save the directory, return the float32 tensors as they stand in the file."""
    gen = torch.Generator().manual_seed(fam.seed)
    model = fam.lm_class(fam.cfg).eval()
    with torch.no_grad():
        for name, w in sorted(model.named_parameters()):
            z = torch.randn(w.shape, generator=gen)
            if name.endswith("bias"):
                w.copy_(0.1 * z)
            elif w.dim() == 1:
                w.copy_(1 + 0.15 * z)
            else:
                w.copy_((0.1 if "wpe" in name else 0.2) * z)
    path = os.path.join(out, fam.name)
    model.save_pretrained(path)
    os.chmod(os.path.join(path, "model.safetensors"), 0o644)
    if fam.name == "llama_tied":
        # Checkpoints written before transformers 5 carry rope_theta and torch_dtype at top level: a loader needs both spellings.
        with open(os.path.join(path, "config.json")) as f:
            c = json.load(f)
        c["rope_theta"] = c.pop("rope_parameters")["rope_theta"]
        c["torch_dtype"] = c.pop("dtype")
        with open(os.path.join(path, "config.json"), "w") as f:
            f.write(json.dumps(c, indent=2, sort_keys=True) + "\n")
    return path, load_file(os.path.join(path, "model.safetensors"))


def leaves(p):
    return {k: v.detach().to(F64).clone().requires_grad_(True) for k, v in p.items()}


def with_head(p, head):
    """Trunk of p with a scalar head of its own."""
    q = {k: v for k, v in p.items() if k != "lm_head.weight"}
    q["score.weight"] = head
    return leaves(q)


# ---------------------------------------------------------------------------------------------- steps

NOISE = 3e-6    # of a tensor's rms gradient: a few float32 roundings, more than a summation of this size loses
NOISE_RUNS = 6


def adamw(param_dicts, lr, wd):
    groups = [dict(params=[w for p in param_dicts for w in p.values() if w.dim() == 2], weight_decay=wd),
              dict(params=[w for p in param_dicts for w in p.values() if w.dim() != 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, foreach=False)


def step(opt, loss, param_dicts, noise):
    """One clipped optimiser step. Returns the norm before clipping; .grad is left as before clipping."""
    opt.zero_grad()
    loss.backward()
    ws = [w for p in param_dicts for w in p.values()]
    for w in ws:
        if noise is not None:
            # Untouched rows of an embedding have a gradient of exactly 0 in any arithmetic and get no noise.
            w.grad += NOISE * w.grad.pow(2).mean().sqrt() * torch.randn(w.shape, generator=noise, dtype=F64) * (w.grad != 0)
    before = [w.grad.clone() for w in ws]
    norm = torch.nn.utils.clip_grad_norm_(ws, 1.0)
    opt.step()
    for w, g in zip(ws, before):
        w.grad = g
    return norm.item()


def spread(n):
    return [i * (n - 1) // 7 for i in range(8)]


def entry(t):
    t = t.detach().flatten()
    return {"norm": t.norm().item(), "first": t[:8].tolist(), "spread": t[spread(t.numel())].tolist()}


def entries(tensors):
    return {k: entry(tensors[k]) for k in sorted(tensors)}


def two_digits(x):
    return float(f"{x:.2g}")


def update_entries(run, lr):
    """run(noise) -> ({name: update}, vector of results after the step). The exact run gives the values, noisy runs the
    tolerances: those of the tensors go into their entries, that of the vector is returned beside them."""
    exact, vec = run(None)
    out, noisy, vdev = entries(exact), [], 0.0
    for i in range(NOISE_RUNS):
        upd, v = run(torch.Generator().manual_seed(1000 + i))
        noisy.append(entries(upd))
        vdev = max(vdev, (v - vec).abs().max().item())
    for k, e in out.items():
        dev = 0.0
        for f in ("first", "spread"):
            for j, b in enumerate(e[f]):
                d = max(abs(n[k][f][j] - b) for n in noisy)
                if d > 0.01 * lr:
                    e[f][j] = None
                else:
                    dev = max(dev, d)
        ndev = max(abs(n[k]["norm"] - e["norm"]) for n in noisy)
        # Two digits are plenty for a tolerance; 2e-3 lr covers the float32 rounding of weights near 1.
        e["tol"] = two_digits(2e-3 * lr + 4 * dev)
        e["ntol"] = two_digits(1e-3 * e["norm"] + 4 * ndev)
    return out, two_digits(2e-5 + 4 * vdev)


def delta(now, was):
    return {k: now[k].detach() - was[k].to(F64) for k in now}


def close(what, a, b, tol):
    a, b = torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64)
    dev = (a - b).norm().item() / (b.norm().item() + 1e-30)
    if not dev <= tol:
        sys.exit(f"{what}: transformers and this script differ by {dev:.3g} (allowed {tol:g})")
    return dev


# ---------------------------------------------------------------------------------------------- stages

def draw_ids(fam, p, gen, n, greedy=0.0):
    """n random ids. Token 0 comes early so that row 0 of the embedding has a gradient; with `greedy` some are the argmax."""
    ids = [BOS, 0] if n > 2 else [BOS]
    while len(ids) < n:
        t = int(torch.randint(3, PAD, (1,), generator=gen))
        if torch.rand(1, generator=gen).item() < greedy:
            top = fam.logits(p, ids)[-1].topk(2)
            # An argmax that float32 could decide otherwise is of no use in a golden accuracy.
            if (top.values[0] - top.values[1]).item() > 1e-2:
                t = int(top.indices[0])
        ids.append(t)
    return ids


def logp_of(logits, ids, first, temperature=1.0):
    """log-probabilities of ids[first:], each from the position before it."""
    lp = (logits / temperature).log_softmax(-1)
    return lp[first - 1:len(ids) - 1].gather(1, torch.tensor(ids[first:])[:, None])[:, 0]


def make_logits(fam, p, gen, hf):
    seqs = []
    for n in (5, 17):
        ids = draw_ids(fam, p, gen, n)
        z = fam.logits(p, ids)
        close(fam.name + " logits", hf(torch.tensor([ids])).logits[0].double(), z, 2e-6)
        seqs.append({"ids": ids, "logits": z, "logprobs": logp_of(z, ids, 1)})
    return {"sequences": seqs}


def sft_loss(fam, p, batch):
    total, hits, count = 0.0, 0, 0
    for s in batch:
        first = max(1, s["loss_from"])
        z = fam.logits(p, s["ids"])
        total = total - logp_of(z, s["ids"], first).sum()
        hits += (z[first - 1:-1].argmax(-1) == torch.tensor(s["ids"][first:])).sum().item()
        count += len(s["ids"]) - first
    return total / count, hits, count


def make_sft(fam, base, gen, hf):
    lr, wd = 1e-3, 0.01
    frozen = leaves(base)
    batch = [{"ids": draw_ids(fam, frozen, gen, n, 0.4), "loss_from": lf} for n, lf in ((9, 0), (14, 6), (6, 3))]
    batch[1]["ids"][-1] = EOS

    def run(noise, steps=1):
        p = leaves(base)
        opt, losses, grads, norm = adamw([p], lr, wd), [], None, None
        for i in range(steps):
            loss, _, _ = sft_loss(fam, p, batch)
            n = step(opt, loss, [p], noise)
            losses.append(loss.item())
            if i == 0:
                grads, norm = {k: w.grad.clone() for k, w in p.items()}, n
        return p, losses, grads, norm

    loss, hits, count = sft_loss(fam, frozen, batch)
    _, _, grads, norm = run(None)
    p3, losses, _, _ = run(None, 3)

    def noisy_sft(noise):
        p, lo, _, _ = run(noise, 3)
        return delta(run(noise)[0], base), torch.tensor(lo + [sft_loss(fam, p, batch)[0].item()], dtype=F64)

    update, tol = update_entries(noisy_sft, lr)

    labels = [[t if i >= s["loss_from"] else -100 for i, t in enumerate(s["ids"])] for s in batch]
    hf.zero_grad()
    hf_loss = sum(F.cross_entropy(hf(torch.tensor([s["ids"]])).logits[0, :-1], torch.tensor(lab[1:]), reduction="sum")
                  for s, lab in zip(batch, labels)) / count
    hf_loss.backward()
    close(fam.name + " SFT loss", hf_loss.item(), loss.item(), 1e-6)
    for k, w in hf.named_parameters():
        close(f"{fam.name} SFT gradient of {k}", w.grad.double(), grads[k], 2e-5)

    return {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": wd, "max_grad_norm": 1.0,
            "batch": batch, "labels": count, "hits": hits, "loss": loss.item(), "accuracy": hits / count, "grad_norm": norm,
            "grads": entries(grads), "update": update,
            "losses": losses, "loss_after": sft_loss(fam, p3, batch)[0].item(), "after_tol": tol}


def rm_rewards(fam, p, seqs):
    return torch.stack([fam.hidden(p, s)[-1] @ p["score.weight"][0] for s in seqs])


def rm_loss(fam, p, pairs, center):
    rc, rr = rm_rewards(fam, p, [x["chosen"] for x in pairs]), rm_rewards(fam, p, [x["rejected"] for x in pairs])
    m, w = (torch.tensor([x[k] for x in pairs], dtype=F64) for k in ("margin", "weight"))
    pairwise = (w * -F.logsigmoid(rc - rr - m)).mean()
    centering = ((rc + rr) ** 2).mean()
    return pairwise + center * centering, pairwise, centering, rc, rr


def make_rm(fam, base, gen):
    lr, wd, center = 1e-3, 0.01, 0.01
    frozen = leaves(base)
    head = 0.3 * torch.randn(1, 32, generator=gen)
    pairs = []
    for np, nc, nr, margin, weight in ((4, 5, 3, 0.0, 1.0), (3, 2, 6, 0.5, 0.25), (6, 4, 4, 0.0, 2.0)):
        prompt = draw_ids(fam, frozen, gen, np)
        answer = lambda n: [int(t) for t in torch.randint(3, PAD, (n - 1,), generator=gen)] + [EOS]
        pairs.append({"chosen": prompt + answer(nc), "rejected": prompt + answer(nr), "margin": margin, "weight": weight})
    start = with_head(base, head)

    def run(noise):
        p = with_head(base, head)
        opt = adamw([p], lr, wd)
        norm = step(opt, rm_loss(fam, p, pairs, center)[0], [p], noise)
        return p, norm

    # One pair right and two wrong, or the reverse, makes accuracy say something: the wrong order is swapped where needed.
    _, _, _, rc, rr = rm_loss(fam, start, pairs, center)
    for i, want in enumerate((True, False, True)):
        if (rc[i] > rr[i]).item() != want:
            pairs[i]["chosen"], pairs[i]["rejected"] = pairs[i]["rejected"], pairs[i]["chosen"]
    loss, pairwise, centering, rc, rr = rm_loss(fam, start, pairs, center)
    p, norm = run(None)

    cls = fam.rm_class(type(fam.cfg)(**{**fam.cfg.to_dict(), "num_labels": 1})).eval()
    state = {k: v for k, v in base.items() if k != "lm_head.weight"} | {"score.weight": head}
    missing = cls.load_state_dict(state, strict=False)
    if missing.missing_keys or missing.unexpected_keys:
        sys.exit(f"{fam.name}: {missing}")
    hf_r = torch.cat([cls(torch.tensor([x["chosen"]])).logits[:, 0] for x in pairs])
    close(fam.name + " RM scores", hf_r.double(), rc, 5e-6)
    rewards = lambda q: [rm_rewards(fam, q, [x[k] for x in pairs]).detach() for k in ("chosen", "rejected")]
    after = rewards(p)

    def noisy_rm(noise):
        q, _ = run(noise)
        return delta(q, start), torch.cat(rewards(q))

    update, tol = update_entries(noisy_rm, lr)

    return {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": wd, "max_grad_norm": 1.0, "center_coef": center,
            "score_weight": head[0].tolist(), "pairs": pairs, "chosen_rewards": rc, "rejected_rewards": rr,
            "loss": loss.item(), "pairwise_loss": pairwise.item(), "centering": centering.item(),
            "accuracy": (rc > rr).double().mean().item(), "margin_mean": (rc - rr).mean().item(), "grad_norm": norm,
            "grads": entries({k: w.grad for k, w in p.items()}),
            "update": update, "chosen_rewards_after": after[0], "rejected_rewards_after": after[1], "after_tol": tol}


def gae(rewards, values, gamma, lam):
    """Advantages of one row; the value after the last entry is 0. The recursion is held against its definition."""
    n = len(rewards)
    v = list(values) + [0.0]
    d = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(n)]
    adv, a = [0.0] * n, 0.0
    for t in reversed(range(n)):
        a = d[t] + gamma * lam * a
        adv[t] = a
    for t in range(n):
        if abs(adv[t] - sum((gamma * lam) ** (s - t) * d[s] for s in range(t, n))) > 1e-12:
            sys.exit("gae")
    return adv


def ppo_loss(new, old, adv, v, v_old, ret, clip, clip_v, vf_coef):
    ratio = (new - old).exp()
    p1, p2 = -adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)
    v1, v2 = (v - ret) ** 2, (torch.minimum(torch.maximum(v, v_old - clip_v), v_old + clip_v) - ret) ** 2
    pg, vf = torch.maximum(p1, p2).mean(), 0.5 * torch.maximum(v1, v2).mean()
    return {"loss": pg + vf_coef * vf, "pg": pg, "vf": vf, "approxkl": 0.5 * ((new - old) ** 2).mean(),
            "clipfrac": (p2 > p1).double().mean(), "vf_clipfrac": (v2 > v1).double().mean(), "ratio_mean": ratio.mean()}


def make_ppo(fam, base, gen):
    c = {"temperature": 0.7, "kl_coef": 0.05, "missing_eos_penalty": 1.0, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2,
         "cliprange_value": 0.2, "vf_coef": 0.1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0,
         "max_grad_norm": 1.0, "epochs": 1, "minibatches": [[0, 1], [2, 3]], "ref_scale": 0.9, "eos": EOS}
    temp = c["temperature"]
    head = 0.15 * torch.randn(1, 32, generator=gen)
    policy0, ref, value0 = leaves(base), leaves({k: (0.9 * v.double()).float() for k, v in base.items()}), with_head(base, head)
    rows = []
    for np, n, ends, score in ((5, 4, True, 0.8), (3, 6, False, 1.1), (8, 2, True, -0.6), (4, 5, True, 0.3)):
        ids, out = draw_ids(fam, policy0, gen, np), []
        while len(out) < n - ends:
            # Responses are drawn from the policy itself, as in a rollout, except that EOS comes where this script wants it.
            t = int(torch.multinomial((fam.logits(policy0, ids + out)[-1] / temp).softmax(-1).detach(), 1, generator=gen))
            if t not in (BOS, EOS, PAD):
                out.append(t)
        rows.append({"prompt": ids, "response": out + [EOS] * ends, "score": score})

    def policy_row(p, r):
        z = fam.logits(p, r["prompt"] + r["response"])
        lp = (z / temp).log_softmax(-1)[len(r["prompt"]) - 1:-1]
        return lp.gather(1, torch.tensor(r["response"])[:, None])[:, 0], lp

    def value_row(p, r):
        h = fam.hidden(p, r["prompt"] + r["response"])
        return (h @ p["score.weight"][0])[len(r["prompt"]) - 1:-1]

    ends, ret, adv = [], [], []
    k1_all, k3_all, exact_all, ent_all, rowsum = [], [], [], [], []
    for r in rows:
        lp, full = (x.detach() for x in policy_row(policy0, r))
        rlp, rfull = (x.detach() for x in policy_row(ref, r))
        v = value_row(value0, r).detach()
        u = lp - rlp
        r["logprobs"], r["ref_logprobs"], r["values"] = lp, rlp, v
        r["exact_kl"], r["entropy"] = (full.exp() * (full - rfull)).sum(-1), -(full.exp() * full).sum(-1)
        ends.append(r["response"][-1] == EOS)
        r["score_final"] = r["score"] - (0.0 if ends[-1] else c["missing_eos_penalty"])
        rew = -c["kl_coef"] * u
        rew[-1] += r["score_final"]
        r["rewards"] = rew
        a = torch.tensor(gae(rew.tolist(), v.tolist(), c["gamma"], c["lam"]), dtype=F64)
        r["advantages_raw"], r["returns"] = a, a + v
        adv.append(a)
        ret.append(a + v)
        k1_all.append(u)
        k3_all.append((-u).exp() - 1 + u)
        exact_all.append(r["exact_kl"])
        ent_all.append(r["entropy"])
        rowsum.append((u.sum(), -lp.sum()))
    flat = torch.cat(adv)
    mean, var = flat.mean(), flat.var(unbiased=True)
    for r, a in zip(rows, adv):
        r["advantages"] = (a - mean) * torch.rsqrt(var + 1e-8)

    kl = torch.stack([a for a, _ in rowsum]).mean().item()
    scores = sum(r["score_final"] for r in rows) / len(rows)
    objective = {"kl": kl, "entropy": torch.stack([b for _, b in rowsum]).mean().item(), "scores": scores,
                 "non_score_reward": -c["kl_coef"] * kl, "rlhf_reward": scores - c["kl_coef"] * kl,
                 "kl_k1_token": torch.cat(k1_all).mean().item(), "kl_k3_token": torch.cat(k3_all).mean().item(),
                 "kl_exact_token": torch.cat(exact_all).mean().item(), "entropy_token": torch.cat(ent_all).mean().item(),
                 "num_eos": sum(ends), "tokens": flat.numel(), "advantage_mean": mean.item(), "advantage_var": var.item()}

    def run(noise):
        pol, val = leaves(base), with_head(base, head)
        opt, log = adamw([pol, val], c["lr"], 0.0), []
        for mb in c["minibatches"]:
            pick = lambda key: torch.cat([rows[i][key] for i in mb])
            new, full = (torch.cat(x) for x in zip(*(policy_row(pol, rows[i]) for i in mb)))
            out = ppo_loss(new, pick("logprobs"), pick("advantages"), torch.cat([value_row(val, rows[i]) for i in mb]),
                           pick("values"), pick("returns"), c["cliprange"], c["cliprange_value"], c["vf_coef"])
            norm = step(opt, out["loss"], [pol, val], noise)
            norms = [torch.cat([w.grad.flatten() for w in p.values()]).norm().item() for p in (pol, val)]
            log.append({"rows": mb, "tokens": new.numel(), **{k: x.item() for k, x in out.items()},
                        "entropy": -(full.exp() * full).sum(-1).mean().item(),
                        "grad_norm": norm, "grad_norm_policy": norms[0], "grad_norm_value": norms[1],
                        "policy_grads": entries({k: w.grad for k, w in pol.items()}) if not log else None,
                        "value_grads": entries({k: w.grad for k, w in val.items()}) if not log else None})
        for m in log[1:]:
            del m["policy_grads"], m["value_grads"]
        return pol, val, log

    pol, val, log = run(None)
    for i, r in enumerate(rows):
        r["logprobs_after"], r["values_after"] = policy_row(pol, r)[0], value_row(val, r)

    def noisy_ppo(noise):
        a, b, lg = run(noise)
        upd = {"policy/" + k: x for k, x in delta(a, base).items()} | {"value/" + k: x for k, x in delta(b, value0).items()}
        vec = [policy_row(a, r)[0] for r in rows] + [value_row(b, r) for r in rows]
        vec += [torch.tensor([m[k] for m in lg for k in ("loss", "pg", "vf", "approxkl", "ratio_mean", "entropy")], dtype=F64)]
        return upd, torch.cat(vec).detach()

    update, tol = update_entries(noisy_ppo, c["lr"])
    part = lambda which: {k[len(which):]: e for k, e in update.items() if k.startswith(which)}
    return {**c, "value_head": head[0].tolist(), "rows": rows, "objective": objective, "minibatch": log, "after_tol": tol,
            "policy_update": part("policy/"), "value_update": part("value/")}


def make_family(fam, out):
    path, base = save_family(fam, out)
    hf = fam.lm_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    gen = torch.Generator().manual_seed(fam.seed + 100)
    p = leaves(base)
    data = {"family": fam.name, "model": fam.name, "eos": EOS,
            "made_with": {"torch": torch.__version__.split("+")[0], "arithmetic": "float64 from float32 weights"},
            "params": sum(v.numel() for v in base.values()),
            "forward": make_logits(fam, p, gen, hf), "sft": make_sft(fam, base, gen, hf), "rm": make_rm(fam, base, gen),
            "ppo": make_ppo(fam, base, gen)}
    write_json(os.path.join(out, fam.name + ".json"), data, 9)
    return data


# ---------------------------------------------------------------------------------------------- further families

def further_families():
    """Two layers each, three where the pattern of layers needs them; windows shorter than the texts."""
    common = dict(vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=64, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)
    grouped = dict(num_key_value_heads=1, **common)
    return {
        "qwen3": Qwen3Config(head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True,
                             **grouped),
        "smollm3": SmolLM3Config(no_rope_layer_interval=2, **grouped),
        "gpt_neox": GPTNeoXConfig(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
                                  **common),
        "gemma": GemmaConfig(head_dim=8, **grouped),
        "gemma2": Gemma2Config(head_dim=8, sliding_window=5, query_pre_attn_scalar=12, attn_logit_softcapping=2.0,
                               final_logit_softcapping=3.0, **grouped),
        "gemma3_text": Gemma3TextConfig(head_dim=8, sliding_window=5, sliding_window_pattern=2, query_pre_attn_scalar=12,
                                        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0,
                                                                            "rope_theta": 1000.0},
                                                         "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
                                        **grouped)}


def greedy(model, ids, n):
    """The most likely continuation, and by how much the closest second choice lost."""
    ids, gap = list(ids), math.inf
    for _ in range(n):
        top = model(torch.tensor([ids])).logits[0, -1].topk(2)
        gap = min(gap, (top.values[0] - top.values[1]).item())
        ids.append(int(top.indices[0]))
    return ids[-n:], gap


def make_further(out, name, cfg):
    """transformers' own numbers in float32, from weights that bfloat16 holds."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(cfg, attn_implementation="eager").eval()
    gen = torch.Generator().manual_seed(77)
    with torch.no_grad():
        for k, w in sorted(model.named_parameters()):
            z = torch.randn(w.shape, generator=gen)
            base = 0.0 if w.dim() > 1 or "bias" in k or "gemma" in name else 1.0
            w.copy_((base + (0.35 if w.dim() > 1 else 0.15) * z).bfloat16().float())
    path = os.path.join(out, name)
    model.to(torch.bfloat16).save_pretrained(path)
    os.chmod(os.path.join(path, "model.safetensors"), 0o644)
    if name == "gemma3_text":
        # As written before transformers 5.
        with open(os.path.join(path, "config.json")) as f:
            c = json.load(f)
        rope = c.pop("rope_parameters")
        c["rope_theta"], c["rope_local_base_freq"] = rope["full_attention"]["rope_theta"], rope["sliding_attention"]["rope_theta"]
        c["rope_scaling"] = {"rope_type": "linear", "factor": rope["full_attention"]["factor"]}
        c["sliding_window_pattern"] = c.pop("_sliding_window_pattern")
        del c["layer_types"]
        with open(os.path.join(path, "config.json"), "w") as f:
            f.write(json.dumps(c, indent=2, sort_keys=True) + "\n")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    while True:
        ids = [BOS] + torch.randint(3, 37, (13,), generator=gen).tolist()
        with torch.no_grad():
            more, gap = greedy(model, ids[:6], 24)
        if gap > 1e-3 and EOS not in more:
            break
    z = model(torch.tensor([ids])).logits[0]
    lp = z.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    model.zero_grad()
    (-lp.mean()).backward()
    grads = {k: {"norm": w.grad.norm().item(), "spread": w.grad.flatten()[spread(w.numel())].tolist()}
             for k, w in sorted(model.named_parameters()) if ".1." not in k and "lm_head" not in k}
    return {"ids": ids, "rows": [6, 13], "logits": z[[6, 13]], "logprobs": lp, "greedy": more, "grads": grads}


# ---------------------------------------------------------------------------------------------- small numbers

def unit_gae():
    """Three rows in a buffer of L = 5: kept lengths 3, 5 (no room after the last token) and 1. `kl_reward` and `values` are
    given for the whole buffer. reward_at "eos": the score is added at n = len-1 and V_t = 0 for t > n; outputs have len entries.
    "p1": the score is added at e = n+1 if n+1 < L else n, kl_reward is 0 and V kept at n+1, and V_t = 0 for t > n+1; outputs
    have e+1 entries, of which the policy loss uses the first len, the value loss all."""
    rows = [{"len": 3, "score": 1.25, "kl_reward": [0.02, -0.05, 0.01, 0.3, -0.2], "values": [0.5, 0.25, -0.75, 0.4, 9.0]},
            {"len": 5, "score": -0.5, "kl_reward": [-0.1, 0.07, 0.0, -0.03, 0.04], "values": [-0.2, 0.6, 0.1, 1.5, -0.35]},
            {"len": 1, "score": 2.0, "kl_reward": [-0.015, 0.5, 0.5, 0.5, 0.5], "values": [0.125, -1.0, 7.0, 7.0, 7.0]}]
    cases = []
    for gamma, lam in ((1.0, 0.95), (0.99, 0.9)):
        for at in ("eos", "p1"):
            res = []
            for r in rows:
                size, n = 5, r["len"] - 1
                e = n if at == "eos" or n + 1 >= size else n + 1
                rew = [r["kl_reward"][t] if t <= n else 0.0 for t in range(e + 1)]
                rew[e] += r["score"]
                adv = gae(rew, r["values"][:e + 1], gamma, lam)
                res.append({"rewards": rew, "advantages": adv, "returns": [a + v for a, v in zip(adv, r["values"])]})
            cases.append({"gamma": gamma, "lam": lam, "reward_at": at, "rows": res})
    return {"buffer": 5, "rows": rows, "cases": cases}


def unit_whiten():
    """`x` is flat, `mask` 1 where an entry counts; masked entries come out as 0. shift_mean true removes the mean."""
    cases = []
    grid = [1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]
    ragged = [0.5, -1.25, 3.0, 100.0, 2.0, -100.0, 0.75, 1e3]
    for x, mask in ((grid, [1] * 9), (ragged, [1, 1, 1, 0, 1, 0, 1, 0])):
        for shift in (True, False):
            for unbiased in (True, False):
                t = torch.tensor([a for a, m in zip(x, mask) if m], dtype=F64)
                w = ((t - t.mean()) * torch.rsqrt(t.var(unbiased=unbiased) + 1e-8) + (0.0 if shift else t.mean())).tolist()
                it = iter(w)
                cases.append({"x": x, "mask": mask, "shift_mean": shift, "unbiased": unbiased,
                              "y": [next(it) if m else 0.0 for m in mask]})
    # spec.md 7.6 quotes the first row of the grid, mean kept, biased variance.
    for got, quoted in zip(cases[3]["y"], (0.0508, 0.4381, 0.8254)):
        assert abs(got - quoted) < 5e-5
    return cases


def unit_adaptive_kl():
    cases = []
    for coef, kl, target, n, horizon in ((0.15, 12.0, 6.0, 512, 10000), (0.15, 1.0, 6.0, 512, 10000), (0.2, 6.6, 6.0, 64, 1000),
                                         (0.05, 6.0, 6.0, 64, 1000)):
        err = min(max(kl / target - 1, -0.2), 0.2)
        cases.append({"coef": coef, "kl": kl, "target": target, "n_steps": n, "horizon": horizon,
                      "next": coef * (1 + err * n / horizon)})
    assert abs(cases[0]["next"] - 0.151536) < 1e-9
    return cases


def unit_schedules():
    """factor[k] multiplies the learning rate of optimiser step k (the first step is k = 0), 3 warm-up steps of 10 in all."""
    out = []
    for name, make in (("linear", lambda o, w: hf_schedules.get_linear_schedule_with_warmup(o, w, 10)),
                       ("cosine", lambda o, w: hf_schedules.get_cosine_schedule_with_warmup(o, w, 10)),
                       ("constant", lambda o, w: hf_schedules.get_constant_schedule_with_warmup(o, w))):
        for warmup in (0, 3):
            opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            sched, factors = make(opt, warmup), []
            for _ in range(11):
                factors.append(float(opt.param_groups[0]["lr"]))
                opt.step()
                sched.step()
            out.append({"name": name, "warmup": warmup, "steps": 10, "factor": factors})
    return out


def unit_adamw():
    """p after each of five steps with gradients g. "torch" adds eps to sqrt(v)/sqrt(1-b2^t), "tf" to sqrt(v) (spec.md 7.11)."""
    cases = []
    for style, wd, eps, p0, gs in (("torch", 0.0, 1e-8, 0.5, [0.1, -0.2, 0.3, 0.0, 1e-3]),
                                   ("torch", 0.1, 1e-8, -2.0, [1.0, 1.0, -4.0, 0.25, 0.0]),
                                   ("torch", 0.0, 1e-5, 0.25, [1e-6] * 5), ("tf", 0.0, 1e-5, 0.25, [1e-6] * 5),
                                   ("tf", 0.0, 1e-5, 0.5, [0.1, -0.2, 0.3, 0.0, 1e-3])):
        lr, b1, b2 = 0.01, 0.9, 0.999
        p, m, v, traj = p0, 0.0, 0.0, []
        w = torch.tensor([p0], dtype=F64, requires_grad=True)
        opt = torch.optim.AdamW([w], lr=lr, betas=(b1, b2), eps=eps, weight_decay=wd)
        for t, g in enumerate(gs, 1):
            p *= 1 - lr * wd
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            if style == "torch":
                p -= lr * (m / (1 - b1 ** t)) / (math.sqrt(v) / math.sqrt(1 - b2 ** t) + eps)
            else:
                p -= lr * math.sqrt(1 - b2 ** t) / (1 - b1 ** t) * m / (math.sqrt(v) + eps)
            traj.append(p)
            w.grad = torch.tensor([g], dtype=F64)
            opt.step()
            assert style == "tf" or abs(w.item() - p) < 1e-13
        cases.append({"style": style, "lr": lr, "beta1": b1, "beta2": b2, "eps": eps, "weight_decay": wd, "p0": p0, "g": gs,
                      "p": traj})
    # spec.md 19.15: the first move at |g| = 1e-6 is .0909 lr against .00315 lr.
    assert abs((0.25 - cases[2]["p"][0]) / 0.01 - 0.0909) < 1e-4 and abs((0.25 - cases[3]["p"][0]) / 0.01 - 0.00315) < 1e-5
    return cases


def unit_softmax():
    cases = []
    for z in ([0.0, 1.0, -2.0, 3.5, 0.25], [1000.0, 999.0, 990.0], [-5e4, -5e4, -5e4, -5e4], [88.0, -88.0, 0.0]):
        for t in (1.0, 0.7, 2.0):
            x = torch.tensor(z, dtype=F64) / t
            lp = x.log_softmax(-1)
            cases.append({"logits": z, "temperature": t, "logsumexp": x.logsumexp(-1).item(), "logprobs": lp, "probs": lp.exp(),
                          "entropy": -(lp.exp() * lp).sum().item()})
    return cases


def unit_kl():
    """k1, k2, k3 of sampled tokens (spec.md 5.10), and the exact divergence of two rows of logits at a temperature."""
    lp, ref = [-1.5, -0.2, -4.0, -2.0, -0.001], [-1.0, -0.9, -4.0, -6.5, -0.0012]
    u = [a - b for a, b in zip(lp, ref)]
    a, b = [0.3, -1.0, 2.0, 0.5, 0.0], [0.0, 0.5, 1.0, -1.5, 0.25]
    exact = []
    for t in (1.0, 0.7):
        x, y = ((torch.tensor(z, dtype=F64) / t).log_softmax(-1) for z in (a, b))
        exact.append({"temperature": t, "kl": (x.exp() * (x - y)).sum().item()})
    return {"logprobs": lp, "ref_logprobs": ref, "k1": u, "k2": [0.5 * x * x for x in u], "k3": [math.expm1(-x) + x for x in u],
            "policy_logits": a, "ref_logits": b, "exact": exact}


def unit_ppo_loss():
    """The clipped losses on eight tokens, chosen so that every branch is taken, with the gradients of loss = pg + 0.1 vf with
    respect to the new log-probability and the new value of each token (mean over the eight)."""
    old = [-1.0, -2.0, -0.5, -3.0, -1.25, -0.1, -2.5, -1.75]
    dlt = [0.0, 0.05, 0.4, -0.5, 0.35, -0.3, -0.1, 0.1]
    adv = [1.0, -0.5, 1.5, 0.8, -1.2, -0.7, 0.3, 0.0]
    v_old = [0.0, 0.5, -0.5, 1.0, 0.25, -1.0, 2.0, 0.75]
    dv = [0.0, 0.1, 0.5, -0.6, 0.3, -0.1, -0.45, 0.15]
    ret = [0.3, 0.2, 1.0, -1.0, 0.3, -1.5, 2.5, 0.9]
    new = torch.tensor([a + b for a, b in zip(old, dlt)], dtype=F64, requires_grad=True)
    v = torch.tensor([a + b for a, b in zip(v_old, dv)], dtype=F64, requires_grad=True)
    t = lambda x: torch.tensor(x, dtype=F64)
    out = ppo_loss(new, t(old), t(adv), v, t(v_old), t(ret), 0.2, 0.2, 0.1)
    out["loss"].backward()
    return {"new_logprobs": new, "old_logprobs": old, "advantages": adv, "values": v, "old_values": v_old, "returns": ret,
            "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, **{k: x.item() for k, x in out.items()},
            "grad_logprobs": new.grad, "grad_values": v.grad}


def unit_clip():
    cases = []
    for g, limit in (([3.0, 4.0], 1.0), ([0.3, 0.4], 1.0), ([1e-3, -2e-3, 2e-3], 1e-3)):
        w = torch.zeros(len(g), dtype=F64, requires_grad=True)
        w.grad = torch.tensor(g, dtype=F64)
        n = torch.nn.utils.clip_grad_norm_([w], limit).item()
        cases.append({"g": g, "max_norm": limit, "norm": n, "clipped": w.grad})
    return cases


def make_unit(out):
    z = [-1000.0, -100.0, -20.0, -5.0, -1.0, -1e-8, 0.0, 1e-8, 0.5, 1.0, 5.0, 16.0, 20.0, 40.0, 90.0, 100.0, 1000.0]
    ls = [min(a, 0.0) - math.log1p(math.exp(-abs(a))) for a in z]
    for a, b in zip(F.logsigmoid(torch.tensor(z, dtype=F64)).tolist(), ls):
        assert abs(a - b) <= 1e-15 * max(1.0, abs(a))
    write_json(os.path.join(out, "unit.json"), {
        "gae": unit_gae(), "whiten": unit_whiten(), "adaptive_kl": unit_adaptive_kl(), "schedule": unit_schedules(),
        "adamw": unit_adamw(), "logsigmoid": {"z": z, "y": ls}, "softmax": unit_softmax(), "kl": unit_kl(),
        "ppo_loss": unit_ppo_loss(), "clip": unit_clip()}, 17)


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    os.makedirs(out, exist_ok=True)
    for fam in families():
        d = make_family(fam, out)
        s, r, p = d["sft"], d["rm"], d["ppo"]
        print(f"{fam.name}: {d['params']} parameters; SFT {s['losses']} -> {s['loss_after']:.6f}, {s['hits']}/{s['labels']}, "
              f"|g| {s['grad_norm']:.4f}; RM {r['loss']:.6f} acc {r['accuracy']:.3f} |g| {r['grad_norm']:.4f}")
        for m in p["minibatch"]:
            print("   ppo", {k: (round(v, 6) if isinstance(v, float) else v) for k, v in m.items() if not k.endswith("grads")})
        print("   ", {k: round(v, 6) for k, v in p["objective"].items()})
    further = {name: make_further(out, name, cfg) for name, cfg in further_families().items()}
    write_json(os.path.join(out, "families.json"), further, 7)
    make_unit(out)


if __name__ == "__main__":
    main()
