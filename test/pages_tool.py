"""What the tests of pages share: a browser, waiting, screenshots, and what makes a page accessible.

A test script defines functions named test_*, each one test, and ends with pages_tool.main(globals()).

    build/pages/venv/bin/python test/pages_NAME.py [WORD]

runs those whose name contains WORD. Pictures go to build/pages; the last line is "N passed, N failed".
Nothing is awaited by sleeping: until() asks again and again, and gives up only after a minute or two.
"""
import base64
import contextlib
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("PAGES_OUT", ROOT / "build" / "pages"))
PROGRAM = os.path.abspath(os.environ.get("RLHF", ROOT / "rlhf"))
PATIENCE = int(os.environ.get("PAGES_PATIENCE", "120"))  # seconds; a slow machine is no failure

DESKTOP = (1280, 900)
PHONE = (360, 740)

browsers = []
endings = []  # what ends what was started: by a test, after it; before the tests, after all


def until(ask, what, seconds=PATIENCE):
    """The first answer of ask() that is true; an exception of ask() counts as not yet."""
    end, last = time.monotonic() + seconds, None
    while True:
        try:
            answer = ask()
            if answer:
                return answer
            last = answer
        except Exception as e:  # pylint: disable=broad-except
            last = e
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}; last: {last!r}")
        time.sleep(0.02)


# ---- Browser -------------------------------------------------------------------------------------

def browser(size=DESKTOP, dark=False):
    """A fresh headless Chromium that knows nothing of others; it ends with the test, or the script."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                 "--hide-scrollbars", "--force-color-profile=srgb", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    browsers.append(driver)
    endings.append(driver.quit)
    resize(driver, size)
    scheme(driver, dark)
    return driver


def resize(driver, size, scale=1):
    """The page's width and height in CSS pixels; up to 600 wide it is a phone, touched by fingers."""
    phone = size[0] <= 600
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": size[0], "height": size[1], "deviceScaleFactor": scale,
                            "mobile": phone})
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})


def scheme(driver, dark):
    """What the page's user prefers: light or dark."""
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})


def screenshot(driver, name, whole=False, kind="png"):
    """build/pages/NAME.KIND (png or webp): what is on the screen, or the whole page."""
    OUT.mkdir(parents=True, exist_ok=True)
    options = {"format": kind, "captureBeyondViewport": whole}
    if kind == "webp":
        options["quality"] = 85
    picture = driver.execute_cdp_cmd("Page.captureScreenshot", options)
    (OUT / f"{name}.{kind}").write_bytes(base64.b64decode(picture["data"]))


def find(driver, css):
    """The visible element of a CSS selector, awaited."""
    def ask():
        for e in driver.find_elements(By.CSS_SELECTOR, css):
            if e.is_displayed():
                return e
        return None
    return until(ask, f"a visible {css}")


def text(driver, css):
    """The visible text of the first element of a CSS selector, "" if there is none."""
    found = driver.find_elements(By.CSS_SELECTOR, css)
    return found[0].text if found else ""


