// Pages over run directories. Everything shown comes from the server anew; all text goes in as textContent, never HTML.
"use strict";

const GOING_MS = 2000;   // between two looks while something runs
const QUIET_MS = 10000;  // and while nothing does
const $ = (id) => document.getElementById(id);
let timer = null;
let page = 0;            // counts page changes: an answer that comes late belongs to no page

// ---- elements ---------------------------------------------------------------------------------------------------

function make(tag, options = {}, ...children) {
  const svg = tag.startsWith("svg:");
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const text = (value) => make("div", { class: "text", dir: "auto", text: value });
const card = (title, ...children) => make("section", { class: "card" }, make("h2", { text: title }), ...children);

function folded(title, key, ...children) {
  const details = make("details", { class: "card" }, make("summary", { text: title }), ...children);
  details.dataset.key = key;
  return details;
}

function table(headings, rows) {
  const head = make("tr", {}, ...headings.map(([name, kind]) => make("th", { class: kind, text: name })));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

const cell = (content, kind) =>
  typeof content === "object" && content !== null
    ? make("td", { class: kind }, content)
    : make("td", { class: kind, text: content ?? "–" });

// ---- words ------------------------------------------------------------------------------------------------------

function number(value, digits = 4) {
  if (typeof value !== "number") return value ?? "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(digits)).toString();
}

function clock(seconds) {
  if (typeof seconds !== "number") return "–";
  const s = Math.max(0, Math.round(seconds));
  const two = (n) => String(n).padStart(2, "0");
  const minutes = Math.floor(s / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours}:${two(minutes % 60)}:${two(s % 60)}` : `${minutes}:${two(s % 60)}`;
}

const moment = (value) => (value ? new Date(value).toLocaleString(undefined, { dateStyle: "short", timeStyle: "short" }) : "–");
const state = (run) => make("span", { class: `state ${run.state}`, text: run.state, title: run.reason || null });

function progress(run) {
  const share = run.total_steps ? Math.min(100, (100 * run.step) / run.total_steps) : 0;
  const inner = make("div");
  inner.style.width = `${share}%`;
  return make("div", {}, make("span", { text: run.step === undefined ? "–" : `${run.step} / ${run.total_steps ?? "?"}` }),
    make("div", { class: "bar" }, inner));
}

// ---- talking to the server --------------------------------------------------------------------------------------

async function ask(path, body) {
  const options = body === undefined ? {}
    : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const value = await response.json();
  if (!response.ok) throw new Error(value.error.message);
  return value;
}

// ---- the list ---------------------------------------------------------------------------------------------------

async function showList() {
  const { folder, runs } = await ask("/api/runs");
  runs.sort((a, b) => b.is_going - a.is_going || String(b.updated ?? "").localeCompare(String(a.updated ?? "")));
  const headings = [["run"], ["state"], ["step"], ["loss", "number"], ["held-out loss", "number"],
    ["tokens/s", "number"], ["left", "number"], ["last change"]];
  const rows = runs.map((run) => make("tr", {},
    cell(make("a", { href: `#/run/${encodeURIComponent(run.id)}`, text: run.id.replaceAll("~", "/") })),
    cell(state(run)), cell(progress(run)), cell(number(run.loss), "number"), cell(number(run.eval_loss), "number"),
    cell(number(run.tokens_per_second), "number"), cell(run.is_going ? clock(run.eta_seconds) : "–", "number"),
    cell(moment(run.updated))));
  const none = make("p", { class: "quiet", text: "There are no runs here yet. Start one with the link above, or with: tunesmith train recipe.yaml" });
  return {
    title: "Runs",
    nodes: [make("section", { class: "card" }, make("h2", { text: `Runs in ${folder}` }), rows.length ? table(headings, rows) : none)],
    isGoing: runs.some((run) => run.is_going),
  };
}

// ---- one run ----------------------------------------------------------------------------------------------------

