"use strict";
// An editor whose blanks the server fills. Texts enter the page through textContent only.
//
// The document is a list of parts: strings, and blanks {length, old, cells, run, tail}. `length` is a number of tokens or
// null (the server chooses); `old` are the words that the blank replaced; `cells` are the tokens that fill it, null in an
// open place; `run` numbers the fill that wrote them; `tail` marks a continuation. Parts are replaced, never changed (but
// for the cells of a fill that runs), so the list itself is what Undo keeps.

const byId = (id) => document.getElementById(id);
const [editor, tip, state, error, settings, svg] = ["editor", "tip", "state", "error", "settings", "order"].map(byId);
const colours = document.body.dataset.colours.split(" ");
const CONTINUATION = 64;  // tokens of a text that goes on
const TYPED = 4;  // tokens of a blank that was made of nothing
const UNIT = 16;  // size of a place in the picture
const PICTURE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;  // what could garble the page
const MARKER_START = /(\\*)<blank(?![\p{L}\p{N}_])/gu;

let parts = ["The keeper of the lighthouse ", blankOf(6, "climbed the stairs every evening"),
  " to light the lamp. One night the lamp stayed dark, because ", blankOf(8, ""), ". The ships waited until the morning."];
let past = [];
let future = [];
let typedAt = -Infinity;  // when a text was last typed: what is typed in one go is undone in one go
let caret = [0, 0];  // selection, counted in characters and blanks
let run = null;  // the fill that runs
let runs = 0;
let marked = [];
let isMoving = false;  // the caret moves by keys, and so shows tooltips
const blankAt = new WeakMap();  // element of a blank → the blank
const cellAt = new WeakMap();  // element of a token or a dot → what the tooltip says about it

// --- the document

function blankOf(length, old, more) {
  return { length, old, cells: null, run: 0, tail: false, ...more };
}
const isText = (part) => typeof part === "string";
const isOpen = (part) => !isText(part) && part.cells === null;
const shown = (text) => text.replace(PICTURE, "\ufffd");
const written = (part) => isText(part) ? part : part.cells.map((cell) => cell ? cell.text : "").join("");
const plain = (part) => isOpen(part) ? "\ufffc" : isText(part) ? part : shown(written(part));  // as long as in the editor
const words = (part) => isOpen(part) ? part.old : written(part);

function joined(list) {
  const result = [];
  for (const part of list) {
    if (isText(part) && isText(result.at(-1) ?? null)) result.push(result.pop() + part);
    else if (part !== "") result.push(part);
  }
  return result;
}

function slice(start, end) {
  const taken = [];
  let at = 0;
  for (const part of parts) {
    const text = plain(part);
    const [from, to] = [Math.max(0, start - at), Math.min(text.length, end - at)];
    if (from < to) taken.push(to - from === text.length ? part : text.slice(from, to));
    at += text.length;
  }
  return taken;
}

function change(list, at) {
  past.push(parts);
  future = [];
  typedAt = -Infinity;
  show(list, at);
}

function show(list, at = caret[1]) {
  parts = joined(list);
  render();
  if (at !== null) place(at);
}

function replace(start, end, list) {
  const length = joined(list).reduce((sum, part) => sum + plain(part).length, 0);
  change([...slice(0, start), ...list, ...slice(end, Infinity)], start + length);
}

function travel(from, to, done) {
  if (run || from.length === 0) return;
  to.push(parts);
  typedAt = -Infinity;
  show(from.pop(), document.activeElement === editor ? undefined : null);
  say(done);
}
const undo = () => travel(past, future, "Undone.");
const redo = () => travel(future, past, "Done again.");

// Tokens, roughly: pieces of words of up to six letters, signs, and single Chinese characters.
const guess = (text) => (text.match(/\p{Script=Han}|[\p{L}\p{N}]{1,6}|[^\s\p{L}\p{N}]/gu) ?? []).length || 1;

