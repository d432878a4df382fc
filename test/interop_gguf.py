"""GGUF files against the gguf package and llama.cpp, event files against TensorBoard.

For every family that `rlhf export --gguf` writes: names, shapes, types and values as the gguf
package reads them; and, where llama-cpp-python is installed, the same tokens for strings of all
kinds and the same greedy continuation as `rlhf generate`. Small models are trained on the spot, so
that the best token is clear. Ends with "N passed, N failed"; the exit status is 1 if any failed.
"""
import glob, json, os, random, shutil, subprocess, unicodedata

import gguf
import numpy as np

from interop import ASSETS, QUICK, check, finish, report, rlhf, workdir

STRINGS = ["Hello world", " two  spaces   three", "don't WE'LL 12345 3.14", "", "line\nbreak\n\n\t x",
           "naïve café — 你好，世界 🙂👩‍👩‍👧", "    indented = [1, 22, 333]\n", "a" * 40, "ſ K ﬁ"]
TOKENIZERS = {"gpt2": "gpt-2", "qwen2.5": "qwen2", "llama-3.2": "llama-bpe", "llama2": "default",
              "mistral-v0.3": "default"}
# The others' ways to cut words, in a vocabulary at hand: name: (tokenizer, pre-tokenizer of llama.cpp,
# changes to tokenizer.json).
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def split(regex):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {**BYTES, "use_regex": False}]}


VARIANTS = {"smollm": ("gpt2", "smollm", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": True}, BYTES]}}),
            "smaug": ("llama-3.2", "smaug-bpe", {"ignore_merges": False}),
            "tekken": ("gpt2", "tekken", {"pre_tokenizer": split(TEKKEN), "ignore_merges": True})}
try:
    import llama_cpp
except ImportError:
    llama_cpp = None
    print("llama-cpp-python is not installed: its tokens are not compared")


# ---- models -------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


def config(family, **more):
    if family == "gpt2":
        c = dict(n_embd=64, n_layer=2, n_head=4, n_positions=256)
    else:
        c = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
                 rope_theta=10000.0, tie_word_embeddings=False)
    return {"model_type": family, "vocab_size": 512, **c, **more}


CASES = {"gpt2": config("gpt2"), "gpt2-untied": config("gpt2", tie_word_embeddings=False, n_inner=100),
         "llama": config("llama"), "llama-tied": config("llama", tie_word_embeddings=True),
         "llama3-rope": config("llama", rope_scaling=LLAMA3, attention_bias=True, head_dim=24),
         "mistral": config("mistral"), "qwen2": config("qwen2")}


def make(work, name):
    """A model of the case, trained for a minute at most on words that follow each other by rule."""
    rng = random.Random(1)
    words = ["red", "blue", "green", "stone", "river", "cloud", "tree", "bird", "fish", "moon"]
    lines = []
    for _ in range(400):
        k, step = rng.randrange(10), rng.choice([1, 3])
        lines.append(" ".join(words[(k + step * i) % 10] for i in range(24)))
    if not os.path.exists(f"{work}/tok"):
        open(f"{work}/corpus.txt", "w").write("\n".join(lines))
        open(f"{work}/text.jsonl", "w").write("".join(json.dumps({"text": s}) + "\n" for s in lines))
        rlhf("tokenizer", "--train", f"{work}/corpus.txt", "--vocab_size", "400", "--out", f"{work}/tok")
    json.dump(CASES[name], open(f"{work}/{name}.json", "w"))
    rlhf("sft", "--init", f"{work}/{name}.json", "--tokenizer", f"{work}/tok", "--data",
         f"{work}/text.jsonl", "--out", f"{work}/{name}", "--max_steps", "60", "--learning_rate", "5e-3",
         "--per_device_train_batch_size", "8", "--quiet")
    return f"{work}/{name}"


def tensors(path):
    """The tensors of a safetensors file as float32."""
    raw = open(path, "rb").read()
    n = int.from_bytes(raw[:8], "little")
    out = {}
    for name, t in json.loads(raw[8:8 + n]).items():
        if name != "__metadata__":
            a, b = (8 + n + x for x in t["data_offsets"])
            out[name] = np.frombuffer(raw[a:b], np.float32).reshape(t["shape"])
    return out


def expected(directory):
    """What the GGUF file should hold, by an independent rule for each family."""
    c, t, out = json.load(open(f"{directory}/config.json")), tensors(f"{directory}/model.safetensors"), {}
    gpt2 = c["model_type"] == "gpt2"
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
             "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
             "ln_f": "output_norm", "lm_head": "output", "embed_tokens": "token_embd", "norm": "output_norm",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}
    for name, x in t.items():
        parts = name.removeprefix("transformer.").removeprefix("model.").split(".")
        layer = f"blk.{parts[1]}." if parts[0] in ("h", "layers") else ""
        stem = ".".join(parts[2:-1] if layer else parts[:-1])
        if gpt2 and ".c_" in name and x.ndim == 2:
            x = x.T
        if c["model_type"] in ("llama", "mistral") and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = c["num_attention_heads" if "q_proj" in stem else "num_key_value_heads"]
            x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        out[f"{layer}{names[stem]}.{parts[-1]}"] = x
    if c.get("rope_scaling"):
        hd, r = c["head_dim"], c["rope_scaling"]
        wave = 2 * np.pi * c["rope_theta"] ** (np.arange(0, hd, 2) / hd)
        old, f = r["original_max_position_embeddings"], r["factor"]
        s = (old / wave - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])
        x = np.where(wave < old / r["high_freq_factor"], 1,
                     np.where(wave > old / r["low_freq_factor"], f, 1 / ((1 - s) / f + s)))
        out["rope_freqs.weight"] = x.astype(np.float32)
    return out


