"""`rlhf raters` against the krippendorff and scikit-learn packages.

Random judgements of several shapes: alpha overall, by domain, by kind of annotator and on an aspect
against krippendorff.alpha, kappa against the weighted mean of sklearn's cohen_kappa_score over pairs
of annotators. Their intervals against a bootstrap over items of these two functions.
"""
import json, random, tempfile

import krippendorff
import numpy as np
from sklearn.metrics import cohen_kappa_score

from interop import check, finish, rlhf

CHOICES = ["A", "B", "tie"]


def table_of(votes, annotators):
    """{(item, annotator): choice} as rows of annotators and columns of items."""
    items = {i: k for k, i in enumerate(sorted({i for i, _ in votes}))}
    table = np.full((annotators, len(items)), np.nan)
    for (i, w), c in votes.items():
        table[w, items[i]] = c
    return table


def expected(table):
    """alpha and kappa."""
    annotators = len(table)
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
    alpha, kappa = expected(table_of(votes, annotators))
    check(f"{name} alpha", abs(found["alpha"] - alpha) < 1e-9, (found["alpha"], alpha))
    check(f"{name} kappa", abs(found["kappa"] - kappa) < 1e-9, (found["kappa"], kappa))


def compare_intervals(name, found, votes, annotators):
    """The ends are quantiles of random replicates: within 15 % of the interval's width."""
    table, random_ = table_of(votes, annotators), np.random.default_rng(1)
    table = table[:, (~np.isnan(table)).sum(0) > 1]
    n = table.shape[1]
    drawn = np.array([expected(table[:, random_.integers(0, n, n)]) for _ in range(400)])
    for key, values in zip(("alpha", "kappa"), drawn.T):
        low, high = np.quantile(values, (0.025, 0.975))
        got = found[key + "_low"], found[key + "_high"]
        check(f"{name} {key} interval", max(abs(got[0] - low), abs(got[1] - high)) < 0.15 * (high - low),
              (got, (low, high)))


def report(lines, *options, bootstrap=0):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.write("\n".join(lines))
        f.flush()
        out = rlhf("raters", "--data", f.name, "--bootstrap", str(bootstrap), "--json", *options)
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
                          "annotator_type": "lay" if w > 1 else "expert",
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
    for kind, who in (("expert", {0, 1}), ("lay", set(range(2, annotators)))):
        if len(who) > 1:
            part = {k: v for k, v in votes.items() if k[1] in who}
            compare(f"seed {seed} {kind}", whole["annotator_type"][kind], part, annotators)
    if seed == 0:
        compare_intervals(f"seed {seed}", report(lines, bootstrap=4000), votes, annotators)
    compare(f"seed {seed} aspect", report(lines, "--aspect", "nuance"), nuance, annotators)
finish()