// A text in which ___ are blanks.
const withBlanks = (text) => text.split(/_{3,}/).flatMap((piece, index) => index ? [blankOf(TYPED, ""), piece] : [piece]);

function makeBlank() {
  if (run) return;
  remember();
  let [start, end] = caret;
  const text = slice(start, end).map(plain).join("");
  if (text.trim()) {  // the blank leaves the spaces around the words
    start += text.length - text.trimStart().length;
    end -= text.length - text.trimEnd().length;
  } else end = start;
  const old = slice(start, end).map(words).join("");
  const blank = blankOf(old ? guess(old) : TYPED, old);
  editor.focus();
  replace(start, end, [blank]);
  say(`Blank of ${blank.length} tokens.`);
}

// --- the editor: between the document and the page

function render() {
  let number = 0;
  const nodes = parts.map((part) =>
    isText(part) ? document.createTextNode(part) : isOpen(part) ? chip(part, number += 1) : filled(part));
  editor.replaceChildren(...nodes, document.createElement("br"));  // so that a last line break has a line
  hideTip();
  update();
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function chip(blank, number) {
  const box = byId("chip").content.firstElementChild.cloneNode(true);
  const [length, remove] = box.children;
  const setLength = (value) => {
    const old = blankAt.get(box) ?? blank;
    const set = value === old.length ? old : { ...old, length: value };
    parts = parts.map((part) => part === old ? set : part);
    blankAt.set(box, set);
    length.setAttribute("aria-valuenow", value ?? 0);
    length.setAttribute("aria-valuetext", value === null ? "auto" : `${value} tokens`);
  };
  const showLength = () => { length.value = blankAt.get(box).length ?? "auto"; };
  box.title = blank.old ? "Blank made of: " + shown(blank.old) : "Blank";
  length.setAttribute("aria-label", `Tokens of blank ${number}, or auto`);
  remove.setAttribute("aria-label", `Remove blank ${number}`);
  setLength(blank.length);
  showLength();
  length.addEventListener("input", () => setLength(/^[1-9]\d*$/.test(length.value) ? Number(length.value) : null));
  length.addEventListener("blur", showLength);
  length.addEventListener("focus", () => length.select());
  length.addEventListener("keydown", (event) => {
    const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (by) {
      const next = (blankAt.get(box).length ?? 0) + by;
      setLength(next > 0 ? Math.min(next, 9999) : null);
      showLength();
    } else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
      editor.focus();
      place(startOf(blankAt.get(box)) + 1);
    } else return;
    event.preventDefault();
  });
  remove.addEventListener("click", () => {
    const gone = blankAt.get(box);
    change(parts.map((part) => part === gone ? gone.old : part), startOf(gone) + gone.old.length);
    editor.focus();
    say("Blank removed.");
  });
  return box;
}

function startOf(blank) {
  return parts.slice(0, parts.indexOf(blank)).reduce((sum, part) => sum + plain(part).length, 0);
}

function filled(blank) {
  const box = element("span", "filled");
  box.append(...blank.cells.map((cell, index) => token(cell, index, blank)));
  blankAt.set(box, blank);
  return box;
}

// The spaces around a word stay outside of its colour.
function token(cell, index, blank) {
  const text = cell ? shown(cell.text) : "\u00a0";
  const core = cell ? text.trim() || text.replace(/^\n+|\n+$/g, "") : text;
  const at = text.indexOf(core);
  const made = element("span", "token " + (!cell ? "open" : cell.logprob === null ? "unscored" : "tinted"));
  const ink = element("span", "ink", core);
  if (!core) ink.dataset.mark = text ? "↵" : "◦";
  if (cell) made.style.setProperty("--c", colour(cell));
  made.append(text.slice(0, at), ink, text.slice(at + core.length));
  cellAt.set(made, { cell, place: `place ${index + 1}${blank.tail ? "" : ` of ${blank.cells.length}`}` });
  return made;
}

const probability = (logprob) => Math.exp(Math.min(logprob, 0));
const colour = (cell) => cell.logprob === null ? "" : colours[Math.round(100 * probability(cell.logprob))];