async function showRun(id) {
  const place = `/api/runs/${encodeURIComponent(id)}`;
  const [run, series] = await Promise.all([ask(place), ask(`${place}/curve`)]);
  return {
    title: run.id.replaceAll("~", "/"),
    nodes: [overview(run), curveCard(series), ...answerCards(run), ...dataCards(run), ...textCards(run)],
    isGoing: run.is_going,
  };
}

function overview(run) {
  const stop = make("button", { class: "danger", type: "button", text: "Stop", onclick: () => stopRun(run.id) });
  const figures = [
    ["step", progress(run)], ["loss", number(run.loss)], ["held-out loss", number(run.eval_loss)],
    ["tokens per second", number(run.tokens_per_second)],
    run.is_going ? ["left", clock(run.eta_seconds)] : ["ended", moment(run.updated)], ["started", moment(run.started)],
  ].map(([name, value]) => make("div", {}, make("div", { class: "small quiet", text: name }),
    make("div", { class: typeof value === "string" && value.length > 12 ? "" : "value" }, value)));
  const head = make("div", { class: "row apart" },
    make("div", { class: "row" }, make("h1", { text: run.id.replaceAll("~", "/") }), state(run)),
    run.is_going ? stop : null);
  return make("section", { class: "card" }, head,
    run.reason ? make("p", { class: run.state === "failed" ? "bad text" : "text", text: run.reason }) : null,
    run.start_failed ? make("p", { class: "bad", text: "The last start from this page ended before the run began; the output below says why." }) : null,
    make("p", { class: "small quiet mono", text: run.folder }), make("div", { class: "figures" }, ...figures));
}

async function stopRun(id) {
  if (!confirm("Stop this run? It ends as Ctrl-C would end it, and can go on from its last checkpoint, if it saved one.")) return;
  try {
    await ask(`/api/runs/${encodeURIComponent(id)}/stop`, {});
    await refresh();
  } catch (error) {
    alert(error.message);
  }
}

function answerCards(run) {
  const cards = [];
  if (run.answers.length) {
    const twice = run.answers.some((row) => row.before !== undefined);
    const names = twice ? ["prompt", "expected", "before", "after"] : ["prompt", "expected", "after"];
    const headings = names.map((name) => [name === "after" && !twice ? "answer" : name]);
    const rows = run.answers.map((row) => make("tr", {}, ...names.map((name) => cell(text(row[name] ?? "–"), "answer"))));
    cards.push(card(twice ? "Held-out prompts, before and after training" : "Answers to held-out prompts", table(headings, rows)));
  }
  if (run.samples.length) {
    const rows = run.samples.toReversed().map((row) => make("tr", {}, cell(number(row.step), "number"),
      ...["prompt", "label", "predict"].map((name) => cell(text(row[name] ?? "–"), "answer"))));
    cards.push(card("Answers during training", table([["step", "number"], ["prompt"], ["expected"], ["answer"]], rows)));
  }
  return cards;
}

function dataCards(run) {
  const cards = [];
  if (run.results) {
    const rows = Object.entries(run.results).map(([name, value]) => make("tr", {}, cell(name.replaceAll("_", " ")), cell(number(value), "number")));
    cards.push(folded("Results", "results", table([["figure"], ["value", "number"]], rows)));
  }
  if (!run.data) return cards;
  const parts = "train" in run.data ? [["Training data", run.data.train], ["Held-out data", run.data.evaluation]] : [["Data", run.data]];
  for (const [title, part] of parts) if (part?.rows) cards.push(dataCard(title, part));
  return cards;
}

