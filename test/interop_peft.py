"""Adapters against PEFT, both ways, for every family.

PEFT's adapters (LoRA and rsLoRA; the matrices PEFT chooses, all-linear, some by name) give in rlhf the
logits and the scores that they give in PEFT, and five steps of training them go the same way; what
rlhf trained gives PeftModel its logits and its 64 greedy tokens; `rlhf export --merge` writes what
merge_and_unload makes of it. Ends with "N passed, N failed".
"""
import json, os, subprocess, warnings

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from interop import BUILD, QUICK, check, finish, near, report, rlhf, workdir
from peers import OPTIONS, ROWS, Text, losses, make, no_padding, rm_loss, sft_loss, steps, tensors, write

warnings.filterwarnings("ignore")  # of names that PEFT and transformers will change
ALL = "all-linear"
# (family, matrices or None for PEFT's choice, rank-stabilised)
CASES = [("gpt2", None, False), ("gpt2", ALL, True), ("gpt2", ["attn.c_proj"], False), ("llama", None, False),
         ("llama", ALL, True), ("mistral", ["o_proj", "up_proj"], False), ("qwen2", None, True), ("qwen2", ALL, False),
         ("qwen3", ["q_proj", "k_proj", "down_proj"], False), ("smollm3", ALL, False), ("gpt_neox", None, False),
         ("gpt_neox", ALL, True), ("gemma", None, False), ("gemma2", ALL, False), ("gemma3_text", ALL, True)]
KINDS = {"CAUSAL_LM": tf.AutoModelForCausalLM, "SEQ_CLS": tf.AutoModelForSequenceClassification}


def base(path, kind):
    model = KINDS[kind].from_pretrained(path, dtype=torch.float32, attn_implementation="eager",
                                        **({"num_labels": 1} if kind == "SEQ_CLS" else {})).eval()
    no_padding(model)
    return model


def load(path, adapter, kind, trainable=False):
    return PeftModel.from_pretrained(base(path, kind), adapter, is_trainable=trainable).eval()


def new_adapter(path, out, kind, targets, rslora):
    """An adapter that PEFT made, with random numbers in both factors and, where there is one, the head."""
    cfg = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=targets, use_rslora=rslora, task_type=kind)
    model = get_peft_model(base(path, kind), cfg)
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for k, w in model.named_parameters():
            if w.requires_grad:
                w.copy_(0.15 * torch.randn(w.shape, generator=gen))
    model.save_pretrained(out)


def values(directory, ids, out, prompt=12):
    json.dump(dict(ids=[ids], prompt=prompt, greedy=64, weights=[1.0]), open(f"{out}.json", "w"))
    r = subprocess.run([f"{BUILD}/tool", directory, f"{out}.json", out, "forward"], capture_output=True, text=True)
    check(f"{directory} opens", r.returncode == 0, r.stderr)
    return load_file(f"{out}/values.safetensors") if r.returncode == 0 else None


