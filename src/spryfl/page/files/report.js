// The page's charts and switches. What is drawn lies in #data; uPlot draws it. Nothing is fetched but, on a live page, itself.
(() => {
"use strict";
const $ = (query, from = document) => from.querySelector(query);
const $$ = (query, from = document) => [...from.querySelectorAll(query)];
const make = (name, text, attributes = {}) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
let data = JSON.parse($("#data").textContent);
let axis = "rounds";
const hidden = new Set();  // labels of lines
const plots = new Map();   // element -> what is drawn in it

// ---- numbers

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
function said(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value)) return whole.format(value);
  if (size >= 1000) return whole.format(value);
  if (size >= 0.1) return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 4);
  return Number(value.toPrecision(3)).toString();
}
const place = x => Math.abs(x) >= 1000 ? whole.format(x) : String(Number(x.toPrecision(4)));  // on an axis
const tick = value => value === null ? "" : Math.abs(value) >= 10000 ? compact.format(value) : String(Number(value.toPrecision(4)));

// A line of a chart along the chosen axis: x rises, no gaps; low and high where it is a mean over seeds.
function lineOf(line, chart) {
  const band = line.bands && line.bands[chart] && line.bands[chart][axis];
  if (line.bands) return band && band.x ? { ...line, x: band.x, y: band.mean, low: band.low, high: band.high } : null;
  if (!line.y[chart]) return null;
  const points = new Map();
  line.y[chart].forEach((y, i) => { const x = line.x[axis][i]; if (x !== null && y !== null) points.set(x, y); });
  const x = [...points.keys()].sort((a, b) => a - b);
  return x.length ? { ...line, x, y: x.map(one => points.get(one)) } : null;
}
const linesOf = chart => data.lines.map(line => hidden.has(line.label) ? null : lineOf(line, chart)).filter(Boolean);

// ---- looks

function colour(name, from = document.body) {
  const probe = make("i", "", { style: `color: var(--${name})` });
  from.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}
const faint = found => found.replace(/^rgb\((.*)\)$/, "rgba($1, 0.14)");
const marks = {
  circle: (c, x, y, r) => c.arc(x, y, r, 0, 2 * Math.PI),
  square: (c, x, y, r) => c.rect(x - .9 * r, y - .9 * r, 1.8 * r, 1.8 * r),
  triangle: (c, x, y, r) => { c.moveTo(x, y - 1.15 * r); c.lineTo(x + 1.1 * r, y + .85 * r); c.lineTo(x - 1.1 * r, y + .85 * r); c.closePath(); },
  down: (c, x, y, r) => { c.moveTo(x, y + 1.15 * r); c.lineTo(x + 1.1 * r, y - .85 * r); c.lineTo(x - 1.1 * r, y - .85 * r); c.closePath(); },
  diamond: (c, x, y, r) => { c.moveTo(x, y - 1.25 * r); c.lineTo(x + 1.25 * r, y); c.lineTo(x, y + 1.25 * r); c.lineTo(x - 1.25 * r, y); c.closePath(); },
  cross: (c, x, y, r) => { const a = .42 * r, b = 1.05 * r; c.rect(x - a, y - b, 2 * a, 2 * b); c.rect(x - b, y - a, 2 * b, 2 * a); },
};
function drawMarks(u, lines, places) {
  const ratio = devicePixelRatio, c = u.ctx, paper = colour("paper");
  lines.forEach((line, i) => {
    const own = [];
    u.data[places[i]].forEach((y, k) => { if (y !== null && y !== undefined) own.push([u.data[0][k], y]); });
    let last = -Infinity;
    const gap = (own.length > 14 ? 64 : 12) * ratio;
    own.forEach(([x, y], k) => {
      const at = u.valToPos(x, "x", true), up = u.valToPos(y, "y", true);
      if (!Number.isFinite(at + up) || (at - last < gap && k < own.length - 1)) return;
      last = at;
      c.save(); c.setLineDash([]); c.beginPath(); marks[line.look.mark](c, at, up, 3.6 * ratio);
      c.fillStyle = colour(`line-${line.look.colour}`); c.strokeStyle = paper; c.lineWidth = 1.2 * ratio;
      c.fill(); c.stroke(); c.restore();
    });
  });
}

