#!/usr/bin/env python3
"""What bfloat16 does to learning: the demo's expert line (SFT, reward model, PPO) with twelve seeds in
f32, and with the first six of them in bf16.

    python3 test/curves.py [--seeds N] [--out DIR]

A curve is cut into fifths, each with its mean. bf16 is within the spread of the seeds where the mean
of its runs lies between the lowest and the highest of f32's. One run alone proves little: of twelve
seeds in f32, the last seven lay outside of the first five at 1 to 12 points of 31. Ends with `N
passed, N failed` and exit status 1 if a fifth is outside. `make demo` builds what this runs; it
takes some ten minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
CURVES = (("sft", "loss"), ("sft", "eval_loss"), ("rm-expert", "loss"), ("rm-expert", "accuracy"),
          ("ppo-expert", "objective/scores"), ("ppo-expert", "objective/kl"),
          ("ppo-expert", "objective/rlhf_reward"))
PARTS = 5


def train(out, seed, dtype):
    """Runs the demo's stages into a directory."""
    env = dict(os.environ, DEMO_OUT=str(out), DEMO_SEED=str(seed), DEMO_DTYPE=dtype,
               DEMO_FEEDBACK="expert")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "w") as log:
        run = subprocess.run(["bash", "data/demo.sh"], cwd=ROOT, env=env, stdout=log, stderr=log)
    if run.returncode:
        sys.exit(f"the demo failed: {out}/log.txt")


def fifths(out, stage, metric):
    """The means of a curve's fifths; fewer where it has fewer points."""
    with open(out / stage / "metrics.jsonl") as f:
        values = [line[metric] for line in map(json.loads, f) if metric in line]
    if not values:
        sys.exit(f"{out}/{stage}/metrics.jsonl: no {metric}")
    parts = min(PARTS, len(values))
    cuts = [len(values) * i // parts for i in range(parts + 1)]
    return [mean(values[a:b]) for a, b in zip(cuts, cuts[1:])]


def main():
    a = argparse.ArgumentParser(description="bf16 against the spread of f32's seeds, on the demo.")
    a.add_argument("--seeds", type=int, default=12, help="runs in f32, half as many in bf16 (12)")
    a.add_argument("--out", type=Path, default=ROOT / "build" / "curves", help="build/curves")
    a = a.parse_args()
    if a.seeds < 4:
        sys.exit("--seeds: at least 4, or there is no spread")
    runs = {dtype: [(a.out / f"{dtype}-{seed}", seed, dtype) for seed in range(1, n + 1)]
            for dtype, n in (("f32", a.seeds), ("bf16", a.seeds // 2))}
    for run in [*runs["f32"], *runs["bf16"]]:
        print(f"{run[0].name} ...", file=sys.stderr, flush=True)
        train(*run)
    passed = failed = 0
    print(f"{'curve':<34}{'fifth':>6}{'lowest':>10}{'mean':>10}{'highest':>10}{'bf16':>10}")
    for stage, metric in CURVES:
        plain, half = ([fifths(out, stage, metric) for out, _, _ in runs[dtype]]
                       for dtype in ("f32", "bf16"))
        for i, (column, ours) in enumerate(zip(zip(*plain), zip(*half))):
            low, high, x = min(column), max(column), mean(ours)
            good = low <= x <= high
            passed, failed = passed + good, failed + (not good)
            print(f"{stage + ' ' + metric:<34}{i + 1:>6}{low:>10.4f}{mean(column):>10.4f}{high:>10.4f}"
                  f"{x:>10.4f}{'' if good else '  outside'}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