def complaints(driver):
    """What the browser holds against the page since the last call: scripts, policy, resources."""
    return [e["message"] for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


# ---- Accessibility -------------------------------------------------------------------------------

NAMED = {"button", "checkbox", "combobox", "link", "listbox", "menuitem", "progressbar", "radio",
         "radiogroup", "searchbox", "slider", "spinbutton", "switch", "tab", "table", "textbox",
         "image", "img", "DisclosureTriangle"}


def nameless(driver):
    """Controls, tables and pictures that the browser would give a screen reader without a name."""
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [n for n in nodes if not n.get("ignored")
                and n.get("role", {}).get("value") in NAMED]
    assert len(nodes) > 3, "an empty page"
    return [n["role"]["value"] for n in controls
            if not str(n.get("name", {}).get("value", "")).strip()]


# Every visible text, with the colour it is painted in and what lies behind it, by WCAG 2.2, 1.4.3:
# 4.5 to 1, 3 to 1 for large text; and 1.4.11: 3 to 1 for the borders of fields to write in.
CONTRAST = r"""
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgba(color) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const d = canvas.getImageData(0, 0, 1, 1).data;
    return [d[0], d[1], d[2], d[3] / 255];
}
const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
function luminance(c) {
    const l = c.slice(0, 3).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * l[0] + .7152 * l[1] + .0722 * l[2];
}
function ratio(a, b) {
    const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + .05) / (y + .05);
}
function behind(e) {
    const layers = [];
    for (let p = e; p; p = p.parentElement) layers.push(rgba(getComputedStyle(p).backgroundColor));
    return layers.reverse().reduce((below, c) => over(c, below), rgba("Canvas"));
}
function opacity(e) {
    let o = 1;
    for (let p = e; p; p = p.parentElement) o *= Number(getComputedStyle(p).opacity);
    return o;
}
const seen = e => e.checkVisibility({visibilityProperty: true}) &&
    !e.closest(":disabled, [aria-disabled=true]") && !e.querySelector(":scope > :disabled") &&
    !(e.closest("label")?.control?.matches(":disabled"));
const bad = [];
let checked = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let n = walk.nextNode(); n; n = walk.nextNode()) {
    const e = n.parentElement;
    if (!n.data.trim() || e.closest("script, style, noscript, textarea, svg") || !seen(e)) continue;
    const s = getComputedStyle(e), back = behind(e), color = rgba(s.color);
    color[3] *= opacity(e);
    const size = parseFloat(s.fontSize), large = size >= 24 || (size >= 18.66 && s.fontWeight >= 700);
    const r = ratio(over(color, back), back);
    checked++;
    if (r < (large ? 3 : 4.5)) bad.push(r.toFixed(2) + " " + n.data.trim().slice(0, 40));
}
for (const e of document.querySelectorAll("textarea, select, input[type=text], input[type=number]")) {
    if (!seen(e)) continue;
    const s = getComputedStyle(e), back = behind(e.parentElement);
    const color = rgba(s.color), mine = behind(e);
    checked++;
    if (e.value && ratio(over(color, mine), mine) < 4.5) bad.push("text of " + (e.id || e.tagName));
    if (ratio(over(rgba(s.borderTopColor), back), back) < 3)
        bad.push("border of " + (e.id || e.tagName));
}
return [checked, bad];
"""


def faint(driver):
    """Texts of too little contrast in the colour scheme that is on."""
    checked, bad = driver.execute_script(CONTRAST)
    assert checked, "no text found at all"
    return bad


def too_wide(driver):
    """By how many pixels the page is wider than the screen."""
    return driver.execute_script("const d = document.documentElement;"
                                 "return Math.max(d.scrollWidth, document.body.scrollWidth)"
                                 " - d.clientWidth")


def accessible(driver):
    """Asserts that the page as it is now has names, contrast in both schemes, and fits a phone."""
    assert not nameless(driver), f"without a name: {nameless(driver)}"
    for dark in (True, False):
        scheme(driver, dark)
        found = faint(driver)
        assert not found, f"too little contrast ({'dark' if dark else 'light'}): {found}"
    assert driver.execute_script("return document.documentElement.lang"), "the page names no language"
    assert driver.title, "the page has no title"
    resize(driver, PHONE)
    wide = too_wide(driver)
    resize(driver, DESKTOP)
    assert wide <= 0, f"{wide} pixels wider than a phone of {PHONE[0]}"


# ---- Running -------------------------------------------------------------------------------------

def main(names):
    """Runs the functions test_* of a script in their order, prints the result, ends the script."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    passed, failed, lasting = 0, 0, (len(endings), len(browsers))
    for name, test in names.items():
        if not name.startswith("test_") or word not in name:
            continue
        began = time.monotonic()
        try:
            test()
            passed += 1
            print(f"ok      {name[5:]} ({time.monotonic() - began:.1f} s)", flush=True)
        except Exception:  # pylint: disable=broad-except
            failed += 1
            print(f"FAILED  {name[5:]}\n{traceback.format_exc()}", flush=True)
            for i, driver in enumerate(browsers):
                with contextlib.suppress(Exception):
                    screenshot(driver, f"failed-{name[5:]}-{i}")
        finally:
            finish(*lasting)
    finish()
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed != 0 or (passed == 0 and not word))


def finish(endings_kept=0, browsers_kept=0):
    """Ends what browser() and others have started, but for the first of them."""
    while len(endings) > endings_kept:
        with contextlib.suppress(Exception):
            endings.pop()()
    del browsers[browsers_kept:]