// Places of a logarithmic scale: powers of ten, with 2 and 5 between them where there are few.
function powers(u, at, low, high) {
  const out = [], few = Math.log10(high / low) < 3;
  for (let ten = 10 ** Math.floor(Math.log10(low)); ten <= high * 1.0001; ten *= 10)
    for (const times of few ? [1, 2, 5] : [1]) {
      const found = Number((times * ten).toPrecision(2));
      if (found >= low * .9999 && found <= high * 1.0001) out.push(found);
    }
  return out;
}

// ---- charts

function nearest(u, series, index) {
  const own = u.data[series], xs = u.data[0];
  if (series === 0 || (own[index] !== null && own[index] !== undefined)) return index;
  const empty = k => own[k] === null || own[k] === undefined;
  let left = index, right = index;
  while (left >= 0 && empty(left)) left--;
  while (right < own.length && empty(right)) right++;
  if (left < 0) return right < own.length ? right : null;
  if (right >= own.length) return left;
  return xs[index] - xs[left] <= xs[right] - xs[index] ? left : right;
}

function draw(element) {
  const old = plots.get(element);
  if (old) old.u.destroy();
  plots.delete(element);
  element.replaceChildren();
  const id = element.closest("figure").dataset.chart, lines = linesOf(id), about = data.charts[id];
  if (!lines.length || !about) {
    element.append(make("p", "No line is shown here.", { class: "note" }));
    return;
  }
  const ends = lines.map(line => line.x[line.x.length - 1]);
  const wide = Math.min(...ends) > 0 && Math.max(...ends) > 12 * Math.min(...ends);
  const steep = about.log && lines.every(line => line.y.every(y => y > 0));
  const tables = [], series = [{}], bands = [], places = [];
  for (const line of lines) {
    const kept = line.x.map((x, k) => k).filter(k => !wide || line.x[k] > 0);
    const pick = row => kept.map(k => row[k]);
    const stroke = colour(`line-${line.look.colour}`);
    const plain = { spanGaps: true, points: { show: false } };
    places.push(series.length);
    series.push({ ...plain, label: line.label, stroke, width: 1.8, dash: line.look.dash ? line.look.dash.split(" ").map(Number) : undefined });
    if (line.low) {
      bands.push({ series: [series.length + 1, series.length], fill: faint(stroke) });
      series.push({ ...plain, stroke: "transparent", width: 0 }, { ...plain, stroke: "transparent", width: 0 });
      tables.push([pick(line.x), pick(line.y), pick(line.low), pick(line.high)]);
    } else tables.push([pick(line.x), pick(line.y)]);
  }
  const soft = colour("soft"), hair = colour("hair"), font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const scale = { stroke: soft, font, labelFont: font, ticks: { show: false }, grid: { stroke: hair, width: 1 } };
  const values = (u, splits) => splits.map(tick);
  const xName = data.axes[axis].toLowerCase() + (wide ? ", logarithmic" : "");
  const tip = make("div", undefined, { class: "tip", hidden: "", "aria-hidden": "true" });
  const options = {
    width: element.clientWidth, height: element.clientHeight, series, bands, legend: { show: false },
    padding: [10, 12, 0, 0],
    scales: { x: { time: false, distr: wide ? 3 : 1, range: (u, low, high) => wide ? [low, high] : [Math.min(low, 0), high > low ? high : low + 1] }, y: { distr: steep ? 3 : 1 } },
    axes: [
      { ...scale, label: xName, ...(wide ? { splits: powers, filter: (u, splits) => splits } : {}), labelSize: 20, size: 26, gap: 6, space: 60, values, grid: { show: false }, border: { show: true, stroke: soft, width: 1 } },
      { ...scale, ...(steep ? { splits: powers, filter: (u, splits) => splits } : {}), size: 52, gap: 6, space: 40, values },
    ],
    cursor: { dataIdx: nearest, drag: { setScale: false, x: false, y: false }, points: { size: 9, width: 2, fill: () => colour("paper") }, y: false },
    hooks: { ready: [u => element.setAttribute("aria-valuetext", sentence(u, lines, places, plots.get(element).at))], draw: [u => drawMarks(u, lines, places)], setCursor: [u => point(element, u, tip, lines, places)] },
  };
  const u = new uPlot(options, uPlot.join(tables), element);
  $$(".uplot", element).forEach(one => one.setAttribute("aria-hidden", "true"));
  element.append(tip);
  const last = u.data[0].length - 1;
  element.setAttribute("aria-valuemax", last);
  element.setAttribute("aria-valuenow", Math.min(old ? old.at : last, last));
  plots.set(element, { u, at: Math.min(old ? old.at : last, last) });
}

