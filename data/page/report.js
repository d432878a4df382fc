"use strict";

/* The page of `rlhf report`. It draws the JSON in the element "data" (rlhf.c, section REPORT, says
 * what that holds). All text comes in as text nodes: an answer that contains HTML shows as text.
 *
 * A figure is an SVG that is redrawn when its width or the choice of runs changes. Its numbers are
 * to be had by pointer, by keyboard (it is a slider over its points) and as a table below it. */

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const hidden = new Set(); /* indices of runs that the legend has switched off */
const redraws = [];       /* called after every change of what is shown */

const shown = () => runs.map((run, i) => i).filter(i => !hidden.has(i));

/* A run's looks: 0 to 7, counted among the runs of its trainer, which alone share figures. */
const looks = runs.map((run, i) => runs.slice(0, i).filter(r => r.trainer === run.trainer).length % 8);
const series = i => `s${looks[i]}`;

/* ---- building blocks ---- */

/* An element with attributes ("onclick" and the like are listeners) and children. */
function el(name, attributes, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text", "rect"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
                   : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

/* A number as people read it: five digits, a true minus sign; nothing is "–". */
function number(value, digits = 5) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value) && size < 1e9) text = value.toLocaleString("en");
  else if (size !== 0 && (size < 1e-3 || size >= 1e6)) text = value.toExponential(3);
  else text = String(Number(value.toPrecision(digits)));
  return text.replace(/-/g, "−");
}

const percent = value =>
  value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %";

/* Marks around (0, 0), one for each of the eight looks. */
const shapes = [
  "M0-4A4 4 0 1 1 0 4A4 4 0 1 1 0-4Z",
  "M-3.6-3.6H3.6V3.6H-3.6Z",
  "M0-4.6L4.4 3.4H-4.4Z",
  "M0-5L4.4 0L0 5L-4.4 0Z",
  "M0 4.6L4.4-3.4H-4.4Z",
  "M-1.6-4.6H1.6V-1.6H4.6V1.6H1.6V4.6H-1.6V1.6H-4.6V-1.6H-1.6Z",
  "M0-4.6L4.4-1.4L2.7 3.7H-2.7L-4.4-1.4Z",
  "M-2-4.6H2L4.6-2V2L2 4.6H-2L-4.6 2V-2Z",
];

function mark(look, x, y, more = "", scale = 1) {
  return el("path", { d: shapes[look], class: `mark s${look} ${more}`,
                      transform: `translate(${x.toFixed(2)} ${y.toFixed(2)}) scale(${scale})` });
}

/* The run's mark as it stands in text, with a piece of its line where that helps. */
function key(i, withLine) {
  const svg = el("svg", { class: `key ${series(i)}${withLine ? "" : " short"}`, "aria-hidden": "true",
                          viewBox: withLine ? "0 0 32 14" : "0 0 14 14" });
  if (withLine) svg.append(el("path", { d: "M0 7H32", class: "curve" }));
  svg.append(mark(looks[i], withLine ? 16 : 7, 7));
  return svg;
}

const runName = i => [key(i), runs[i].name];

/* Adds a section to the page and to its contents. */
function section(id, title, note) {
  const part = el("section", { id, "aria-labelledby": `${id}-title` },
                  el("h2", { id: `${id}-title` }, title), note ? el("p", { class: "note" }, note) : null);
  document.getElementById("main").append(part);
  document.getElementById("contents").append(el("a", { href: `#${id}` }, title));
  return part;
}

/* Fills a node now and after every change of what is shown. */
function live(node, fill) {
  const redraw = () => node.replaceChildren(...[fill()].flat().filter(Boolean));
  redraws.push(redraw);
  redraw();
  return node;
}

/* A table, built when it is opened: long runs have many numbers. */
function behind(title, build) {
  const box = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title });
  const details = el("details", {}, el("summary", {}, "Numbers"), box);
  const fill = () => { if (details.open) box.replaceChildren(build()); };
  details.addEventListener("toggle", fill);
  redraws.push(fill);
  return details;
}

/* ---- scales ---- */

/* Round values from low to high, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 5].find(m => m * unit >= rough) || 10);
  const list = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) list.push(k * step);
  return { list, step };
}

/* A tick's text has as many digits as tell it from the next one. */
function tickText(value, step, most) {
  if (value === 0 || Math.abs(value) < step / 1e6) return "0";
  if (most < 1e-2 || most >= 1e6) {
    const digits = Math.max(0, Math.floor(Math.log10(Math.abs(value)) + 1e-9) - Math.floor(Math.log10(step) + 1e-9));
    return value.toExponential(digits).replace("+", "").replace(/-/g, "−");
  }
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })
    .replace(/-/g, "−");
}

/* Limits of values with a little room; equal ones get some, too. */
function limits(values, room) {
  let low = Infinity, high = -Infinity;
  for (const v of values) {
    if (v === null) continue;
    if (v < low) low = v;
    if (v > high) high = v;
  }
  if (low > high) return [0, 1];
  if (low === high) {
    const half = Math.abs(low) * 0.1 || 1;
    return [low - half, high + half];
  }
  return [low - room * (high - low), high + room * (high - low)];
}

