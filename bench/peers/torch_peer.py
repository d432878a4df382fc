#!/usr/bin/env python3
"""The work of `rlhf bench` in PyTorch, as somebody who knows PyTorch writes it for a CPU.

    torch_peer.py --threads 2 train/llama-8m/8x128/f32 generate/llama-8m/batch8/f32 ...
    torch_peer.py --check

Arguments are names of results of `rlhf bench --json`; the last line of standard output is a JSON
object with results of those names. Shapes, tokens and mathematics are those of rlhf.c, section
BENCH. Plain modules in eager mode; what is done for speed:

    one product for q, k, v and one for gate and up; scaled_dot_product_attention
    no dropout, no padding, no masks: all sequences of a batch are equally long
    fused AdamW, foreach clipping, gradients set to None instead of zeroed
    rotary embeddings as one complex product; denormal numbers flushed
    generation under inference_mode with a cache allocated once; only last rows meet the vocabulary
    PPO: log-probabilities of the policy come from the sampling; only states of the answer meet the
    vocabulary; the temperature divides hidden states instead of logits

bench/run.py adds an allocator that keeps its pages (jemalloc or tcmalloc), where there is one.
"""

import argparse
import copy
import json
import math
import re
import sys
import time
import warnings
from dataclasses import dataclass

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it

import torch
import torch.nn.functional as F
from torch import nn

# ---- Models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    kind: str
    d: int
    layers: int
    heads: int
    ff: int
    vocab: int


SHAPES = {
    "gpt2": Shape("gpt2", 768, 12, 12, 3072, 50257),
    "gpt2-14m": Shape("gpt2", 384, 6, 6, 1536, 8192),
    "llama-8m": Shape("llama", 288, 6, 6, 768, 8192),
    "llama-15m": Shape("llama", 288, 6, 6, 768, 32000),
}
POSITIONS = 1024  # both kinds: enough for every item


class Cache:
    """Keys and values of all layers, [layers][batch][heads][length][head size]."""

    def __init__(self, s, batch, length):
        shape = (s.layers, batch, s.heads, length, s.d // s.heads)
        self.k = torch.empty(shape)
        self.v = torch.empty(shape)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        bias = s.kind == "gpt2"
        self.heads = s.heads
        self.qkv = nn.Linear(s.d, 3 * s.d, bias=bias)
        self.o = nn.Linear(s.d, s.d, bias=bias)

    def forward(self, x, rope, past, cache, layer):
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)
        if rope is None:
            q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))
        else:
            # Queries and keys turn in one go. Neighbours form a pair, where Llama's checkpoints
            # pair the halves of a head: the order of rows in the matrix, nothing else.
            pairs = torch.view_as_complex(qkv[:, :, :2].unflatten(-1, (-1, 2)))
            q, k = torch.view_as_real(pairs * rope).flatten(-2).transpose(1, 3).unbind(2)
            v = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            cache.k[layer, :, :, past:past + t] = k
            cache.v[layer, :, :, past:past + t] = v
            k = cache.k[layer, :, :, :past + t]
            v = cache.v[layer, :, :, :past + t]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        return self.o(y.transpose(1, 2).reshape(b, t, d))


