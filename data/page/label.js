"use strict";
/* The page of `rlhf label`: what an annotator or the operator sees. Its counterpart, which stores
 * the judgements and says what comes next, is section LABEL of rlhf.c.
 *
 *   session    who this is and what is asked: read once
 *   show       one item, its form filled with what was entered before a reload or an undo
 *   save       sends a judgement until the server has answered, then asks for the next item
 *
 * Texts of people and models enter the page through textContent only. Nothing counts as saved
 * before the server said so; what is entered survives a reload (sessionStorage) and a server that
 * is away.
 */

const $ = id => document.getElementById(id);

let token = "";          // who this is: what follows # in the address, which no request tells
let session = null;
let progress = {done: 0, total: 0};
let item = null;         // what is on the page, null for none
let busy = false;        // a judgement is on its way
let retryNow = null;     // ends the present wait for the server

// ---- Server -------------------------------------------------------------------------------------

class Refusal extends Error {
    constructor(status, text, wait) {
        super(text);
        this.status = status;    // 0: there was no answer
        this.wait = wait;        // seconds that the server asked for
    }
    get passing() {
        return this.status === 0 || this.status === 429 || this.status >= 500;
    }
}

/* One request; the JSON of its answer, or a Refusal. */
async function call(method, path, body) {
    let response, data;
    try {
        response = await fetch(path, {
            method,
            headers: {"Authorization": "Bearer " + token,
                      ...(body && {"Content-Type": "application/json"})},
            body: body && JSON.stringify(body),
            cache: "no-store",
            signal: AbortSignal.timeout(30000),
        });
        data = await response.json();
    } catch {
        // An error without a JSON body still has a status; a broken success is no answer.
        if (!response || response.ok) throw new Refusal(0, "no connection to the server");
    }
    if (!response.ok)
        throw new Refusal(response.status, data?.error || "the server answered " + response.status,
                          Number(response.headers.get("Retry-After")) || 0);
    return data;
}

/* The same, again and again while the reason for failing may pass; `waiting`: what is held up. */
async function insist(method, path, body, waiting) {
    const before = [$("status").textContent, $("status").className];
    let lost = false;            // an earlier attempt may have reached the server
    for (let attempt = 0; ; attempt++) {
        try {
            const data = await call(method, path, body);
            if (attempt) [$("status").textContent, $("status").className] = before;
            return data;
        } catch (error) {
            error.lost = lost;
            if (!(error instanceof Refusal) || !error.passing) throw error;
            lost ||= error.status !== 429;
            if (attempt > 0 || error.status !== 429)
                say(waiting + ": " + sentence(error.message) + " Trying again.", "bad");
            const seconds = error.wait || Math.min(5, 0.5 * 2 ** attempt);
            await new Promise(resume => {
                retryNow = resume;
                setTimeout(resume, seconds * 1000);
            });
        }
    }
}

// ---- Small things -------------------------------------------------------------------------------

function element(name, className, text) {
    const e = document.createElement(name);
    if (className) e.className = className;
    if (text !== undefined) e.textContent = text;
    return e;
}

/* The saved state, announced by screen readers. kind: "", "good" or "bad". */
function say(text, kind = "") {
    if ($("status").textContent !== text) $("status").textContent = text;
    $("status").className = "status " + kind;
}

function only(id) {
    for (const part of ["notice", "item", "operator"]) $(part).hidden = part !== id;
}

function notice(title, text, button, action) {
    only("notice");
    $("notice-title").textContent = title;
    $("notice-text").textContent = text;
    $("notice-button").hidden = !button;
    $("notice-button").textContent = button || "";
    $("notice-button").onclick = action || null;
    document.title = title + " – rlhf label";
    $("notice-title").focus();
}

/* What cannot be waited for. */
function fail(error) {
    item = null;
    busy = false;
    if (error instanceof Refusal && error.status === 401) {
        $("undo").hidden = $("help").hidden = true;
        say("");
        notice("This link is not valid",
               "It may be incomplete, or from an earlier session. " +
               "Ask whoever sent it to you for a new one.");
    } else {
        notice("Something went wrong", error.message + ".", "Try again", start);
    }
}

