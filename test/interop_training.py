"""Training as a whole against PyTorch: five AdamW steps of `rlhf sft` and of `rlhf rm`.

For a small random model of every family, and for the models in ../shared/assets that have a tokenizer:
the same records, the same weights to begin with, the loss of each of five steps within 1e-3 of that
of transformers' model under torch.optim.AdamW, and the loss on the records after them. What is
trained is read back by transformers. Ends with "N passed, N failed".
"""
import os

import torch
import transformers as tf

from peers import CASES, OPTIONS, ROWS, Text, losses, make, no_padding, rm_loss, sft_loss, steps, write
from interop import ASSETS, QUICK, check, finish, near, report, rlhf, workdir

def compare(name, cls, loss, rows, start, out, command, data, tokens, lr):
    model = cls.from_pretrained(start, dtype=torch.float32, attn_implementation="eager").eval()
    want, after = steps(model, loss, rows, lr)
    rlhf(command, "--model", start, *tokens, "--data", data, "--eval_data", data, "--out", out, *OPTIONS,
         "--learning_rate", lr)
    got, got_after = losses(out)
    check(f"{name} {command} learns", after < 0.95 * want[0], (after, want))
    near(f"{name} {command} losses", f"{command} loss", got, want, 1e-3)
    near(f"{name} {command} loss after", f"{command} loss", got_after, after, 1e-3)
    with torch.no_grad():
        back = cls.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
        no_padding(back)
        near(f"{name} {command} read back", f"{command} read back", loss(back, rows), got_after, 1e-4)


def train(name, path, words, work, lr):
    text, tokens = Text(words), ["--tokenizer", words]
    compare(name, tf.AutoModelForCausalLM, sft_loss, [text(r["prompt"], r["chosen"]) for r in ROWS], path,
            f"{work}/{name}-sft", "sft", f"{work}/sft.jsonl", tokens, lr)
    torch.manual_seed(5)
    scorer = tf.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        scorer.score.weight.normal_(0, 0.2)
    scorer.save_pretrained(f"{work}/{name}-scorer")
    pairs = [(text(r["prompt"], r["chosen"]), text(r["prompt"], r["rejected"])) for r in ROWS]
    compare(name, tf.AutoModelForSequenceClassification, rm_loss, pairs, f"{work}/{name}-scorer", f"{work}/{name}-rm", "rm",
            f"{work}/rm.jsonl", tokens + ["--normalize_samples", 0], lr)
    report(name)


work = workdir()
write(f"{work}/sft.jsonl", [dict(prompt=r["prompt"], completion=r["chosen"]) for r in ROWS])
write(f"{work}/rm.jsonl", ROWS)
rlhf("tokenizer", "--train", "README.md", "--vocab_size", 320, "--out", f"{work}/words", "--quiet")
for case in list(CASES)[::3] if QUICK else CASES:
    make(f"{work}/{case}", case, vocab_size=320)
    train(case, f"{work}/{case}", f"{work}/words", work, 2e-3)
for case in ("babyllama361", "stories260K"):
    directory = f"{ASSETS}/models/{case}"
    if os.path.isdir(directory):
        train(case, directory, directory, work, 2e-4)
    else:
        print(f"{case}: no {directory}, skipped")
finish()