class GptMlp(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.up = nn.Linear(s.d, s.ff)
        self.down = nn.Linear(s.ff, s.d)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class LlamaMlp(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.up = nn.Linear(s.d, 2 * s.ff, bias=False)  # gate, then up
        self.down = nn.Linear(s.ff, s.d, bias=False)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, s):
        super().__init__()
        gpt = s.kind == "gpt2"
        norm = nn.LayerNorm if gpt else nn.RMSNorm
        eps = 1e-5 if gpt else 1e-6
        self.norm1 = norm(s.d, eps=eps)
        self.attention = Attention(s)
        self.norm2 = norm(s.d, eps=eps)
        self.mlp = GptMlp(s) if gpt else LlamaMlp(s)

    def forward(self, x, rope, past, cache, layer):
        x = x + self.attention(self.norm1(x), rope, past, cache, layer)
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """The trunk. The output matrix is the embedding; with a score head, one number a position."""

    def __init__(self, name, score=False, seed=1):
        super().__init__()
        s = self.shape = SHAPES[name]
        torch.manual_seed(seed)
        gpt = s.kind == "gpt2"
        self.tokens = nn.Embedding(s.vocab, s.d)
        if gpt:
            self.places = nn.Embedding(POSITIONS, s.d)
        else:
            half = s.d // s.heads // 2
            freq = 10000.0 ** (-torch.arange(half) / half)
            angle = torch.outer(torch.arange(POSITIONS), freq)[:, None, None]  # over q|k and heads
            self.register_buffer("turn", torch.polar(torch.ones(()), angle), persistent=False)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = (nn.LayerNorm(s.d, eps=1e-5) if gpt else nn.RMSNorm(s.d, eps=1e-6))
        self.score = nn.Linear(s.d, 1, bias=False) if score else None
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        for n, p in self.named_parameters():
            if n.endswith("bias"):
                nn.init.zeros_(p)
        if score:
            nn.init.normal_(self.score.weight, std=1 / math.sqrt(s.d + 1))

    def forward(self, ids, past=0, cache=None):
        """Hidden states after the last norm, [batch][length][d]."""
        x = self.tokens(ids)
        here = slice(past, past + ids.shape[1])
        if self.shape.kind == "gpt2":
            x = x + self.places.weight[here]
            rope = None
        else:
            rope = self.turn[here]
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, past, cache, layer)
        return self.norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.tokens.weight)

    def scores(self, hidden):
        return self.score(hidden).squeeze(-1)


def random_ids(model, batch, length):
    g = torch.Generator().manual_seed(7)
    return torch.randint(model.shape.vocab, (batch, length), generator=g)


# ---- Training step -------------------------------------------------------------------------------


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def update(parameters, optimizer):
    nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Training:
    """Every token but the first bears loss, as in `rlhf sft` on unmasked records."""

    def __init__(self, name, batch, length, lr=2e-5):
        self.model = Model(name)
        self.ids = random_ids(self.model, batch, length)
        self.parameters = list(self.model.parameters())
        self.optimizer = adamw(self.parameters, lr)

    def step(self):
        hidden = self.model(self.ids[:, :-1])
        logits = self.model.logits(hidden.flatten(0, 1))
        loss = F.cross_entropy(logits, self.ids[:, 1:].flatten())
        del hidden, logits
        loss.backward()
        update(self.parameters, self.optimizer)
        return loss.item()


# ---- Generation ----------------------------------------------------------------------------------


def draw(logits):
    """Samples by inversion: one uniform number a row. Returns ids and their log-probabilities."""
    p = F.softmax(logits, dim=-1)
    c = p.cumsum(-1)
    u = torch.rand(p.shape[0], 1) * c[:, -1:]
    ids = torch.searchsorted(c, u, right=True).clamp_(max=p.shape[1] - 1)
    return ids, p.gather(1, ids).log_()


@torch.inference_mode()
def generate(model, prompts, new, temperature=1.0):
    """[batch][new] ids and their log-probabilities; temperature 0 takes the most likely ones."""
    batch, length = prompts.shape
    cache = Cache(model.shape, batch, length + new)
    ids = torch.empty(batch, new, dtype=torch.long)
    logp = torch.empty(batch, new)
    feed, past = prompts, 0
    for i in range(new):
        last = model(feed, past, cache)[:, -1]
        past += feed.shape[1]
        if temperature == 0:
            feed = model.logits(last).argmax(-1, keepdim=True)
        else:
            feed, logp[:, i:i + 1] = draw(model.logits(last / temperature))
        ids[:, i] = feed[:, 0]
    return ids, logp


# ---- PPO -----------------------------------------------------------------------------------------


def advantages(rewards, values, gamma=1.0, lam=0.95):
    """Generalised advantage estimation over [batch][states], and the returns."""
    out = torch.empty_like(rewards)
    carry = torch.zeros(rewards.shape[0])
    after = torch.zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        carry = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * carry
        after = values[:, t]
        out[:, t] = carry
    return out, out + values


