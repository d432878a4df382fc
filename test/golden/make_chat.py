#!/usr/bin/env python3
"""Golden renderings for test/test_chat.c: conversations, as transformers' own Jinja environment writes them.

Run      python3 test/golden/make_chat.py [OUTPUT_DIR] [--official NAME=FILE ...]      (default: the folder this file lies in)
Needs    Python 3.11, transformers 5.23.0, jinja2 3.1.6. The C build and its tests need none of them: they read chat.json.

Writes   chat.json: the conversations; for each template its Jinja text, its end of turn, what a generation prompt adds to any
         conversation (`ask`), and for each conversation its text, or null where the template refuses it, and what bears loss in
         each turn of the assistant.

The Jinja texts below are written here, from the formats' documentation, as short as they can be: text in, text out, no tools, no
images. They carry the words by which rlhf knows a template. An official text (of a checkpoint's tokenizer_config.json or a
chat_template.jinja) is not kept here; --official NAME=FILE renders one as well and refuses to write if a single text differs.
../shared/assets, where it is there, is compared so for qwen2.5 and llama-3.2.

What the comparison leaves out, since rlhf does it otherwise on purpose:
  llama-3.2      the date is 26 Jul 2024, the template's own default
  phi-3          the end-of-text token behind a conversation that is not generated from
  gemma, -3      a system text that does not begin the conversation: the official text takes it for an answer, here it is refused
  mistral-v0.3   a system text in a conversation that ends with an answer: the official text drops it there, though it was part of
                 what the answer was generated from; here it stays in the user's last turn
"""

import json
import os
import sys

from transformers.utils.chat_template_utils import render_jinja_template

U, A, S = "user", "assistant", "system"
CONVERSATIONS = [
    [(U, "Hi"), (A, "Hello!")],
    [(S, "Be brief."), (U, "Hi"), (A, "Hello!")],
    [(U, "Hi"), (A, "Hello!"), (U, "2+2?"), (A, "4"), (U, "And 3+3?"), (A, "6")],
    [(U, "2+2?")],
    [(S, "Be brief."), (U, "Hi"), (A, "Hello!"), (U, "2+2?")],
    [(S, "Be brief."), (U, "Hi"), (A, "Hello!"), (U, "2+2?"), (A, "4")],
    [(U, "Größe? 你好 🙂\u200d"), (A, "é, in two characters: e\u0301; and Ünï")],
    [(S, " \tspaces around \n"), (U, "  two before, one behind "), (A, "\n\nnewlines\n"), (U, "ends in à"), (A, "\u00a0Voilà\u3000\x85")],
    [(U, "think"), (A, "<think>\nhm, so\n</think>\n\nyes"), (U, "again"), (A, "<think>well</think>\n\n\nno")],
    [(U, "think"), (A, "<think>\n\n</think>\n\nyes"), (U, "again"), (A, "\n\nno"), (A, "<think>a</think>b</think>\nc")],
    [(U, "a <|im_end|> b </s> c <end_of_turn> d"), (A, "<|eot_id|>")],
    [(U, "one"), (U, "two"), (A, "three")],
    [(S, "first"), (U, "a"), (S, "second"), (U, "b"), (A, "c")],
    [(A, "I begin."), (U, "So do.")],
    [(S, ""), (U, ""), (A, "")],
]

EACH = "{% for m in messages %}"
END = "{% endfor %}"
# A turn of every ChatML dialect.
IM_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
IM_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns do not alternate') }}{% endif %}"


def chatml(system):
    """ChatML with a system text for conversations that begin without."""
    first = "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\n" + system + "<|im_end|>\\n' }}{% endif %}"
    return EACH + (first if system else "") + IM_TURN + END + IM_ASK


def bars(close, after, ask):
    """Turns <|role|> newline content, as Phi-3 and Zephyr write them."""
    turn = "".join("{%% %s m.role == '%s' %%}{{ '<|%s|>\\n' + m.content + %s }}%s" % (word, role, role, close, after)
                   for word, role in (("if", S), ("elif", U), ("elif", A)))
    return EACH + turn + "{% endif %}" + END + "{% if add_generation_prompt %}{{ '" + ask + "' }}{% endif %}"


