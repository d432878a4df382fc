"""Training as a whole against PyTorch: five AdamW steps of `rlhf sft` and of `rlhf rm`.

For a small random model of every family, and for the models in ../shared/assets that have a tokenizer:
the same records, the same weights to begin with, the loss of each of five steps within 1e-3 of that
of transformers' model under torch.optim.AdamW, and the loss on the records after them. What is
trained is read back by transformers. Ends with "N passed, N failed".
"""
import json, os, shutil, tempfile

import torch
import transformers as tf
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, logsigmoid

from families import CASES, make
from interop import ASSETS, check, finish, near, report, rlhf

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


work = tempfile.mkdtemp(prefix="rlhf-training-")
write(f"{work}/sft.jsonl", [dict(prompt=r["prompt"], completion=r["chosen"]) for r in ROWS])
write(f"{work}/rm.jsonl", ROWS)
rlhf("tokenizer", "--train", "README.md", "--vocab_size", 320, "--out", f"{work}/words", "--quiet")
for case in CASES:
    make(f"{work}/{case}", case, vocab_size=320)
    train(case, f"{work}/{case}", f"{work}/words", work, 2e-3)
for case in ("babyllama361", "stories260K"):
    directory = f"{ASSETS}/models/{case}"
    if os.path.isdir(directory):
        train(case, directory, directory, work, 2e-4)
    else:
        print(f"{case}: no {directory}, skipped")
shutil.rmtree(work)
finish()
