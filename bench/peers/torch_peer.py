#!/usr/bin/env python3
"""The work of `rlhf bench` in PyTorch, as somebody who knows PyTorch writes it for a CPU.

    torch_peer.py --threads 2 train/llama-8m/8x128/f32 generate/llama-8m/batch8/bf16 ...
    torch_peer.py --check

common.py tells of names and results. Sizes and mathematics are those of rlhf.c, section BENCH.
Plain modules in eager mode; what is done for speed:

    one product for q, k, v and one for gate and up; scaled_dot_product_attention
    no dropout, no padding, no masks: all sequences of a batch are equally long
    fused AdamW, foreach clipping, gradients set to None instead of zeroed
    rotary embeddings as one complex product; denormal numbers flushed
    generation under inference_mode with a cache allocated once; only last rows meet the vocabulary
    PPO: log-probabilities of the policy come from the sampling; only states of the answer meet the
    vocabulary; the temperature divides hidden states instead of logits
    grouped key and value heads by scaled_dot_product_attention itself, which beats repeating them

Names that end in /bf16: training under autocast with masters in fp32; generation, rollouts and the
frozen models of PPO with weights in bf16. Probabilities and losses are fp32 throughout.

bench/run.py adds an allocator that keeps its pages (jemalloc or tcmalloc), where there is one.
"""

import copy
import math
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # nothing here needs it

import torch
import torch.nn.functional as F
from torch import nn

from common import POSITIONS, SHAPES, main, median_time

# ---- Models --------------------------------------------------------------------------------------


