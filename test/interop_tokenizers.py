"""Ids of this library against those of Hugging Face's tokenizers, for strings of all kinds.

The tokenizers in ../shared/assets, and two made here in the style of Pythia's (byte-level BPE, NFC,
added runs of spaces) and of Gemma's (visible spaces, bytes as a fallback). Strings are drawn from a
fixed seed: random Unicode of many scripts, code, white space, digits, special tokens inside text,
bytes that are not UTF-8. Each is encoded and decoded by both, alone; so are random ids. Then a long
text, with the speed of both on one thread: the median of several rounds in which one follows the other.
Ends with "N passed, N failed".
"""
import ctypes, glob, gzip, json, os, random, statistics, time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from interop import ASSETS, BUILD, QUICK, check, finish, workdir

STRINGS = 3000 if QUICK else 100000
MEGABYTES = 1 if QUICK else 10
ROUNDS = 1 if QUICK else 3
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

    def encode(self, tok, data):
        count = ctypes.c_int()
        room = len(data) * 3 + 16  # a space may become three bytes
        ids = (ctypes.c_int32 * room)()
        self.call("rlhf_encode", tok, data, ctypes.c_size_t(len(data)), 1, ids, room,
                  ctypes.byref(count))
        return ids[:count.value]

    def decode(self, tok, ids):
        out, n = ctypes.c_void_p(), ctypes.c_size_t()
        self.call("rlhf_decode", tok, (ctypes.c_int32 * len(ids))(*ids), len(ids), 0, ctypes.byref(out), ctypes.byref(n))
        text = ctypes.string_at(out, n.value)
        self.lib.rlhf_free(self.ctx, out)
        return text.decode()


def long_text(size):
    """So many bytes of stories, conversations, questions and code, as far as they are there."""
    text = b""
    for path in sorted(glob.glob(f"{ASSETS}/datasets/*"), key=lambda p: ".txt" not in p) + ["rlhf.c", "README.md"]:
        with (gzip.open if path.endswith("gz") else open)(path, "rb") as f:
            text += f.read()
    text *= size // len(text) + 1
    return text[:size].decode("utf-8", "ignore")


def seconds(work):
    begun = time.perf_counter()
    out = work()
    return time.perf_counter() - begun, out


def race(name, theirs, ours, lib, text):
    """The ids of a long text, and the time of both for it. The library's faster call is taken, which leaves
    out where in the text a token stands."""
    data, ratio, speed = text.encode(), [], []
    for i in range(ROUNDS):
        slow, want = seconds(lambda: theirs.encode_batch_fast([text])[0].ids)
        fast, got = seconds(lambda: lib.encode(ours, data))
        check(f"{name} long text {i}", want == got)
        ratio.append(slow / fast)
        speed.append(len(data) / 1e6 / fast)
    print(f"{name}: {len(data) / 1e6:.0f} MB at {statistics.median(ratio):.2f} times the speed ({min(ratio):.2f} to "
          f"{max(ratio):.2f}), {statistics.median(speed):.1f} MB/s", flush=True)


def make_pythia(text, out):
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    t.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=True)
    t.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                    special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False))
    t.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    save(t, out)


def make_gemma(text, out):
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    t.normalizer = normalizers.Replace(" ", "\u2581")
    t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    byte = [f"<0x{b:02X}>" for b in range(256)]
    # Trained on words, as spaces that merge across them would make one word of a line.
    spaces = [" " * n for n in range(2, 20)] * 50
    t.train_from_iterator([" " + w for s in text for w in s.split(" ")] + spaces, trainers.BpeTrainer(
        vocab_size=3000, special_tokens=special + byte, show_progress=False))
    t.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(2, 12)])
    t.post_processor = processors.TemplateProcessing("<bos>:0 $A:0", "<bos>:0 $A:0 <bos>:1 $B:1",
                                                     special_tokens=[("<bos>", t.token_to_id("<bos>"))])
    j = json.loads(t.to_str())
    j["added_tokens"] = [a for a in j["added_tokens"] if a["content"] not in byte]
    save(Tokenizer.from_str(json.dumps(j)), out)


def save(t, out):
    os.makedirs(out)
    t.save(f"{out}/tokenizer.json")


def spoil(rng, text):
    """Bytes that are no UTF-8 any more, mostly."""
    data = bytearray(text.encode())
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data))
        data[at:at + rng.randrange(2)] = bytes([rng.choice([0x80, 0xbf, 0xc0, 0xe2, 0xed, 0xf0, 0xf5, 0xff])])
    return bytes(data)


def different(name, what, s, want, got, seen):
    if want == got:
        return 0
    if seen < 3:
        print(f"  {name} {what}: {s!r}\n    {want!r}\n    {got!r}")
    return 1


def compare(path, lib, text):
    name, theirs, ours = os.path.basename(os.path.dirname(path)), Tokenizer.from_file(path), lib.open(os.path.dirname(path))
    special = [t.content for t in theirs.get_added_tokens_decoder().values()]
    rng, bad, size = random.Random(1), 0, theirs.get_vocab_size()
    for i in range(STRINGS):
        s = draw(rng, special)
        data = spoil(rng, s) if i % 20 == 0 else s.encode()
        ids = theirs.encode(data.decode("utf-8", "replace")).ids
        bad += different(name, "ids", data, ids, lib.encode(ours, data), bad)
        bad += different(name, "text", ids, theirs.decode(ids, skip_special_tokens=False), lib.decode(ours, ids), bad)
        if i % 10 == 0:
            ids = [rng.randrange(size) for _ in range(rng.randrange(1, 12))]
            bad += different(name, "text", ids, theirs.decode(ids, skip_special_tokens=False), lib.decode(ours, ids), bad)
    check(f"{name} strings", bad == 0, f"{bad} differ")
    print(f"{name}: {STRINGS} strings, {bad} different", flush=True)
    race(name, theirs, ours, lib, text)


work, text = workdir(), long_text(MEGABYTES * 1000000)
sample = [text[i:i + 500] for i in range(0, 300000, 500)] + open("README.md").read().split("\n") + WORDS
make_pythia(sample, f"{work}/pythia-style")
make_gemma(sample, f"{work}/gemma-style")
library = Library(f"{BUILD}/librlhf.so")
files = sorted(glob.glob(f"{ASSETS}/tokenizers/*/tokenizer.json") + glob.glob(f"{ASSETS}/models/*/tokenizer.json"))
if not files:
    print(f"no tokenizers under {ASSETS}: skipped")
for file in files + [f"{work}/pythia-style/tokenizer.json", f"{work}/gemma-style/tokenizer.json"]:
    compare(file, library, text)
finish()