class Ppo:
    """One update: 16 answers of 48 tokens to prompts of 32, then 4 epochs x 4 minibatches. Policy,
    reference, reward and value are separate models. No token ends an answer."""

    EPOCHS, MINIBATCHES, TEMPERATURE = 4, 4, 0.7
    KL, CLIP, VALUE_CLIP, VALUE_COEF = 0.05, 0.2, 0.2, 0.1

    def __init__(self, name, batch, prompt, new, lr=3e-6):
        self.policy = Model(name)
        self.reward = Model(name, score=True).requires_grad_(False)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.value = copy.deepcopy(self.reward).requires_grad_(True)
        self.prompts = random_ids(self.policy, batch, prompt)
        self.batch, self.prompt, self.new = batch, prompt, new
        self.parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = adamw(self.parameters, lr)

    def states(self, model, ids):
        """Hidden states before each token of the answers, [batch][new][d]."""
        return model(ids[:, :-1])[:, self.prompt - 1:]

    def logp(self, model, ids):
        hidden = self.states(model, ids).flatten(0, 1) / self.TEMPERATURE
        target = ids[:, self.prompt:].flatten()
        # Rows in pieces: without a gradient, logits of all answers at once would only cost memory.
        piece = len(target) if torch.is_grad_enabled() else 192
        out = [-F.cross_entropy(model.logits(h), t, reduction="none")
               for h, t in zip(hidden.split(piece), target.split(piece))]
        return torch.cat(out).view(len(ids), self.new)

    def values(self, ids):
        return self.value.scores(self.states(self.value, ids))

    @torch.no_grad()
    def rollout(self):
        answers, logp = generate(self.policy, self.prompts, self.new, self.TEMPERATURE)
        answers, logp = answers.clone(), logp.clone()  # ordinary tensors: autograd may save them
        ids = torch.cat((self.prompts, answers), 1)
        reference = self.logp(self.reference, ids)
        values = self.values(ids)
        rewards = -self.KL * (logp - reference)
        rewards[:, -1] += self.reward.scores(self.reward(ids)[:, -1])
        rewards[:, -1] += torch.arange(self.batch) % 2  # what the bench's reward function adds
        adv, returns = advantages(rewards, values)
        adv = (adv - adv.mean()) * (adv.var() + 1e-8).rsqrt()
        return ids, logp, values, adv, returns

    def minibatch(self, ids, logp, values, adv, returns):
        ratio = (self.logp(self.policy, ids) - logp).exp()
        bound = ratio.clamp(1 - self.CLIP, 1 + self.CLIP)
        torch.max(-adv * ratio, -adv * bound).mean().backward()
        v = self.values(ids)
        near = torch.clamp(v, values - self.VALUE_CLIP, values + self.VALUE_CLIP)
        loss = torch.max((v - returns) ** 2, (near - returns) ** 2).mean()
        (0.5 * self.VALUE_COEF * loss).backward()
        update(self.parameters, self.optimizer)
        return ratio.detach()

    def step(self):
        """Returns the probability ratios of the first minibatch."""
        rolled = self.rollout()
        first = None
        for _ in range(self.EPOCHS):
            order = torch.randperm(self.batch)
            for rows in order.chunk(self.MINIBATCHES):
                ratio = self.minibatch(*(x[rows] for x in rolled))
                first = ratio if first is None else first
        return first


# ---- Measuring -----------------------------------------------------------------------------------


