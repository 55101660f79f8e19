
"use strict";
// Draws what pipeline/face/page.py embeds. Text of users and books is only ever set as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const EDGES = [0.1, 0.5, 1, 2]; // nats; below the first a change has no colour
const NUMBERS_OF_A_READ = 7;
const LONGEST_WORD = 14; // characters kept on one line: on a telephone there are about 30
const MOST_EXTREMES = 6;

const find = (id) => document.getElementById(id);
const tokens = data.tokens.map(([text, withMemory, without, leftOut, reads], index) => ({
  index, text, withMemory, without, leftOut, reads,
  change: withMemory === null ? null : withMemory - without,
}));
const buttons = [];
let opened = null; // the token that the panel shows
let layer = "all";

// Words and numbers

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const grouped = (count) => count.toLocaleString("en");
const plural = (count, word) => `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;
const percent = (part) => `${(100 * part).toFixed(part >= 0.0995 ? 0 : part >= 0.00995 ? 1 : 2)}\u00a0%`;
const signed = (value, digits = 2) =>
  `${Math.abs(value) < 0.5 * 10 ** -digits ? "±" : value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
const minus = (value, digits) => value.toFixed(digits).replace("-", "−");

function visible(text) {
  const signs = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
  const code = (sign) => `⟨${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  const unseen = /(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu; // joiners belong to words
  const edges = text.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
  return edges.replace(unseen, (sign) => signs[sign] ?? code(sign)) || "∅";
}

function kind(change) {
  if (change === null) return "unknown";
  const level = EDGES.filter((edge) => Math.abs(change) >= edge).length;
  return level === 0 ? "same" : `${change < 0 ? "helped" : "hurt"}${level}`;
}

function described(token) {
  const name = `“${visible(token.text)}”`;
  if (token.change === null) return `${name}, not predicted`;
  const verdict = { h: token.change < 0 ? "memory helped" : "memory hurt", s: "no change" }[kind(token.change)[0]];
  return `${name}, ${signed(token.change)} nats, ${verdict}`;
}

// The head of the page

function figure(name, value) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value));
}

function drawHead() {
  const [withMemory, without] = data.perplexity;
  find("about").append(`${data.model}, memory ${data.memory.names.join(" + ")}, fusion “${data.fusion}”`);
  const known = tokens.filter((token) => token.change !== null);
  const count = (sign) => known.filter((token) => sign * token.change >= EDGES[0]).length;
  if (withMemory !== null) {
    const change = `${minus(100 * (withMemory / without - 1), 0)} %`;
    find("figures").append(
      figure("Perplexity without → with memory", `${without.toPrecision(3)} → ${withMemory.toPrecision(3)}`),
      figure("Change", change.startsWith("−") ? change : `+${change}`),
      figure("Tokens helped", `${grouped(count(-1))} of ${grouped(known.length)}`),
      figure("Tokens hurt", grouped(count(1))),
    );
  }
  const remembered = data.memory.documents;
  const sum = remembered.reduce((total, [, size]) => total + size, 0);
  find("documents").querySelector("summary").append(
    `${plural(remembered.length, "remembered document")}, ${plural(sum, "token")}`);
  find("documents").querySelector("tbody").append(...remembered.map(([name, size]) => element("tr", {},
    element("td", { dir: "auto" }, visible(name)), element("td", { class: "number" }, grouped(size)))));
}

function drawLegend() {
  const swatch = (change, text) => element("span", { class: kind(change) }, text);
  find("legend").setAttribute("aria-label",
    "Colours: blue with a solid underline where memory lowered the loss, orange with a dashed one where it raised it; " +
    `steps at ${EDGES.join(", ")} nats.`);
  find("legend").querySelector(".scale").append(
    ...[...EDGES].reverse().map((edge) => swatch(-edge, `−${edge}`)),
    swatch(0, "0"),
    ...EDGES.map((edge) => swatch(edge, `+${edge}`)),
  );
  find("legend").querySelector(".note").append(
    ...["helped", "loss with memory − without, nats", "hurt"].map((words) => element("span", {}, words)));
}

function drawExtremes() {
  const helped = tokens.filter((token) => token.change !== null && token.change <= -EDGES[0]);
  helped.sort((a, b) => a.change - b.change);
  const best = new Map(); // by text: a name that comes back is one
  for (const token of helped) if (!best.has(token.text)) best.set(token.text, token);
  if (best.size === 0) return;
  find("extremes").append("Helped most: ", ...[...best.values()].slice(0, MOST_EXTREMES).map((token) => {
    const button = element("button", { type: "button", class: kind(token.change) },
      `${visible(token.text.trim() || token.text)} ${signed(token.change, 1)}`);
    button.addEventListener("click", () => open(token.index));
    return button;
  }));
  find("extremes").hidden = false;
}

// The tokens

function drawTokens() {
  const page = document.createDocumentFragment();
  let word = null;
  let length = 0;
  for (const token of tokens) {
    const spaced = /^ \S/.test(token.text); // an ordinary word: its space stands before the button
    const shown = visible(spaced ? token.text.slice(1) : token.text);
    if (spaced) page.append(" ");
    if (spaced || word === null || length + shown.length > LONGEST_WORD) {
      word = page.appendChild(element("span", { class: "word" }));
      length = 0;
    }
    length += shown.length;
    const button = element("button", {
      type: "button", class: `token ${kind(token.change)}`, tabindex: "-1", title: described(token),
      "aria-label": described(token), "data-change": token.change === null ? "–" : signed(token.change, 1),
    }, shown);
    buttons.push(word.appendChild(button));
    for (let count = token.text.split("\n").length - 1; count > 0; count--) page.append(element("br"));
    if (/\s$/.test(token.text)) word = null;
  }
  buttons[0].tabIndex = 0;
  find("tokens").append(page);
}

function makeTabStop(index) { // Tab stops at one token only; arrow keys reach the others
  for (const button of find("tokens").querySelectorAll("[tabindex='0']")) button.tabIndex = -1;
  buttons[index].tabIndex = 0;
}

function onOtherLine(from, direction) {
  const place = (index) => buttons[index].getBoundingClientRect();
  const middle = (box) => (box.left + box.right) / 2;
  const start = place(from);
  const below = (box, other) => direction * (box.top - other.top) > other.height / 2;
  let best = from;
  for (let index = from + direction; index >= 0 && index < buttons.length; index += direction) {
    const box = place(index);
    if (best !== from && below(box, place(best))) break;
    const nearer = Math.abs(middle(box) - middle(start)) < Math.abs(middle(place(best)) - middle(start));
    if (below(box, start) && (best === from || nearer)) best = index;
  }
  return best;
}

find("tokens").addEventListener("keydown", (event) => {
  const from = buttons.indexOf(event.target);
  if (from < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
  const to = {
    ArrowLeft: () => from - 1, ArrowRight: () => from + 1, Home: () => 0, End: () => buttons.length - 1,
    ArrowUp: () => onOtherLine(from, -1), ArrowDown: () => onOtherLine(from, 1),
  }[event.key];
  if (!to) return;
  event.preventDefault();
  const index = Math.min(Math.max(to(), 0), buttons.length - 1);
  makeTabStop(index);
  buttons[index].focus();
});

find("tokens").addEventListener("click", (event) => {
  const index = buttons.indexOf(event.target.closest(".token"));
  if (index >= 0) open(index);
});

find("numbers").addEventListener("change", (event) => find("tokens").classList.toggle("numbers", event.target.checked));

// What a token read

function readsOf(token) {
  const found = [];
  for (let at = 0; at < token.reads.length; at += NUMBERS_OF_A_READ) {
    const [text, name, distance, score, share, number, heads] = token.reads.slice(at, at + NUMBERS_OF_A_READ);
    found.push({ text: data.strings[text], document: data.strings[name], distance, score, share, layer: number,
      heads: data.heads[heads] });
  }
  return found;
}

function open(index, focus = true) {
  if (opened !== null) buttons[opened].removeAttribute("aria-current");
  opened = index;
  const token = tokens[index];
  buttons[index].setAttribute("aria-current", "true");
  makeTabStop(index);
  find("panel").classList.add("open");
  find("panel").scrollTop = 0;
  find("hint").hidden = true;
  find("opened").hidden = false;
  document.querySelector("#panel .buttons").hidden = false;
  find("previous").disabled = index === 0;
  find("next").disabled = index === buttons.length - 1;
  find("panel-title").textContent = `Token ${grouped(index + 1)}: “${visible(token.text)}”`;
  drawLosses(token);
  drawLayers(token);
  drawChunks(token);
  buttons[index].scrollIntoView({ block: "nearest" });
  if (focus || document.activeElement.disabled) find("panel-title").focus({ preventScroll: true });
}

function close() {
  if (opened === null) return;
  const last = buttons[opened];
  last.removeAttribute("aria-current");
  opened = null;
  find("panel").classList.remove("open");
  find("hint").hidden = false;
  find("opened").hidden = true;
  document.querySelector("#panel .buttons").hidden = true;
  find("panel-title").textContent = "What a token read";
  last.focus();
}

function drawLosses(token) {
  const values = token.change === null ? [figure("Loss", "the first token: nothing predicts it")] : [
    figure("Loss, nats", `${token.without.toFixed(2)} → ${token.withMemory.toFixed(2)}`),
    figure("Change", signed(token.change)),
    figure("Probability", `${percent(Math.exp(-token.without))} → ${percent(Math.exp(-token.withMemory))}`),
  ];
  find("losses").replaceChildren(...values);
}

function drawLayers(token) {
  const shares = new Map();
  for (const read of readsOf(token)) {
    const [count, share] = shares.get(read.layer) ?? [0, 0];
    shares.set(read.layer, [count + 1, share + read.share]);
  }
  if (!shares.has(Number(layer))) layer = "all";
  const options = [...shares].sort(([a], [b]) => a - b).map(([number, [count, share]]) =>
    element("option", { value: number }, `${number}: ${plural(count, "chunk")}, ${percent(share)}`));
  find("layer").replaceChildren(element("option", { value: "all" }, "all"), ...options);
  find("layer").value = layer;
}

function drawChunks(token) {
  const shown = readsOf(token).filter((read) => layer === "all" || read.layer === Number(layer));
  const left = token.leftOut ? `; ${grouped(token.leftOut)} with smaller shares are left out` : "";
  find("count").textContent = shown.length ? `${plural(shown.length, "chunk")}${left}` : "It read nothing from memory.";
  find("chunks").hidden = shown.length === 0;
  const widest = Math.max(...shown.map((read) => read.share), Number.MIN_VALUE);
  find("chunks").querySelector("tbody").replaceChildren(...shown.map((read) => {
    const bar = element("span", { class: "share" });
    bar.style.width = `${(100 * read.share) / widest}%`;
    return element("tr", {},
      element("td", { class: "number" }, percent(read.share), bar),
      element("td", { class: "chunk", dir: "auto", lang: "" }, visible(read.text).replaceAll("↵", "↵\n")),
      element("td", { class: "document", dir: "auto" }, visible(read.document)),
      element("td", { class: "number" }, grouped(read.distance)),
      element("td", { class: "number" }, String(read.layer)),
      element("td", { class: "heads" }, read.heads.join(", ")),
      element("td", { class: "number" }, minus(read.score, 2)));
  }));
}

find("layer").addEventListener("change", (event) => { layer = event.target.value; drawChunks(tokens[opened]); });
find("previous").addEventListener("click", () => open(opened - 1, false));
find("next").addEventListener("click", () => open(opened + 1, false));
find("close").addEventListener("click", close);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });

// The gates

function drawGates() {
  find("gates-section").hidden = data.gates.length === 0;
  find("gates-note").textContent = "Weight of memory, from 0 to 1, mean over the prompt, by layer and query head. Below it " +
    (data.fusion === "gate" ? "g, as learnt: memory has the weight 1 − sigmoid(g)." : "the learnt bias of memory’s logits.");
  const most = Math.max(0, ...data.gates.map(([, weights]) => weights.length));
  find("gates").querySelector("tr").append(element("th", { scope: "col" }, "layer"),
    ...Array.from({ length: most }, (_, head) => element("th", { scope: "col" }, `head ${head}`)));
  const level = (weight) => (weight < 0.1 ? "low" : `helped${Math.min(4, 1 + Math.floor(4 * weight))}`);
  find("gates").querySelector("tbody").append(...data.gates.map(([number, weights, learnt]) => element("tr", {},
    element("th", { scope: "row" }, String(number)),
    ...weights.map((weight, head) => element("td", { class: level(weight) },
      weight.toFixed(2), element("small", {}, signed(learnt[head])))))));
}

drawHead();
drawLegend();
drawExtremes();
drawTokens();
drawGates();
const asked = /^#token-(\d+)$/.exec(location.hash); // page.html#token-12 opens the twelfth
if (asked && asked[1] >= 1 && asked[1] <= tokens.length) open(asked[1] - 1, false);