/* ---- figures ---- */

/* A figure with axes. spec:
 *   title, says    its name and what it shows
 *   xLabel, yLabel
 *   points(i)      the points {x, y, ...} of run i, in order
 *   nearest        "x": the pointer chooses a place on the x axis, for all runs; "point": one point
 *   describe(at)   the readout: a list of nodes for the chosen {x} or {run, point}
 *   extra(i)       more points that limits have to hold; draw(frame) draws between grid and marks
 *   table()        the numbers as a table
 *   height */
function figure(spec) {
  const readout = el("p", { class: "readout" });
  const svg = el("svg", { class: "chart", tabindex: "0", role: "slider", "aria-label": spec.title,
                          "aria-valuemin": "0", "aria-orientation": "horizontal" });
  const node = el("figure", { class: "plot", "data-title": spec.title },
                  el("figcaption", {}, el("h4", {}, spec.title), el("p", { class: "says" }, spec.says)),
                  readout, svg, behind(spec.title, spec.table));
  const state = { width: 0, at: null, stops: [] };
  let overlay = null;

  /* What the pointer or the arrow keys can stand on. */
  function findStops() {
    if (spec.nearest === "point")
      return shown().flatMap(run => spec.points(run).map(point => ({ run, point })));
    const all = new Set();
    for (const run of shown()) for (const p of spec.points(run)) if (p.y !== null) all.add(p.x);
    return [...all].sort((a, b) => a - b).map(x => ({ x }));
  }

  function frame() {
    const width = state.width, height = spec.height || 170;
    const points = shown().flatMap(i => spec.points(i).concat(spec.extra ? spec.extra(i) : []));
    const [x0, x1] = limits(points.map(p => p.x), spec.nearest === "point" ? 0.05 : 0);
    const [y0, y1] = limits(points.map(p => p.y), 0.06);
    const yTicks = ticks(y0, y1, height / 36), most = Math.max(Math.abs(y0), Math.abs(y1));
    const yTexts = yTicks.list.map(v => tickText(v, yTicks.step, most));
    const left = 10 + 6.3 * Math.max(...yTexts.map(t => t.length), 2);
    const box = { left, right: width - 8, top: 8, bottom: height - 32 };
    return { ...box, width, height, yTicks, yTexts, xTicks: ticks(x0, x1, Math.max(3, width / 80)),
             xMost: Math.max(Math.abs(x0), Math.abs(x1)),
             x: v => box.left + (v - x0) / (x1 - x0) * (box.right - box.left),
             y: v => box.bottom - (v - y0) / (y1 - y0) * (box.bottom - box.top) };
  }

  function drawAxes(f) {
    const g = el("g", { "aria-hidden": "true" });
    f.yTicks.list.forEach((v, k) => g.append(
      el("line", { class: "grid", x1: f.left, x2: f.right, y1: f.y(v), y2: f.y(v) }),
      el("text", { x: f.left - 6, y: f.y(v) + 4, "text-anchor": "end" }, f.yTexts[k])));
    g.append(el("line", { class: "axis", x1: f.left, x2: f.right, y1: f.bottom, y2: f.bottom }));
    for (const v of f.xTicks.list) g.append(
      el("line", { class: "axis", x1: f.x(v), x2: f.x(v), y1: f.bottom, y2: f.bottom + 4 }),
      el("text", { x: f.x(v), y: f.bottom + 15, "text-anchor": "middle" }, tickText(v, f.xTicks.step, f.xMost)));
    g.append(el("text", { x: f.right, y: f.height - 2, "text-anchor": "end" }, spec.xLabel));
    return g;
  }

  /* The curve of a run; a value that is no number interrupts it. */
  function drawCurve(f, i) {
    let path = "", pen = false;
    const points = spec.points(i);
    for (const p of points) {
      if (p.y === null) { pen = false; continue; }
      path += `${pen ? "L" : "M"}${f.x(p.x).toFixed(2)} ${f.y(p.y).toFixed(2)}`;
      pen = true;
    }
    if (!path) return [];
    const last = points.filter(p => p.y !== null).pop();
    return [el("path", { d: path, class: `curve ${series(i)}` }), mark(looks[i], f.x(last.x), f.y(last.y))];
  }

  /* Shows what stands at a stop; the last one where none is chosen. */
  function show(at) {
    state.at = at;
    const stop = state.stops[at ?? state.stops.length - 1];
    readout.replaceChildren(...(stop ? spec.describe(stop) : [el("span", { class: "at" }, "No run is shown.")]));
    svg.setAttribute("aria-valuenow", at ?? Math.max(state.stops.length - 1, 0));
    svg.setAttribute("aria-valuetext", readout.textContent);
    if (overlay) overlay.remove();
    overlay = null;
    if (at === null || !stop) return;
    const f = state.frame;
    overlay = el("g", { "aria-hidden": "true" });
    if (spec.nearest === "point") {
      overlay.append(mark(looks[stop.run], f.x(stop.point.x), f.y(stop.point.y), "on", 1.4));
    } else {
      overlay.append(el("line", { class: "cross", x1: f.x(stop.x), x2: f.x(stop.x), y1: f.top, y2: f.bottom }));
      for (const i of shown()) {
        const p = spec.points(i).find(q => q.x === stop.x);
        if (p && p.y !== null) overlay.append(mark(looks[i], f.x(p.x), f.y(p.y), "on"));
      }
    }
    svg.append(overlay);
  }

  function draw() {
    state.width = Math.max(Math.round(node.clientWidth), 120);
    state.stops = findStops();
    const f = state.frame = frame();
    svg.setAttribute("viewBox", `0 0 ${f.width} ${f.height}`);
    svg.setAttribute("aria-valuemax", Math.max(state.stops.length - 1, 0));
    svg.replaceChildren(drawAxes(f));
    if (spec.draw) svg.append(...spec.draw(f));
    if (spec.nearest === "x")
      for (const i of shown()) svg.append(...drawCurve(f, i));
    show(state.at !== null && state.at < state.stops.length ? state.at : null);
  }

  function follow(event) {
    const box = svg.getBoundingClientRect(), f = state.frame, scale = f.width / box.width;
    const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
    let best = null, least = Infinity;
    state.stops.forEach((stop, k) => {
      const far = spec.nearest === "point"
        ? Math.hypot(f.x(stop.point.x) - px, f.y(stop.point.y) - py) : Math.abs(f.x(stop.x) - px);
      if (far < least) { least = far; best = k; }
    });
    show(best);
  }

  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", () => { if (document.activeElement !== svg) show(null); });
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", event => {
    const last = state.stops.length - 1, at = state.at ?? last;
    const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1,
                 PageDown: at - 10, PageUp: at + 10, Home: 0, End: last }[event.key];
    if (event.key === "Escape") show(null);
    else if (to !== undefined && last >= 0) {
      event.preventDefault();
      show(Math.min(Math.max(to, 0), last));
    }
  });

  redraws.push(draw);
  new ResizeObserver(() => { if (node.clientWidth && Math.round(node.clientWidth) !== state.width) draw(); }).observe(node);
  return node;
}

