#!/usr/bin/env python3
"""`rlhf bench` against its peers on the same work, in turn: A B A B ... for each item.

    python3 bench/run.py [--rounds N] [--peer NAME]... [--work gemm|train|rm|generate|sample|ppo]...
                         [--model NAME]... [--dtype f32|bf16]... [--threads N]

Each run is a process of its own. A ratio is the median over rounds of the ratio of two
neighbouring runs, above 1 where rlhf is faster; other numbers are medians. Results go to
bench/results/<cpu>.csv, where a row replaces the one of the same work and peer, and from there to a
chart, <cpu>.svg. Python's standard library only; `make deps-bench` installs the peers.
bench/NOTES.md: how to read it all.
"""

import argparse
import csv
import glob
import json
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from html import escape
from pathlib import Path
from statistics import geometric_mean, median

HERE = Path(__file__).resolve().parent
WORK = ("gemm", "train", "rm", "generate", "sample", "ppo")
MODELS = ("llama-8m", "gpt2-14m", "llama-15m", "gpt2", "smollm2-135m", "qwen2.5-0.5b",
          "llama3.2-1b")
USUAL = MODELS[:4]  # without --model
COLUMNS = ("machine", "date", "compiler", "commit", "name", "unit", "ours", "peer", "ratio",
           "share", "threads", "rounds", "ratio_min", "ratio_max", "ours_mb", "peer_mb", "against")

# A peer is a script in peers/ that runs in the environment build/bench-NAME, or a program in build.
Peer = namedtuple("Peer", "run work dtypes")
PEERS = {
    "torch": Peer("torch_peer.py", ("train", "rm", "generate", "sample", "ppo"), ("f32", "bf16")),
    "openblas": Peer("gemm-openblas", ("gemm",), ("f32",)),
    "blis": Peer("gemm-blis", ("gemm",), ("f32",)),
    "onednn": Peer("gemm-onednn", ("gemm",), ("f32", "bf16")),
    "trl": Peer("trl_peer.py", ("ppo",), ("f32", "bf16")),
    "llama.cpp": Peer("llama_peer.py", ("generate", "sample"), ("f32", "bf16")),
}
PRELOADED = ("torch", "trl")  # with an allocator: their tensors come and go

# Allocators by preference, as Debian, Fedora and Arch place them.
ALLOCATORS = [f"{d}/{n}" for n in ("libjemalloc.so.2", "libtcmalloc.so.4",
                                   "libtcmalloc_minimal.so.4")
              for d in ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib")]
# What PyTorch's tuning guide gives jemalloc: freed pages stay with the process.
MALLOC_CONF = ("oversize_threshold:1,background_thread:true,metadata_thp:auto,"
               "dirty_decay_ms:-1,muzzy_decay_ms:-1")


def last_json(command, env=None, errors=None):
    """(the object on the last line of a command's output, ""), or (None, why there is none)."""
    try:
        run = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        if run.returncode == 0:
            return json.loads(run.stdout.strip().splitlines()[-1]), ""
        said = (run.stderr or "").strip().splitlines()
        return None, said[-1] if said else f"exit status {run.returncode}"
    except OSError as e:
        return None, e.strerror
    except (IndexError, ValueError):
        return None, "no result"


def result(command, env=None):
    """The same object; ends the program if there is none."""
    found, why = last_json(command, env)
    return found or sys.exit(f"{' '.join(map(str, command))}: {why}")


def first_line(command):
    try:
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return out.stdout.splitlines()[0].strip()
    except (OSError, IndexError):
        return "unknown"


def is_amd():
    try:
        with open("/proc/cpuinfo") as f:
            return "AuthenticAMD" in f.read(4000)
    except OSError:
        return False


def commit():
    """The commit that is checked out, with a + behind it where the program's source differs."""
    git = ["git", "-C", str(HERE.parent)]
    name = first_line([*git, "rev-parse", "--short", "HEAD"])
    files = ["rlhf.c", "rlhf.h", "Makefile"]
    same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *files],
                          stderr=subprocess.DEVNULL).returncode == 0
    return name if same or name == "unknown" else name + "+"


def slug(cpu):
    """A file's name from a processor's."""
    plain = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", " ", cpu, flags=re.I)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-") or "cpu"


