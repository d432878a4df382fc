"""Every family of models against transformers, both ways.

For small random models of every family: logits and log-probabilities within 1e-4, 64 greedy tokens
the same, gradients of the fine-tuning loss and of scores within 1e-3 of each tensor's norm; what is
saved loads in AutoModelForCausalLM and AutoModelForSequenceClassification with the same tensors and
scores. Files come in one piece or in several, as f32, f16 and bf16, with new and old forms of
config.json. Ends with "N passed, N failed"; the exit status is 1 if any failed.
"""
import glob, json, shutil, subprocess, tempfile

import torch
import transformers as tf
from safetensors.torch import load_file

from interop import BUILD, QUICK, check, finish, near, report

torch.set_num_threads(1)
tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()

# ---- models -------------------------------------------------------------------------------------

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


def make(path, name):
    cls, values, dtype, shard = CASES[name]
    cfg = getattr(tf, cls)(**values)
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


# ---- what is compared ---------------------------------------------------------------------------

def loss_of(model, ids):
    total, sums = 0, 0.0
    for s in ids:
        z = model(torch.tensor([s])).logits[0, :-1]
        sums = sums + torch.nn.functional.cross_entropy(z, torch.tensor(s[1:]), reduction="sum")
        total += len(s) - 1
    return sums / total


def check_gradients(name, prefix, model, got, file_names):
    """Tensors as the file has them; transformers' own names differ for one (embed_out)."""
    seen = 0
    for k, w in model.named_parameters():
        key = k if prefix + k in got else {"lm_head.weight": "embed_out.weight"}.get(k, k)
        if prefix + key not in got:
            check(f"{name} {prefix}{key}", False, "is not there")
            continue
        near(f"{name} {prefix}{key}", "gradient", got[prefix + key], w.grad, 1e-3, relative=True)
        seen += 1
    check(f"{name} {prefix}*", seen == sum(k.startswith(prefix) for k in got), file_names)


def compare(name, path, out, kind):
    gen = torch.Generator().manual_seed(9)
    ids = [torch.randint(4, 203, (n,), generator=gen).tolist() for n in (150, 3, 64, 97)]
    task = dict(ids=ids, prompt=12, greedy=64, weights=[1.0, -0.5, 0.25, 2.0])
    json.dump(task, open(f"{out}.json", "w"))
    r = subprocess.run([f"{BUILD}/tool", path, f"{out}.json", out] + kind, capture_output=True, text=True)
    if r.returncode:
        check(name, False, r.stderr)
        return
    got = load_file(f"{out}/values.safetensors")
    model = tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for i, s in enumerate(ids):
            z = model(torch.tensor([s])).logits[0]
            lp = z.log_softmax(-1)[:-1].gather(1, torch.tensor(s[1:])[:, None])[:, 0]
            near(f"{name} logits {i}", "logits", got[f"logits.{i}"], z, 1e-4)
            near(f"{name} logprobs {i}", "logprobs", got[f"logprobs.{i}"], lp, 1e-4)
        more = [int(x) for x in got["greedy"]]
        text = torch.tensor([ids[0][:12] + more])
        z = model(text).logits[0, 11:-1]
    # The best token of transformers, where float32 can tell it from the second.
    best, top = z.argmax(-1).tolist(), z.topk(2).values
    clear = (top[:, 0] - top[:, 1] > 1e-4).tolist()
    check(f"{name} greedy", len(more) == 64 and all(a == b or not c for a, b, c in zip(more, best, clear)) and sum(clear) > 60,
          (more, best))
    loss_of(model, ids).backward()
    check_gradients(name, "sft.", model, got, "all")
    # What is saved: the same tensors, byte for byte, for transformers the same model.
    was, now = tensors(path), tensors(f"{out}/saved")
    check(f"{name} names", set(was) == set(now), set(was) ^ set(now))
    check(f"{name} bytes", all(was[k].dtype == now[k].dtype and torch.equal(was[k], now[k]) for k in was))
    back = tf.AutoModelForCausalLM.from_pretrained(f"{out}/saved", dtype=torch.float32, attn_implementation="eager").eval()
    check(f"{name} class", type(back) is type(model), type(back))
    with torch.no_grad():
        check(f"{name} saved", torch.equal(back(text).logits, model(text).logits))
    scorer, info = tf.AutoModelForSequenceClassification.from_pretrained(
        f"{out}/scorer", dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    check(f"{name} scorer keys", not info["missing_keys"] and not info["unexpected_keys"], info)
    scores = torch.cat([scorer.eval()(torch.tensor([s])).logits[:, 0] for s in ids])
    near(f"{name} scores", "scores", got["scores"], scores.detach(), 1e-4)
    (scores * torch.tensor(task["weights"])).sum().backward()
    check_gradients(name, "score.", scorer, got, "all")


work = tempfile.mkdtemp(prefix="rlhf-families-")
for name in CASES:
    path = f"{work}/{name}"
    make(path, name)
    check(f"{name} files", (len(glob.glob(f"{path}/*.safetensors")) > 1) == bool(CASES[name][3]))
    compare(name, path, f"{path}-out", [])
    config = json.load(open(f"{path}/config.json"))
    old = old_form(config)
    if old:
        shutil.copytree(path, f"{path}-old")
        json.dump(old, open(f"{path}-old/config.json", "w"))
        compare(f"{name} (old form)", f"{path}-old", f"{path}-old-out", [])
    report(name)
shutil.rmtree(work)
finish()
