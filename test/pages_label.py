"""`rlhf label` as people use it: by mouse and by keyboard, in headless Chromium.

    build/pages/venv/bin/python test/pages_label.py [WORD]      (`make pages` runs it)

The program is the real one. What was chosen is checked in the file that it writes, by the texts that
were on the screen: on which side an answer was shown must not matter. Pictures go to build/pages;
`picture` instead of WORD writes the one in README.md, data/page/label.webp.
"""
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import pages_tool as tool
from pages_tool import find, text, until

SCRIPT = ("<script>document.title = 'taken over'</script>"
          "<img src=x onerror=\"document.title='taken over'\">")
TMP = tempfile.TemporaryDirectory(prefix="rlhf-pages-")


# ---- The program ---------------------------------------------------------------------------------

def write_lines(path, records):
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read_lines(path):
    """The records of a file, each line of which must be whole."""
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "", f"{path} ends within a line"
    return [json.loads(line) for line in lines]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Label:
    """`rlhf label` on a port of its own, in a directory of its own."""

    def __init__(self, *options, pairs=None, prompts=None, people=None, extra=None):
        self.dir = Path(tempfile.mkdtemp(dir=TMP.name))
        self.out = self.dir / "out.jsonl"
        self.options = ["--out", self.out, "--port", str(free_port()), *options]
        if pairs and "--aspects" not in options:
            self.options += ["--aspects", "accuracy,edge_cases"]
        for option, records in {"--pairs": pairs, "--prompts": prompts, **(extra or {})}.items():
            if records:
                self.options += [option, write_lines(self.dir / f"{option[2:]}.jsonl", records)]
        if people:
            file = self.dir / "people.json"
            names = {"annotator": "name", "annotator_type": "kind", "domains": "domains"}
            file.write_text(json.dumps([{names[k]: v for k, v in p.items()} for p in people]))
            self.options += ["--annotators", file]
        self.process = None
        tool.endings.append(self.kill)
        self.start()

    def start(self):
        self.log = self.dir / "log"
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen([tool.PROGRAM, "label", *map(str, self.options)],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.links = until(lambda: self.process.poll() is not None or self.read_links(),
                           "the links of rlhf label")
        assert self.process.poll() is None, f"{self.process.returncode} {self.log.read_text()}"

    def read_links(self):
        found = re.findall(r"(\S+)\s+(http://127\.0\.0\.1:\d+/#\S+)", self.log.read_text())
        return dict(found) if any(name == "operator" for name, _ in found) else None

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """Ends it as Ctrl-C does, and returns what it wrote."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait()
        return self.records()

    def records(self):
        return read_lines(self.out)


def run(*arguments):
    """Standard output of the program, which must succeed."""
    command = [tool.PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def base_model():
    """A model as small as can be, made once."""
    model = Path(TMP.name) / "model"
    if not model.exists():
        config = Path(TMP.name) / "config.json"
        config.write_text(json.dumps({"model_type": "llama", "vocab_size": 512, "hidden_size": 32,
                                      "num_hidden_layers": 1, "num_attention_heads": 2,
                                      "intermediate_size": 64, "max_position_embeddings": 1024}))
        data = write_lines(Path(TMP.name) / "sft.jsonl", [{"prompt": "a", "completion": " b"}] * 2)
        words = Path(TMP.name) / "words"
        run("tokenizer", "--train", tool.ROOT / "README.md", "--vocab_size", 512, "--out", words)
        run("sft", "--init", config, "--tokenizer", words, "--data", data, "--out", model)
    return model


# ---- What there is to judge ----------------------------------------------------------------------

def make_pairs(n, domain="numbers"):
    """Pairs of a good and a bad answer; the good one is the first of every other pair."""
    pairs = []
    for i in range(n):
        good = f"good {i}: it is {i + 1}.\n  (in two  lines)"
        bad = f"bad {i}: {SCRIPT if i == 1 else 'who knows?'}"
        chat = [{"role": "system", "content": "Be exact."},
                {"role": "user", "content": f"Count to {i}."},
                {"role": "assistant", "content": "Done."},
                {"role": "user", "content": "What comes next?"}]
        pairs.append({"item": f"{domain}-{i}", "domain": domain,
                      "prompt": chat if i % 3 else f"What follows {i}?",
                      "answers": [good, bad] if i % 2 else [bad, good]})
    return pairs


# One of each kind, and what is entered beside it.
WANTS = ({"choice": "good", "strength": 3, "aspects": {"accuracy": "good", "edge_cases": "bad"}},
         {"choice": "bad", "unsafe": ["good"]},
         {"choice": "tie", "reason": "Both say the same: \"a\", 1, 2 and <b>."},
         {"choice": "both_bad", "unsafe": ["good", "bad"]},
         {"choice": "skip"},
         {"choice": "bad", "strength": 1, "aspects": {"edge_cases": "tie"}},
         {"choice": "good"})


def shown(driver):
    """What the page shows as A and B."""
    return [driver.find_element(By.ID, i).get_property("textContent") for i in ("a-text", "b-text")]


def number(driver):
    """Which pair is on the page, by its texts."""
    return int(re.match(r"(?:good|bad) (\d+):", shown(driver)[0]).group(1))


def side(driver, which):
    """A or B: where the good or the bad answer is shown; other words stay what they are."""
    if which in ("tie", "both_bad", "skip"):
        return which
    return "AB"[[s.startswith(which) for s in shown(driver)].index(True)]


def open_link(driver, link):
    driver.get("about:blank")  # a link that differs after the # only would not load again
    driver.get(link)


def js(driver, expression):
    return driver.execute_script("return " + expression)


def on_item(driver):
    """Waits for a pair that can be judged."""
    return until(lambda: driver.find_element(By.ID, "item").is_displayed() and js(driver, "!busy")
                 and number(driver) >= 0 and driver, "a pair")


def count(driver):
    """How many the page says are done."""
    return int(text(driver, "#count").split()[0])


def press(driver, *keys):
    ActionChains(driver).send_keys(*keys).perform()


def ctrl_enter(driver):
    ActionChains(driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()


def click(driver, css):
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", find(driver, css))
    find(driver, css).click()


def pick(driver, field, value):
    click(driver, f"label:has(input[name='{field}'][value='{value}'])")


def enter_by_mouse(driver, want):
    pick(driver, "choice", side(driver, want["choice"]))
    if "strength" in want:
        pick(driver, "strength", want["strength"])
    for aspect, which in want.get("aspects", {}).items():
        pick(driver, f"aspect {aspect}", side(driver, which))
    for which in want.get("unsafe", []):
        click(driver, f"label:has([name=unsafe-{side(driver, which).lower()}])")
    if "reason" in want:
        click(driver, "#reason")
        press(driver, want["reason"])


def tab_to(driver, css):
    """By the tabulator alone, as who has no mouse goes."""
    goal = driver.find_element(By.CSS_SELECTOR, css)
    for _ in range(60):
        press(driver, Keys.TAB)
        if driver.switch_to.active_element == goal:
            return
    raise AssertionError(f"the tabulator does not lead to {css}")


KEYS = {"A": ("a", "1", Keys.ARROW_LEFT), "B": ("b", "2", Keys.ARROW_RIGHT),
        "tie": ("t",), "both_bad": ("n",), "skip": ("s",)}


def enter_by_keyboard(driver, want, turn):
    keys = KEYS[side(driver, want["choice"])]
    press(driver, keys[turn % len(keys)])
    press(driver, *["+"] * want.get("strength", 0))
    for which in want.get("unsafe", []):
        tab_to(driver, f"[name=unsafe-{side(driver, which).lower()}]")
        press(driver, Keys.SPACE)
    for aspect, which in want.get("aspects", {}).items():
        tab_to(driver, f"[name='aspect {aspect}']")
        press(driver, Keys.SPACE)  # the first of the three
        press(driver, *[Keys.ARROW_RIGHT] * ["A", "tie", "B"].index(side(driver, which)))
    if "reason" in want:
        tab_to(driver, "#reason")
        press(driver, want["reason"])


def saved(driver, done):
    """Waits until the page says that so many are saved."""
    until(lambda: count(driver) == done and js(driver, "!busy"), f"{done} saved")


def label(driver, wants, mouse=True):
    """Judges the pair on the page, and notes in wants, by number, what and how it was shown."""
    on_item(driver)
    i, done = number(driver), count(driver)
    want = dict(WANTS[i % len(WANTS)], shown=shown(driver))
    if mouse:
        enter_by_mouse(driver, want)
        click(driver, "#compare [type=submit]")
    else:
        enter_by_keyboard(driver, want, i)
        if "reason" in want:
            ctrl_enter(driver)
        else:
            press(driver, Keys.ENTER)
    saved(driver, done + 1)
    assert "Saved" in text(driver, "#status"), text(driver, "#status")
    assert i not in wants, f"pair {i} was shown again"
    wants[i] = want
    return i


def own(pair, which):
    """A or B in the pair's own order, which is the file's."""
    if which not in ("good", "bad"):
        return which
    return "AB"[[a.startswith(which) for a in pair["answers"]].index(True)]


def check_record(record, pair, want, annotator):
    """A judgement in the file against what was seen and done on the page."""
    expected = {"item": pair["item"], "prompt": pair["prompt"], "answers": pair["answers"],
                "choice": own(pair, want["choice"]), "domain": pair["domain"],
                "order": [pair["answers"].index(s) for s in want["shown"]],
                "strength": want.get("strength"), "reason": want.get("reason"),
                "aspects": None, "unsafe": None, **annotator}
    if "aspects" in want:
        expected["aspects"] = {name: own(pair, which) for name, which in want["aspects"].items()}
    if "unsafe" in want:
        expected["unsafe"] = [a.split()[0] in want["unsafe"] for a in pair["answers"]]
    for key, value in expected.items():
        assert record.get(key) == value, f"{pair['item']}: {key} is {record.get(key)!r}, not {value!r}"
    assert 0 < record["seconds"] < 3600, record["seconds"]


def check_file(program, pairs, wants, annotator):
    """Every judgement of an annotator, once."""
    mine = [r for r in program.records() if r["annotator"] == annotator["annotator"]]
    by_item = {r["item"]: r for r in mine}
    assert len(by_item) == len(mine), "an item twice"
    assert len(mine) == len(wants), f"{len(mine)} judgements in the file, {len(wants)} made"
    for i, want in wants.items():
        check_record(by_item[pairs[i]["item"]], pairs[i], want, annotator)


ANN = {"annotator": "ann", "annotator_type": "expert"}
BOB = {"annotator": "bob", "annotator_type": "lay"}


# ---- Tests ---------------------------------------------------------------------------------------

def test_twenty_pairs():
    """Ten by mouse, a reload, five by keyboard, SIGKILL, undo, five more: each once, as meant."""
    pairs = make_pairs(21)
    program = Label(pairs=pairs, people=[dict(ANN, domains=["numbers"])])
    driver, wants = tool.browser(), {}
    open_link(driver, program.links["ann"])
    for _ in range(10):
        label(driver, wants)
    driver.refresh()
    on_item(driver)
    assert count(driver) == 10, "a reload loses count"
    for _ in range(5):
        label(driver, wants, mouse=False)
    program.kill()
    assert len(program.records()) == 15, "what the page called saved is not in the file"
    program.start()
    press(driver, "u")  # what was said before the kill comes back as it was
    saved(driver, 14)
    on_item(driver)
    assert len(program.records()) == 14
    press(driver, Keys.ENTER)
    saved(driver, 15)
    for _ in range(5):
        label(driver, wants, mouse=False)
    check_file(program, pairs, wants, ANN)
    sides = {tuple(r["order"]) for r in program.records()}
    assert len(sides) == 2, "the first answer was always on the same side"
    found = [c for c in tool.complaints(driver) if "ERR_CONNECTION" not in c]
    assert not found, found

    # The file is what the next commands read.
    program.stop()
    report = json.loads(run("raters", "--data", program.out, "--json").splitlines()[-1])
    assert report["judgements"] == sum(w["choice"] != "skip" for w in wants.values()), report
    assert "who knows?" in run("rm", "--model", base_model(), "--data", program.out, "--dry_run")


def test_server_away():
    """The program is killed before a judgement is sent: the page keeps it and saves it once later."""
    pairs = make_pairs(4)
    program = Label(pairs=pairs, people=[ANN])
    driver, wants = tool.browser(), {}
    open_link(driver, program.links["ann"])
    label(driver, wants)
    on_item(driver)
    i = number(driver)
    want = {"choice": "bad", "strength": 2, "shown": shown(driver)}
    enter_by_mouse(driver, want)
    program.kill()
    press(driver, Keys.ENTER)
    until(lambda: "Not saved yet" in text(driver, "#status"), "the page to say that nothing is saved")
    assert shown(driver) == want["shown"], "the page went on without having saved"
    assert len(program.records()) == 1
    program.start()
    saved(driver, 2)
    wants[i] = want
    label(driver, wants)
    check_file(program, pairs, wants, ANN)


# Instead of the next answer to a path, the page gets another, again and again for `left` times.
INSTEAD = """
const [asked, status, body, times] = arguments, real = window.fetch;
let left = times;
window.fetch = async (path, options) => {
    if (path !== asked || left-- <= 0) return real(path, options);
    return new Response(JSON.stringify(body), {status, headers: {"Retry-After": "0.1"}});
};
"""

# The next request to a path reaches the server, its answer does not reach the page.
LOSE = """
const real = window.fetch;
let left = 1;
window.fetch = async (path, options) => {
    const answer = await real(path, options);
    if (path !== arguments[0] || left-- <= 0) return answer;
    await answer.text();
    throw new TypeError("lost");
};
"""


def test_lost_answer():
    """The server has stored a judgement, the page does not get to know: it is not stored again."""
    pairs = make_pairs(4)
    program = Label(pairs=pairs, people=[ANN])
    driver, wants = tool.browser(), {}
    open_link(driver, program.links["ann"])
    on_item(driver)
    driver.execute_script(LOSE, "api/judge")
    label(driver, wants)
    label(driver, wants, mouse=False)
    check_file(program, pairs, wants, ANN)

    # The same for undo: what comes next shows that it was taken back, once.
    on_item(driver)
    driver.execute_script(LOSE, "api/undo")
    click(driver, "#undo")
    saved(driver, 1)
    on_item(driver)
    wants.pop(number(driver))
    label(driver, wants)
    check_file(program, pairs, wants, ANN)


def test_too_fast():
    """A server that asks to wait is waited for."""
    program = Label(pairs=make_pairs(3), people=[ANN])
    driver, wants = tool.browser(), {}
    open_link(driver, program.links["ann"])
    on_item(driver)
    driver.execute_script(INSTEAD, "api/judge", 429, {"error": "too fast"}, 3)
    label(driver, wants)
    assert len(program.records()) == 1


def test_refused():
    """What the server refuses stays on the page, with the reason."""
    program = Label(pairs=make_pairs(3), people=[ANN])
    driver = tool.browser()
    open_link(driver, program.links["ann"])
    on_item(driver)
    driver.execute_script(INSTEAD, "api/judge", 400, {"error": "reason is too long"}, 1)
    press(driver, "b", Keys.ENTER)
    until(lambda: text(driver, "#status") == "Not saved: Reason is too long.", "the reason")
    assert js(driver, "entered().choice") == "B"
    assert not program.out.exists() or not program.records()
    press(driver, Keys.ENTER)
    saved(driver, 1)
    assert len(program.records()) == 1


def test_two_annotators():
    """Two at once: each sees every item once, neither sees what the other entered."""
    pairs = make_pairs(6)
    program = Label("--per_item", "2", pairs=pairs, people=[ANN, BOB])
    a, b = tool.browser(), tool.browser()
    open_link(a, program.links["ann"])
    open_link(b, program.links["bob"])
    ann, bob = {}, {}
    for turn in range(6):
        label(a, ann, mouse=turn % 2)
        label(b, bob, mouse=not turn % 2)
    for driver in (a, b):
        until(lambda d=driver: text(d, "#notice-title") == "All done", "the end")
    tool.screenshot(a, "label-done")
    tool.accessible(a)
    check_file(program, pairs, ann, ANN)
    check_file(program, pairs, bob, BOB)
    assert len(program.records()) == 12
    report = json.loads(run("raters", "--data", program.out, "--json").splitlines()[-1])
    assert set(report["annotator"]) == {"ann", "bob"}, report["annotator"]


def test_same_annotator_twice():
    """One person in two windows: the second window is told that the pair is gone, and goes on."""
    pairs = make_pairs(4)
    program = Label(pairs=pairs, people=[ANN])
    a, b = tool.browser(), tool.browser()
    for driver in (a, b):
        open_link(driver, program.links["ann"])
        on_item(driver)
    assert number(a) == number(b)
    wants = {}
    label(a, wants)
    before = number(b)
    press(b, "a", Keys.ENTER)
    until(lambda: "Not counted" in text(b, "#status"), "the second window to be told")
    on_item(b)
    assert number(b) != before
    check_file(program, pairs, wants, ANN)


def test_undo():
    """The last judgement comes back as it was entered, and is replaced by what is entered then."""
    pairs = make_pairs(4)
    program = Label(pairs=pairs, people=[ANN])
    driver, wants = tool.browser(), {}
    open_link(driver, program.links["ann"])
    on_item(driver)
    first = number(driver)
    want = {"choice": "good", "strength": 2, "aspects": {"accuracy": "bad"}, "unsafe": ["bad"],
            "reason": "because"}
    enter_by_mouse(driver, want)
    before = js(driver, "entered()")
    click(driver, "#compare [type=submit]")
    saved(driver, 1)
    on_item(driver)
    assert number(driver) != first
    press(driver, "u")
    saved(driver, 0)
    on_item(driver)
    assert number(driver) == first, "another pair came back"
    again = js(driver, "entered()")
    assert again.pop("seconds") >= before.pop("seconds") > 0
    assert again == before, f"{again} came back for {before}"
    assert not driver.find_element(By.ID, "undo").is_displayed(), "there is nothing to undo"
    seen = shown(driver)
    pick(driver, "choice", side(driver, "bad"))
    click(driver, "#compare [type=submit]")
    saved(driver, 1)
    wants[first] = dict(want, choice="bad", shown=seen)
    label(driver, wants)
    check_file(program, pairs, wants, ANN)


def test_text_stays_text():
    """Answers with scripts and tags show as they are, spaces and lines kept, whatever their length."""
    answers = [SCRIPT + "\n\n    four  spaces\n\ttab &amp; <b>bold</b>", "long " * 4000 + "w" * 3000]
    pair = {"item": "x", "domain": "d", "prompt": SCRIPT, "answers": answers}
    program = Label(pairs=[pair], people=[ANN])
    driver = tool.browser()
    open_link(driver, program.links["ann"])
    find(driver, "#compare")
    assert sorted(shown(driver)) == sorted(answers)
    assert driver.find_element(By.CSS_SELECTOR, "#turns .text").get_property("textContent") == SCRIPT
    assert driver.title.startswith("Pair 1"), driver.title
    assert not driver.find_elements(By.CSS_SELECTOR, "#item script, #item img, #item b")
    style = js(driver, "getComputedStyle($('a-text')).whiteSpace")
    assert style == "pre-wrap", style
    assert not tool.complaints(driver)
    tool.accessible(driver)


def test_policy():
    """The page's own scripts and styles, and nothing else."""
    program = Label(pairs=make_pairs(2), people=[ANN])
    driver = tool.browser()
    open_link(driver, program.links["ann"])
    on_item(driver)
    ran = driver.execute_script("""
        const s = document.createElement("script");
        s.textContent = "window.inlined = true";
        document.head.append(s);
        return Boolean(window.inlined);""")
    assert not ran, "an inline script ran"
    assert any("Content Security Policy" in c for c in tool.complaints(driver))
    asked = js(driver, "performance.getEntriesByType('resource').map(e => e.name)")
    host = program.links["ann"].split("/#")[0]
    assert asked and all(a.startswith(host) for a in asked), asked
    secret = program.links["ann"].split("#")[1]
    assert not any(secret in a for a in asked), "the token is part of an address"
    assert not driver.get_cookies()
    kept = js(driver, "JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert secret not in kept, kept


def test_keys_and_focus():
    """Single keys do nothing in text fields or when they are turned off; focus goes to the new pair."""
    program = Label(pairs=make_pairs(4), people=[ANN])
    driver = tool.browser()
    open_link(driver, program.links["ann"])
    on_item(driver)
    assert driver.switch_to.active_element.get_attribute("id") == "title"
    press(driver, Keys.ENTER)
    until(lambda: "Choose an answer" in text(driver, "#status"), "to be asked for a choice")
    tab_to(driver, "#reason")
    press(driver, "absent 12tnsu+-")
    assert js(driver, "entered().choice") == ""
    assert js(driver, "$('reason').value") == "absent 12tnsu+-"
    driver.execute_script("document.activeElement.blur()")
    press(driver, "t", "+")
    assert js(driver, "entered().choice") == "tie"
    assert js(driver, "entered().strength") is None, "a tie has no strength"
    press(driver, "2", "+", "+", "-")
    assert js(driver, "[entered().choice, entered().strength]") == ["B", 1]

    # What is entered outlives a reload.
    driver.refresh()
    on_item(driver)
    assert js(driver, "[entered().choice, entered().strength, entered().reason]") == \
        ["B", 1, "absent 12tnsu+-"]
    press(driver, Keys.ENTER)
    saved(driver, 1)
    on_item(driver)
    assert driver.switch_to.active_element.get_attribute("id") == "title", "focus stays behind"
    assert js(driver, "scrollY") == 0
    assert js(driver, "entered().choice") == "", "the next pair has a choice already"

    # Turned off, for whom dictation or a screen reader types single letters.
    driver.execute_script("document.querySelector('#help details').open = true")
    click(driver, "label:has(#shortcuts)")
    driver.refresh()
    on_item(driver)
    press(driver, "a")
    assert js(driver, "entered().choice") == ""
    tab_to(driver, "[name=choice]")
    press(driver, Keys.SPACE)
    outline = js(driver, "getComputedStyle(document.activeElement.closest('label')).outlineStyle")
    assert outline == "solid", "focus is not to be seen"
    press(driver, Keys.ENTER)
    saved(driver, 2)


def test_looks():
    """Names, contrast, width, and pictures of the label page."""
    program = Label("--aspects", "accuracy,nuance,safety", "--guidelines", guidelines(),
                    pairs=SHOWN, people=[ANN])
    driver = tool.browser()
    open_link(driver, program.links["ann"])
    find(driver, "#compare")
    tool.accessible(driver)
    press(driver, "a", "+", "+")
    tool.accessible(driver)
    driver.execute_script("document.querySelector('#help details').open = true")
    tool.accessible(driver)
    driver.execute_script("document.querySelector('#help details').open = false; scrollTo(0, 0)")
    tool.screenshot(driver, "label", whole=True)
    tool.scheme(driver, dark=True)
    tool.screenshot(driver, "label-dark", whole=True)
    tool.scheme(driver, dark=False)
    tool.resize(driver, tool.PHONE, scale=2)
    driver.refresh()
    find(driver, "#compare")
    tool.screenshot(driver, "label-phone", whole=True)
    small = driver.execute_script("""
        return [...document.querySelectorAll("button, label:has(input), summary")]
            .filter(e => e.checkVisibility() && e.getBoundingClientRect().height < 24)
            .map(e => e.textContent)""")
    assert not small, f"too small for a finger: {small}"
    a, b = driver.find_elements(By.CSS_SELECTOR, ".answer")
    assert a.rect["y"] + a.rect["height"] <= b.rect["y"], "answers are not below each other"


def test_write():
    """Demonstrations: a draft corrected, a prompt answered, one skipped; the file is for rlhf sft."""
    chat = [{"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Good morning"},
            {"role": "user", "content": "Who are you?"}]
    prompts = [{"item": "w0", "domain": "law", "prompt": "May he keep the deposit?",
                "draft": "Yes, he may."},
               {"item": "w1", "domain": "law", "prompt": chat},
               {"item": "w2", "domain": "law", "prompt": "Never mind."}]
    program = Label("--task", "write", prompts=prompts, people=[ANN])
    driver = tool.browser()
    open_link(driver, program.links["ann"])
    asked = lambda: driver.find_element(By.ID, "turns").get_property("textContent")
    answers = {"deposit": "No, <b>not</b>\n\n  for \"wear\". 🦙", "Who are": "A llama.",
               "Never": None}
    for done in range(3):
        find(driver, "#write")
        tool.accessible(driver)
        key = next(k for k in answers if k in asked())
        assert driver.find_element(By.ID, "joint-hint").is_displayed() == (key != "Who are")
        if key == "deposit":
            assert driver.find_element(By.ID, "answer").get_property("value") == "Yes, he may."
            tool.screenshot(driver, "label-write", whole=True)
        if answers[key] is None:
            click(driver, "#skip")
        else:
            click(driver, "#answer")
            press(driver, "u", "s")  # letters, no commands
            driver.execute_script("arguments[0].value = ''", find(driver, "#answer"))
            ctrl_enter(driver)
            until(lambda: "Write an answer" in text(driver, "#status"), "to be asked for an answer")
            driver.execute_script("const a = document.getElementById('answer'); a.value = arguments[0];"
                                  "a.dispatchEvent(new Event('input', {bubbles: true}))", answers[key])
            driver.refresh()
            find(driver, "#write")
            until(lambda: driver.find_element(By.ID, "answer").get_property("value") == answers[key],
                  "what was written before the reload")
            click(driver, "#write [type=submit]")
        saved(driver, done + 1)
    until(lambda: text(driver, "#notice-title") == "All done", "the end")
    records = {r["item"]: r for r in program.stop()}
    for prompt in prompts[:2]:
        record = records[prompt["item"]]
        key = next(k for k in answers if k in json.dumps(prompt["prompt"]))
        assert record["completion"] == answers[key] and record["prompt"] == prompt["prompt"], record
        assert record["annotator"] == "ann" and record["domain"] == "law", record
    run("sft", "--model", base_model(), "--data", program.out, "--dry_run")


def test_operator():
    """Who did how much, how well on gold items, what is left; not for an annotator's eyes."""
    pairs = make_pairs(4)
    gold = [dict(p, item=f"gold-{i}", gold=own(p, "good")) for i, p in enumerate(make_pairs(2))]
    program = Label("--per_item", "1", pairs=pairs, people=[ANN, BOB], extra={"--gold": gold})
    driver, boss = tool.browser(), tool.browser()
    open_link(driver, program.links["ann"])
    for _ in range(3):
        done = count(on_item(driver))
        press(driver, side(driver, "good").lower(), Keys.ENTER)
        saved(driver, done + 1)
    right = sum(1 for r in program.records() if "gold" in r)
    open_link(boss, program.links["operator"])
    rows = lambda: [[c.text for c in r.find_elements(By.CSS_SELECTOR, "th, td")]
                    for r in boss.find_elements(By.CSS_SELECTOR, "#people tr")]
    until(lambda: len(rows()) == 2, "two annotators")
    table = {r[0]: r for r in rows()}
    assert table["ann"][1] == "expert" and table["ann"][3] == "3", table
    assert table["bob"][3] == "0", table
    assert right and table["ann"][4] == f"{right} of {right} (100 %)", table
    assert table["ann"][6].endswith(" s") and table["bob"][6] == "–", table
    assert text(boss, "#figures").splitlines()[-1] == "3", text(boss, "#figures")
    tool.accessible(boss)
    tool.screenshot(boss, "label-operator")

    # The view follows: nothing is to be pressed.
    on_item(driver)
    press(driver, side(driver, "bad").lower(), Keys.ENTER)
    saved(driver, 4)
    until(lambda: {r[0]: r for r in rows()}["ann"][3] == "4", "the operator to see the fourth")
    refused = driver.execute_script("""
        const token = location.hash.slice(1);
        return fetch("api/operator", {headers: {"Authorization": "Bearer " + token}})
            .then(r => r.status)""")
    assert refused in (401, 403), refused


def test_wrong_link():
    """Without a token, or with a wrong one, there is a friendly word and no item."""
    program = Label(pairs=make_pairs(2), people=[ANN])
    driver = tool.browser()
    link = program.links["ann"]
    for bad, title in ((link.split("#")[0], "This page needs your personal link"),
                       (link[:-1] + ("0" if link[-1] != "0" else "1"), "This link is not valid"),
                       (link.split("#")[0] + "#x", "This link is not valid")):
        open_link(driver, bad)
        until(lambda t=title: text(driver, "#notice-title") == t, title)
        assert not driver.find_element(By.ID, "item").is_displayed()
        tool.accessible(driver)
    tool.screenshot(driver, "label-wrong-link")
    driver.execute_script("location.hash = arguments[0]", link.split("#")[1])
    on_item(driver)


# ---- The picture in README.md --------------------------------------------------------------------

# Twelve that are told apart by a space at the end of a line: whichever comes, the picture is the same.
def shown_pair(i):
    chat = [{"role": "user",
             "content": "My landlord wants to keep my deposit because the paint has faded after four "
                        "years. Can he do that?"},
            {"role": "assistant", "content": "Usually not. Normal wear is the landlord's to bear."},
            {"role": "user",
             "content": "He says the contract has a clause about it. What now?" + " " * i}]
    good = ("Read the clause first. One that makes the tenant pay for ordinary wear is void in many "
            "places, whatever was signed.\n\n1. Ask for an itemised bill.\n2. Reply in writing that "
            "faded paint is ordinary wear.\n3. Set a date for the return of the deposit; two weeks "
            "is usual.\n\nThe details depend on where you live.")
    bad = ("A contract is binding. If it has a clause about the paint and you signed it, then you "
           "have to pay for the paint. You could ask whether he would be content with half.")
    return {"item": f"deposit-{i}", "domain": "law", "prompt": chat, "answers": [good, bad]}


SHOWN = [shown_pair(i) for i in range(12)]


def guidelines():
    file = Path(TMP.name) / "guidelines.txt"
    file.write_text("Prefer the answer that is right, then the one that is clear.\n"
                    "Length is no merit.\n")
    return file


def picture():
    """data/page/label.webp: the fourth pair, with a choice made."""
    program = Label("--aspects", "accuracy,nuance,safety", pairs=SHOWN, people=[ANN])
    driver = tool.browser((1000, 900))
    open_link(driver, program.links["ann"])
    for done in range(4):
        find(driver, "#compare")
        press(driver, side(driver, "Read").lower(), "+", "+")
        if done < 3:
            press(driver, Keys.ENTER)
            saved(driver, done + 1)
    driver.execute_script("$('help').hidden = true; document.activeElement.blur()")
    tool.screenshot(driver, "label-picture", whole=True, kind="webp")
    shutil.copy(tool.OUT / "label-picture.webp", tool.ROOT / "data" / "page" / "label.webp")


if __name__ == "__main__":
    if sys.argv[1:] == ["picture"]:
        picture()
        tool.finish()
    else:
        tool.main(globals())