def check_file(name, directory, path, kind):
    reader, want = gguf.GGUFReader(path), expected(directory)
    got = {t.name: t for t in reader.tensors}
    check(f"{name} {kind} names", set(got) == set(want), sorted(set(got) ^ set(want)))
    asked = gguf.GGMLQuantizationType[kind.upper()]
    for key, x in want.items():
        t = got[key]
        one = x.ndim == 1 or key.startswith("position")
        q = gguf.GGMLQuantizationType.F32 if one else asked
        if q == gguf.GGMLQuantizationType.Q8_0 and x.shape[-1] % 32:
            q = gguf.GGMLQuantizationType.F16
        ok = t.tensor_type == q and list(t.shape) == list(x.shape[::-1]) and t.data_offset % 32 == 0
        check(f"{name} {kind} {key}", ok, (t.tensor_type, t.shape, x.shape))
        if key == "rope_freqs.weight":
            check(f"{name} factors", np.allclose(t.data, x, rtol=1e-5), (t.data, x))
        elif q == gguf.GGMLQuantizationType.F32:
            check(f"{name} {kind} {key} values", np.array_equal(t.data, x))
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(x), q)
            check(f"{name} {kind} {key} values", t.data.tobytes() == data.tobytes())
    return reader


# ---- llama.cpp ----------------------------------------------------------------------------------

def open_llama(path):
    # Keys and values as they are computed: the default, half precision, flips close decisions.
    return llama_cpp.Llama(path, n_ctx=256, n_threads=1, verbose=False, type_k=0, type_v=0, flash_attn=False)


def check_llama(name, directory, path, prompt, steps=64):
    llm = open_llama(path)
    ids = [int(x) for x in rlhf("tokenize", "--model", directory, stdin=prompt + "\n").split()]
    check(f"{name} tokens of the prompt", llm.tokenize(prompt.encode(), add_bos=True, special=True) == ids)
    want = json.loads(rlhf("generate", "--model", directory, "--prompt", prompt, "--temperature", "0",
                           "--max_new_tokens", str(steps), "--json").splitlines()[-1])["completion"]
    out = []
    for token in llm.generate(ids, temp=0.0, top_k=1):
        if token == llm.token_eos() or len(out) == steps:
            break
        out.append(token)
    got = llm.detokenize(out).decode("utf-8", "replace")
    check(f"{name} greedy", got.lstrip() == want.lstrip() and len(out) > 20, f"\n  {got!r}\n  {want!r}")


def comparable(name, s):
    """Where llama.cpp is known to differ, as `rlhf export` says when it writes such a file: it does
    not compose characters (NFC), and puts a space before all text after special tokens."""
    if name == "qwen2.5":
        return unicodedata.is_normalized("NFC", s)
    if name == "mistral-v0.3":
        return not s.startswith(" ") and "<s>" not in s
    return name != "tekken" or s.isascii()  # there it tells capitals by a-z alone