// The document as a person has changed it in the editor. A fill whose words were changed becomes plain text.
function read() {
  const list = [];
  for (const node of editor.childNodes) {
    const blank = blankAt.get(node);
    const text = blank && blank.cells ? plain(blank) : "";
    if (!blank) list.push(node.textContent);
    else if (!text || node.textContent === text) list.push(blank);
    else if (node.textContent.startsWith(text)) list.push(blank, node.textContent.slice(text.length));
    else if (node.textContent.endsWith(text)) list.push(node.textContent.slice(0, -text.length), blank);
    else list.push(node.textContent);
  }
  return joined(list);
}

function typed() {
  hideTip();
  remember();
  const found = read();
  const hasNew = found.some((part) => isText(part) && /_{3,}/.test(part));
  const kept = new Set(found);
  const isSame = parts.every((part) => isText(part) || kept.has(part));
  if (hasNew || !isSame || performance.now() - typedAt > 1500) past.push(parts);
  future = [];
  typedAt = hasNew ? -Infinity : performance.now();
  parts = found;
  if (hasNew) {
    const before = slice(0, caret[1]).map(plain).join("");
    show(found.flatMap((part) => isText(part) ? withBlanks(part) : [part]), before.replace(/_{3,}/g, "_").length);
    say(`Blank of ${TYPED} tokens.`);
  } else if (!isSame) show(found);
  update();
}

// Places in the text are counted in characters, and one for each open blank.
const length = (node) => !node.classList && node.nodeType !== Node.DOCUMENT_FRAGMENT_NODE ? node.textContent.length :
  node.classList?.contains("chip") ? 1 : Array.from(node.childNodes).reduce((sum, child) => sum + length(child), 0);

function offset(node, at) {
  const range = document.createRange();
  range.setStart(editor, 0);
  range.setEnd(node, at);
  return length(range.cloneContents());
}

function remember() {
  const selection = getSelection();
  const inside = (node) => node && editor.contains(node) && !(node.closest ?? (() => null)).call(node, ".chip");
  if (!inside(selection.anchorNode) || !inside(selection.focusNode)) return;
  const ends = [offset(selection.anchorNode, selection.anchorOffset), offset(selection.focusNode, selection.focusOffset)];
  caret = ends.sort((one, other) => one - other);
}

function place(at) {
  let rest = at;
  const find = (node) => {
    for (const child of node.childNodes) {
      const size = length(child);
      if (rest > size || (rest === size && child.classList?.contains("chip"))) rest -= size;
      else if (child.nodeType === Node.TEXT_NODE) return [child, rest];
      else if (size === 0 || child.classList.contains("chip")) return [node, Array.from(node.childNodes).indexOf(child)];
      else return find(child);
    }
    return [node, node.childNodes.length];
  };
  caret = [at, at];
  isMoving = false;
  getSelection().collapse(...find(editor));
}

const selected = () => slice(...caret).map((part) => isOpen(part) ? "___" : written(part)).join("");

editor.addEventListener("beforeinput", (event) => {
  if (event.target !== editor) return;
  const kind = event.inputType;
  remember();
  if (run || kind === "insertFromDrop" || kind === "deleteByDrag" || kind.startsWith("format")) hideTip();
  else if (kind === "historyUndo") undo();
  else if (kind === "historyRedo") redo();
  else if (kind === "insertParagraph" || kind === "insertLineBreak") replace(...caret, ["\n"]);
  else if (caret[0] < caret[1] && kind.startsWith("delete")) replace(...caret, []);
  else if (caret[0] < caret[1] && kind === "insertText") replace(...caret, [event.data]);
  else return;
  event.preventDefault();
});
editor.addEventListener("input", (event) => { if (event.target === editor && !event.isComposing && !run) typed(); });
editor.addEventListener("compositionend", () => { if (!run) typed(); });
for (const kind of ["copy", "cut", "paste"]) {
  editor.addEventListener(kind, (event) => {
    if (event.target.closest?.(".chip")) return;
    event.preventDefault();
    remember();
    if (kind !== "paste") event.clipboardData.setData("text/plain", selected());
    if (run || kind === "copy") return;
    const text = kind === "cut" ? "" : event.clipboardData.getData("text/plain").replace(/\r\n?/g, "\n");
    replace(...caret, withBlanks(text));
  });
}