/* One run's number in a readout; the exact one is there, too. In small figures its mark stands for
 * its name, which the legend tells and screen readers say. */
function reading(i, value, named) {
  return el("span", { class: "reading", "data-run": i, "data-value": value === null ? "" : String(value),
                      title: `${runs[i].name}: ${value}` }, key(i),
            el("span", { class: named ? "soft" : "unseen" }, `${runs[i].name} `), number(value));
}

/* A table that may be wider than a phone moves sideways in its own box. */
const sideways = node => el("div", { class: "sideways", tabindex: "0", role: "region", "aria-label": node.getAttribute("aria-label") }, node);

/* Rows of numbers with a head; cells that are numbers stand to the right. name: for screen readers. */
function table(name, head, rows) {
  const cell = (value, tag) => typeof value === "number" || value === null
    ? el(tag, { class: "num" }, number(value)) : el(tag, {}, value);
  return el("table", { "aria-label": name },
            el("thead", {}, el("tr", {}, head.map((h, k) =>
              el("th", { scope: "col", class: rows[0] && (typeof rows[0][k] === "number" || rows[0][k] === null) ? "num" : null }, h)))),
            el("tbody", {}, rows.map(row => el("tr", {}, row.map((v, k) => cell(v, k ? "td" : "th"))))));
}

/* ---- curves ---- */

/* What metrics say, in a line; further ones are drawn without. */
const says = {
  "objective/scores": "Mean score of the answers, end penalty included",
  "objective/rlhf_reward": "Score less the KL penalty: what is maximised",
  "objective/non_score_reward": "The KL penalty, mean over answers",
  "objective/kl": "KL to the reference as penalised, nats per answer",
  "objective/kl_k1": "KL, estimator k1, nats per answer",
  "objective/kl_k3": "KL, estimator k3, nats per answer",
  "objective/kl_exact": "KL over the whole vocabulary, nats per answer",
  "objective/entropy": "−log p of the sampled answers",
  "objective/kl_coef": "Weight of the KL penalty",
  "val/num_eos_tokens": "Answers of an update that ended by themselves",
  "val/ratio": "Mean probability ratio, new to old",
  "val/ratio_var": "Variance of the steps’ mean ratios",
  "val/ratio_first": "First ratio of the update: exactly 1",
  "val/clipfrac_avg": "Share of clipped values",
  "completions/mean_length": "Tokens of an answer",
  "completions/clipped_ratio": "Share of answers without an end",
  "completions/repetition": "Share of three-token runs that an answer repeats",
  "policy/approxkl_avg": "How far a step moves the policy",
  "policy/clipfrac_avg": "Share of tokens whose ratio was clipped",
  "policy/entropy_avg": "Entropy of the next token, nats",
  "loss/policy_avg": "Policy loss",
  "loss/value_avg": "Value loss",
  "loss": "Loss on the training data",
  "eval_loss": "Loss on the evaluation data",
  "accuracy": "Share of pairs whose better answer scores higher",
  "eval_accuracy": "The same on the evaluation data",
  "margin": "Score of the better answer less that of the other",
  "eval_margin": "The same on the evaluation data",
  "mean_token_accuracy": "Share of tokens that were the most likely one",
  "eval_mean_token_accuracy": "The same on the evaluation data",
  "entropy": "Entropy of the next token, nats",
  "grad_norm": "Norm of the gradient before clipping",
  "learning_rate": "Learning rate",
  "lr": "Learning rate of the policy",
  "num_tokens": "Tokens seen",
  "episode": "Answers sampled",
  "epoch": "Passes over the data",
};