// What the lines are at a place, or near it: within NEAR pixels.
const NEAR = 48;
const readings = (u, lines, places, index) => lines.map((line, i) => {
  const at = nearest(u, places[i], index), to = at === null ? null : u.valToPos(u.data[0][at], "x");
  return at === null || Math.abs(to - u.valToPos(u.data[0][index], "x")) > NEAR ? null : { line, x: u.data[0][at], y: u.data[places[i]][at], low: line.low && u.data[places[i] + 1][at], high: line.low && u.data[places[i] + 2][at] };
}).filter(Boolean);

function sentence(u, lines, places, index) {
  const x = u.data[0][index];
  const each = readings(u, lines, places, index).map(one => `${one.line.label} ${said(one.y)}` + (one.x === x ? "" : ` at ${place(one.x)}`));
  return `${data.axes[axis]} ${place(x)}: ${each.join(", ")}`;
}

function swatch(line) {
  const button = $$(".legend button")[data.lines.findIndex(one => one.label === line.label)];
  return button ? $("svg", button).cloneNode(true) : "";
}

function point(element, u, tip, lines, places) {
  const index = u.cursor.idx;
  tip.hidden = index === null || index === undefined;
  if (tip.hidden) return;
  const known = plots.get(element);
  if (known) known.at = index;
  element.setAttribute("aria-valuenow", index);
  element.setAttribute("aria-valuetext", sentence(u, lines, places, index));
  const x = u.data[0][index];
  tip.replaceChildren(make("p", `${data.axes[axis].toLowerCase()} ${place(x)}`));
  for (const one of readings(u, lines, places, index).sort((a, b) => b.y - a.y).slice(0, 14)) {
    const row = make("div");
    if (data.lines.length > 1) row.append(swatch(one.line), make("span", one.line.label));
    row.append(make("b", said(one.y)));
    if (one.low !== undefined && lines.length <= 4) row.append(make("i", `${said(one.low)}–${said(one.high)}`));
    if (one.x !== x) row.append(make("i", `at ${place(one.x)}`));
    tip.append(row);
  }
  const left = u.cursor.left + u.bbox.left / devicePixelRatio, room = element.clientWidth - tip.offsetWidth;
  tip.style.left = `${Math.max(0, Math.min(room, left > element.clientWidth / 2 ? left - tip.offsetWidth - 14 : left + 14))}px`;
}

function step(event) {
  const known = plots.get(event.currentTarget);
  if (!known) return;
  const u = known.u, last = u.data[0].length - 1, far = Math.max(1, Math.round(last / 10));
  const to = { ArrowLeft: known.at - 1, ArrowDown: known.at - 1, ArrowRight: known.at + 1, ArrowUp: known.at + 1,
    PageDown: known.at - far, PageUp: known.at + far, Home: 0, End: last }[event.key];
  if (event.key === "Escape") u.setCursor({ left: -10, top: -10 });
  if (to === undefined) return;
  event.preventDefault();
  known.at = Math.max(0, Math.min(last, to));
  u.setCursor({ left: u.valToPos(u.data[0][known.at], "x"), top: u.bbox.height / devicePixelRatio / 3 });
}

function numbers(details) {
  const box = $(".scroll", details), id = details.closest("figure").dataset.chart, lines = linesOf(id);
  if (!details.open) return box.replaceChildren();
  const rows = new Map();
  lines.forEach((line, i) => line.x.forEach((x, k) => {
    if (!rows.has(x)) rows.set(x, lines.map(() => "–"));
    rows.get(x)[i] = line.low ? `${said(line.y[k])} (${said(line.low[k])}–${said(line.high[k])})` : said(line.y[k]);
  }));
  const table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  head.append(...[data.axes[axis], ...lines.map(line => line.label)].map(text => make("th", text, { scope: "col" })));
  for (const x of [...rows.keys()].sort((a, b) => a - b)) {
    const row = body.insertRow();
    row.append(make("th", place(x), { scope: "row" }), ...rows.get(x).map(text => make("td", text)));
  }
  box.replaceChildren(table);
}