/* With a capital and a full stop. */
function sentence(text) {
    return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

// ---- What is entered and not yet saved ----------------------------------------------------------

/* Kept under the item's id together with its text, since another server may use the same ids. */
const draftKey = () => "rlhf-label " + session.annotator + " " + item.id;
const content = of => JSON.stringify([of.prompt, of.answers, of.draft]);

function keepDraft() {
    if (!item || busy) return;
    try {
        sessionStorage.setItem(draftKey(), JSON.stringify({of: content(item), entered: entered()}));
    } catch {
        // A browser that keeps nothing: a reload then loses what was not saved.
    }
}

function findDraft() {
    try {
        const kept = JSON.parse(sessionStorage.getItem(draftKey()));
        return kept && kept.of === content(item) ? kept.entered : null;
    } catch {
        return null;
    }
}

function dropDraft() {
    try {
        sessionStorage.removeItem(draftKey());
    } catch {
        // Nothing was kept.
    }
}

// ---- Time on an item ----------------------------------------------------------------------------

const clock = {
    spent: 0,
    since: 0,
    start(seconds) {
        this.spent = seconds;
        this.since = performance.now();
    },
    /* Seconds with the page in view. */
    read() {
        const now = document.hidden ? this.since : performance.now();
        return Math.round((this.spent + (now - this.since) / 1000) * 10) / 10;
    },
    turn() {
        if (document.hidden) this.spent += (performance.now() - this.since) / 1000;
        this.since = performance.now();
    },
};

// ---- One item -----------------------------------------------------------------------------------

const ROLES = {user: "User", assistant: "Assistant", system: "System", tool: "Tool"};

/* A text that the answer is joined to, without turns. */
const isPlain = prompt => prompt.length === 1 && prompt[0].role === "text";

function showPrompt(prompt) {
    const turns = $("turns");
    turns.replaceChildren();
    const plain = isPlain(prompt);
    $("conversation-title").textContent =
        plain ? "Text to go on from" : prompt.length > 1 ? "Conversation" : "Question";
    for (const message of prompt) {
        const turn = element("div", "turn");
        turn.dataset.role = message.role;
        if (!plain) turn.append(element("h3", "role", ROLES[message.role] || message.role));
        const text = element("div", "text", message.content);
        text.dir = "auto";
        turn.append(text);
        turns.append(turn);
    }
}

/* An item, with what was entered for it before: by `judgement` as it was sent, or none. */
function show(next, judgement) {
    item = next;
    busy = false;
    showProgress();
    const before = judgement || findDraft() || {};
    const name = session.task === "write" ? "Prompt" : "Pair";
    const {done, total} = progress;
    const number = name + " " + (done + 1) + (total > done ? " of " + total : "");
    $("title").textContent = number + (item.domain ? " · " + item.domain : "");
    document.title = number + " – rlhf label";
    $("trial").hidden = progress.qualified?.[item.domain] !== false;
    $("trial").textContent = "Your first judgements in " + item.domain + " are a trial.";
    showPrompt(item.prompt);
    $("compare").hidden = session.task === "write";
    $("write").hidden = session.task !== "write";
    if (session.task === "write") fillWrite(before);
    else fillCompare(before);
    only("item");
    enable(true);
    clock.start(before.seconds || 0);
    window.scrollTo(0, 0);
    $("title").focus({preventScroll: true});
}

function fillCompare(before) {
    const form = $("compare");
    form.reset();
    $("a-text").textContent = item.answers[0];
    $("b-text").textContent = item.answers[1];
    form.elements.choice.value = before.choice || "";
    form.elements.strength.value = before.strength || "";
    for (const aspect of session.aspects)
        form.elements["aspect " + aspect].value = before.aspects?.[aspect] || "";
    form.elements.reason.value = before.reason || "";
    form.elements["unsafe-a"].checked = Boolean(before.unsafe?.[0]);
    form.elements["unsafe-b"].checked = Boolean(before.unsafe?.[1]);
    allowStrength();
}

function fillWrite(before) {
    const drafted = typeof item.draft === "string";
    $("answer").value = before.text ?? item.draft ?? "";
    $("answer-label").textContent = drafted ? "Correct this answer" : "Your answer";
    $("draft-hint").hidden = $("restore").hidden = !drafted;
    $("joint-hint").hidden = !isPlain(item.prompt);
}

/* What the form says now, in the words of POST api/judge or api/write. */
function entered() {
    if (session.task === "write") return {text: $("answer").value, seconds: clock.read()};
    const fields = $("compare").elements;
    const judgement = {choice: fields.choice.value, seconds: clock.read()};
    if (strengthCounts() && fields.strength.value)
        judgement.strength = Number(fields.strength.value);
    for (const aspect of session.aspects) {
        const value = fields["aspect " + aspect].value;
        if (value) (judgement.aspects ??= {})[aspect] = value;
    }
    if (fields.reason.value.trim()) judgement.reason = fields.reason.value.trim();
    const unsafe = [fields["unsafe-a"].checked, fields["unsafe-b"].checked];
    if (unsafe.includes(true)) judgement.unsafe = unsafe;
    return judgement;
}

const strengthCounts = () => ["A", "B"].includes($("compare").elements.choice.value);

function allowStrength() {
    $("how-much").disabled = !strengthCounts();
}

/* While a judgement is on its way it stays to be seen, and cannot be changed. */
function enable(on) {
    $("compare").inert = $("write").inert = !on;
    $("item").classList.toggle("sending", !on);
    $("undo").disabled = !on;
}

// ---- Saving -------------------------------------------------------------------------------------

async function save(body) {
    if (busy || !item) return;
    keepDraft();
    busy = true;
    enable(false);
    say("Saving…");
    try {
        await deliver(body);
    } catch (error) {
        busy = false;
        if (!(error instanceof Refusal) || error.status === 401) return fail(error);
        enable(true);
        $(session.task).querySelector("[type=submit]").focus();
        return say("Not saved: " + sentence(error.message), "bad");
    }
    dropDraft();
    await goOn().catch(fail);
}

/* Sends until there is an answer. The server takes an item once: of a judgement that is sent twice
 * because the first answer was lost, the second is refused (409), and progress tells whether the
 * first was stored. A server that was restarted may have given the same item a new token. */
async function deliver(body) {
    const path = session.task === "write" ? "api/write" : "api/judge";
    for (let tries = 0; ; tries++) {
        const message = {id: item.id, token: item.token, ...body};
        try {
            const answer = await insist("POST", path, message, "Not saved yet");
            progress = answer.progress;
            return say("Saved.", "good");
        } catch (error) {
            if (!(error instanceof Refusal) || error.status !== 409) throw error;
            const done = progress.done;
            const next = await insist("GET", "api/next", null, "Not saved yet");
            progress = next.progress;
            if (error.lost && progress.done > done) return say("Saved.", "good");
            if (tries || !next.item || !sameItem(next.item))
                return say("Not counted: this one was no longer yours to judge.", "bad");
            item.token = next.item.token;
        }
    }
}

function sameItem(other) {
    return other.id === item.id && content(other) === content(item);
}

/* The next item, or why there is none. */
async function goOn() {
    const next = await insist("GET", "api/next", null, "The next one is held up");
    progress = next.progress;
    if (next.item) return show(next.item);
    showProgress();
    item = null;
    busy = false;
    enable(true);
    if (progress.done >= progress.total)
        notice("All done",
               progress.done ? "Thank you. All that you did is saved." : "There is nothing to do.",
               "Look for more", again);
    else
        notice("Nothing for you just now",
               "Others have the remaining ones, and some may come back to you.",
               "Look for more", again);
}

function again() {
    goOn().catch(fail);
}

/* Not sent twice: if the answer is lost, what comes next shows whether it was taken back. */
async function undo() {
    if (busy || $("undo").hidden) return;
    keepDraft();
    busy = true;
    enable(false);
    say("Undoing…");
    try {
        const back = await call("POST", "api/undo", {});
        progress = back.progress;
        say("Taken back. Change it and save it again.");
        show(back.item, back.judgement);
    } catch (error) {
        busy = false;
        enable(true);
        if (!(error instanceof Refusal) || error.status === 401) return fail(error);
        say(error.status === 409 ? "There is nothing to undo."
                                 : "Not undone: " + sentence(error.message), "bad");
        if (error.status === 0) {
            busy = true;
            again();
        }
    }
}

function showProgress() {
    const {done, total} = progress;
    $("done").hidden = false;
    $("bar").max = Math.max(1, total, done);
    $("bar").value = done;
    $("count").textContent = done + " of " + Math.max(total, done);
    $("undo").hidden = !done;
}

// ---- Operator -----------------------------------------------------------------------------------

function percent(part, whole) {
    return whole ? part + " of " + whole + " (" + Math.round(100 * part / whole) + " %)" : "–";
}

function duration(seconds) {
    if (!(seconds > 0)) return "–";
    if (seconds < 100) return seconds.toFixed(seconds < 10 ? 1 : 0) + " s";
    const whole = Math.round(seconds);
    return Math.floor(whole / 60) + " min " + whole % 60 + " s";
}

function qualification(qualified) {
    const all = Object.entries(qualified || {});
    if (!all.length) return "–";
    return all.map(([domain, passed]) => domain + (passed ? ": yes" : ": not yet")).join(", ");
}

function showOperator(state) {
    const figure = (label, value) => {
        const box = element("div");
        box.append(element("dt", "", label), element("dd", "", String(value)));
        return box;
    };
    const {total, finished, judgements} = state.items;
    $("figures").replaceChildren(figure("Items finished", finished + " of " + total),
                                 figure("Items left", total - finished),
                                 figure("Judgements", judgements));
    $("people").replaceChildren(...state.annotators.map(a => {
        const row = element("tr");
        const name = element("th", "", a.annotator);
        name.scope = "row";
        row.append(name,
                   element("td", "", a.annotator_type || "–"),
                   element("td", "", (a.domains || []).join(", ") || "all"),
                   element("td", "n", String(a.done)),
                   element("td", "n", percent(a.gold_right, a.gold_total)),
                   element("td", "", qualification(a.qualified)),
                   element("td", "n", duration(a.seconds_median)));
        return row;
    }));
    $("links").hidden = !state.links?.length;
    $("links-list").replaceChildren(...(state.links || []).map(link => {
        const entry = element("li", "", link.annotator + ": ");
        const a = element("a", "", link.url);
        a.href = link.url;
        entry.append(a);
        return entry;
    }));
    $("fresh").textContent =
        "As of " + new Date().toLocaleTimeString() + ". Renewed every few seconds.";
}

const pause = seconds => new Promise(resume => setTimeout(resume, seconds * 1000));
const turned = () => new Promise(resume =>
    document.addEventListener("visibilitychange", resume, {once: true}));

async function operate() {
    only("operator");
    document.title = "Progress – rlhf label";
    $("operator-title").focus();
    for (;;) {
        showOperator(await insist("GET", "api/operator", null, "Not up to date"));
        say("");
        await pause(5);
        while (document.hidden) await turned();
    }
}

// ---- Keyboard -----------------------------------------------------------------------------------

const KEYS = {a: "A", 1: "A", ArrowLeft: "A", b: "B", 2: "B", ArrowRight: "B",
              t: "tie", n: "both_bad", s: "skip"};
const FIELDS = "textarea, select, input:not([type=radio], [type=checkbox])";

function choose(value) {
    $("compare").elements.choice.value = value;
    allowStrength();
    keepDraft();
}

/* One step more or less: none, slightly, clearly, far. */
function strengthen(step) {
    if (!strengthCounts()) return;
    const field = $("compare").elements.strength;
    const level = Math.min(3, Math.max(0, Number(field.value) + step));
    for (const radio of field) radio.checked = Number(radio.value) === level;
    keepDraft();
}

function onKey(event) {
    if (event.defaultPrevented || event.isComposing || event.altKey || busy || !session) return;
    const at = event.target;
    const typing = at.matches(FIELDS);
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (!item && key !== "u") return;
    if (event.ctrlKey || event.metaKey) {
        if (key !== "Enter") return;
        event.preventDefault();
        return submit();
    }
    // A prompt is answered in words: a key that is pressed before the field has focus does nothing.
    if (typing || session.task === "write" || !$("shortcuts").checked) return;
    const moves = at.matches("input[type=radio]") && key.startsWith("Arrow");
    if (KEYS[key] && !moves) choose(KEYS[key]);
    else if (key === "+" || key === "=") strengthen(1);
    else if (key === "-" || key === "−") strengthen(-1);
    else if (key === "u") undo();
    else if (key === "Enter" && !at.matches("button, a, summary")) submit();
    else return;
    event.preventDefault();
}

function submit() {
    $(session.task === "write" ? "write" : "compare").requestSubmit();
}

function onSubmit(event) {
    event.preventDefault();
    const body = entered();
    if (session.task === "write" ? body.text.trim() : body.choice) return save(body);
    if (session.task === "write") {
        say("Write an answer first, or skip.", "bad");
        $("answer").focus();
    } else {
        say("Choose an answer first.", "bad");
        $("compare").elements.choice[0].focus();
    }
}

// ---- Start --------------------------------------------------------------------------------------

function showSession() {
    const kind = session.annotator_type ? " (" + session.annotator_type + ")" : "";
    $("who").textContent = session.role === "operator" ? "operator" : session.annotator + kind;
    if (session.role === "operator") return;
    session.aspects ??= [];
    $("aspects").replaceChildren(...session.aspects.map(aspect => {
        const copy = $("aspect-template").content.cloneNode(true);
        const words = aspect.replaceAll("_", " ");
        copy.querySelector("legend span").textContent = sentence(words).slice(0, -1);
        for (const radio of copy.querySelectorAll("input")) radio.name = "aspect " + aspect;
        return copy;
    }));
    $("guidelines").hidden = !session.guidelines;
    $("guidelines").open = !session.progress.done;
    $("guidelines-text").textContent = session.guidelines || "";
    $("help").hidden = session.task === "write";
    document.body.classList.toggle("writing", session.task === "write");
}

async function start() {
    token = location.hash.slice(1);
    if (!token)
        return notice("This page needs your personal link",
                      "Open the whole link that was sent to you, with the part after the #.");
    try {
        session = await insist("GET", "api/session", null, "Not started yet");
        say("");
        progress = session.progress || progress;
        showSession();
        if (session.role === "operator") await operate();
        else await goOn();
    } catch (error) {
        fail(error);
    }
}

/* Whether single keys choose is the annotator's decision, kept by their browser (WCAG 2.1.4). */
function rememberShortcuts() {
    try {
        $("shortcuts").checked = localStorage.getItem("rlhf-label shortcuts") !== "off";
        $("shortcuts").addEventListener("change", () =>
            localStorage.setItem("rlhf-label shortcuts", $("shortcuts").checked ? "on" : "off"));
    } catch {
        // A browser that keeps nothing: they are on.
    }
}

rememberShortcuts();
$("compare").addEventListener("submit", onSubmit);
$("write").addEventListener("submit", onSubmit);
$("compare").addEventListener("input", () => { allowStrength(); keepDraft(); });
$("write").addEventListener("input", keepDraft);
$("skip").addEventListener("click", () => save({skip: true}));
$("restore").addEventListener("click", () => { $("answer").value = item.draft; keepDraft(); });
$("undo").addEventListener("click", undo);
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => {
    clock.turn();
    if (document.hidden) keepDraft();
});
window.addEventListener("online", () => retryNow?.());
window.addEventListener("hashchange", () => location.reload());
window.addEventListener("pagehide", keepDraft);
window.addEventListener("beforeunload", event => { if (busy) event.preventDefault(); });
start();
