"""PyTorch's side of the test/interop_*.py: small random models of every family, losses, AdamW steps."""
import glob, json

import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, logsigmoid

torch.set_num_threads(1)
tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()

COMMON = dict(vocab_size=203, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
              max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GROUPED = dict(num_key_value_heads=2, **COMMON)
GPT2 = dict(vocab_size=203, n_embd=48, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


def rope(theta, **more):
    return dict(rope_parameters=dict(rope_type="default", rope_theta=theta, **more))


# name: (class of the configuration, its values, dtype of the file, largest file)
CASES = {
    "gpt2": ("GPT2Config", GPT2, "float32", None),
    "llama": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3, **GROUPED), "float32", "40KB"),
    "mistral": ("MistralConfig", dict(head_dim=16, sliding_window=20, **GROUPED), "bfloat16", None),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True, **rope(1e6), **GROUPED), "float32", None),
    "qwen2_window": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=24, max_window_layers=1, **GROUPED),
                     "float32", None),
    "qwen3": ("Qwen3Config", dict(head_dim=16, tie_word_embeddings=True, **rope(1e6), **GROUPED), "bfloat16", "30KB"),
    "qwen3_window": ("Qwen3Config", dict(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=65,
                                         max_window_layers=1, **GROUPED), "float32", None),
    "smollm3": ("SmolLM3Config", dict(**rope(5e6), **{**GROUPED, "num_hidden_layers": 4}), "float16", None),
    "smollm3_window": ("SmolLM3Config", dict(no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=17,
                                             tie_word_embeddings=False, **GROUPED), "float32", None),
    "gpt_neox": ("GPTNeoXConfig", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                                            partial_rotary_factor=0.5), **COMMON), "float32", "50KB"),
    "gpt_neox_serial": ("GPTNeoXConfig", dict(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new",
                                              rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0,
                                                                   partial_rotary_factor=1.0), **COMMON), "float32", None),
    "gemma": ("GemmaConfig", dict(head_dim=20, **GROUPED), "float32", None),
    "gemma2": ("Gemma2Config", dict(head_dim=16, sliding_window=30, query_pre_attn_scalar=24, attn_logit_softcapping=3.0,
                                    final_logit_softcapping=5.0, **GROUPED), "float32", None),
    "gemma3_text": ("Gemma3TextConfig", dict(head_dim=16, sliding_window=21, query_pre_attn_scalar=24, rope_parameters={
        "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        "sliding_attention": dict(rope_type="default", rope_theta=1e4)}, **{**GROUPED, "num_hidden_layers": 7}), "bfloat16", None),
}


def old_form(c):
    """The same config.json as transformers 4 wrote it, or None where that is no other."""
    c = dict(c)
    r = c.pop("rope_parameters", None)
    if r is None:
        return None
    if "full_attention" in r:
        c["rope_local_base_freq"] = r["sliding_attention"]["rope_theta"]
        r = r["full_attention"]
        c["sliding_window_pattern"] = c.pop("_sliding_window_pattern")
        c.pop("layer_types")
    theta, part = r["rope_theta"], r.get("partial_rotary_factor")
    if c["model_type"] == "gpt_neox":
        c["rotary_emb_base"], c["rotary_pct"] = theta, part
    else:
        c["rope_theta"] = theta
    scaling = {k: v for k, v in r.items() if k not in ("rope_theta", "partial_rotary_factor")}
    c["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    c["torch_dtype"] = c.pop("dtype")
    c["eos_token_id"] = [c["eos_token_id"], 3]
    return c


def make(path, name, **changes):
    cls, values, dtype, shard = CASES[name]
    cfg = getattr(tf, cls)(**{**values, **changes})
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(cfg, attn_implementation="eager").eval()
    gen = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for k, w in sorted(model.named_parameters()):
            z = torch.randn(w.shape, generator=gen)
            base = 0.0 if w.dim() > 1 or "bias" in k or "gemma" in name else 1.0
            w.copy_(base + (0.2 if w.dim() > 1 else 0.15) * z)
    model.to(getattr(torch, dtype)).save_pretrained(path, **({"max_shard_size": shard} if shard else {}))


def tensors(path):
    out = {}
    for f in glob.glob(f"{path}/*.safetensors"):
        out |= load_file(f)
    return out


# ---- training -----------------------------------------------------------------------------------

STEPS, BATCH = 5, 4
OPTIONS = ["--max_steps", STEPS, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
           "--lr_scheduler_type", "constant", "--weight_decay", 0.1, "--logging_steps", 1,
           "--shuffle_dataset", "false", "--max_grad_norm", 1.0, "--quiet"]
NOUNS = ["river", "stone", "bird", "cloud", "tree", "fish", "moon", "house"]
ROWS = [dict(prompt=f"Tell me of the {a}.", chosen=f" The {a} and the {b} are {n} old friends.", rejected=f" No {b}{'!' * n}")
        for n, (a, b) in enumerate(zip(NOUNS * 3, NOUNS[3:] + NOUNS * 2 + NOUNS[:3]), 1)][:STEPS * BATCH]


def write(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)


class Text:
    """Ids as a record has them: the whole text's, an end token, and where the answer begins."""
    def __init__(self, directory):
        self.tok = Tokenizer.from_file(f"{directory}/tokenizer.json")
        self.eos = self.tok.token_to_id(json.load(open(f"{directory}/tokenizer_config.json"))["eos_token"])

    def __call__(self, prompt, answer):
        ids, before = self.tok.encode(prompt + answer).ids + [self.eos], self.tok.encode(prompt).ids
        same = next((i for i, (a, b) in enumerate(zip(ids, before)) if a != b), len(before))
        return ids, max(same, 1)


def sft_loss(model, batch):
    sums, count = 0.0, 0
    for ids, first in batch:
        z = model(torch.tensor([ids])).logits[0, first - 1:-1]
        sums = sums + cross_entropy(z, torch.tensor(ids[first:]), reduction="sum")
        count += len(ids) - first
    return sums / count


def rm_loss(model, batch):
    score = lambda ids: model(torch.tensor([ids])).logits[0, 0]
    return sum(-logsigmoid(score(a) - score(b)) for (a, _), (b, _) in batch) / len(batch)


def no_padding(model):
    """Else the last token before padding is scored, and the embedding of that token gets no gradient."""
    model.config.pad_token_id = model.get_input_embeddings().padding_idx = None


def steps(model, loss, rows, lr):
    """The loss before each step, and over all rows after the last."""
    no_padding(model)
    matrices = [w for w in model.parameters() if w.dim() > 1]
    others = [w for w in model.parameters() if w.dim() < 2]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)], lr=lr)
    out = []
    for i in range(0, len(rows), BATCH):
        opt.zero_grad()
        out.append(loss(model, rows[i:i + BATCH]))
        out[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    with torch.no_grad():
        return torch.stack(out).detach(), loss(model, rows)


def losses(out):
    """What the program wrote: the loss of each step and of the evaluation at the end."""
    lines = [json.loads(s) for s in open(f"{out}/metrics.jsonl")]
    step = {j["step"]: j["loss"] for j in lines if "loss" in j}
    return torch.tensor([step[i + 1] for i in range(STEPS)]), torch.tensor([j["eval_loss"] for j in lines if "eval_loss" in j][-1])