function drawAll() {
  for (const element of [...plots.keys()]) if (!element.isConnected) { plots.get(element).u.destroy(); plots.delete(element); }
  $$(".plot").forEach(draw);
  $$(".numbers").forEach(numbers);
}

// A chart is as wide as its place.
const sizes = new ResizeObserver(entries => entries.forEach(({ target }) => {
  const known = plots.get(target);
  if (known && target.clientWidth) known.u.setSize({ width: target.clientWidth, height: target.clientHeight });
}));
function listen() {
  $$(".plot").forEach(one => { one.onkeydown = step; sizes.observe(one); });
  $$(".numbers").forEach(one => { one.ontoggle = () => numbers(one); });
}

// ---- switches

function remembered(value) {  // a page opened as a file may have no memory
  try {
    if (value !== undefined) localStorage.setItem("spryfl-theme", value);
    return localStorage.getItem("spryfl-theme") || "auto";
  } catch { return "auto"; }
}
function theme(value) {
  if (value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
  const button = $(`#theme input[value="${value}"]`);
  if (button) button.checked = true;
}
$("#theme").addEventListener("change", event => { theme(event.target.value); remembered(event.target.value); drawAll(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
$("#axis").addEventListener("change", event => { axis = event.target.value; plots.forEach(known => { known.at = Infinity; }); drawAll(); });
$$(".legend button").forEach(button => button.addEventListener("click", () => {
  const { label } = data.lines[Number(button.dataset.line)], shown = hidden.has(label);
  if (shown) hidden.delete(label); else hidden.add(label);
  button.setAttribute("aria-pressed", String(shown));
  drawAll();
}));
theme(["light", "dark"].includes(remembered()) ? remembered() : "auto");
axis = ($("#axis input:checked") || { value: "rounds" }).value;
listen();
drawAll();

// ---- a page of a run that goes on: it looks for itself again, and takes over what has changed

let seen = "", lost = 0;
function takeOver(text) {
  const next = new DOMParser().parseFromString(text, "text/html");
  const focus = document.activeElement && document.activeElement.id;
  for (const old of $$("[data-part]")) {
    const made = next.getElementById(old.id);
    if (!made || made.innerHTML === old.dataset.was) continue;
    const open = new Set($$("details[open]", old).map(one => one.id));
    old.dataset.was = made.innerHTML;
    old.innerHTML = made.innerHTML;
    $$("details", old).forEach(one => { one.open = open.has(one.id); });
  }
  let fresh = false;
  for (const old of $$("[data-figures]")) {
    const made = next.getElementById(old.id), ids = from => $$("figure", from).map(one => one.dataset.chart).join();
    if (!made || ids(made) === ids(old)) continue;
    old.innerHTML = made.innerHTML;
    if (old.nextElementSibling && old.nextElementSibling.tagName === "P") old.nextElementSibling.remove();
    fresh = true;
  }
  document.title = next.title;
  data = JSON.parse($("#data", next).textContent);
  if (fresh) listen();
  drawAll();
  if (focus && document.activeElement.id !== focus && document.getElementById(focus)) document.getElementById(focus).focus();
}
async function look() {
  let told = "";
  try {
    const answer = await fetch(location.pathname, { cache: "no-store", headers: seen ? { "If-None-Match": seen } : {} });
    lost = 0;
    if (answer.status === 200) { seen = answer.headers.get("ETag") || ""; takeOver(await answer.text()); }
  } catch { lost += 1; }
  if (data.live.ended) told = `The run has ended.${data.live.kept ? ` Its report: ${data.live.kept}` : ""}`;
  else if (lost >= 3) told = "Nothing answers any more: this is the last that was seen.";
  if (told) { $("#live").textContent = told; return; }
  setTimeout(look, data.live.every * 1000);
}
if (data.live && !data.live.ended) setTimeout(look, data.live.every * 1000);
})();