class Cache:
    """Keys and values of all layers, [layers][batch][heads][length][head size]."""

    def __init__(self, s, batch, length, dtype):
        shape = (s.layers, batch, s.groups, length, s.d // s.heads)
        self.k = torch.empty(shape, dtype=dtype)
        self.v = torch.empty(shape, dtype=dtype)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        bias = s.kind == "gpt2"
        self.heads, self.groups = s.heads, s.groups
        self.qkv = nn.Linear(s.d, s.d + 2 * s.groups * (s.d // s.heads), bias=bias or s.bias)
        self.o = nn.Linear(s.d, s.d, bias=bias)

    def forward(self, x, rope, past, cache, layer):
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, self.heads + 2 * self.groups, d // self.heads)
        qk, v = qkv[:, :, :-self.groups], qkv[:, :, -self.groups:].transpose(1, 2)
        if rope is not None:
            # Queries and keys turn in one go. Neighbours form a pair, where Llama's checkpoints
            # pair the halves of a head: the order of rows in the matrix, nothing else.
            pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
            qk = torch.view_as_real(pairs * rope).flatten(-2).to(qkv.dtype)
        q, k = qk.transpose(1, 2).split((self.heads, self.groups), 1)
        if cache is not None:
            cache.k[layer, :, :, past:past + t] = k
            cache.v[layer, :, :, past:past + t] = v
            k = cache.k[layer, :, :, :past + t]
            v = cache.v[layer, :, :, :past + t]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1,
                                           enable_gqa=self.groups < self.heads)
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
            angle = torch.outer(torch.arange(POSITIONS), freq)[:, None]  # the same for all heads
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
        return F.linear(hidden, self.tokens.weight).float()

    def scores(self, hidden):
        return self.score(hidden).squeeze(-1).float()


def random_ids(model, batch, length):
    g = torch.Generator().manual_seed(7)
    return torch.randint(model.shape.vocab, (batch, length), generator=g)


# ---- Training step -------------------------------------------------------------------------------


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def mixed(bf16):
    """Around forward passes whose masters are fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)


def update(parameters, optimizer):
    nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Training:
    """Every token but the first bears loss, as in `rlhf sft` on unmasked records."""

    def __init__(self, name, batch, length, bf16=False, lr=2e-5):
        self.model = Model(name)
        self.bf16 = bf16
        self.ids = random_ids(self.model, batch, length)
        self.parameters = list(self.model.parameters())
        self.optimizer = adamw(self.parameters, lr)

    def step(self):
        with mixed(self.bf16):
            hidden = self.model(self.ids[:, :-1])
            logits = self.model.logits(hidden.flatten(0, 1))
            loss = F.cross_entropy(logits, self.ids[:, 1:].flatten())
        del hidden, logits
        loss.backward()
        update(self.parameters, self.optimizer)
        return loss.item()


class Pairs:
    """The reward model's step on pairs of answers to one prompt, all sequences in one batch, as
    TRL's RewardTrainer has them: both answers begin with the prompt. The scores are read at the
    last tokens."""

    def __init__(self, name, pairs, prompt, answer, bf16=False, lr=2e-5):
        self.model = Model(name, score=True)
        self.bf16 = bf16
        ids = random_ids(self.model, pairs, prompt + 2 * answer)
        start, chosen, rejected = ids.split((prompt, answer, answer), 1)
        self.ids = torch.cat((torch.cat((start, chosen), 1), torch.cat((start, rejected), 1)))
        self.parameters = list(self.model.parameters())
        self.optimizer = adamw(self.parameters, lr)

    def step(self):
        with mixed(self.bf16):
            chosen, rejected = self.model.scores(self.model(self.ids)[:, -1]).chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
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


def draw_some(logits, top_k=50, top_p=0.9):
    """The same from the top_k most likely tokens, of these the fewest that hold the share top_p."""
    logits, ids = logits.topk(top_k)
    p = F.softmax(logits, dim=-1)
    chosen, logp = draw(logits.masked_fill_(p.cumsum(-1) - p >= top_p, -math.inf))
    return ids.gather(1, chosen), logp


@torch.inference_mode()
def generate(model, prompts, new, temperature=1.0, draw=draw):
    """[batch][new] ids and their log-probabilities; temperature 0 takes the most likely ones."""
    batch, length = prompts.shape
    cache = Cache(model.shape, batch, length + new, model.tokens.weight.dtype)
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

    def __init__(self, name, batch, prompt, new, bf16=False, lr=3e-6):
        self.policy = Model(name)
        self.reward = Model(name, score=True).requires_grad_(False)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.value = copy.deepcopy(self.reward).requires_grad_(True)
        self.bf16, self.sampler = bf16, self.policy
        if bf16:  # the sampler's weights are copied from the policy's before each rollout
            self.sampler = copy.deepcopy(self.reference).bfloat16()
            self.reference.bfloat16()
            self.reward.bfloat16()
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
        if self.bf16:
            torch._foreach_copy_([*self.sampler.parameters()], [*self.policy.parameters()])
        answers, logp = generate(self.sampler, self.prompts, self.new, self.TEMPERATURE)
        answers, logp = answers.clone(), logp.clone()  # ordinary tensors: autograd may save them
        ids = torch.cat((self.prompts, answers), 1)
        reference = self.logp(self.reference, ids)
        with mixed(self.bf16):
            values = self.values(ids)
        rewards = -self.KL * (logp - reference)
        rewards[:, -1] += self.reward.scores(self.reward(ids)[:, -1])
        rewards[:, -1] += torch.arange(self.batch) % 2  # what the bench's reward function adds
        adv, returns = advantages(rewards, values)
        adv = (adv - adv.mean()) * (adv.var() + 1e-8).rsqrt()
        return ids, logp, values, adv, returns

    def minibatch(self, ids, logp, values, adv, returns):
        with mixed(self.bf16):
            ratio = (self.logp(self.policy, ids) - logp).exp()
        bound = ratio.clamp(1 - self.CLIP, 1 + self.CLIP)
        torch.max(-adv * ratio, -adv * bound).mean().backward()
        with mixed(self.bf16):
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


def measure(work, model, numbers, bf16, a):
    if work == "train":
        batch, length = numbers
        training = Training(model, batch, length, bf16)
        return batch * length / median_time(training.step, a.quick), "tok/s"
    if work == "rm":
        pairs, prompt, answer = numbers
        s = median_time(Pairs(model, pairs, prompt, answer, bf16).step, a.quick)
        return 2 * pairs * (prompt + answer) / s, "tok/s"
    if work in ("generate", "sample"):
        batch, = numbers
        how = draw_some if work == "sample" else draw
        m = Model(model).requires_grad_(False)
        m = m.bfloat16() if bf16 else m
        prompts = random_ids(m, batch, 64)
        # The prompt and the first token are taken off.
        s = median_time(lambda: generate(m, prompts, 64, draw=how), a.quick)
        s -= median_time(lambda: generate(m, prompts, 1, draw=how), a.quick)
        return batch * 63 / s, "tok/s"
    return 1e3 * median_time(Ppo(model, *numbers, bf16).step, a.quick), "ms"


# ---- Checking ------------------------------------------------------------------------------------


def check(report, _):
    """About a minute."""
    def greedy(name):
        m = Model(name).requires_grad_(False)
        for p in m.parameters():  # sharper, so that no two tokens are nearly as likely
            if p.dim() > 1:
                p.mul_(5)
        prompts = random_ids(m, 3, 9)
        ids, _ = generate(m, prompts, 12, temperature=0)
        whole = torch.cat((prompts, ids), 1)
        again = m.logits(m(whole[:, :-1])[:, 8:]).argmax(-1)
        report(torch.equal(ids, again), f"{name}: greedy with cache = argmax of a whole pass")
        return m, whole

    for name, millions in (("gpt2-14m", 13.79), ("llama-8m", 8.34), ("llama-15m", 15.19)):
        t = Training(name, 2, 32, lr=1e-3)
        n = sum(p.numel() for k, p in t.model.named_parameters() if k != "places.weight")
        report(abs(n / 1e6 - millions) < 0.006, f"{name}: {n / 1e6:.2f} million parameters")
        losses = [t.step() for _ in range(6)]
        start = math.log(t.model.shape.vocab)
        report(abs(losses[0] - start) < 0.3 and losses[-1] < losses[0] - 1,
               f"{name}: loss {losses[0]:.3f} (ln vocab {start:.3f}) falls to {losses[-1]:.3f}")

        for bf16 in (False, True):
            t = Pairs(name, 4, 16, 16, bf16, lr=1e-3)
            pairs = [t.step() for _ in range(6)]
            report(pairs[-1] < 0.5 * pairs[0],
                   f"{name}: {'bf16: ' * bf16}loss of pairs {pairs[0]:.3f} falls to "
                   f"{pairs[-1]:.3f}")

        m, whole = greedy(name)
        for bf16, most in ((False, 1e-3), (True, 0.1)):
            p = Ppo(name, 8, 5, 7, bf16)
            before = p.policy.tokens.weight.detach().clone()
            off = (p.step() - 1).abs().max().item()
            kind = "bf16: " if bf16 else ""
            report(off < most, f"{name}: {kind}ratios before the first step are 1 within {off:.1e}")
            moved = (p.policy.tokens.weight - before).abs().max().item()
            report(moved > 0, f"{name}: {kind}PPO moves the policy, by at most {moved:.1e}")

        t = Training(name, 2, 32, bf16=True, lr=1e-3)
        halves = [t.step() for _ in range(6)]
        off = max(abs(a - b) for a, b in zip(losses, halves))
        report(off < 0.02 * start, f"{name}: bf16 losses within {off:.1e} of fp32's")
        full = m.logits(m(whole)).log_softmax(-1)
        low = m.bfloat16()
        off = (low.logits(low(whole)).log_softmax(-1) - full).abs().mean().item()
        report(off < 0.05, f"{name}: bf16 log-probabilities within {off:.1e} of fp32's on average")

    for name, count in (("smollm2-135m", 134515008), ("qwen2.5-0.5b", 494032768),
                        ("llama3.2-1b", 1235814400)):
        with torch.device("meta"):
            n = sum(p.numel() for p in Model(name).parameters())
        report(n == count, f"{name}: {n} parameters")
    greedy("smollm2-135m")

    r, v = torch.randn(2, 5), torch.randn(2, 5)
    _, returns = advantages(r, v, gamma=1.0, lam=1.0)
    report(torch.allclose(returns, r.flip(1).cumsum(1).flip(1), atol=1e-5),
           "lambda = 1: returns are sums of the rewards to come")
    logits = torch.randn(1, 6)
    ids, logp = draw(logits.expand(40000, -1))
    share = torch.bincount(ids[:, 0], minlength=6) / 40000
    report((share - logits.softmax(-1)[0]).abs().max() < 0.015, "draws follow the probabilities")
    report(torch.allclose(logp, logits.log_softmax(-1)[0][ids], atol=1e-5), "and say them")
    few = torch.tensor([[0.05, 0.3, 0.1, 0.25, 0.2, 0.1]]).log()  # of five, 0.95, of it 3/4: three
    ids, logp = draw_some(few.expand(40000, -1), 5, 0.75)
    share = torch.bincount(ids[:, 0], minlength=6) / 40000
    left = torch.tensor([0, 0.3, 0, 0.25, 0.2, 0]) / 0.75
    report((share - left).abs().max() < 0.015, "draws of some tokens follow what is left")
    report(torch.allclose(logp.exp(), left[ids], atol=1e-5), "and say it")


def setup(threads):
    if threads:
        torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.set_flush_denormal(True)


if __name__ == "__main__":
    main("torch " + torch.__version__.split("+")[0], setup, measure, check)