def processors():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def progress(text):
    if sys.stderr.isatty():
        print("\r\033[K" + text, end="", file=sys.stderr, flush=True)


def preload(choice):
    """The allocator for the peer: a path, or None."""
    if choice == "none":
        return None
    if choice != "auto":
        if not Path(choice).exists():
            sys.exit(f"--preload: {choice} is not there")
        return choice
    return next((hit for p in ALLOCATORS for hit in sorted(glob.glob(p))), None)


# ---- Running -------------------------------------------------------------------------------------


class Runner:
    def __init__(self, a):
        self.a = a
        self.threads = a.threads or processors()
        self.allocator = preload(a.preload)
        self.env = dict(os.environ, OMP_NUM_THREADS=str(self.threads))
        if is_amd():  # OpenBLAS 0.3.21 gives Zen 4 the slower kernels of an Intel
            self.env.setdefault("OPENBLAS_CORETYPE", "Zen")
        self.hash = {}
        help_ = subprocess.run([a.program, "bench", "--help"], stdout=subprocess.PIPE, text=True)
        self.has_dtype = "--dtype" in help_.stdout
        self.peers = {}  # name: (command, environment, how it calls itself)
        for name in a.peer or PEERS:
            self.find(name)

    def find(self, name):
        """Learns how to run a peer; one that does not run is skipped with a line."""
        script, env, against = PEERS[name].run, self.env, ""
        commands = [[self.a.build / script]]
        if script.endswith(".py"):
            venv = self.a.build / f"bench-{name}" / "bin" / "python"
            commands = [[p, HERE / "peers" / script] for p in (venv, self.a.python)]
        if name in PRELOADED:
            against = ", " + (Path(self.allocator).name.split(".")[0][3:] if self.allocator
                              else "malloc")
        if name in PRELOADED and self.allocator:
            env = dict(env, LD_PRELOAD=self.allocator)
            if "jemalloc" in self.allocator:
                env.setdefault("MALLOC_CONF", MALLOC_CONF)
        isa = env.get("ONEDNN_MAX_CPU_ISA")
        if isa and name in (*PRELOADED, "onednn"):
            against += ", " + isa.lower()
        for command in commands:
            found, why = last_json(command, env, subprocess.PIPE)  # no work: only its name
            if found:
                self.peers[name] = command, env, found["peer"] + against
                return
        print(f"{name}: skipped: {why} (make deps-bench PEERS={name})", file=sys.stderr)

    def flags(self):
        return ["--threads", str(self.threads), *(["--quick"] if self.a.quick else [])]

    def items(self):
        """(work, model, dtype) of all runs; products have no model."""
        work = self.a.work or WORK
        dtypes = self.a.dtype or (("f32", "bf16") if self.has_dtype else ("f32",))
        for dtype in dtypes:
            yield from ((w, None, dtype) for w in work if w == "gemm")
            for model in self.a.model or USUAL:
                yield from ((w, model, dtype) for w in work if w != "gemm")

    def ours(self, work, model, dtype):
        found = result([self.a.program, "bench", work, *(["--model", model] if model else []),
                        *(["--dtype", dtype] if self.has_dtype else []), "--json", "--quiet",
                        *self.flags()])
        if self.hash.setdefault(dtype, found["weights_hash"]) != found["weights_hash"]:
            sys.exit("rlhf bench: the weights' hash changed from run to run")
        return found

    def pairs(self, peer, work, model, dtype):
        """[{name: (our result, the peer's)}] of all rounds, and what our program says of itself."""
        command, env, _ = self.peers[peer]
        rounds = []
        for i in range(self.a.rounds):
            progress(f"{work} {model or ''} {dtype} {peer}: round {i + 1} of {self.a.rounds}")
            found = self.ours(work, model, dtype)
            ours = {r["name"]: r for r in found["results"] if r["name"].startswith(work + "/")}
            theirs = {r["name"]: r
                      for r in result([*command, *self.flags(), *ours], env)["results"]}
            rounds.append({n: (ours[n], theirs[n]) for n in ours if n in theirs})
        progress("")
        return rounds, found