// --- the request

const field = (name) => settings.elements[name];

function markers(list) {
  let prompt = "";
  let text = "";
  const escape = (found, slashes) => slashes + slashes + "\\" + found.slice(slashes.length);
  for (const part of list) {
    if (!isOpen(part)) { text += written(part); continue; }
    prompt += text.replace(MARKER_START, escape) + /\\*$/.exec(text)[0] + `<blank:${part.length ?? "auto"}>`;
    text = "";
  }
  return prompt + text.replace(MARKER_START, escape);
}

function requestOf(list) {
  const hasBlanks = list.some(isOpen);
  const body = { prompt: hasBlanks ? markers(list) : list.map(written).join("") };
  if (hasBlanks) {
    Object.assign(body, { blanks: true, strategy: field("strategy").value });
    if (!field("order").disabled) body.order = field("order").value;
    for (const name of ["group_size", "tokens_per_step"]) {
      if (!field(name).disabled) body[name] = Number(field(name).value);
    }
  } else body.max_tokens = CONTINUATION;
  body.temperature = Number(field("temperature").value);
  if (field("seed").value !== "") body.seed = Number(field("seed").value);
  return { ...body, logprobs: 5, commits: true, stream: true, stream_options: { include_usage: true } };
}

function showCurl(body) {
  const quoted = (text) => "'" + text.replaceAll("'", "'\\''") + "'";
  const lines = ["curl -N " + quoted(location.origin + "/v1/completions"), "-H 'Content-Type: application/json'",
    ...byId("key").value ? ['-H "Authorization: Bearer $API_KEY"'] : [], "-d " + quoted(JSON.stringify(body))];
  byId("curl").textContent = lines.join(" \\\n  ");
  byId("request").hidden = false;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

class Refusal extends Error {}  // an error that the server has put into words

async function refusal(response) {
  const answer = await response.json().catch(() => null);
  const message = String(answer?.error?.message ?? "no explanation was given").replace(/\.$/, "");
  if (response.status === 401) {
    byId("access").open = true;
    byId("key").focus();
    const does = byId("key").value ? "refuses this" : "asks for an";
    return new Refusal(`The server ${does} API key: ${message}`);
  }
  if (response.status === 503) return new Refusal(`The server is not ready (503): ${message}. Try again in a moment.`);
  return new Refusal(`The server refused the request (${response.status}): ${message}`);
}

// --- a fill

async function fill(list = parts) {
  if (run || !settings.reportValidity()) return;
  const before = parts;
  const body = requestOf(list);
  const control = new AbortController();
  run = { number: runs += 1, control, list, blanks: [], pieces: null, isDone: false, steps: 0, count: 0, total: 0, sum: 0 };
  const start = performance.now();
  error.hidden = true;
  showCurl(body);
  update();
  say("Waiting for the server…");
  let problem = null;
  try {
    const headers = { "Content-Type": "application/json" };
    if (byId("key").value) headers.Authorization = "Bearer " + byId("key").value;
    const options = { method: "POST", headers, body: JSON.stringify(body), signal: control.signal };
    const response = await fetch("/v1/completions", options);
    if (!response.ok) throw await refusal(response);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      take(JSON.parse(data));
    }
    if (!run.isDone) problem = "The connection ended before the text was complete.";
  } catch (caught) {
    problem = control.signal.aborted ? "" : caught instanceof Refusal ? caught.message :
      run.blanks.length ? "The answer broke off. What was written is kept." :
        "The server does not answer. Is it still running?";
  }
  finish(before, problem, (performance.now() - start) / 1000);
}