/* What a reader looks for comes first; the others are behind a click, what only counts is last. */
const first = ["objective/scores", "objective/kl_exact", "objective/rlhf_reward", "completions/mean_length",
               "completions/repetition", "completions/clipped_ratio", "policy/entropy_avg",
               "loss", "eval_loss", "accuracy", "eval_accuracy", "margin", "eval_margin", "mean_token_accuracy"];
const final = ["lr", "learning_rate", "num_tokens", "episode", "epoch"];

const points = (i, name) => {
  const m = runs[i].metrics[name];
  return m ? m.step.map((x, k) => ({ x, y: m.value[k] })) : [];
};

function curve(trainer, name) {
  const cache = runs.map((run, i) => run.trainer === trainer ? points(i, name) : []);
  return figure({
    title: name, says: says[name] || "", xLabel: "step", nearest: "x",
    points: i => cache[i],
    describe: at => [el("span", { class: "at" }, `step ${number(at.x)}`),
      ...shown().map(i => [i, cache[i].find(p => p.x === at.x)]).filter(([, p]) => p).map(([i, p]) => reading(i, p.y))],
    table: () => {
      const list = shown().filter(i => cache[i].length);
      const steps = [...new Set(list.flatMap(i => cache[i].map(p => p.x)))].sort((a, b) => a - b);
      const maps = list.map(i => new Map(cache[i].map(p => [p.x, p.y])));
      return table(name, ["step", ...list.map(i => runs[i].name)], steps.map(x => [x, ...maps.map(m => m.get(x) ?? null)]));
    },
  });
}

const trainers = ["ppo", "rm", "sft"];
const trainerNames = { ppo: "PPO", rm: "Reward model", sft: "Supervised fine-tuning" };

/* Figures of all metrics of the runs of one trainer; what was measured once is a table. */
function curves() {
  const part = section("curves", "Curves",
    "The number under the pointer stands above each figure; with the keyboard, the arrow keys move it.");
  for (const trainer of trainers) {
    const of = runs.map((run, i) => i).filter(i => runs[i].trainer === trainer);
    const names = [...new Set(of.flatMap(i => Object.keys(runs[i].metrics)))];
    const rank = name => first.includes(name) ? first.indexOf(name) : final.includes(name) ? 200 : 100 + names.indexOf(name);
    names.sort((a, b) => rank(a) - rank(b));
    const many = names.filter(name => of.some(i => runs[i].metrics[name]?.step.length > 1));
    const once = names.filter(name => !many.includes(name));
    if (!names.length) continue;
    part.append(el("h3", {}, trainerNames[trainer]));
    const lead = many.filter(name => first.includes(name)), rest = many.filter(name => !first.includes(name));
    if (lead.length) part.append(el("div", { class: "plots" }, lead.map(name => curve(trainer, name))));
    if (rest.length) part.append(el("details", { class: "further" }, el("summary", {}, `${rest.length} further metrics`),
                                    el("div", { class: "plots" }, rest.map(name => curve(trainer, name)))));
    if (once.length) part.append(live(el("div"), () => {
      const list = of.filter(i => !hidden.has(i));
      return list.length ? sideways(table("Measured once", ["measured once", ...list.map(i => el("span", {}, runName(i)))],
        once.map(name => [name, ...list.map(i => runs[i].metrics[name]?.value[0] ?? null)]))) : null;
    }));
  }
}

/* ---- reward against KL ---- */

