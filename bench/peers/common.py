"""What the peers written in Python share: shapes, the rule of timing, and the command line.

    PEER.py --threads 2 NAME...     the last line of standard output is a JSON object with results
    PEER.py --check                 whether the peer does the work that it says it does

Names are those of results of `rlhf bench --json`. Python's standard library only.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    kind: str
    d: int
    layers: int
    heads: int
    ff: int
    vocab: int
    kv: int = 0  # heads of keys and values; 0: as many as queries
    bias: bool = False  # of q, k and v, in a llama

    @property
    def groups(self):
        return self.kv or self.heads


SHAPES = {
    "gpt2": Shape("gpt2", 768, 12, 12, 3072, 50257),
    "gpt2-14m": Shape("gpt2", 384, 6, 6, 1536, 8192),
    "llama-8m": Shape("llama", 288, 6, 6, 768, 8192),
    "llama-15m": Shape("llama", 288, 6, 6, 768, 32000),
    "smollm2-135m": Shape("llama", 576, 30, 9, 1536, 49152, kv=3),
    "qwen2.5-0.5b": Shape("llama", 896, 24, 14, 4864, 151936, kv=2, bias=True),
    "llama3.2-1b": Shape("llama", 2048, 16, 32, 8192, 128256, kv=8),
}
POSITIONS = 1024  # of all kinds: enough for every item


def parse(name):
    """(work, model, numbers, bf16) of a result's name, None for work that is not a model's."""
    found = re.fullmatch(r"(train|rm|generate|sample|ppo)/([^/]+)/([^/]+)/(f32|bf16)", name)
    if not found or found[2] not in SHAPES:
        return None
    return found[1], found[2], [int(x) for x in re.findall(r"\d+", found[3])], found[4] == "bf16"


def enough(times, quick):
    """`rlhf bench` counts at least three calls, about a second of them."""
    least, span = (2, 0.3) if quick else (3, 1.0)
    return len(times) >= 64 or (len(times) >= least and sum(times) >= span)


def median(times):
    t = sorted(times)
    return 0.5 * (t[len(t) // 2] + t[(len(t) - 1) // 2])


def median_time(run, quick):
    """Median seconds of a call, after one that does not count."""
    run()
    times = []
    while not enough(times, quick):
        at = time.perf_counter()
        run()
        times.append(time.perf_counter() - at)
    return median(times)


def forget_peak():
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass


def peak_mb():
    try:
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s*(\d+)", f.read())[1]) / 1024
    except (OSError, TypeError):
        return 0


class Report:
    """The lines of a check."""

    failed = 0

    def __call__(self, ok, text):
        self.failed += not ok
        print(("ok    " if ok else "FAILED") + " " + text, flush=True)


def main(peer, setup, measure, check):
    """peer: its name and version. setup(threads), with 0 for what the peer takes by itself.
    measure(work, model, numbers, bf16, arguments): (value, unit), None for what the peer cannot do.
    check(report, arguments)."""
    a = argparse.ArgumentParser(description=f"The work of `rlhf bench` in {peer}.")
    a.add_argument("names", nargs="*", metavar="NAME", help="as in generate/llama-8m/batch8/f32")
    a.add_argument("--threads", type=int, default=0, help="default: what the peer takes")
    a.add_argument("--quick", action="store_true", help="fewer repetitions")
    a.add_argument("--check", action="store_true", help="check the work instead of timing it")
    a = a.parse_args()
    setup(a.threads)
    if a.check:
        report = Report()
        check(report, a)
        sys.exit(report.failed > 0)
    results = []
    for name in a.names:
        work = parse(name)
        forget_peak()
        found = work and measure(*work, a)
        if found:
            results.append({"name": name, "value": found[0], "unit": found[1],
                            "peak_rss_mb": peak_mb()})
    print(json.dumps({"peer": peer, "threads": a.threads, "results": results}))