def rows_of(rounds, common):
    """One row of the CSV for each name."""
    for name in rounds[0]:
        pairs = [r[name] for r in rounds]
        unit = pairs[0][0]["unit"]
        if any(x["unit"] != unit for pair in pairs for x in pair):
            sys.exit(f"{name}: the units differ")
        ratios = [p["value"] / o["value"] if unit == "ms" else o["value"] / p["value"]
                  for o, p in pairs]

        def middle(which, key):
            return median(pair[which].get(key, 0) for pair in pairs)

        yield {**common, "name": name, "unit": unit, "ours": f"{middle(0, 'value'):.5g}",
               "peer": f"{middle(1, 'value'):.5g}", "ratio": f"{median(ratios):.3f}",
               "share": f"{middle(0, 'share'):.3f}", "rounds": len(pairs),
               "ratio_min": f"{min(ratios):.3f}", "ratio_max": f"{max(ratios):.3f}",
               "ours_mb": f"{middle(0, 'peak_rss_mb'):.0f}",
               "peer_mb": f"{middle(1, 'peak_rss_mb'):.0f}"}


# ---- Writing -------------------------------------------------------------------------------------


def rank(row):
    """Work in the order of WORK, models in that of MODELS, then numbers as numbers."""
    work, model, *rest = row["name"].split("/")
    place = [*WORK].index(work) if work in WORK else len(WORK)
    size = MODELS.index(model) if model in MODELS else len(MODELS)
    numbers = [int(x) for x in re.findall(r"\d+", "/".join(rest))]
    return place, size, model, row["name"].endswith("/bf16"), numbers, row["against"]


def condensed(rows):
    """Products of as many rows in one: the geometric mean over their shapes."""
    means = {}
    for r in rows:
        name = re.sub(r"^(gemm/\w+/\d+)x\d+x\d+", r"\1 rows", r["name"])
        means.setdefault((name, r["against"]), []).append(float(r["ratio"]))
    return [(name, against, geometric_mean(x)) for (name, against), x in means.items()]


def write_csv(path, rows):
    """Puts rows into the file; returns all that it holds then."""
    held = {}
    if path.exists():
        with path.open(newline="") as f:
            held = {(r["name"], r["against"]): r for r in csv.DictReader(f)}
    held.update({(r["name"], r["against"]): r for r in rows})
    held = sorted(held.values(), key=rank)
    with path.open("w", newline="") as f:
        out = csv.DictWriter(f, COLUMNS, extrasaction="ignore", lineterminator="\n")
        out.writeheader()
        out.writerows(held)
    return held


def write_svg(path, rows):
    """A bar for each ratio, a line at 1: as fast as the peer."""
    left, right, top, pitch, wide = 330, 70, 56, 22, 840
    span = wide - left - right
    bars = condensed(rows)
    most = max([2.0, *(ratio for _, _, ratio in bars)])
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100, 1e9) if most / s <= 8)
    scale = span / most
    height = top + pitch * len(bars) + 24
    names = sorted({r["against"].split(",")[0] for r in rows})
    title = f"rlhf against {', '.join(names)}"
    about = f"{rows[0]['machine']}, {rows[0]['threads']} threads: times as fast, more is better"
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{height}" '
           f'viewBox="0 0 {wide} {height}" font-family="sans-serif" font-size="12" fill="#222">',
           '<rect width="100%" height="100%" fill="#fff"/>',
           f'<text x="12" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
           f'<text x="12" y="38" fill="#666">{escape(about)}</text>']
    bottom = top + pitch * len(bars)
    for i in range(int(most / step) + 1):
        x = left + i * step * scale
        out.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#ddd"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 16}" fill="#666" text-anchor="middle">'
                   f'{i * step:g}</text>')
    for i, (name, against, ratio) in enumerate(bars):
        y = top + pitch * i
        color = "#2b7a4b" if ratio >= 1 else "#b5482f"
        out.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">'
                   f'{escape(name)} : {escape(against.split()[0])}</text>')
        out.append(f'<rect x="{left}" y="{y + 3}" width="{ratio * scale:.1f}" '
                   f'height="{pitch - 6}" fill="{color}"/>')
        out.append(f'<text x="{left + ratio * scale + 6:.1f}" y="{y + 15}">{ratio:.2f}</text>')
    out.append(f'<path d="M{left + scale:.1f} {top}V{bottom}" stroke="#222" '
               'stroke-dasharray="4 3"/>')
    path.write_text("\n".join([*out, "</svg>", ""]))


