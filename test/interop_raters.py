"""`rlhf raters` against the krippendorff and scikit-learn packages.

Random judgements of several shapes: alpha overall, by domain and on an aspect against
krippendorff.alpha, kappa against the weighted mean of sklearn's cohen_kappa_score over pairs of
annotators.
"""
import json, random, tempfile

import krippendorff
import numpy as np
from sklearn.metrics import cohen_kappa_score

from interop import check, finish, rlhf

CHOICES = ["A", "B", "tie"]


def expected(votes, annotators):
    """alpha and kappa of {(item, annotator): choice}."""
    items = sorted({i for i, _ in votes})
    table = np.full((annotators, len(items)), np.nan)
    for (i, w), c in votes.items():
        table[w, items.index(i)] = c
    alpha = krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")
    total = weight = 0
    for a in range(annotators):
        for b in range(a + 1, annotators):
            both = ~np.isnan(table[a]) & ~np.isnan(table[b])
            n = int(both.sum())
            if n >= 10:
                kappa = cohen_kappa_score(table[a, both], table[b, both])
                if not np.isnan(kappa):
                    total += n * kappa
                    weight += n
    return alpha, total / weight


def compare(name, found, votes, annotators):
    alpha, kappa = expected(votes, annotators)
    check(f"{name} alpha", abs(found["alpha"] - alpha) < 1e-9, (found["alpha"], alpha))
    check(f"{name} kappa", abs(found["kappa"] - kappa) < 1e-9, (found["kappa"], kappa))


def report(lines, *options):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.write("\n".join(lines))
        f.flush()
        out = rlhf("raters", "--data", f.name, "--bootstrap", "0", "--json", *options)
    return json.loads(out.splitlines()[-1])


for seed in range(12):
    rng = random.Random(seed)
    annotators, n = rng.randint(2, 7), rng.randint(80, 200)
    votes, nuance, lines = {}, {}, []
    for i in range(n):
        truth = rng.choices([0, 1, 2], [5, 3, 2])[0]
        for w in range(annotators):
            if rng.random() < 0.8:
                c = truth if rng.random() < 0.7 else rng.randrange(3)
                votes[i, w] = c
                record = {"prompt": str(i), "answers": ["x", "y"], "annotator": str(w),
                          "choice": CHOICES[c], "domain": "d%d" % (i % 2), "aspects": {}}
                if rng.random() < 0.7:
                    nuance[i, w] = truth if rng.random() < 0.5 else rng.randrange(3)
                    record["aspects"]["nuance"] = CHOICES[nuance[i, w]]
                lines.append(json.dumps(record))
                # What somebody not qualified says counts for nothing.
                if rng.random() < 0.1:
                    lines.append(json.dumps({**record, "annotator": "new", "qualified": False}))
    whole = report(lines)
    compare(f"seed {seed}", whole, votes, annotators)
    for d in (0, 1):
        part = {k: v for k, v in votes.items() if k[0] % 2 == d}
        compare(f"seed {seed} domain {d}", whole["domain"]["d%d" % d], part, annotators)
    compare(f"seed {seed} aspect", report(lines, "--aspect", "nuance"), nuance, annotators)
finish()
