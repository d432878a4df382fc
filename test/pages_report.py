"""The page of `rlhf report` in headless Chromium: it asks for nothing, says the numbers that the runs
wrote, by pointer, keyboard and table, hides what the legend switches off, and can be read in the dark,
on a phone and on paper. The runs are made up here; only the last test wants those of `make demo`.
"""
import base64
import json
import math
import subprocess
import tempfile
from pathlib import Path

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import pages_tool as pages

WORK = Path(tempfile.mkdtemp(prefix="rlhf-report-"))
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


# ---- Runs ----------------------------------------------------------------------------------------

def share(hits, n):
    return {"pairs": n, "accuracy": hits / n, "accuracy_low": max(hits / n - .1, 0), "accuracy_high": min(hits / n + .1, 1),
            "margin": 1.25, "ece": .05, "length_accuracy": .45, "agreement": .9, "agreement_low": .85, "agreement_high": .94,
            "ceiling": .95}


def write_run(name, trainer, metrics, **files):
    """A run directory: metrics are lines, files are "NAME_json" objects or "NAME_jsonl" lists."""
    run = WORK / name
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"trainer": trainer, "data": "prompts.jsonl", "kl_coef": .2, "dtype": "f32"}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for file, content in files.items():
        stem, kind = file.rsplit("_", 1)
        text = json.dumps(content) if kind == "json" else "".join(json.dumps(line) + "\n" for line in content)
        (run / f"{stem}.{kind}").write_text(text)
    return run


def ppo_metrics(phase, steps=24, hacked=False):
    """Numbers with many digits; the loss has a step without a number. hacked: answers grow."""
    return [{"step": s, "objective/scores": math.sin(s + phase) / 9 + s / 30, "objective/kl_exact": .03 * s * (1 + phase),
             "objective/kl": .031 * s, "completions/mean_length": 10 + (s if hacked else s % 3 / 10),
             "completions/repetition": .01 * (s % 2), "completions/clipped_ratio": .02, "grad_norm": 1 / s,
             "lr": 1e-6 / s, "loss/policy_avg": None if s == 5 else -.001 * s, "epoch": s / 24} for s in range(1, steps + 1)]


def answers(phase):
    return [{"step": step, "prompt": f"Question {i} {EVIL if i == 1 else ''}", "completion": f"Answer {i} at {step}, {phase} "
             + (EVIL if i == 1 else ""), "n_tokens": 7, "finished": i != 2, "score": .5 * i} for step in (0, 24) for i in range(9)]