function take(chunk) {
  if (chunk.error) throw new Refusal("The server stopped: " + chunk.error.message);
  const choice = chunk.choices?.[0];
  if (!choice) return;
  if (choice.blank_lengths) open(choice.blank_lengths);
  for (const node of editor.querySelectorAll(".fresh")) node.classList.remove("fresh");
  for (const commit of run.blanks[0]?.tail ? withText(choice) : choice.commits ?? []) write(commit);
  run.pieces ??= choice.pieces ?? null;
  run.isDone ||= Boolean(choice.finish_reason);
  say(`${run.count} of ${run.total} tokens`);
}

// The commits of a continuation: where a character is made of several tokens, the chunk's text is right, not theirs.
function withText({ text = "", commits = [] }) {
  const isSame = commits.map((commit) => commit.text).join("") === text;
  return isSame ? commits : commits.map((commit, index) => ({ ...commit, text: index === commits.length - 1 ? text : "" }));
}

// The server has chosen the lengths: every place of every blank is shown, open.
function open(lengths) {
  const fresh = (blank, cells) => ({ ...blank, cells, was: blank, run: run.number, nodes: [], dots: [] });
  const list = run.list.map((part) => {
    if (!isOpen(part)) return part;
    run.blanks.push(fresh(part, Array(lengths[run.blanks.length]).fill(null)));
    return run.blanks.at(-1);
  });
  if (run.blanks.length === 0) {
    run.blanks.push(fresh(blankOf(null, "", { tail: true }), []));
    list.push(run.blanks[0]);
  }
  run.total = lengths.reduce((sum, one) => sum + one, 0);
  show(list, null);
  for (const box of editor.querySelectorAll(".filled")) {
    const blank = blankAt.get(box);
    if (run.blanks.includes(blank)) blank.nodes = Array.from(box.children);
  }
  drawPlaces(lengths);
}

function write(commit) {
  const blank = run.blanks[commit.blank];
  const at = commit.position;
  const { text, step, logprob = null, top_logprobs: top } = commit;
  const cell = { text, step, logprob, top: top ?? [] };
  const isNew = !blank.cells[at];
  if (isNew) run.count += 1;
  run.sum += (logprob ?? 0) - (isNew ? 0 : blank.cells[at].logprob ?? 0);
  run.steps = Math.max(run.steps, cell.step + 1);
  blank.cells[at] = cell;
  const node = token(cell, at, blank);
  node.classList.add("fresh");
  if (blank.nodes[at]) blank.nodes[at].replaceWith(node);
  else boxOf(blank).append(node);
  blank.nodes[at] = node;
  drawDot(cell, node, blank, at);
}

const boxOf = (blank) => Array.from(editor.querySelectorAll(".filled")).find((box) => blankAt.get(box) === blank);

function finish(before, problem, seconds) {
  const { blanks, pieces, count, steps, sum } = run;
  const isWhole = problem === null;
  blanks.forEach((blank, index) => {
    if (!isWhole || !pieces) return;
    const unscored = { logprob: null, top: [], step: 0 };
    blank.cells = pieces[index].map((text, at) => Object.assign(blank.cells[at] ?? { ...unscored }, { text }));
  });
  const list = count || isWhole ? parts.flatMap((part) => blanks.includes(part) ? settled(part) : [part]) : before;
  const written = `${count} ${count === 1 ? "token" : "tokens"} written in ${steps} ${steps === 1 ? "step" : "steps"}`;
  run = null;
  if (list !== before) [past, future] = [[...past, before], []];
  typedAt = -Infinity;
  show(list, document.activeElement === editor ? undefined : null);
  svg.setAttribute("aria-label", written + ". " + orderInWords(blanks));
  error.hidden = !problem;
  error.textContent = problem || "";
  if (isWhole) say(`${written} · log-likelihood ${nats(sum)} nats · ${seconds.toFixed(1)} s`);
  else say(problem === "" ? "Stopped" + (count ? `: ${written}.` : ".") : count ? written + "." : "");
}

