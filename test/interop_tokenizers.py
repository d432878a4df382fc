"""Ids of this library against those of Hugging Face's tokenizers, for strings of all kinds.

    python test/interop_tokenizers.py --library build/interop/librlhf.so [--assets ../shared/assets]
                                      [--strings 100000] [--megabytes 10]

Strings are drawn from a fixed seed: random Unicode of many scripts, code, white space, digits,
special tokens inside text. Each is encoded by both, alone. Then the time of both for a long text,
on one thread. Ends with "N passed, N failed"; the exit status is 1 if any failed.
"""
import argparse
import ctypes
import glob
import gzip
import os
import random
import sys
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import tokenizers

WORDS = ("the of and a to in is you that it he was for on are as with his they I at be this have "
         "don't WE'LL they're I'd it's O'Brien naïve café Straße İstanbul ǅ ſ K ﬁ e\u0301 "
         "def return self.x += 1; // #include <stdio.h> \"quoted\" `code` {'a': [1, 2.5e-3]} "
         "https://example.org/?q=1&r=%20 user@example.org 2024-01-31 12:34:56 1,234,567.89 "
         "你好 世界 こんにちは 안녕하세요 שלום مرحبا नमस्ते สวัสดี Привет Γειά 🙂 👩‍👩‍👧 🇩🇪 ❤️").split(" ")
SPACES = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "   ", "\u00a0", "\u3000", "\u200b"]
RANGES = [(0x20, 0x7f), (0x20, 0x7f), (0xa0, 0x250), (0x370, 0x500), (0x590, 0x700), (0x900, 0xa00),
          (0xe00, 0xe80), (0x300, 0x370), (0x1100, 0x1200), (0x2000, 0x2070), (0x20a0, 0x2200),
          (0x3040, 0x3100), (0x4e00, 0x5000), (0xac00, 0xad00), (0xff00, 0xfff0), (0x1f300, 0x1f700),
          (0x1d400, 0x1d500), (0x1, 0x20), (0xe000, 0xe010), (0x10ffe0, 0x110000)]


def draw(rng, special):
    """One string; kinds are mixed."""
    parts = []
    for _ in range(rng.randrange(1, 14)):
        kind = rng.randrange(10)
        if kind < 5:
            parts.append(rng.choice(WORDS) + rng.choice(SPACES))
        elif kind < 7:
            lo, hi = rng.choice(RANGES)
            parts.append("".join(chr(rng.randrange(lo, hi)) for _ in range(rng.randrange(1, 9))))
        elif kind == 7:
            parts.append(str(rng.randrange(10 ** rng.randrange(1, 12))))
        elif kind == 8:
            parts.append(rng.choice(SPACES) * rng.randrange(1, 6))
        elif special and rng.randrange(3) == 0:
            parts.append(rng.choice(special))
        else:
            parts.append(rng.choice("aA '.-_/\\(") * rng.randrange(1, 20))
    return "".join(parts)


class Library:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.rlhf_error.restype = ctypes.c_char_p
        self.ctx = ctypes.c_void_p()
        self.call("rlhf_open", ctypes.byref(self.ctx), None)

    def call(self, name, *args):
        if getattr(self.lib, name)(*args):
            raise RuntimeError(f"{name}: {self.lib.rlhf_error(self.ctx).decode()}")

    def open(self, directory):
        tok = ctypes.c_void_p()
        self.call("rlhf_tokenizer_open", self.ctx, directory.encode(), ctypes.byref(tok))
        return tok

    def encode(self, tok, text):
        data, count = text.encode(), ctypes.c_int()
        room = len(data) * 2 + 16
        ids = (ctypes.c_int32 * room)()
        self.call("rlhf_encode", tok, data, ctypes.c_size_t(len(data)), 1, ids, room,
                  ctypes.byref(count))
        return ids[:count.value]


def long_text(assets, size):
    text = ""
    for path in glob.glob(os.path.join(assets, "datasets", "*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as f:
            text += f.read()
    while text and len(text) < size:
        text += text
    return text[:size]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--library", default="build/interop/librlhf.so")
    p.add_argument("--assets", default="../shared/assets")
    p.add_argument("--strings", type=int, default=100000)
    p.add_argument("--megabytes", type=int, default=10)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    passed = failed = 0
    files = sorted(glob.glob(os.path.join(args.assets, "tokenizers", "*", "tokenizer.json")) +
                   glob.glob(os.path.join(args.assets, "models", "*", "tokenizer.json")))
    if not files:
        print(f"no tokenizers under {args.assets}: skipped")
    lib, text = Library(args.library), long_text(args.assets, args.megabytes * 1000000)
    for path in files:
        theirs = tokenizers.Tokenizer.from_file(path)
        ours = lib.open(os.path.dirname(path))
        special = [t.content for t in theirs.get_added_tokens_decoder().values()]
        rng, different = random.Random(args.seed), 0
        for _ in range(args.strings):
            s = draw(rng, special)
            want, got = theirs.encode(s).ids, lib.encode(ours, s)
            if want != got:
                different += 1
                if different <= 3:
                    print(f"  {path}: {s!r}\n    {want}\n    {got}")
        name = os.path.basename(os.path.dirname(path))
        line = f"{name}: {args.strings} strings, {different} different"
        if text:
            begun = time.perf_counter()
            want = theirs.encode(text).ids
            middle = time.perf_counter()
            got = lib.encode(ours, text)
            ratio = (middle - begun) / (time.perf_counter() - middle)
            different += want != got
            line += f"; {len(text) / 1e6:.0f} MB at {ratio:.2f} times the speed" + \
                    ("" if want == got else ", DIFFERENT ids")
        print(line, flush=True)
        passed, failed = passed + (not different), failed + bool(different)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