def show(row):
    share = f"{100 * float(row['share']):5.1f} %" if float(row["share"]) else ""
    spread = f"{row['ratio_min']}-{row['ratio_max']}"
    print(f"{row['name']:<32} {row['ours']:>9} {row['peer']:>9} {row['unit']:<8}"
          f"{float(row['ratio']):>7.2f}  {spread:<14}{share:>8}{row['ours_mb']:>7}"
          f"{row['peer_mb']:>7}  {row['against'].split(',')[0]}", flush=True)


def options():
    a = argparse.ArgumentParser(description="rlhf against its peers on the same work, in turn.")
    a.add_argument("--rounds", type=int, default=3, help="pairs of runs for each item (3)")
    a.add_argument("--peer", action="append", choices=PEERS, help="default: all installed ones")
    a.add_argument("--work", action="append", choices=WORK, help="default: all of it")
    a.add_argument("--model", action="append", choices=MODELS,
                   help=f"default: {', '.join(USUAL)}")
    a.add_argument("--dtype", action="append", choices=("f32", "bf16"),
                   help="default: what the program has")
    a.add_argument("--threads", type=int, default=0, help="default: all processors")
    a.add_argument("--quick", action="store_true", help="fewer repetitions in each run")
    a.add_argument("--program", default=str(HERE.parent / "rlhf"), help="default: ./rlhf")
    a.add_argument("--build", type=Path, default=HERE.parent / "build",
                   help="where the peers' programs and environments are (build)")
    a.add_argument("--python", default=sys.executable,
                   help="runs the peers that have no environment there")
    a.add_argument("--preload", default="auto", help="PyTorch's allocator: a path, auto or none")
    a.add_argument("--results", type=Path, default=HERE / "results", help="where to write")
    a = a.parse_args()
    if a.rounds < 1:
        sys.exit("--rounds: at least 1")
    return a


def main():
    a = options()
    runner = Runner(a)
    if a.dtype and "bf16" in a.dtype and not runner.has_dtype:
        sys.exit("--dtype bf16: the program does not have it")
    if not runner.peers:
        sys.exit("no peer is here: `make deps-bench` installs them")
    if not runner.allocator and a.preload == "auto" and any(p in PRELOADED for p in runner.peers):
        print("no jemalloc or tcmalloc here: PyTorch runs with malloc, which is slower "
              "(Debian: libjemalloc2)", file=sys.stderr)
    compiler = first_line([*os.environ.get("CC", "cc").split(), "--version"])
    common = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "threads": runner.threads}
    print(f"{'name':<32} {'ours':>9} {'peer':>9} {'unit':<8}{'ratio':>7}  {'min-max':<14}"
          f"{'of peak':>8}{'MB':>7}{'peer':>7}")
    a.results.mkdir(parents=True, exist_ok=True)
    path = None
    for work, model, dtype in runner.items():
        for name in runner.peers:
            if work not in PEERS[name].work or dtype not in PEERS[name].dtypes:
                continue
            rounds, found = runner.pairs(name, work, model, dtype)
            machine = found["machine"]
            common.update(machine=machine["cpu"], against=runner.peers[name][2],
                          compiler=machine.get("compiler", compiler))
            rows = list(rows_of(rounds, common))
            for row in rows:
                show(row)
            if work == "gemm":
                for what, against, ratio in condensed(rows):
                    print(f"{what:<60}{ratio:>7.2f}  geometric mean  {against}")
            if rows:  # after every item, so that a run that is cut short leaves what it found
                path = a.results / (slug(machine["cpu"]) + ".csv")
                write_svg(path.with_suffix(".svg"), write_csv(path, rows))
    if not path:
        sys.exit("none of the peers does any of this work")
    against = "; ".join(sorted({p[2] for p in runner.peers.values()}))
    hashes = ", ".join(f"{h} ({dtype})" for dtype, h in runner.hash.items())
    print(f"\n{common['machine']}, {runner.threads} threads, {common['compiler']}, commit "
          f"{common['commit']}\nagainst {against}\nweights hash {hashes}\n"
          f"{path}\n{path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