// A blank after its fill. Where the fill was interrupted, its open places become blanks of their own.
function settled({ was, cells, run: number, tail }) {
  const list = [];
  for (const cell of tail ? cells.filter(Boolean) : cells) {
    const isSame = list.length && isOpen(list.at(-1)) === !cell;
    if (!isSame) list.push(blankOf(0, "", { cells: cell ? [] : null, run: number, tail }));
    list.at(-1).length += 1;
    if (cell) list.at(-1).cells.push(cell);
  }
  if (list.length !== 1 || tail) return list;
  return isOpen(list[0]) ? [was] : [{ ...was, cells, run: number }];
}

function lastFill() {
  const last = Math.max(0, ...parts.map((part) => isOpen(part) || isText(part) ? 0 : part.run));
  return last ? parts.filter((part) => part.run === last) : [];
}

function fillAgain() {
  const blanks = lastFill();
  if (run || blanks.length === 0) return;
  if (field("seed").value !== "") field("seed").value = Number(field("seed").value) + 1;
  fill(joined(parts.flatMap((part, index) => !blanks.includes(part) ? [part] :
    part.tail && index === parts.length - 1 ? [] : [{ ...part, cells: null }])));
}

function say(text) { state.textContent = text; }
const nats = (value) => value.toFixed(3).replace("-", "−");

function update() {
  const focused = document.activeElement;
  const disabled = { fill: run, again: run || lastFill().length === 0, stop: !run, blank: run, undo: run || past.length === 0 };
  for (const [id, is] of Object.entries(disabled)) byId(id).disabled = Boolean(is);
  if (!run) byId("fill").textContent = parts.some(isOpen) ? "Fill" : "Continue";
  for (const control of editor.querySelectorAll(".chip > *")) control.disabled = Boolean(run);
  editor.setAttribute("aria-readonly", String(Boolean(run)));
  editor.classList.toggle("empty", parts.length === 0);
  if (focused.disabled && focused.tagName === "BUTTON") (run ? byId("stop") : byId("fill")).focus();
  const strategy = field("strategy").value;
  for (const control of settings.querySelectorAll("[data-for]")) {
    control.disabled = !control.dataset.for.split(" ").includes(strategy);
  }
}

// --- the picture of the order: a column per place, a row per step

