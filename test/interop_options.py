"""TRL's options: every name is accepted, or an error says why or what to use.

Reads the fields of SFTConfig, RewardConfig, PPOConfig, ModelConfig and ScriptArguments in the sources
of TRL's last release and of the last that has PPO, and of the TrainingArguments they extend, and says
each to the command that stands for it, with TRL's default. Then a --config file that says a run the
way TRL would. Ends with "N passed, N failed".
"""
import ast, filecmp, glob, json, os, subprocess, sys

import transformers

from interop import PROGRAM, check, finish, rlhf, workdir

# Values that TRL has by default and that ask for something else here; each is refused with a reason.
OTHERWISE = {"assistant_only_loss", "bnb_4bit_quant_type", "ddp_timeout", "ds3_gather_for_generation", "debug", "hub_strategy",
             "local_rollout_forward_batch_size", "logging_nan_inf_filter", "num_sample_generations", "packing_strategy",
             "pad_to_multiple_of", "per_device_eval_batch_size", "project", "sft_model_path", "truncation_mode"}


def fields(path, name):
    """name: default of a dataclass in a source file; None where there is none."""
    out = {}
    for node in ast.walk(ast.parse(open(path).read())):
        if not (isinstance(node, ast.ClassDef) and node.name == name):
            continue
        for s in node.body:
            if not isinstance(s, ast.AnnAssign):
                continue
            value = s.value
            if isinstance(value, ast.Call):
                value = next((k.value for k in value.keywords if k.arg == "default"), None)
            try:
                out[s.target.id] = ast.literal_eval(value) if value else None
            except ValueError:
                out[s.target.id] = None
    return out


def of_trl():
    """command: {option: default}"""
    base = fields(f"{os.path.dirname(transformers.__file__)}/training_args.py", "TrainingArguments")
    out = {"sft": {}, "rm": {}, "ppo": {}}
    for trl in sorted(glob.glob(f"{sys.prefix}/trl==*/trl")):
        common = base | fields(f"{trl}/trainer/base_config.py", "_BaseConfig") | \
            fields(f"{trl}/trainer/model_config.py", "ModelConfig") | fields(f"{trl}/scripts/utils.py", "ScriptArguments")
        out["sft"] |= common | fields(f"{trl}/trainer/sft_config.py", "SFTConfig")
        out["rm"] |= common | fields(f"{trl}/trainer/reward_config.py", "RewardConfig")
        ppo = f"{trl}/experimental/ppo/ppo_config.py"
        if os.path.exists(ppo):
            out["ppo"] |= common | fields(ppo, "PPOConfig")
    return out


def say(command, name, value):
    """The exit status and what was said; --help stands behind, so that nothing runs."""
    r = subprocess.run([PROGRAM, command, f"--{name}={value}", "--help"], capture_output=True, text=True)
    return r.returncode, r.stderr.strip()


for command, options in of_trl().items():
    check(f"{command} fields", len(options) > 130, len(options))
    accepted, refused = [], []
    for name, default in sorted(options.items()):
        text = "x" if default is None else str(default).lower() if isinstance(default, bool) else default
        status, error = say(command, name, text)
        check(f"{command} --{name}", status == 0 or (status == 2 and "unknown option" not in error), error)
        if default is not None and name not in OTHERWISE:
            check(f"{command} --{name} {text}", status == 0, error)
        (refused if status else accepted).append(name)
    print(f"{command}: {len(accepted)} taken with TRL's default, {len(refused)} with a reason why not")

# One run said twice: to the command line, and as TRL's names in a file.
work = workdir()
rlhf("tokenizer", "--train", "README.md", "--vocab_size", 300, "--out", f"{work}/words", "--quiet")
json.dump(dict(model_type="llama", vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
               intermediate_size=64, max_position_embeddings=128), open(f"{work}/init.json", "w"))
with open(f"{work}/d.jsonl", "w") as f:
    f.writelines(json.dumps(dict(prompt=f"{i} and {i}", completion=f" is {i + i}")) + "\n" for i in range(20))
start = ["sft", "--init", f"{work}/init.json", "--tokenizer", f"{work}/words"]
rlhf(*start, "--data", f"{work}/d.jsonl", "--out", f"{work}/a", "--learning_rate", 1e-3, "--max_steps", 4, "--seed", 7,
     "--lr-scheduler-type", "cosine", "--per_device_train_batch_size", 4, "--quiet")
json.dump(dict(dataset_name=f"{work}/d.jsonl", output_dir=f"{work}/b", learning_rate=1e-3, max_steps=4, seed=7,
               lr_scheduler_type="cosine", per_device_train_batch_size=4, report_to=["tensorboard"], packing=False,
               eval_strategy=None, bf16=False, completion_only_loss=True), open(f"{work}/c.json", "w"))
rlhf(*start, "--config", f"{work}/c.json", "--quiet")
check("the same weights", filecmp.cmp(f"{work}/a/model.safetensors", f"{work}/b/model.safetensors", shallow=False))
run = [json.load(open(f"{work}/{x}/run.json")) for x in "ab"]
check("the same options", {k for k in run[0] if run[0][k] != run[1].get(k)} == {"output_dir"}, run)
json.dump(dict(packing=True), open(f"{work}/d.json", "w"))
r = subprocess.run([PROGRAM, *start, "--config", f"{work}/d.json"], capture_output=True, text=True)
check("a file is refused likewise", r.returncode == 2 and "--packing: sequences lie" in r.stderr, r.stderr)
finish()