def make_report():
    best = {"prompts": 4, "answers": 8, "points": [{"n": n, "kl": math.log(n) - (n - 1) / n, "score": .2 * n, "error": .05}
                                                   for n in (1, 2, 4, 8)]}
    by = {"domain": {"law": share(30, 40), "medicine <b>": share(38, 40)},
          "safety": {"refusal": share(9, 10), "harmless": share(5, 10)}}
    runs = [write_run("first", "ppo", ppo_metrics(0), samples_jsonl=answers("a"), best_of_n_json=best),
            write_run("second", "ppo", ppo_metrics(.5, hacked=True), samples_jsonl=answers("b")),
            write_run("rm", "rm", [{"step": 10 * k, "loss": 1 / k, "accuracy": .5 + k / 50} for k in range(1, 20)],
                      eval_json={**share(68, 80), **by}),
            write_run("sft", "sft", [{"step": 10 * k, "loss": 2 / k, "mean_token_accuracy": k / 20} for k in range(1, 20)],
                      samples_jsonl=answers("c"), eval_json={"records": 9, "nll": .5, "perplexity": 1.6, "domain": {
                          "law": {"records": 4, "nll": .4, "perplexity": 1.5}}})]
    row = {"judgements": 50, "agreement": .8, "agreement_low": .7, "agreement_high": .88, "reliability": .9,
           "reliability_low": .8, "reliability_high": .95, "gold": .9, "gold_low": .6, "gold_high": .98, "first": .52, "seconds": 8.5}
    raters = WORK / "raters.json"
    raters.write_text(json.dumps({**row, "items": 25, "annotators": 2, "alpha": .61, "alpha_low": .5, "alpha_high": .7, "kappa": .6,
                                  "domain": {"law": row, "medicine": row}, "annotator_type": {"expert": row, "lay": row},
                                  "annotator": {"ann": row, "bob": {**row, "reliability": .55, "reliability_low": .45,
                                                                    "reliability_high": .65}},
                                  "reliabilities": {"ann": {"law": row, "medicine": row}, "bob": {"law": row}},
                                  "disputed": [{"prompt": "Who? " + EVIL, "answers": ["I", "You"], "votes": [2, 1, 0]}]}))
    page = WORK / "report.html"
    done = subprocess.run([pages.PROGRAM, "report", *runs, "--raters", raters, "--out", page], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert "second: The reward rose" in done.stderr, "the program does not warn: " + done.stderr
    return page


PAGE = make_report()


def open_page(driver=None, page=PAGE):
    driver = driver or pages.browser()
    pages.resize(driver, pages.DESKTOP)
    pages.scheme(driver, False)
    driver.get(page.as_uri())
    pages.until(lambda: driver.execute_script("return document.querySelectorAll('.chart .curve').length > 3"), "the curves")
    return driver


DRIVER = open_page()


# ---- Reading the page ----------------------------------------------------------------------------

def figure(title):
    """The chart of a name and its figure; of several trainers' the first."""
    node = pages.until(lambda: DRIVER.find_element(By.CSS_SELECTOR, f'figure[data-title="{title}"]'), title)
    return node, node.find_element(By.CSS_SELECTOR, "svg.chart")


def readings(node):
    """What stands above a figure: the step and {run: exact value}."""
    at = node.find_element(By.CSS_SELECTOR, ".readout .at").text
    return int(at.split()[-1].replace(",", "")), {
        int(r.get_attribute("data-run")): None if r.get_attribute("data-value") == "" else float(r.get_attribute("data-value"))
        for r in node.find_elements(By.CSS_SELECTOR, ".readout .reading")}


def legend(i):
    return DRIVER.find_element(By.CSS_SELECTOR, f"#legend button[data-run='{i}']")


def shown_curves(node):
    return {i for i in range(8) if node.find_elements(By.CSS_SELECTOR, f".curve.s{i}")}


def to_middle(node):
    DRIVER.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", node)


def open_all():
    DRIVER.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")


# ---- Tests ---------------------------------------------------------------------------------------

def test_asks_for_nothing():
    open_page(DRIVER)
    open_all()
    assert not pages.complaints(DRIVER)
    asked = DRIVER.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [a for a in asked if not a.startswith("data:")] == [], asked
    assert DRIVER.title.startswith("first, second, rm, sft")


def test_every_metric_has_its_figure():
    open_page(DRIVER)
    titles = [f.get_attribute("data-title") for f in DRIVER.find_elements(By.CSS_SELECTOR, "figure")]
    for name in ppo_metrics(0)[0]:
        assert name == "step" or titles.count(name) == 1, name
    assert titles.count("loss") == 2, "losses of different trainers do not share an axis"


def test_number_under_the_pointer():
    open_page(DRIVER)
    truth = [{m["step"]: m for m in ppo_metrics(0)}, {m["step"]: m for m in ppo_metrics(.5, hacked=True)}]
    for name in ("objective/scores", "completions/mean_length"):
        node, chart = figure(name)
        to_middle(node)
        width, height = chart.size["width"], chart.size["height"]
        seen = []
        for part in (-.38, -.2, 0, .17, .31, .49):
            ActionChains(DRIVER).move_to_element_with_offset(chart, int(part * width), int(.1 * height)).perform()
            step, values = readings(node)
            assert values == {i: truth[i][step][name] for i in (0, 1)}, (name, step, values)
            # The line stands at the step that is nearest to the pointer.
            cross = chart.find_element(By.CSS_SELECTOR, ".cross").rect["x"] - chart.rect["x"]
            assert abs(cross - (part + .5) * width) < width / 23, (name, part, step)
            seen.append(step)
        assert seen == sorted(set(seen)) and seen[-1] == 24, seen
    # Away from a figure it says where its runs ended.
    ActionChains(DRIVER).move_to_element(DRIVER.find_element(By.ID, "title")).perform()
    assert readings(node)[0] == 24


def test_reward_against_kl():
    open_page(DRIVER)
    node, chart = figure("objective/scores against objective/kl_exact")
    to_middle(node)
    marks = chart.find_elements(By.CSS_SELECTOR, ".mark.s0")
    assert len(marks) == 24
    for step in (3, 11, 20):
        ActionChains(DRIVER).move_to_element(marks[step - 1]).perform()
        said, values = readings(node)
        assert said == step and values == {0: ppo_metrics(0)[step - 1]["objective/scores"]}, (step, said, values)
    labels = [t.text for t in chart.find_elements(By.CSS_SELECTOR, "text.n")]
    assert labels == [f"n = {n}" for n in (1, 2, 4, 8)], labels
    # Further to the right is a larger KL; the frontier's points stand at log n - (n - 1) / n.
    places = [t.rect["x"] + t.rect["width"] / 2 for t in chart.find_elements(By.CSS_SELECTOR, "text.n")]
    kl = [math.log(n) - (n - 1) / n for n in (1, 2, 4, 8)]
    for k in (1, 2):
        assert abs((places[k] - places[0]) / (places[3] - places[0]) - kl[k] / kl[3]) < .01


def test_keyboard():
    open_page(DRIVER)
    node, chart = figure("objective/scores")
    to_middle(node)
    # From the summary before it, one step of the tab key.
    before, _ = figure("objective/scores against objective/kl_exact")
    before.find_element(By.CSS_SELECTOR, "summary").send_keys(Keys.TAB)
    assert DRIVER.switch_to.active_element == chart
    for key, step in ((Keys.HOME, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_RIGHT, 3), (Keys.ARROW_LEFT, 2), (Keys.PAGE_UP, 12),
                      (Keys.END, 24), (Keys.ARROW_RIGHT, 24), (Keys.PAGE_DOWN, 14)):
        chart.send_keys(key)
        said, values = readings(node)
        assert said == step and values[0] == ppo_metrics(0)[step - 1]["objective/scores"], (key, said, values)
        # A screen reader hears the same.
        heard = chart.get_attribute("aria-valuetext")
        assert f"step {step}" in heard and "first" in heard and "second" in heard, heard
    assert chart.find_elements(By.CSS_SELECTOR, ".cross")
    chart.send_keys(Keys.ESCAPE)
    assert not chart.find_elements(By.CSS_SELECTOR, ".cross")
    button = legend(1)
    button.send_keys(Keys.SPACE)
    assert button.get_attribute("aria-pressed") == "false" and shown_curves(node) == {0}


def test_toggling():
    open_page(DRIVER)
    node, chart = figure("objective/scores")
    assert shown_curves(node) == {0, 1}
    text = chart.text
    legend(1).click()
    assert legend(1).get_attribute("aria-pressed") == "false"
    assert shown_curves(node) == {0} and list(readings(node)[1]) == [0]
    assert chart.text != text, "the axis is that of the run that is hidden"
    assert not DRIVER.find_elements(By.CSS_SELECTOR, "#answers .cell.s1")
    legend(0).click()
    assert shown_curves(node) == set() and "No run is shown" in node.text
    legend(0).click()
    legend(1).click()
    assert shown_curves(node) == {0, 1} and chart.text == text
    legend(2).click()
    assert not DRIVER.find_elements(By.CSS_SELECTOR, ".slices")
    legend(2).click()
    assert not pages.complaints(DRIVER)


def test_tables_behind_the_figures():
    open_page(DRIVER)
    node, _ = figure("objective/scores")
    to_middle(node)
    node.find_element(By.CSS_SELECTOR, "summary").click()
    rows = pages.until(lambda: node.find_elements(By.CSS_SELECTOR, "tbody tr"), "the table")
    assert len(rows) == 24
    for k in (0, 9, 23):
        cells = [float(c.text.replace("−", "-")) for c in rows[k].find_elements(By.CSS_SELECTOR, "th, td")]
        truth = [k + 1, ppo_metrics(0)[k]["objective/scores"], ppo_metrics(.5)[k]["objective/scores"]]
        assert all(abs(a - b) < 1e-4 for a, b in zip(cells, truth)) and len(cells) == 3, (cells, truth)


def test_slices_and_annotators():
    open_page(DRIVER)
    table = DRIVER.find_element(By.CSS_SELECTOR, ".slices")
    rows = {r.find_element(By.CSS_SELECTOR, "th").text: r for r in table.find_elements(By.CSS_SELECTOR, "tbody tr")}
    assert {"all", "law", "medicine <b>", "refusal", "harmless"} <= set(rows), rows.keys()
    assert "75.0 % [65.0, 85.0]" in rows["law"].text and "40" in rows["law"].text
    # Dots and intervals lie where their numbers say, on one axis for all rows.
    def place(row, css):
        r = rows[row].find_element(By.CSS_SELECTOR, css).rect
        return r["x"] + r["width"] / 2
    low, half, high = place("harmless", ".dots .mark"), place("law", ".dots .mark"), place("medicine <b>", ".dots .mark")
    assert abs((half - low) / (high - low) - (.75 - .5) / (.95 - .5)) < .02
    interval = rows["law"].find_element(By.CSS_SELECTOR, ".range").rect
    assert abs(interval["width"] / (high - low) - .2 / .45) < .02
    text = DRIVER.find_element(By.ID, "annotators").text
    for part in ("0.61 [0.5, 0.7]", "ann", "90.0 % [80.0, 95.0]", "55.0 % [45.0, 65.0]"):
        assert part in text, part


def test_texts_are_texts():
    open_page(DRIVER)
    open_all()
    assert DRIVER.execute_script("return window.hacked") is None
    cells = [c.text for c in DRIVER.find_elements(By.CSS_SELECTOR, "#answers .text")]
    assert any("<script>window.hacked" in c for c in cells), "the answer is not shown as it is"
    assert not DRIVER.find_elements(By.CSS_SELECTOR, "main img, main script")
    # Before, then both afterwards, for the same prompt.
    row = DRIVER.find_element(By.CSS_SELECTOR, "#answers .answer")
    assert [c.text for c in row.find_elements(By.CSS_SELECTOR, ".text")] == [
        "Answer 0 at 0, a", "Answer 0 at 0, b", "Answer 0 at 24, a", "Answer 0 at 24, b"]


def test_warnings_and_commands():
    open_page(DRIVER)
    warnings = [w.text for w in DRIVER.find_elements(By.CSS_SELECTOR, ".warnings li")]
    assert len(warnings) == 1 and warnings[0].startswith("second: The reward rose"), warnings
    open_all()
    rules = DRIVER.find_element(By.CSS_SELECTOR, ".rules").text
    for part in ("completions/mean_length", "20 %", "standard error", "eval_loss"):
        assert part in rules, part
    assert f"rlhf ppo --data prompts.jsonl --kl_coef 0.2 --out {WORK}/first" in DRIVER.find_element(By.ID, "runs").text


def test_accessible():
    open_page(DRIVER)
    pages.accessible(DRIVER)
    open_all()
    pages.accessible(DRIVER)
    ids = DRIVER.execute_script("return [...document.querySelectorAll('#contents a')].filter(a => "
                                "!document.querySelector(a.getAttribute('href'))).length")
    assert ids == 0


def test_colours_stand_out():
    """Lines and marks: 3 to 1 against both backgrounds (WCAG 2.2, 1.4.11), for all eight runs."""
    open_page(DRIVER)

    def luminance(colour):
        parts = [int(colour[k:k + 2], 16) / 255 for k in (1, 3, 5)]
        return sum(w * (v / 12.92 if v <= .04045 else ((v + .055) / 1.055) ** 2.4) for w, v in zip((.2126, .7152, .0722), parts))
    for dark in (False, True):
        pages.scheme(DRIVER, dark)
        colours = DRIVER.execute_script("const s = getComputedStyle(document.documentElement); return ['paper', ...Array(8).keys()]"
                                        ".map(k => s.getPropertyValue(k === 'paper' ? '--paper' : '--s' + k).trim())")
        paper = luminance(colours[0])
        assert (paper < .1) == dark
        for c in colours[1:]:
            a, b = sorted((luminance(c), paper))
            assert (b + .05) / (a + .05) >= 3, (dark, c)
    pages.scheme(DRIVER, False)


def test_pictures():
    """For the eye: build/pages/report-*.png."""
    open_page(DRIVER)
    pages.screenshot(DRIVER, "report-desktop", whole=True)
    pages.scheme(DRIVER, True)
    pages.screenshot(DRIVER, "report-dark", whole=True)
    pages.scheme(DRIVER, False)
    pages.resize(DRIVER, pages.PHONE)
    pages.until(lambda: pages.too_wide(DRIVER) <= 0, "the page to fit a phone")
    pages.screenshot(DRIVER, "report-phone", whole=True)
    open_all()
    assert pages.too_wide(DRIVER) <= 0
    charts = DRIVER.execute_script("return [...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect())"
                                   ".filter(r => r.width).every(r => r.left >= 0 && r.right <= innerWidth)")
    assert charts, "a figure is cut off"
    pages.resize(DRIVER, pages.DESKTOP)


def test_paper():
    open_page(DRIVER)
    pdf = base64.b64decode(DRIVER.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF-") and pdf.count(b"/Type /Page") > 3, len(pdf)
    (pages.OUT / "report.pdf").write_bytes(pdf)
    assert DRIVER.execute_script("return [...document.querySelectorAll('.further')].every(d => d.open)"), "metrics are missing"


def test_long_runs():
    runs = [write_run(f"long{i}", "ppo", ppo_metrics(i / 9, steps=3000)) for i in range(9)]
    page = WORK / "long.html"
    subprocess.run([pages.PROGRAM, "report", *runs, "--out", page], check=True, capture_output=True)
    open_page(DRIVER, page)
    node, chart = figure("objective/scores")
    to_middle(node)
    chart.send_keys(Keys.HOME)
    assert readings(node)[0] == 1 and len(readings(node)[1]) == 9
    assert not pages.complaints(DRIVER)


def test_demo():
    """The picture in README.md, if `make demo` has been run: build/pages/report.png."""
    page = pages.ROOT / "build" / "demo" / "report.html"
    if not page.exists():
        print("        (no build/demo/report.html: no picture)")
        return
    open_page(DRIVER, page)
    pages.accessible(DRIVER)
    pages.resize(DRIVER, (1080, 1000))
    pages.until(lambda: DRIVER.execute_script(
        "return [...document.querySelectorAll('svg.chart')].every(s => !s.clientWidth || s.viewBox.baseVal.width <= 1080)"), "redrawing")
    pages.screenshot(DRIVER, "report")
    assert not pages.complaints(DRIVER)
    assert (pages.OUT / "report.png").stat().st_size < 150_000


pages.main(globals())