function frontier() {
  const of = runs.map((run, i) => i).filter(i => runs[i].metrics["objective/kl_exact"] && runs[i].metrics["objective/scores"]);
  if (!of.length) return;
  const part = section("frontier", "Reward against KL",
    "Each point is one update: how far the policy is from the reference and what its answers score. " +
    "A run that climbs steeply pays little for its reward. The dotted line is what choosing the best " +
    "of n answers of the first policy scores, at KL log n − (n−1)/n; its band is two standard errors.");
  const cache = runs.map((run, i) => {
    if (!of.includes(i)) return [];
    const kl = new Map(points(i, "objective/kl_exact").map(p => [p.x, p.y]));
    return points(i, "objective/scores").map(p => ({ step: p.x, x: kl.get(p.x) ?? null, y: p.y }))
      .filter(p => p.x !== null && p.y !== null);
  });
  const best = i => runs[i].best_of_n ? runs[i].best_of_n.points : [];
  const path = list => list.map(([x, y], k) => `${k ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");
  part.append(el("div", { class: "plots wide" }, figure({
    title: "objective/scores against objective/kl_exact", says: "Score against KL in nats per answer",
    xLabel: "KL to the reference, nats per answer", nearest: "point", height: 320,
    points: i => cache[i],
    extra: i => best(i).flatMap(p => [{ x: p.kl, y: p.score - 2 * p.error }, { x: p.kl, y: p.score + 2 * p.error }]),
    draw: f => shown().filter(i => cache[i].length).flatMap(i => {
      const b = best(i), c = cache[i], at = c.map(p => [f.x(p.x), f.y(p.y)]);
      const band = b.map(p => [f.x(p.kl), f.y(p.score + 2 * p.error)])
        .concat([...b].reverse().map(p => [f.x(p.kl), f.y(p.score - 2 * p.error)]));
      return [
        b.length ? el("path", { class: `band ${series(i)}`, d: path(band) + "Z" }) : null,
        b.length ? el("path", { class: `frontier ${series(i)}`, d: path(b.map(p => [f.x(p.kl), f.y(p.score)])) }) : null,
        el("path", { class: `path ${series(i)}`, d: path(at) }),
        ...at.map(([x, y], k) => mark(looks[i], x, y, k ? "" : "open", k === at.length - 1 ? 1.25 : 0.65)),
      ].filter(Boolean);
    }).concat( /* over all curves; the frontiers' points are at the same KL: of many, one is labelled */
      shown().filter(i => cache[i].length).flatMap((i, place, list) =>
        place > 0 && list.length > 2 ? [] : best(i).map(p => el("text", { class: `n ${series(i)}`, x: f.x(p.kl),
          y: f.y(p.score) + (place % 2 ? 16 : -8), "text-anchor": "middle" }, `n = ${p.n}`)))),
    describe: at => [el("span", { class: "at" }, `step ${number(at.point.step)}`), reading(at.run, at.point.y, true),
                     el("span", {}, `at KL ${number(at.point.x)}`)],
    table: () => {
      const rows = shown().flatMap(i => cache[i].map(p => [runs[i].name, p.step, p.x, p.y])
        .concat(best(i).map(p => [`${runs[i].name}, best of ${p.n}`, null, p.kl, p.score])));
      return table("Score against KL", ["run", "step", "KL", "score"], rows);
    },
  })));
}

/* ---- slices and annotators: rows of dots with intervals ---- */

/* The lowest value that rows of shares have to show, on a round place. */
const floorOf = values => Math.max(0, Math.min(0.4, Math.floor(Math.min(...values.filter(v => typeof v === "number")) * 10) / 10));

/* A place on the axis of shares from low to 1, as a percentage of its width. */
const place = (value, low) => `${(100 * (value - low) / (1 - low)).toFixed(2)}%`;

/* The axis over a column of dots. */
function shareAxis(low) {
  const svg = el("svg", { height: "1.1rem", "aria-hidden": "true" });
  for (const v of [low, 0.5, 0.75, 1].filter((v, k, all) => k === 0 || v - all[0] > 0.15))
    svg.append(el("text", { class: v === low || v === 1 ? null : "extra", x: place(v, low), y: "12", "text-anchor": v === 1 ? "end" : v === low ? "start" : "middle" },
                  `${Math.round(100 * v)} %`));
  return svg;
}

/* Dots on that axis: {value, low, high, look, open} each; bars are values drawn as a stroke. */
function dots(low, list, bars, ceiling) {
  const svg = el("svg", { "aria-hidden": "true" });
  const at = v => place(v, low);
  if (low < 0.5) svg.append(el("line", { class: "zero", x1: at(0.5), x2: at(0.5), y1: "0", y2: "100%" }));
  svg.append(el("line", { class: "zero", x1: at(1), x2: at(1), y1: "0", y2: "100%" }));
  for (const v of bars) if (typeof v === "number")
    svg.append(el("line", { class: "other", x1: at(v), x2: at(v), y1: "20%", y2: "80%" }));
  if (typeof ceiling === "number") {
    const nest = el("svg", { x: at(ceiling), y: "50%", style: "overflow: visible" });
    nest.append(el("path", { class: "ceiling", d: "M0-5L5 0L0 5L-5 0Z" }));
    svg.append(nest);
  }
  for (const d of list) {
    if (typeof d.value !== "number") continue;
    if (typeof d.low === "number")
      svg.append(el("line", { class: `range s${d.look}`, x1: at(d.low), x2: at(d.high), y1: "50%", y2: "50%" }));
    const nest = el("svg", { x: at(d.value), y: "50%", style: "overflow: visible" });
    nest.append(mark(d.look, 0, 0, d.open ? "open" : ""));
    svg.append(nest);
  }
  return svg;
}

/* A share with its interval, which may stand in a line of its own. */
const share = (row, name) =>
  el("span", { class: "share" }, percent(row[name]), typeof row[name + "_low"] === "number"
    ? [" ", el("span", { class: "soft" }, `[${(100 * row[name + "_low"]).toFixed(1)}, ${(100 * row[name + "_high"]).toFixed(1)}]`)] : null);

/* Objects by value, as evaluations hold them under the name of a field. */
const fieldsOf = e => Object.keys(e || {}).filter(k => e[k] && typeof e[k] === "object" && !Array.isArray(e[k]));
const fieldNames = { annotator_type: "kind of annotator", length: "length (thirds)", turns: "turns", per_turn: "up to turn" };

/* Whether enough pairs were judged more than once to tell a ceiling. */
const sure = row => !(row.agreement_high - row.agreement_low > 0.2);

/* Preference accuracy of the shown runs that have one: all pairs, then each field's values. */
function accuracySlices(list) {
  const fields = [...new Set(list.flatMap(i => fieldsOf(runs[i].eval)))];
  const rowsOf = field => {
    const values = [...new Set(list.flatMap(i => Object.keys(runs[i].eval[field] || {})))];
    return values.flatMap(value => list.map(i => ({ value, i, row: (runs[i].eval[field] || {})[value] })).filter(r => r.row));
  };
  const groups = [["all pairs", list.map(i => ({ value: "all", i, row: runs[i].eval }))],
                  ...fields.map(field => [fieldNames[field] || field, rowsOf(field)])];
  const low = floorOf(groups.flatMap(([, rows]) => rows.flatMap(r => [r.row.accuracy_low, r.row.length_accuracy])));
  const head = el("thead", {}, el("tr", {}, el("th", { scope: "col" }, ""), el("th", { scope: "col", class: list.length > 1 ? null : "extra" }, "run"),
    el("th", { scope: "col", class: "dots" }, shareAxis(low)), el("th", { scope: "col" }, "accuracy"),
    ["pairs", "margin", "ECE", "length", "ceiling"].map(h => el("th", { scope: "col", class: "num extra" }, h))));
  const bodies = groups.filter(([, rows]) => rows.length).map(([name, rows]) => {
    let before = null;
    return el("tbody", {}, el("tr", {}, el("th", { scope: "rowgroup", colspan: "9" }, el("h4", {}, name))),
      rows.map(r => {
        const again = r.value === before;
        before = r.value;
        return el("tr", {}, el("th", { scope: "row" }, again ? "" : r.value),
          el("td", { class: `who${list.length > 1 ? "" : " extra"}` }, runName(r.i)),
          el("td", { class: "dots" }, dots(low, [{ value: r.row.accuracy, low: r.row.accuracy_low, high: r.row.accuracy_high, look: looks[r.i] }],
                                           [r.row.length_accuracy], sure(r.row) ? r.row.ceiling : null)),
          el("td", {}, share(r.row, "accuracy")),
          [number(r.row.pairs), number(r.row.margin, 3), number(r.row.ece, 2), percent(r.row.length_accuracy), sure(r.row) ? percent(r.row.ceiling) : "–"]
            .map(t => el("td", { class: "num extra" }, t)));
      }));
  });
  return el("table", { class: "slices", "aria-label": "Preference accuracy by slice" }, head, bodies);
}

/* Likelihood of the shown runs that have one. */
function textSlices(list) {
  const columns = ["records", "num_tokens", "nll", "perplexity", "mean_token_accuracy", "entropy", "kl"]
    .filter(c => list.some(i => typeof runs[i].eval[c] === "number"));
  const rows = list.flatMap(i => [["all", i, runs[i].eval]].concat(fieldsOf(runs[i].eval).flatMap(field =>
    Object.entries(runs[i].eval[field]).map(([value, row]) => [`${field}: ${value}`, i, row]))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "likelihood" },
    table("Likelihood", ["", "run", ...columns], rows.map(([value, i, row]) =>
      [value, el("span", {}, runName(i)), ...columns.map(c => row[c] ?? null)])));
}

function slices() {
  const has = (i, name) => runs[i].eval && typeof runs[i].eval[name] === "number";
  if (!runs.some((run, i) => has(i, "accuracy") || has(i, "nll"))) return;
  const part = section("slices", "Slices");
  if (runs.some((run, i) => has(i, "accuracy")))
    part.append(el("p", { class: "note" }, "Accuracy on held-out pairs with its 95\u00a0% Wilson interval. The stroke is the accuracy of " +
      "always preferring the longer answer; the diamond the ceiling that the annotators’ own agreement sets, where it is known to 20 points. Margin in deviations of " +
      "the reward, ECE the expected calibration error."));
  part.append(live(el("div"), () => {
    const pairs = shown().filter(i => has(i, "accuracy")), text = shown().filter(i => has(i, "nll"));
    return [pairs.length ? accuracySlices(pairs) : null, text.length ? textSlices(text) : null];
  }));
}

/* ---- annotators ---- */

function raterTable(title, rows, low, sorted) {
  const entries = Object.entries(rows);
  if (sorted) entries.sort((a, b) => (b[1].reliability ?? -1) - (a[1].reliability ?? -1));
  const gold = entries.some(([, r]) => typeof r.gold === "number");
  return el("table", { class: "raters" }, el("caption", {}, title),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, ""), el("th", { scope: "col", class: "dots" }, shareAxis(low)),
      el("th", { scope: "col" }, "reliability"), el("th", { scope: "col", class: "extra" }, "agreement"),
      gold ? el("th", { scope: "col", class: "extra" }, "gold") : null,
      el("th", { scope: "col", class: "num extra" }, "first shown"), el("th", { scope: "col", class: "num extra" }, "seconds"),
      el("th", { scope: "col", class: "num" }, "judgements"))),
    el("tbody", {}, entries.map(([name, r]) => el("tr", {}, el("th", { scope: "row" }, name),
      el("td", { class: "dots" }, dots(low, [
        { value: r.agreement, low: r.agreement_low, high: r.agreement_high, look: 6, open: true },
        { value: r.reliability, low: r.reliability_low, high: r.reliability_high, look: 0 }], [])),
      el("td", {}, share(r, "reliability")), el("td", { class: "extra" }, share(r, "agreement")),
      gold ? el("td", { class: "extra" }, share(r, "gold")) : null,
      el("td", { class: "num extra" }, percent(r.first)), el("td", { class: "num extra" }, number(r.seconds, 3)),
      el("td", { class: "num" }, number(r.judgements))))));
}

/* Reliability of each annotator by domain. */
function cells(reliabilities) {
  const domains = [...new Set(Object.values(reliabilities).flatMap(Object.keys))];
  if (domains.length < 2) return null;
  return el("details", {}, el("summary", {}, "Reliability by domain"),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Reliability by domain" },
      el("table", { "aria-label": "Reliability by domain" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "annotator"),
        domains.map(d => el("th", { scope: "col" }, d)))),
        el("tbody", {}, Object.entries(reliabilities).map(([who, row]) => el("tr", {}, el("th", { scope: "row" }, who),
          domains.map(d => el("td", {}, row[d] ? [share(row[d], "reliability"), ` of ${row[d].judgements}`] : "–"))))))));
}

const plain = value => typeof value === "string" ? value
  : Array.isArray(value) ? value.map(turn => turn && turn.content ? `${turn.role}: ${turn.content}` : JSON.stringify(turn)).join("\n")
    : value === null || value === undefined ? "" : JSON.stringify(value);

function annotators() {
  const r = data.raters;
  if (!r) return;
  const part = section("annotators", "Annotators",
    "Filled: how often each is right, estimated from all judgements together. Open: how often each agrees with others. " +
    "Both with 95\u00a0% intervals.");
  const fact = (name, value, key) => el("div", {}, el("dt", {}, name), el("dd", {}, value,
    typeof r[`${key}_low`] === "number" ? el("small", {}, ` [${number(r[`${key}_low`], 2)}, ${number(r[`${key}_high`], 2)}]`) : null));
  part.append(el("dl", { class: "facts-list" }, fact("judgements", number(r.judgements)), fact("items", number(r.items)),
    fact("annotators", number(r.annotators)), fact("agreement", percent(r.agreement)),
    fact("Krippendorff’s alpha", number(r.alpha, 3), "alpha"), fact("Cohen’s kappa", number(r.kappa, 3), "kappa")));
  const groups = [["By kind", r.annotator_type], ["By domain", r.domain], ["By annotator", r.annotator]]
    .filter(([, rows]) => rows && Object.keys(rows).length && !(Object.keys(rows).length === 1 && rows["-"]));
  const low = floorOf(groups.flatMap(([, rows]) => Object.values(rows).flatMap(v => [v.reliability_low, v.agreement_low])));
  for (const [title, rows] of groups) part.append(raterTable(title, rows, low, title === "By annotator"));
  part.append(cells(r.reliabilities || {}) || "");
  if (r.disputed && r.disputed.length) part.append(el("details", {}, el("summary", {}, `Most disputed items (${r.disputed.length})`),
    r.disputed.map(d => el("article", { class: "answer" }, el("p", { class: "prompt" }, plain(d.prompt)),
      el("div", { class: "cells" }, [0, 1].map(k => el("div", { class: "cell" },
        el("h5", {}, `${d.votes[k]} ${d.votes[k] === 1 ? "vote" : "votes"}`), el("div", { class: "text" }, plain(d.answers[k])))))))));
}

/* ---- answers ---- */

const ANSWERS_OPEN = 6; /* further prompts are behind a click */

/* One answer that runs share, each with its sample of it. */
function answerCell(title, list) {
  const [run, s] = list[0], alone = list.length === 1;
  const scores = list.filter(([, t]) => typeof t.score === "number")
    .map(([i, t], k) => [k ? " " : "score ", el("span", { class: "whole" }, alone ? null : key(i), number(t.score, 3))]);
  return el("div", { class: `cell ${alone ? series(run) : ""}` }, el("h5", {}, alone ? key(run) : null, title),
            el("div", { class: "text" }, s.completion.trim() || "(empty)"),
            el("div", { class: "facts" }, scores.flat(), scores.length ? " · " : null, `${s.n_tokens} tokens`,
               s.finished === false ? " · no end" : null));
}

/* Before and after of the shown runs for one prompt. Runs that began with the same answer share it. */
function answerRow(prompt, byRun) {
  const list = shown().filter(i => byRun.has(i)), cells = [], seen = new Map();
  if (!list.length) return null;
  for (const i of list) {
    const before = byRun.get(i).find(s => s.step === 0);
    if (!before) continue;
    const same = JSON.stringify([before.completion, before.finished]);
    seen.set(same, [...(seen.get(same) || []), [i, before]]);
  }
  for (const of of seen.values())
    cells.push(answerCell(of.length === list.length ? "before" : `before ${of.map(([i]) => runs[i].name).join(", ")}`, of));
  for (const i of list)
    for (const s of byRun.get(i)) if (s.step > 0)
      cells.push(answerCell(`${runs[i].name}, after ${number(s.step)} steps`, [[i, s]]));
  return el("article", { class: "answer" }, el("p", { class: "prompt" }, prompt.trim()), el("div", { class: "cells" }, cells));
}

function answers() {
  if (!runs.some(run => run.samples.length)) return;
  const part = section("answers", "Answers, before and after",
    "The most likely answer (greedy) to prompts spread over each run’s data, before the first step and after the last.");
  for (const trainer of ["ppo", "sft"]) {
    const prompts = new Map();
    runs.forEach((run, i) => {
      if (run.trainer !== trainer) return;
      for (const s of run.samples) {
        if (!prompts.has(s.prompt)) prompts.set(s.prompt, new Map());
        const byRun = prompts.get(s.prompt);
        byRun.set(i, [...(byRun.get(i) || []), s]);
      }
    });
    if (!prompts.size) continue;
    part.append(live(el("div"), () => {
      const rows = [...prompts].map(([prompt, byRun]) => answerRow(prompt, byRun)).filter(Boolean);
      if (!rows.length) return null;
      const rest = rows.slice(ANSWERS_OPEN);
      return [el("h3", {}, trainerNames[trainer]), ...rows.slice(0, ANSWERS_OPEN),
              rest.length ? el("details", {}, el("summary", {}, `${rest.length} more`), rest) : null];
    }));
  }
}

/* ---- warnings, what was run ---- */

function warnings() {
  const part = section("warnings", "Warnings");
  const list = runs.flatMap((run, i) => run.warnings.map(text => [i, text]));
  const unchecked = runs.flatMap((run, i) => run.unchecked.map(text => [i, text]));
  part.append(list.length
    ? el("ul", { class: "warnings" }, list.map(([i, text]) => el("li", {}, el("span", { class: "who" }, `${runs[i].name}: `), text)))
    : el("p", {}, "None."));
  if (unchecked.length) part.append(el("p", { class: "note" }, "Not checked, for want of numbers: " +
    unchecked.map(([i, text]) => `${runs[i].name}, ${text}`).join("; ") + "."));
  part.append(el("details", {}, el("summary", {}, "What is a warning"),
                 el("ul", { class: "rules" }, data.rules.map(rule => el("li", {}, rule)))));
}

/* A text that breaks at a separator rather than within what stands between two. */
const words = (text, separator) => text.split(separator).flatMap((word, k) =>
  [k ? separator : "", el("span", { class: "word" }, word)]);

function commands() {
  const part = section("runs", "What was run");
  part.append(live(el("div"), () => shown().map(i => el("article", { class: `run ${series(i)}` },
    el("h3", {}, runName(i)), el("pre", {}, words(runs[i].command, " ")),
    runs[i].options.length ? el("details", {}, el("summary", {}, "Options that differ from their defaults"),
      sideways(table("Options", ["option", "value", "default", "what"], runs[i].options.map(o =>
        [`--${o.name}`, el("span", {}, typeof o.value === "number" ? number(o.value) : String(o.value)),
         o.default === null ? "" : typeof o.default === "number" ? number(o.default) : String(o.default) || "\"\"", o.help])))) : null))));
}

/* ---- the page ---- */

/* A button for each run, by trainer: what shares figures stands together. */
function legend() {
  const toggle = (i, button) => {
    if (!hidden.delete(i)) hidden.add(i);
    button.setAttribute("aria-pressed", String(!hidden.has(i)));
    for (const redraw of redraws) redraw();
  };
  for (const trainer of trainers) {
    const list = runs.map((run, i) => i).filter(i => runs[i].trainer === trainer);
    if (!list.length) continue;
    document.getElementById("legend").append(el("div", { role: "group", "aria-label": trainerNames[trainer] },
      el("span", { class: "soft" }, trainerNames[trainer]), list.map(i => el("button", { type: "button", "aria-pressed": "true",
        "data-run": i, onclick: event => toggle(i, event.currentTarget) }, key(i, true), runs[i].name))));
  }
}

const title = runs.map(run => run.name).join(", ");
document.title = `${title} – rlhf report`;
document.getElementById("title").replaceChildren(...words(title, ", "));
document.getElementById("kicker").textContent = runs.length === 1 ? "rlhf report" : `rlhf report · ${runs.length} runs`;
document.getElementById("footer").textContent = `Written by rlhf ${data.version}. This file needs no other one and no network.`;
legend();
addEventListener("beforeprint", () => document.querySelectorAll(".further").forEach(d => { d.open = true; }));
warnings();
frontier();
curves();
slices();
annotators();
answers();
commands();
for (const redraw of redraws) redraw();