def check_tokenizer(work, name, base, pre, changes):
    """A model of few numbers, so that the file is mostly its tokenizer."""
    directory = f"{work}/tok-{name}"
    shutil.copytree(f"{ASSETS}/tokenizers/{base}", directory)
    subprocess.run(["chmod", "-R", "u+w", directory])
    t = json.load(open(f"{directory}/tokenizer.json"))
    for key, value in changes.items():
        (t["model"] if key == "ignore_merges" else t)[key] = value
    if changes:
        json.dump(t, open(f"{directory}/tokenizer.json", "w"))
    vocab = 1 + max([*json.load(open(f"{directory}/tokenizer.json"))["model"]["vocab"].values()] +
                    [a["id"] for a in json.load(open(f"{directory}/tokenizer.json"))["added_tokens"]])
    family = {"gpt2": "gpt2", "qwen2.5": "qwen2"}.get(base, "llama")
    tiny = dict(n_embd=4, n_layer=1, n_head=1) if family == "gpt2" else \
        dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
             num_key_value_heads=1, tie_word_embeddings=True)
    json.dump(config(family, **{**tiny, "vocab_size": vocab + 3}), open(f"{directory}/c.json", "w"))
    open(f"{directory}/d.jsonl", "w").write('{"text": "a"}\n')
    rlhf("sft", "--init", f"{directory}/c.json", "--tokenizer", directory, "--data", f"{directory}/d.jsonl",
         "--out", f"{directory}/m", "--max_steps", "1", "--quiet")
    rlhf("export", "--model", f"{directory}/m", "--gguf", "f16", "--out", f"{directory}/m.gguf", "--quiet")
    f = gguf.GGUFReader(f"{directory}/m.gguf")
    key = lambda k: f.fields[k].contents() if k in f.fields else None
    cfg = f"{directory}/tokenizer_config.json"
    cfg = json.load(open(cfg)) if os.path.exists(cfg) else {}
    check(f"{name} pre", key("tokenizer.ggml.pre") == pre, key("tokenizer.ggml.pre"))
    check(f"{name} template", key("tokenizer.chat_template") == cfg.get("chat_template"))
    tokens = key("tokenizer.ggml.tokens")
    check(f"{name} tokens", all(tokens[i] == s for s, i in t["model"]["vocab"].items()) and
          all(tokens[a["id"]] == a["content"] for a in t["added_tokens"]))
    types = key("tokenizer.ggml.token_type")
    check(f"{name} types", all(types[a["id"]] == (2 if a["content"] == "<unk>" else 3 if a["special"] else 4)
                               for a in t["added_tokens"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in t["model"]["merges"]]
    check(f"{name} merges", pre == "default" or key("tokenizer.ggml.merges") == merges)
    if not llama_cpp:
        return
    llm = open_llama(f"{directory}/m.gguf")
    lines = STRINGS + json.load(open(f"{ASSETS}/tokenizers/golden_vectors.json"))["strings"]
    rng = random.Random(3)
    ranges = [(32, 127)] * 6 + [(160, 0x250), (0x400, 0x460), (0x4e00, 0x4f00), (0x1f600, 0x1f640)]
    for _ in range(300):
        lines.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40))))
    lines = [s for s in lines if s and not set(s) & set("\n\r\0") and comparable(name, s)]
    ours = rlhf("tokenize", "--tokenizer", directory, stdin="\n".join(lines) + "\n").split("\n")
    for s, row in zip(lines, ours):
        got = llm.tokenize(s.encode(), add_bos=True, special=True)
        check(f"{name} {s!r}", got == [int(x) for x in row.split()], (got, row))


# ---- TensorBoard --------------------------------------------------------------------------------

def check_events(work, directory):
    """Event files of a run that was resumed: TensorBoard reads what metrics.jsonl says."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = ["sft", "--model", directory, "--data", f"{work}/text.jsonl", "--eval_data", f"{work}/text.jsonl",
           "--out", f"{work}/run", "--logging_steps", "2", "--eval_steps", "3", "--save_steps", "4", "--quiet"]
    rlhf(*run, "--max_steps", "6")
    rlhf(*run, "--max_steps", "9", "--resume")
    files = glob.glob(f"{work}/run/runs/events.out.tfevents.*")
    check("a file for each start", len(files) == 2, files)
    reader = EventAccumulator(f"{work}/run/runs", size_guidance={"scalars": 0})
    reader.Reload()
    want = {}
    for line in open(f"{work}/run/metrics.jsonl"):
        j = json.loads(line)
        for k, v in j.items():
            if k != "step":
                tag = "eval/" + k[5:] if k.startswith("eval_") else "train/" + k
                want.setdefault(tag, []).append((j["step"], float(np.float32(v))))
    check("tags", set(reader.Tags()["scalars"]) == set(want), reader.Tags()["scalars"])
    for tag, rows in want.items():
        check(tag, [(e.step, e.value) for e in reader.Scalars(tag)] == rows, reader.Scalars(tag))


work = workdir()
for name in ["gpt2", "llama3-rope", "qwen2"] if QUICK else CASES:
    directory = make(work, name)
    for kind in ("f32", "f16", "bf16", "q8_0"):
        path = f"{work}/{name}-{kind}.gguf"
        rlhf("export", "--model", directory, "--gguf", kind, "--out", path, "--quiet")
        check_file(name, directory, path, kind)
        if llama_cpp and kind in ("f32", "q8_0"):
            check_llama(f"{name} {kind}", directory, path, "stone river cloud")
    report(name)
for model in ("babyllama361", "stories260K"):
    directory = f"{ASSETS}/models/{model}"
    if os.path.exists(directory) and llama_cpp:
        for kind in ("f32", "q8_0"):
            path = f"{work}/{model}-{kind}.gguf"
            rlhf("export", "--model", directory, "--gguf", kind, "--out", path, "--quiet")
            check_llama(f"{model} {kind}", directory, path, "Once upon a time, there was a little girl")
cases = {k: (k, pre, {}) for k, pre in TOKENIZERS.items()} | VARIANTS
for name, (base, pre, changes) in cases.items():
    if os.path.exists(f"{ASSETS}/tokenizers/{base}"):
        check_tokenizer(work, name, base, pre, changes)
        report(name)
check_events(work, f"{work}/qwen2")
finish()