def median_time(run, quick):
    """Median seconds of a call, counted as `rlhf bench` counts: at least three, about a second."""
    run()
    times, begun = [], time.perf_counter()
    while len(times) < 64 and (len(times) < (2 if quick else 3)
                               or time.perf_counter() - begun < (0.3 if quick else 1.0)):
        at = time.perf_counter()
        run()
        times.append(time.perf_counter() - at)
    times.sort()
    return 0.5 * (times[len(times) // 2] + times[(len(times) - 1) // 2])


def forget_peak():
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass


def peak_mb():
    try:
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s*(\d+)", f.read())[1]) / 1024
    except (OSError, TypeError):
        return 0


def measure(name, quick):
    """(value, unit) of one result's name, None for work that has no counterpart here."""
    found = re.fullmatch(r"(train|generate|ppo)/([^/]+)/([^/]+)/f32", name)
    if not found or found[2] not in SHAPES:
        return None
    what, model, size = found.groups()
    numbers = [int(x) for x in re.findall(r"\d+", size)]
    if what == "train":
        batch, length = numbers
        training = Training(model, batch, length)
        return batch * length / median_time(training.step, quick), "tok/s"
    if what == "generate":
        batch, = numbers
        m = Model(model).requires_grad_(False)
        prompts = random_ids(m, batch, 64)
        # The prompt and the first token are taken off.
        s = median_time(lambda: generate(m, prompts, 64), quick)
        s -= median_time(lambda: generate(m, prompts, 1), quick)
        return batch * 63 / s, "tok/s"
    ppo = Ppo(model, *numbers)
    return 1e3 * median_time(ppo.step, quick), "ms"


# ---- Checking ------------------------------------------------------------------------------------


def check():
    """Whether this does the work that it says it does. About a minute."""
    failed = 0

    def report(ok, text):
        nonlocal failed
        failed += not ok
        print(("ok    " if ok else "FAILED") + " " + text, flush=True)

    for name, millions in (("gpt2-14m", 13.79), ("llama-8m", 8.34), ("llama-15m", 15.19)):
        t = Training(name, 2, 32, lr=1e-3)
        n = sum(p.numel() for k, p in t.model.named_parameters() if k != "places.weight")
        report(abs(n / 1e6 - millions) < 0.006, f"{name}: {n / 1e6:.2f} million parameters")
        losses = [t.step() for _ in range(6)]
        start = math.log(t.model.shape.vocab)
        report(abs(losses[0] - start) < 0.3 and losses[-1] < losses[0] - 1,
               f"{name}: loss {losses[0]:.3f} (ln vocab {start:.3f}) falls to {losses[-1]:.3f}")

        m = Model(name).requires_grad_(False)
        for p in m.parameters():  # sharper, so that no two tokens are nearly as likely
            if p.dim() > 1:
                p.mul_(5)
        prompts = random_ids(m, 3, 9)
        ids, _ = generate(m, prompts, 12, temperature=0)
        whole = torch.cat((prompts, ids), 1)
        again = m.logits(m(whole[:, :-1])[:, 8:]).argmax(-1)
        report(torch.equal(ids, again), f"{name}: greedy with cache = argmax of a whole pass")

        p = Ppo(name, 8, 5, 7)
        ratio = p.step()
        off = (ratio - 1).abs().max().item()
        report(off < 1e-3, f"{name}: ratios before the first step are 1 within {off:.1e}")
        moved = (p.policy.tokens.weight - p.reference.tokens.weight).abs().max().item()
        report(moved > 0, f"{name}: PPO moves the policy, by at most {moved:.1e}")

    r, v = torch.randn(2, 5), torch.randn(2, 5)
    _, returns = advantages(r, v, gamma=1.0, lam=1.0)
    report(torch.allclose(returns, r.flip(1).cumsum(1).flip(1), atol=1e-5),
           "lambda = 1: returns are sums of the rewards to come")
    logits = torch.randn(1, 6)
    ids, logp = draw(logits.expand(40000, -1))
    share = torch.bincount(ids[:, 0], minlength=6) / 40000
    report((share - logits.softmax(-1)[0]).abs().max() < 0.015, "draws follow the probabilities")
    report(torch.allclose(logp, logits.log_softmax(-1)[0][ids], atol=1e-5), "and say them")
    return failed


def main():
    a = argparse.ArgumentParser(description="The work of `rlhf bench` in PyTorch.")
    a.add_argument("names", nargs="*", metavar="NAME", help="as in train/llama-8m/8x128/f32")
    a.add_argument("--threads", type=int, default=0, help="default: what PyTorch takes")
    a.add_argument("--quick", action="store_true", help="fewer repetitions")
    a.add_argument("--check", action="store_true", help="check the work instead of timing it")
    a = a.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    torch.set_num_interop_threads(1)
    torch.set_flush_denormal(True)
    if a.check:
        sys.exit(check() > 0)
    results = []
    for name in a.names:
        forget_peak()
        found = measure(name, a.quick)
        if found:
            results.append({"name": name, "value": found[0], "unit": found[1],
                            "peak_rss_mb": peak_mb()})
    print(json.dumps({"peer": "torch " + torch.__version__.split("+")[0],
                      "threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
