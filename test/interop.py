"""What the test/interop_*.py share: where things are, checks that count, the closing line.

`make interop` runs them from the root of the repository; RLHF_TEST_QUICK=1 asks for less of it.
"""
import os, shutil, subprocess, sys, tempfile

PROGRAM = os.path.abspath(os.environ.get("PROG", "rlhf"))
BUILD = os.path.abspath(os.environ.get("INTEROP", "build/interop"))  # the library and the tool
ASSETS = os.path.abspath("../shared/assets")
QUICK = os.environ.get("RLHF_TEST_QUICK", "0") not in ("", "0")

passed = failed = 0
work = None
worst = {}


def check(name, ok, why=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED {name} {why}", flush=True)


def near(name, kind, got, want, tol, relative=False):
    """Two tensors: the largest difference, or the norm of it relative to what it should be."""
    got, want = got.double(), want.double()
    if got.shape != want.shape:
        return check(name, False, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    off = (got - want).norm() / (want.norm() + 1e-12) if relative else (got - want).abs().max()
    worst[kind] = max(worst.get(kind, 0.0), off.item())
    check(name, off <= tol, f"off by {off:.3g}")


def report(name):
    """A line for what was compared since the last, with the largest differences of each kind."""
    off = "".join(f", {k} {v:.1g}" for k, v in worst.items())
    print(f"{name}: {passed} passed, {failed} failed{off and '; off by at most' + off[1:]}", flush=True)
    worst.clear()


def rlhf(*args, stdin=None, threads=1):
    r = subprocess.run([PROGRAM, *map(str, args), "--threads", str(threads)], input=stdin, capture_output=True, text=True)
    if r.returncode:
        raise RuntimeError(f"rlhf {' '.join(map(str, args))}: {r.stderr}")
    return r.stdout


def workdir():
    """A directory for what a script makes; kept if a check failed."""
    global work
    work = tempfile.mkdtemp(prefix=os.path.basename(sys.argv[0])[8:-3] + "-", dir=BUILD)
    return work


def finish():
    if work and not failed:
        shutil.rmtree(work)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)
