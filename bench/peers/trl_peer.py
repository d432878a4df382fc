#!/usr/bin/env python3
"""The PPO of `rlhf bench` in TRL's PPOTrainer, of the last release that has it.

    trl_peer.py --threads 2 'ppo/llama-8m/16x(32+48)/f32' ...
    trl_peer.py --check

common.py tells of names and results. Weights are random. The numbers are those of rlhf.c, section
BENCH, most of them TRL's own defaults; what is done for speed:

    no gradient checkpointing, no samples to look at, no reports, no checkpoints, no progress bar
    scaled_dot_product_attention, fused AdamW, the whole batch in one rollout and one scoring pass
    minibatches without gradient accumulation: 4 x 4 optimizer steps, as num_mini_batches says
    denormal numbers flushed

bench/run.py adds an allocator that keeps its pages (jemalloc or tcmalloc), where there is one.
TRL clips no gradient in PPO, which makes its work a little less. Names that end in /bf16: its own
mixed precision, and frozen models in bf16; it samples from the fp32 weights.
"""

import io
import math
import os
import tempfile
import time
import warnings
from contextlib import redirect_stdout

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1",
                  TRANSFORMERS_VERBOSITY="error")
warnings.filterwarnings("ignore")

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config,
                          LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, TrainerCallback)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from common import POSITIONS, SHAPES, enough, main, median
from torch_peer import Model, setup

# ---- Models --------------------------------------------------------------------------------------


def config(name):
    s = SHAPES[name]
    # No token ends an answer, and nothing needs padding.
    rest = {"vocab_size": s.vocab, "bos_token_id": None, "eos_token_id": None,
            "pad_token_id": None, "num_labels": 1}
    if s.kind == "gpt2":
        return GPT2Config(n_embd=s.d, n_layer=s.layers, n_head=s.heads, n_inner=s.ff,
                          n_positions=POSITIONS, **rest)
    kind = Qwen2Config if s.bias else LlamaConfig
    return kind(hidden_size=s.d, num_hidden_layers=s.layers, num_attention_heads=s.heads,
                num_key_value_heads=s.groups, intermediate_size=s.ff, tie_word_embeddings=True,
                max_position_embeddings=POSITIONS, **rest)


def tokenizer(vocab):
    """PPOTrainer wants one; only its ids are used, and no model draws them."""
    words = models.WordLevel({"[UNK]": 0, "[EOS]": vocab, "[PAD]": vocab + 1}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="[UNK]",
                                   eos_token="[EOS]", pad_token="[PAD]", padding_side="left")


# ---- PPO -----------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends PPOTrainer.train, which does not look at control.should_training_stop."""


class Clock(TrainerCallback):
    """Times of updates, but for the first."""

    def __init__(self, quick):
        self.quick, self.times, self.logs, self.at = quick, [], [], None

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(logs)

    def on_step_end(self, args, state, control, **_):
        if self.at is not None:
            self.times.append(time.perf_counter() - self.at)
        if enough(self.times, self.quick):
            raise Enough
        self.at = time.perf_counter()


def ppo(name, batch, prompt, new, bf16, clock, directory, lr=3e-6):
    """The trainer; policy and reference start alike, and so do reward and value model."""
    def model(kind, seed, dtype=torch.float32):
        torch.manual_seed(seed)
        return kind.from_config(config(name), attn_implementation="sdpa", dtype=dtype)

    vocab = SHAPES[name].vocab
    low = torch.bfloat16 if bf16 else torch.float32
    g = torch.Generator().manual_seed(7)
    prompts = torch.randint(vocab, (batch, prompt), generator=g).tolist()
    args = PPOConfig(
        output_dir=directory, use_cpu=True, bf16=bf16, seed=7, learning_rate=lr, weight_decay=0.0,
        lr_scheduler_type="constant", optim="adamw_torch_fused",
        per_device_train_batch_size=batch, gradient_accumulation_steps=1, num_mini_batches=4,
        num_ppo_epochs=4, total_episodes=1000 * batch, response_length=new, temperature=0.7,
        kl_coef=0.05, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, gamma=1.0, lam=0.95,
        local_rollout_forward_batch_size=batch, num_sample_generations=0,
        gradient_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True)
    return PPOTrainer(
        args=args, processing_class=tokenizer(vocab), callbacks=[clock],
        model=model(AutoModelForCausalLM, 1), ref_model=model(AutoModelForCausalLM, 1, low),
        reward_model=model(AutoModelForSequenceClassification, 2, low),
        value_model=model(AutoModelForSequenceClassification, 2),
        train_dataset=Dataset.from_dict({"input_ids": prompts}))


def train(trainer):
    with redirect_stdout(io.StringIO()):
        try:
            trainer.train()
        except Enough:
            pass


def measure(work, model, numbers, bf16, a):
    if work != "ppo":
        return None
    clock = Clock(a.quick)
    with tempfile.TemporaryDirectory() as directory:
        train(ppo(model, *numbers, bf16, clock, directory))
    return 1e3 * median(clock.times), "ms"


# ---- Checking ------------------------------------------------------------------------------------


def check(report, _):
    """Half a minute."""
    for name in ("gpt2-14m", "llama-8m"):
        for bf16 in (False, True):
            clock, steps = Clock(True), []
            with tempfile.TemporaryDirectory() as directory:
                t = ppo(name, 8, 5, 7, bf16, clock, directory, lr=1e-4)
                policy, value = t.policy_model, t.value_model
                t.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
                before = [m.get_input_embeddings().weight.clone() for m in (policy, value)]
                train(t)
            name_ = name + (" bf16" if bf16 else "")
            updates = len(clock.logs)
            report(len(steps) == 16 * updates,
                   f"{name_}: {len(steps)} optimizer steps in {updates} updates")
            want = sum(p.numel() for p in Model(name).parameters())
            have = sum(p.numel() for p in policy.parameters())
            report(have == want, f"{name_}: {have} parameters, torch_peer.py has {want}")
            kl = clock.logs[0]["objective/kl"]
            report(abs(kl) < (0.3 if bf16 else 1e-3), f"{name_}: KL before any step is {kl:.1e}")
            # Mean surprise of 7 tokens; at temperature 0.7 nearly that of uniform draws.
            entropy, most = clock.logs[0]["objective/entropy"], 7 * math.log(SHAPES[name].vocab)
            report(0.95 * most < entropy < most, f"{name_}: entropy {entropy:.1f} of {most:.1f}")
            for m, w, what in zip((policy, value), before, ("policy", "value")):
                moved = (m.get_input_embeddings().weight - w).abs().max().item()
                report(moved > 0, f"{name_}: moves the {what} model, by at most {moved:.1e}")


if __name__ == "__main__":
    main(f"trl {trl.__version__}, torch {torch.__version__.split('+')[0]}", setup, measure, check)