def same_model(name, model, directory, out):
    """Logits and greedy tokens of an adapter's directory in rlhf, against PEFT's model."""
    ids = torch.randint(4, 320, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    got = values(directory, ids, out)
    if got is None:
        return
    with torch.no_grad():
        near(f"{name} logits", "logits", got["logits.0"], model(torch.tensor([ids])).logits[0], 1e-4)
        more = [int(x) for x in got["greedy"]]
        z = model(torch.tensor([ids[:12] + more])).logits[0, 11:-1]
    best, top = z.argmax(-1).tolist(), z.topk(2).values
    clear = (top[:, 0] - top[:, 1] > 1e-4).tolist()
    check(f"{name} greedy", len(more) == 64 and sum(clear) > 57 and
          all(a == b or not c for a, b, c in zip(more, best, clear)), (more, best))


def same_scores(name, model, directory, text):
    """rlhf score writes what the model says of a text and the end token behind it."""
    write(f"{WORK}/score.jsonl", [dict(text=r["prompt"] + r["chosen"]) for r in ROWS])
    out = rlhf("score", "--model", directory, "--tokenizer", f"{WORK}/words", "--data", f"{WORK}/score.jsonl", "--quiet")
    got = torch.tensor([json.loads(s)["score"] for s in out.splitlines()])
    with torch.no_grad():
        want = torch.stack([model(torch.tensor([text(r["prompt"] + r["chosen"], "")[0]])).logits[0, 0] for r in ROWS])
    check(f"{name} scores differ", want.std() > 1e-3, want)
    near(f"{name} scores", "scores", got, want, 1e-4)


def same_merged(name, model, directory, out):
    """The merged directory has transformers' tensors, and is what PEFT makes of the adapter."""
    if "--merge" not in rlhf("export", "--help"):
        return
    rlhf("export", "--merge", "--model", directory, "--tokenizer", f"{WORK}/words", "--out", out, "--quiet")
    want = {k.removeprefix("base_model.model."): w for k, w in model.merge_and_unload().state_dict().items()}
    got = tensors(out)
    for k, w in got.items():
        key = k if k in want else {"embed_out.weight": "lm_head.weight"}.get(k, k)
        if key not in want:
            check(f"{name} merged {k}", False, "is not in PEFT's model")
        else:
            near(f"{name} merged {k}", "merged", w, want[key], 1e-5)
    lost = [k for k in want if k not in got and k not in ("lm_head.weight",) and "rotary" not in k and "attn.bias" not in k]
    check(f"{name} merged, all tensors", not lost, lost)


def trained_alike(name, path, adapter, kind, command, data, rows, loss, out, more=()):
    """Five steps from one adapter, here and with PEFT."""
    want, after = steps(load(path, adapter, kind, trainable=True), loss, rows, 2e-3)
    rlhf(command, "--model", adapter, "--tokenizer", f"{WORK}/words", "--data", data, "--eval_data", data, "--out", out,
         *OPTIONS, "--learning_rate", 2e-3, "--lora_dropout", 0, *more)
    got, got_after = losses(out)
    near(f"{name} losses", f"{command} loss", got, want, 1e-3)
    near(f"{name} loss after", f"{command} loss", got_after, after, 1e-3)
    check(f"{name} learns", after < want.mean(), (after, want))
    model = load(path, out, kind)
    with torch.no_grad():
        near(f"{name} read back", f"{command} read back", loss(model, rows), got_after, 1e-4)
    return model


def compare(family, targets, rslora, text):
    name = f"{family} {targets if isinstance(targets, str) else ','.join(targets or ['auto'])}{' rslora' if rslora else ''}"
    path, at = f"{WORK}/{family}", f"{WORK}/{name.replace(' ', '-')}"
    if not os.path.isdir(path):
        make(path, family, vocab_size=320)
    sft = [text(r["prompt"], r["chosen"]) for r in ROWS]
    pairs = [(text(r["prompt"], r["chosen"]), text(r["prompt"], r["rejected"])) for r in ROWS]
    # PEFT's to rlhf.
    new_adapter(path, f"{at}-lm", "CAUSAL_LM", targets, rslora)
    same_model(f"{name} PEFT's", load(path, f"{at}-lm", "CAUSAL_LM"), f"{at}-lm", f"{at}-lm-values")
    same_merged(f"{name} PEFT's", load(path, f"{at}-lm", "CAUSAL_LM"), f"{at}-lm", f"{at}-lm-merged")
    new_adapter(path, f"{at}-rm", "SEQ_CLS", targets, rslora)
    same_scores(f"{name} PEFT's", load(path, f"{at}-rm", "SEQ_CLS"), f"{at}-rm", text)
    same_merged(f"{name} PEFT's scorer", load(path, f"{at}-rm", "SEQ_CLS"), f"{at}-rm", f"{at}-rm-merged")
    # Both train it; what rlhf trained goes to PEFT.
    model = trained_alike(f"{name} sft", path, f"{at}-lm", "CAUSAL_LM", "sft", f"{WORK}/sft.jsonl", sft, sft_loss, f"{at}-sft")
    same_model(f"{name} trained", model, f"{at}-sft", f"{at}-sft-values")
    same_merged(f"{name} trained", model, f"{at}-sft", f"{at}-sft-merged")
    model = trained_alike(f"{name} rm", path, f"{at}-rm", "SEQ_CLS", "rm", f"{WORK}/rm.jsonl", pairs, rm_loss, f"{at}-trm",
                          ["--normalize_samples", 0])
    same_scores(f"{name} trained", model, f"{at}-trm", text)
    # An adapter that rlhf began, by the options' names.
    new = ["--model", path, "--tokenizer", f"{WORK}/words", *OPTIONS, "--use_peft", "--lora_r", 4, "--lora_alpha", 16,
           "--learning_rate", 1e-2, "--lora_target_modules",
           targets if isinstance(targets, str) else ",".join(targets or ["auto"]), "--use_rslora", str(rslora).lower()]
    rlhf("sft", *new, "--data", f"{WORK}/sft.jsonl", "--out", f"{at}-new")
    model = load(path, f"{at}-new", "CAUSAL_LM")
    same_model(f"{name} new", model, f"{at}-new", f"{at}-new-values")
    mine, theirs = (json.load(open(f"{d}/adapter_config.json")) for d in (f"{at}-new", f"{at}-lm"))
    check(f"{name} matrices", {k.split(".")[1] + k for k in tensors(f"{at}-new")} ==
          {k.split(".")[1] + k for k in tensors(f"{at}-lm")}, (mine["target_modules"], theirs["target_modules"]))
    same_merged(f"{name} new", model, f"{at}-new", f"{at}-new-merged")
    rlhf("rm", *new, "--data", f"{WORK}/rm.jsonl", "--out", f"{at}-newrm", "--normalize_samples", 0)
    same_scores(f"{name} new", load(path, f"{at}-newrm", "SEQ_CLS"), f"{at}-newrm", text)
    report(name)


WORK = workdir()
write(f"{WORK}/sft.jsonl", [dict(prompt=r["prompt"], completion=r["chosen"]) for r in ROWS])
write(f"{WORK}/rm.jsonl", ROWS)
rlhf("tokenizer", "--train", "README.md", "--vocab_size", 320, "--out", f"{WORK}/words", "--quiet")
for case in CASES[1::3] if QUICK else CASES:
    compare(*case, Text(f"{WORK}/words"))
finish()