function dataCard(title, part) {
  const { read, kept, dropped } = part.rows;
  const nodes = [make("p", { class: dropped ? "warn" : "", text: `${number(read)} rows read, ${number(kept)} kept, ${number(dropped)} dropped` })];
  const reasons = [["dropped", part.dropped], ["changed", part.changed]].flatMap(([kind, found]) =>
    Object.entries(found ?? {}).map(([reason, entry]) => make("tr", {}, cell(kind), cell(reason), cell(number(entry.rows), "number"),
      cell(entry.first.map((row) => `${row.source}:${row.line}`).join(", ")))));
  if (reasons.length) nodes.push(table([[""], ["reason"], ["rows", "number"], ["first"]], reasons));
  for (const note of part.notes ?? []) nodes.push(make("p", { class: "small quiet text", text: note }));
  const tokens = part.tokens;
  if (tokens) {
    const share = (100 * tokens.trained_share).toFixed(1);
    nodes.push(make("p", { text: `${number(tokens.num_tokens)} tokens, ${number(tokens.num_trained)} of them trained (${share} %); ` +
      `a row has ${tokens.min} to ${tokens.max}, half of them up to ${tokens.median}` }));
    const most = Math.max(...tokens.histogram.map((bin) => bin.rows));
    nodes.push(make("div", { class: "histogram" }, ...tokens.histogram.flatMap((bin) => {
      const bar = make("div");
      bar.style.width = `${(100 * bin.rows) / most}%`;
      return [make("span", { class: "quiet", text: `${bin.low}–${bin.high}` }), make("div", { class: "bar" }, bar), make("span", { text: number(bin.rows) })];
    })));
  }
  return folded(title, title, ...nodes);
}

function textCards(run) {
  const cards = [];
  if (run.events.length) {
    const rows = run.events.toReversed().map((row) => make("tr", {}, cell(moment(row.time)), cell(row.kind), cell(text(row.message ?? ""))));
    cards.push(folded("Events", "events", table([["time"], ["kind"], ["message"]], rows)));
  }
  if (run.checkpoints.length) cards.push(folded("Checkpoints", "checkpoints", make("p", { class: "text", text: run.checkpoints.join("\n") })));
  for (const [title, value] of [["Recipe", run.recipe], ["Model card", run.card], ["Output of the process", run.output]]) {
    if (!value) continue;
    const box = folded(title, title, make("pre", { dir: "auto", text: value }));
    if (title.startsWith("Output") && (run.start_failed || run.state === "starting")) box.open = true;
    cards.push(box);
  }
  return cards;
}

// ---- the curve --------------------------------------------------------------------------------------------------

// Exponential moving average, once in each direction: one pass lags behind a falling loss.
function smooth(points) {
  const weight = 1.8 * (1 / (1 + Math.exp(-0.05 * points.length)) - 0.5);
  const pass = (values) => {
    let last = values[0];
    return values.map((value) => (last = weight * last + (1 - weight) * value));
  };
  const there = pass(points.map((point) => point[1]));
  return pass(there.reverse()).reverse().map((value, place) => [points[place][0], value]);
}

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count, whole) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
  if (whole) step = Math.max(1, step);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function curveCard(series) {
  const training = series.loss ?? [];
  const heldOut = Object.entries(series).filter(([name]) => name !== "loss");
  const all = [...training, ...heldOut.flatMap(([, points]) => points)];
  if (!all.length) return card("Loss", make("p", { class: "quiet", text: "No loss has been logged yet." }));
  const readout = make("span", { class: "small quiet" });
  const calm = training.length > 2 ? smooth(training) : [];
  const legend = make("div", { class: "legend" },
    ...[["pale", "training", training], ["strong", "training, smoothed", calm], ...heldOut.map(([name, points]) => ["heldout", heldOutName(name), points])]
      .filter(([, , points]) => points.length)
      .map(([kind, name, points]) => make("span", {}, make("span", { class: `key ${kind}` }), `${name} (last ${number(points.at(-1)[1], 3)})`)));
  return make("section", { class: "card" }, make("div", { class: "row apart" }, make("h2", { text: "Loss" }), readout),
    drawCurve(training, calm, heldOut, all, readout), legend);
}

