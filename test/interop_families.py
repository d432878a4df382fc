"""Every family of models against transformers, both ways.

For small random models of every family: logits and log-probabilities within 1e-4, 64 greedy tokens
the same, gradients of the fine-tuning loss and of scores within 1e-3 of each tensor's norm; what is
saved loads in AutoModelForCausalLM and AutoModelForSequenceClassification with the same tensors and
scores. Files come in one piece or in several, as f32, f16 and bf16, with new and old forms of
config.json. Ends with "N passed, N failed"; the exit status is 1 if any failed.
"""
import glob, json, os, shutil, subprocess

import torch
import transformers as tf
from safetensors.torch import load_file

from peers import CASES, make, old_form, tensors
from interop import ASSETS, BUILD, check, finish, near, report, workdir

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


def draw(vocab):
    gen = torch.Generator().manual_seed(9)
    return [torch.randint(min(4, vocab - 2), vocab, (n,), generator=gen).tolist() for n in (150, 3, 64, 97)]


def compare(name, path, out, ids, prompt=12, greedy=64):
    task = dict(ids=ids, prompt=prompt, greedy=greedy, weights=[1.0, -0.5, 0.25, 2.0])
    json.dump(task, open(f"{out}.json", "w"))
    r = subprocess.run([f"{BUILD}/tool", path, f"{out}.json", out], capture_output=True, text=True)
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
        text = torch.tensor([ids[0][:prompt] + more])
        z = model(text).logits[0, prompt - 1:-1]
    # The best token of transformers, where float32 can tell it from the second.
    best, top = z.argmax(-1).tolist(), z.topk(2).values
    clear = (top[:, 0] - top[:, 1] > 1e-4).tolist()
    check(f"{name} greedy", len(more) == greedy and all(a == b or not c for a, b, c in zip(more, best, clear)) and
          sum(clear) > 0.9 * greedy,
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
    scorer.get_input_embeddings().padding_idx = None  # that token's embedding would get no gradient
    scores = torch.cat([scorer.eval()(torch.tensor([s])).logits[:, 0] for s in ids])
    near(f"{name} scores", "scores", got["scores"], scores.detach(), 1e-4)
    (scores * torch.tensor(task["weights"])).sum().backward()
    check_gradients(name, "score.", scorer, got, "all")


work = workdir()
for name in CASES:
    path = f"{work}/{name}"
    make(path, name)
    check(f"{name} files", (len(glob.glob(f"{path}/*.safetensors")) > 1) == bool(CASES[name][3]))
    compare(name, path, f"{path}-out", draw(203))
    config = json.load(open(f"{path}/config.json"))
    old = old_form(config)
    if old:
        shutil.copytree(path, f"{path}-old")
        json.dump(old, open(f"{path}-old/config.json", "w"))
        compare(f"{name} (old form)", f"{path}-old", f"{path}-old-out", draw(203))
    report(name)

# Real models: what they continue is their own golden prompt; a tail of it for short contexts.
for model in ("babyllama361", "stories260K", "gpt-nano-sort", "llama-fixture-ferric"):
    path = f"{ASSETS}/models/{model}"
    if not os.path.isdir(path):
        print(f"{model}: no {path}, skipped")
        continue
    golden, config = json.load(open(f"{path}/golden.json")), json.load(open(f"{path}/config.json"))
    context = config.get("max_position_embeddings") or config["n_positions"]
    known = golden.get("prompt_ids") or golden.get("ids") or golden["input_ids"][0]
    real = [known] + [[t % config["vocab_size"] for t in ids[:context]] for ids in draw(config["vocab_size"])[1:]]
    prompt = min(len(known), context // 2)
    compare(model, path, f"{work}/{model}-out", real, prompt, min(64, context - prompt))
    report(model)
finish()
