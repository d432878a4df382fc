#!/usr/bin/env python3
"""What bfloat16 does to learning: the demo's expert line (SFT, reward model, PPO) with five seeds in
f32, and with the first of them in bf16.

    python3 test/curves.py [--seeds N] [--out DIR]

A curve is cut into fifths, each with its mean. bf16 is within the spread of the seeds where it is no
further from their mean than the highest of them is from the lowest: of six runs that differ in
their seed alone, one in three would lie outside of the five others. Ends with `N passed, N failed`
and exit status 1 if a fifth is outside. `make demo` builds what this runs; it takes some minutes.
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
    a.add_argument("--seeds", type=int, default=5, help="runs in f32 (5)")
    a.add_argument("--out", type=Path, default=ROOT / "build" / "curves", help="build/curves")
    a = a.parse_args()
    if a.seeds < 2:
        sys.exit("--seeds: at least 2, or there is no spread")
    runs = [(a.out / f"f32-{seed}", seed, "f32") for seed in range(1, a.seeds + 1)]
    half = a.out / "bf16-1"
    for run in [*runs, (half, 1, "bf16")]:
        print(f"{run[0].name} ...", file=sys.stderr, flush=True)
        train(*run)
    passed = failed = 0
    print(f"{'curve':<34}{'fifth':>6}{'lowest':>10}{'mean':>10}{'highest':>10}{'bf16':>10}")
    for stage, metric in CURVES:
        seeds = [fifths(out, stage, metric) for out, _, _ in runs]
        for i, x in enumerate(fifths(half, stage, metric)):
            column = [s[i] for s in seeds]
            low, high, middle = min(column), max(column), mean(column)
            good = abs(x - middle) <= high - low
            passed, failed = passed + good, failed + (not good)
            print(f"{stage + ' ' + metric:<34}{i + 1:>6}{low:>10.4f}{middle:>10.4f}{high:>10.4f}"
                  f"{x:>10.4f}{'' if good else '  outside'}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