const heldOutName = (key) => (key === "eval_loss" ? "held out" : `held out: ${key.slice(5, -5)}`);

function drawCurve(training, calm, heldOut, all, readout) {
  const narrow = innerWidth < 640;
  const [width, height] = narrow ? [440, 300] : [960, 360];
  const box = { left: 58, right: 14, top: 12, bottom: 44 };
  const values = all.map((point) => point[1]);
  let low = Math.min(...values), high = Math.max(...values);
  const margin = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
  // From zero where the curve comes near it; else from just below its lowest point, or a small change would not show.
  low = low >= 0 && low < 0.4 * high ? 0 : low - margin;
  high += margin;
  const last = Math.max(1, ...all.map((point) => point[0]));
  const x = (step) => box.left + (step / last) * (width - box.left - box.right);
  const y = (loss) => height - box.bottom - ((loss - low) / (high - low)) * (height - box.top - box.bottom);
  const svg = make("svg:svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "loss over optimizer steps" });
  for (const value of ticks(low, high, 5)) {
    svg.append(make("svg:line", { class: "grid", x1: box.left, x2: width - box.right, y1: y(value), y2: y(value) }),
      make("svg:text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end", text: number(value) }));
  }
  for (const value of ticks(0, last, narrow ? 4 : 9, true))
    svg.append(make("svg:text", { x: x(value), y: height - box.bottom + 18, "text-anchor": "middle", text: number(value) }));
  svg.append(make("svg:text", { x: (box.left + width - box.right) / 2, y: height - 6, "text-anchor": "middle", text: "optimizer step" }),
    make("svg:text", { transform: `translate(13 ${(height - box.bottom + box.top) / 2}) rotate(-90)`, "text-anchor": "middle", text: "loss" }));
  const line = (points, kind) => make("svg:polyline", { class: kind, points: points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ") });
  if (training.length) svg.append(line(training, calm.length ? "pale" : "strong"));
  if (calm.length) svg.append(line(calm, "strong"));
  for (const [, points] of heldOut)
    svg.append(line(points, "heldout"), ...points.slice(-200).map(([step, loss]) => make("svg:circle", { class: "dot", cx: x(step), cy: y(loss), r: 3.5 })));
  follow(svg, { box, width, height, x, last, training, heldOut, readout });
  return svg;
}

// The figures of the step under the pointer.
function follow(svg, { box, width, height, x, last, training, heldOut, readout }) {
  const cursor = make("svg:line", { class: "cursor hidden", y1: box.top, y2: height - box.bottom });
  svg.append(cursor);
  const nearest = (points, step) => points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  svg.addEventListener("pointermove", (event) => {
    const place = ((event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width) * width;
    const wanted = ((place - box.left) / (width - box.left - box.right)) * last;
    const base = training.length ? training : heldOut[0][1];
    const [step, loss] = nearest(base, wanted);
    const parts = [`step ${number(step)}`, training.length ? `loss ${number(loss)}` : ""];
    for (const [name, points] of heldOut) {
      const [at, value] = nearest(points, step);
      parts.push(`${heldOutName(name)} ${number(value)} at ${number(at)}`);
    }
    readout.textContent = parts.filter(Boolean).join(" · ");
    cursor.classList.remove("hidden");
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
  });
  svg.addEventListener("pointerleave", () => {
    readout.textContent = "";
    cursor.classList.add("hidden");
  });
}

// ---- a new run --------------------------------------------------------------------------------------------------

const EXAMPLE = `model_name_or_path: path/or/hub-id
dataset: data/train.jsonl
eval_dataset: data/heldout.jsonl
output_dir: runs/mine
num_train_epochs: 3
`;

function showNew() {
  const path = make("input", { placeholder: "recipes/mine.yaml", "aria-label": "Path of a recipe" });
  const pasted = make("textarea", { class: "recipe", spellcheck: "false", placeholder: EXAMPLE, "aria-label": "Recipe" });
  const report = make("div", {});
  const check = make("button", { type: "button", text: "Check" });
  const start = make("button", { type: "button", class: "main", text: "Start training" });
  pasted.value = recalled("recipe");
  path.value = recalled("path");
  async function send(address) {
    try { sessionStorage.setItem("tunesmith-new", JSON.stringify({ path: path.value, recipe: pasted.value })); } catch { /* storage is off */ }
    check.disabled = start.disabled = true;
    report.replaceChildren(make("p", { class: "quiet", text: "Reading the recipe …" }));
    try {
      const found = await ask(address, path.value.trim() ? { path: path.value.trim() } : { recipe: pasted.value });
      if (found.id) location.hash = `#/run/${encodeURIComponent(found.id)}`;
      else report.replaceChildren(make("div", { class: "report fine" }, make("p", { text: `The recipe is right. The run will lie in ${found.output_dir}.` })));
    } catch (error) {
      report.replaceChildren(make("div", { class: "report" }, make("pre", { text: error.message })));
    }
    check.disabled = start.disabled = false;
  }
  check.addEventListener("click", () => send("/api/check"));
  start.addEventListener("click", () => send("/api/runs"));
  const form = card("Start a run",
    make("label", {}, "Path of a recipe on this machine", path),
    make("p", { class: "small quiet", text: "or paste one:" }), pasted,
    make("div", { class: "row" }, check, start), report,
    make("p", { class: "small quiet", text: "Training runs in a process of its own: this page, and the server behind it, may be closed." }));
  form.classList.add("new");
  return { title: "Start a run", nodes: [form], isGoing: null };
}

function recalled(name) {
  try { return JSON.parse(sessionStorage.getItem("tunesmith-new"))?.[name] ?? ""; } catch { return ""; }
}

// ---- which page, and again --------------------------------------------------------------------------------------

async function refresh() {
  clearTimeout(timer);
  const mine = page;
  const [, kind, id] = location.hash.split("/");
  let wait = GOING_MS;
  try {
    const shown = kind === "run" && id ? await showRun(decodeURIComponent(id)) : kind === "new" ? showNew() : await showList();
    if (mine !== page) return;
    document.title = shown.title;
    $("connection").textContent = put(shown.nodes) ? "" : "Not refreshed while text is selected.";
    if (shown.isGoing === null) return;
    wait = shown.isGoing ? GOING_MS : QUIET_MS;
  } catch (error) {
    if (mine !== page) return;
    $("connection").textContent = error instanceof TypeError ? "The server does not answer; trying again." : error.message;
  }
  timer = setTimeout(refresh, wait);
}

// New content in place of the old, unless text of the old is selected. What was unfolded and scrolled stays so, and a
// curve under the pointer keeps its figures.
function put(nodes) {
  const main = $("main");
  if (main.childElementCount && String(getSelection()) && main.contains(getSelection().anchorNode)) return false;
  const pointedAt = matchMedia("(hover: hover)").matches && main.querySelector("svg.curve:hover")?.closest("section");
  const open = new Map([...main.querySelectorAll("details")].map((box) => [box.dataset.key, box.open]));
  const scrolled = [...main.querySelectorAll(".scroll, td .text")].map((box) => [box.scrollLeft, box.scrollTop]);
  main.replaceChildren(...nodes.map((node) => (pointedAt && node.querySelector("svg.curve") ? pointedAt : node)));
  for (const box of main.querySelectorAll("details")) if (open.has(box.dataset.key)) box.open = open.get(box.dataset.key);
  [...main.querySelectorAll(".scroll, td .text")].forEach((box, place) => {
    if (scrolled[place]) [box.scrollLeft, box.scrollTop] = scrolled[place];
  });
  return true;
}

addEventListener("hashchange", () => {
  page += 1;
  $("main").replaceChildren();
  scrollTo(0, 0);
  refresh();
});
refresh();