function draw(tag, attributes) {
  const made = document.createElementNS(svg.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  svg.append(made);
  return made;
}

function drawPlaces(lengths) {
  svg.replaceChildren();
  let x = 0;
  run.blanks.forEach((blank, index) => {
    blank.x = x;
    draw("rect", { x, y: 0, width: lengths[index] * UNIT, height: UNIT, rx: 3 });
    x += (lengths[index] + 1) * UNIT;
  });
  run.width = Math.max(x - UNIT, UNIT);
  byId("picture").hidden = false;
  stretch();
}

function stretch() {
  const height = Math.max(1, run.steps) * UNIT;
  for (const [name, value] of [["width", run.width], ["height", height]]) svg.setAttribute(name, value);
  svg.setAttribute("viewBox", `0 0 ${run.width} ${height}`);
  for (const column of svg.querySelectorAll("rect")) column.setAttribute("height", height);
}

function drawDot(cell, node, blank, at) {
  if (blank.dots[at]) blank.dots[at].classList.add("old");  // it was written again
  const r = Math.max(5, run.width / 140);  // visible in a picture that is made smaller to fit
  const dot = draw("circle", { class: "dot", r, cx: blank.x + (at + 0.5) * UNIT, cy: (cell.step + 0.5) * UNIT });
  dot.style.setProperty("--c", colour(cell));
  cellAt.set(dot, cellAt.get(node));
  blank.dots[at] = dot;
  stretch();
}

function orderInWords(blanks) {
  const cells = blanks.flatMap((blank) => blank.cells.filter(Boolean)).sort((one, other) => one.step - other.step);
  const named = cells.slice(0, 60).map((cell) => `${cell.step + 1}: ${shown(cell.text).trim() || (cell.text ? "space" : "no text")}`);
  return named.join(", ") + (cells.length > 60 ? ", …" : "");
}

// --- the tooltip

const seen = (text) => shown(text).replaceAll(" ", "␣").replaceAll("\n", "↵") || "◦";

function showTip(node) {
  hideTip();
  const { cell, place } = cellAt.get(node);
  if (cell) {
    const score = cell.logprob === null ? "not scored" :
      `${(100 * probability(cell.logprob)).toFixed(1)} %, log p ${nats(cell.logprob)} nats`;
    tip.append(element("strong", "", seen(cell.text)), `step ${cell.step + 1}, ${place}, ${score}`);
    if (cell.top.length) tip.append(choices(cell));
  } else tip.append("open, " + place);
  marked = [node, ...[...editor.querySelectorAll(".token"), ...svg.querySelectorAll(".dot:not(.old)")]
    .filter((other) => cell && other !== node && cellAt.get(other).cell === cell)];
  for (const one of marked) one.classList.add("here");
  tip.hidden = false;
  const box = (node.querySelector(".ink") ?? node).getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (above < 4 ? box.bottom + 8 : above) + "px";
}

function choices(cell) {
  const table = element("div", "choices");
  for (const { text, logprob } of cell.top) {
    const bar = element("i");
    bar.style.setProperty("--w", 100 * probability(logprob) + "%");
    bar.style.setProperty("--c", colour({ logprob }));
    table.append(element("b", text === cell.text ? "taken" : "", seen(text)), bar,
      element("span", "", (100 * probability(logprob)).toFixed(1) + " %"));
  }
  return table;
}

function hideTip() {
  for (const one of marked) one.classList.remove("here");
  marked = [];
  tip.hidden = true;
  tip.replaceChildren();
}

document.addEventListener("pointerover", (event) => {
  const node = event.target.closest?.(".token, .dot");
  if (node && cellAt.has(node)) showTip(node); else hideTip();
});
document.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("selectionchange", () => {
  if (document.activeElement !== editor) return;
  remember();
  const node = getSelection().focusNode;
  const found = (node?.nodeType === Node.TEXT_NODE ? node.parentElement : node)?.closest(".token");
  if (isMoving && found) showTip(found);
  else if (isMoving) hideTip();
});
editor.addEventListener("blur", hideTip);

// --- buttons and keys

for (const [id, action] of [["fill", () => fill()], ["again", fillAgain], ["stop", () => run?.control.abort()],
  ["blank", makeBlank], ["undo", undo]]) byId(id).addEventListener("click", action);
settings.addEventListener("change", update);
settings.addEventListener("submit", (event) => {
  event.preventDefault();
  fill();
});
byId("copy").addEventListener("click", async () => {
  const copied = await navigator.clipboard?.writeText(byId("curl").textContent).then(() => true, () => false);
  if (!copied) getSelection().selectAllChildren(byId("curl"));
  say(copied ? "Copied." : "Selected: copy it with your own keys.");
});
document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  isMoving = /^(arrow|home|end|page)/.test(key);
  const isField = /^(INPUT|SELECT)$/.test(event.target.tagName);
  if (key === "escape") {
    if (!tip.hidden) hideTip(); else run?.control.abort();
    return;
  }
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
  if (key === "enter") (event.shiftKey ? fillAgain : fill)();
  else if (key === "b" && event.target === editor) makeBlank();
  else if ((key === "z" || key === "y") && !isField) (key === "y" || event.shiftKey ? redo : undo)();
  else return;
  event.preventDefault();
});

if (/Mac|iP/.test(navigator.platform)) {
  for (const key of document.querySelectorAll("kbd")) key.textContent = key.textContent.replace("Ctrl", "⌘");
}
for (let percent = 0; percent <= 100; percent += 10) {
  const swatch = element("span", "swatch");
  swatch.style.setProperty("--c", colours[percent]);
  byId("scale").append(swatch);
}
render();
document.body.dataset.ready = "true";