QWEN3 = """\
{%- set ns = namespace(last_query_index=messages|length - 1, seen=false) %}
{%- for m in messages|reverse %}
    {%- if m.role == 'user' and not ns.seen %}
        {%- set ns.seen = true %}
        {%- set ns.last_query_index = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set answer = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {%- set answer = '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ answer.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + answer + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA_TURN = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content|trim + '<|eot_id|>' }}"
LLAMA_ASK = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
LLAMA32 = """\
{{- bos_token }}
{%- set date_string = date_string|default('26 Jul 2024') %}
{%- set first = messages[0].role == 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{{- (messages[0].content|trim if first else '') + '<|eot_id|>' }}
{%- for m in (messages[1:] if first else messages) %}""" + LLAMA_TURN + "{%- endfor %}" + LLAMA_ASK

# The system text goes into one of the user's turns: which, `here` says.
INST = """\
{%%- set has = messages[0].role == 'system' %%}
{%%- set turns = messages[1:] if has else messages %%}
{%%- if has and not turns %%}{{ raise_exception('no turn of the user') }}{%%- endif %%}
{%%- set ns = namespace(last=0) %%}
{%%- for m in turns %%}{%%- if m.role == 'user' %%}{%%- set ns.last = loop.index0 %%}{%%- endif %%}{%%- endfor %%}
{{- bos_token }}
{%%- for m in turns %%}""" + ALTERNATE + """
    {%%- if m.role == 'user' %%}
        {%%- set first_user_prefix = messages[0].content + '\\n\\n' if has and %s else '' %%}
        {{- %s }}
    {%%- elif m.role == 'assistant' %%}
        {{- %s }}
    {%%- else %%}{{ raise_exception('a system turn') }}
    {%%- endif %%}
{%%- endfor %%}"""
INST = INST.replace(ALTERNATE, ALTERNATE.replace("%", "%%"))
GEMMA = """\
{{- bos_token }}
{%- for m in messages %}""" + ALTERNATE + """
    {%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content|trim + '<end_of_turn>\\n' }}
{%- endfor %}"""
GEMMA_ASK = "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"

# name: Jinja text, begin, end of text, end of turn, what follows it, options
TEMPLATES = {
    "plain": (EACH + "{{ m.content + '\\n' }}" + END, "", "", "", "\n", {}),
    "hh": (EACH + "{{ '\\n\\n' + {'system': 'System', 'user': 'Human:', 'assistant': 'Assistant:'}[m.role].strip(':') + ': ' "
           "+ m.content }}" + END + "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}", "", "", "", "", {}),
    "chatml": (chatml(""), "", "", "<|im_end|>", "\n", {}),
    "qwen2": (chatml("You are a helpful assistant."), "", "", "<|im_end|>", "\n", {}),
    "qwen2.5": (chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), "", "", "<|im_end|>", "\n", {}),
    "qwen3": (QWEN3, "", "", "<|im_end|>", "\n", {}),
    "qwen3-nothink": (QWEN3, "", "", "<|im_end|>", "\n", {"enable_thinking": False}),
    "smollm2": (chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), "", "", "<|im_end|>", "\n", {}),
    "llama-3": ("{{ bos_token }}" + EACH + LLAMA_TURN + END + LLAMA_ASK, "<|begin_of_text|>", "", "<|eot_id|>", "", {}),
    "llama-3.2": (LLAMA32, "<|begin_of_text|>", "", "<|eot_id|>", "", {"date_string": "26 Jul 2024"}),
    "mistral-v0.1": (INST % ("loop.first", "' [INST] ' + first_user_prefix + m.content + ' [/INST]'", "' ' + m.content + eos_token"),
                     "<s>", "</s>", "</s>", "", {}),
    "mistral-v0.3": (INST % ("loop.index0 == ns.last", "'[INST] ' + first_user_prefix + m.content + '[/INST]'",
                             "' ' + m.content|trim + eos_token"), "<s>", "</s>", "</s>", "", {}),
    "gemma": (GEMMA + GEMMA_ASK, "<bos>", "<eos>", "<end_of_turn>", "\n", {}),
    "gemma-3": (INST % ("loop.first", "'<start_of_turn>user\\n' + first_user_prefix + m.content|trim + '<end_of_turn>\\n'",
                        "'<start_of_turn>model\\n' + m.content|trim + '<end_of_turn>\\n'") + GEMMA_ASK,
                "<bos>", "<eos>", "<end_of_turn>", "\n", {}),
    "phi-3": (bars("'<|end|>\\n'", "", "<|assistant|>\\n"), "", "", "<|end|>", "\n", {}),
    "zephyr": (bars("eos_token", "\n", "<|assistant|>\\n"), "", "</s>", "</s>", "\n", {}),
}


def render(name, jinja, turns, generate):
    """The text, or None where the template refuses the conversation."""
    _, bos, eos, _, _, options = TEMPLATES[name]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return render_jinja_template([messages], chat_template=jinja, add_generation_prompt=generate, bos_token=bos,
                                     eos_token=eos, **options)[0][0]
    except Exception as error:
        if "TemplateError" not in type(error).__name__:
            raise
        return None


def losses(name, jinja, turns):
    """What bears loss in each turn of the assistant: its part of the conversation up to it, without what follows its end."""
    close, after = TEMPLATES[name][3:5]
    last_user = max((i for i, (role, _) in enumerate(turns) if role == U), default=len(turns) - 1)
    out = []
    for i, (role, content) in enumerate(turns):
        if role != A:
            continue
        if name.startswith("qwen3") and not (i > last_user and i == len(turns) - 1):
            thought = ""
            if "</think>" in content:
                thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
                content = content.split("</think>")[-1].lstrip("\n")
            if i > last_user and thought:
                content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
            out.append(content + close)
            continue
        prompt = render(name, jinja, turns[:i], True) if i else render(name, jinja, turns[:1], False)[:0]
        whole = render(name, jinja, turns[:i + 1], False)
        if not i or not whole.startswith(prompt):    # begins the conversation, or thinks where it was told not to
            head = "<|im_start|>assistant\n" if "im_start" in whole else None
            if head is None:
                return None
            prompt = whole[:whole.rindex(head) + len(head)]
        out.append(whole[len(prompt):].removesuffix(after) if after else whole[len(prompt):])
    return out


def compare(name, file):
    """Refuses an official text that renders anything else."""
    with open(file, encoding="utf-8") as f:
        official = f.read()
    if file.endswith(".json"):
        official = json.loads(official)["chat_template"]
    for turns in CONVERSATIONS:
        for generate in (False, True):
            if name == "mistral-v0.3" and turns[0][0] == S and turns[-1][0] == A:
                continue
            if name.startswith("gemma") and S in [role for role, _ in turns[1:]]:
                continue
            ours, theirs = (render(name, text, turns, generate) for text in (TEMPLATES[name][0], official))
            if ours != theirs:
                sys.exit(f"{file} differs from {name}:\n{turns}\n{ours!r}\n{theirs!r}")
    print(f"{name}: as {file}")


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    out, args = here, sys.argv[1:]
    assets = os.environ.get("RLHF_TEST_ASSETS", os.path.join(here, "../../../shared/assets"))
    official = [(name, os.path.join(assets, "tokenizers", name, "tokenizer_config.json")) for name in ("qwen2.5", "llama-3.2")]
    official = [(name, file) for name, file in official if os.path.exists(file)]
    while args:
        arg = args.pop(0)
        if arg == "--official":
            official.append(args.pop(0).split("=", 1))
        else:
            out = arg
    for name, file in official:
        compare(name, file)
    golden = {"conversations": [[{"role": role, "content": content} for role, content in turns] for turns in CONVERSATIONS],
              "templates": []}
    for name, (jinja, _, _, close, _, _) in TEMPLATES.items():
        rows, ask = [], None
        for turns in CONVERSATIONS:
            text, prompt = (render(name, jinja, turns, generate) for generate in (False, True))
            if text is not None:
                ask = prompt[len(text):] if ask is None else ask
                if prompt != text + ask:
                    sys.exit(f"{name}: the prompt is not the text and {ask!r}: {prompt!r}")
            rows.append({"text": text, "loss": losses(name, jinja, turns) if text is not None else None})
        golden["templates"].append({"name": name, "close": close, "jinja": jinja, "ask": ask, "renderings": rows})
    with open(os.path.join(out, "chat.json"), "w", encoding="utf-8") as f:
        f.write(json.dumps(golden, indent=0, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
