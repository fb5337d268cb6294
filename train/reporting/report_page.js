"use strict";
// The run report's curves, heat maps, pictures and events. Its data stands in the element #data (run_report.py).
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const several = data.runs.length > 1;

function make(name, attributes = {}, parent = null, text = null) {
  const plain = ["div", "figure", "figcaption", "img", "button", "h3", "p", "span", "i"].includes(name);
  const element = plain ? document.createElement(name) : document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 10000 && Number.isInteger(value)) return value.toLocaleString("en");
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

// ── theme ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

const root = document.documentElement;
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
byId("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch {}
  drawHeatMaps();
});

// ── curves: all share what is zoomed into ───────────────────────────────────────────────────────────────────────────────

const everyX = data.charts.flatMap((chart) => chart.series.flatMap((one) => [one.x[0], one.x[one.x.length - 1]]));
const whole = everyX.length ? [Math.min(...everyX), Math.max(...everyX)] : [0, 1];
if (whole[0] === whole[1]) whole[1] += 1;
const view = { from: whole[0], to: whole[1], smoothing: 0, log: false };
const drawn = [];

function zoom(from, to) {
  const least = Math.min(1, (whole[1] - whole[0]) / 2);
  if (to - from < least) { const middle = (from + to) / 2; from = middle - least / 2; to = middle + least / 2; }
  const size = Math.min(to - from, whole[1] - whole[0]);
  view.from = Math.max(whole[0], Math.min(from, whole[1] - size));
  view.to = view.from + size;
  drawCharts();
}

function zoomBy(factor, around = (view.from + view.to) / 2) {
  zoom(around - (around - view.from) * factor, around + (view.to - around) * factor);
}

// Exponential moving average that does not start at 0 (the bias is divided out, as in Adam's moments).
function smooth(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function ticks(from, to, count) {
  const rough = (to - from) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) || rough;
  const found = [];
  for (let at = Math.ceil(from / step) * step; at <= to + step * 1e-9 && found.length < 30; at += step) found.push(at);
  return found;
}

function logTicks(from, to) {
  const found = [];
  for (let power = Math.floor(Math.log10(from)); power <= Math.ceil(Math.log10(to)); power++) {
    for (const n of [1, 2, 5]) { const at = n * 10 ** power; if (at >= from && at <= to) found.push(at); }
  }
  const every = Math.ceil(found.length / 6);
  return found.length < 2 ? [from, to] : found.filter((_, place) => place % every === 0);
}

class Chart {
  constructor(spec, parent) {
    this.spec = spec;
    this.cursor = null;
    this.hidden = new Set();
    this.box = make("div", { class: "chart" }, parent);
    const top = make("div", { class: "top" }, this.box);
    make("h3", {}, top, spec.title);
    this.read = make("span", { class: "read" }, top);
    this.svg = make("svg", { role: "application", tabindex: "0", "aria-label": this.label() }, this.box);
    this.legend();
    this.listen();
  }

  label() {
    const parts = this.spec.series.map((one) => `${this.nameOf(one)} from ${shown(one.y[0])} to ${shown(one.y[one.y.length - 1])}`);
    return `${this.spec.title}: ${parts.slice(0, 6).join(", ")}. Arrow keys read values, plus and minus zoom.`;
  }

  nameOf(one) {
    const short = one.name.includes("/") ? one.name.slice(one.name.indexOf("/") + 1) : one.name;
    return several ? `${data.runs[one.run].name}: ${short}` : short;
  }

  // Of several runs each has its color, and each number its kind of line.
  color(place) {
    return `var(--s${(several ? this.spec.series[place].run : place) % 8})`;
  }

  dash(place) {
    const names = [...new Set(this.spec.series.map((one) => one.name))];
    return several ? Math.min(2, names.indexOf(this.spec.series[place].name)) : 0;
  }

  legend() {
    if (this.spec.series.length < 2) return;
    const legend = make("div", { class: "legend" }, this.box);
    this.spec.series.forEach((one, place) => {
      const button = make("button", { type: "button", "aria-pressed": "true" }, legend);
      make("i", { class: `key dash${this.dash(place)}`, style: `--c:${this.color(place)}` }, button);
      button.append(this.nameOf(one));
      button.addEventListener("click", () => {
        if (!this.hidden.delete(place)) this.hidden.add(place);
        button.setAttribute("aria-pressed", String(!this.hidden.has(place)));
        this.draw();
      });
    });
  }

  listen() {
    const { svg } = this;
    let began = null;
    const at = (event) => this.stepAt(event.clientX - svg.getBoundingClientRect().left);
    svg.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      began = at(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      this.cursor = at(event);
      this.brush = began === null ? null : [began, this.cursor];
      this.draw();
    });
    svg.addEventListener("pointerup", (event) => {
      if (began !== null && Math.abs(this.xAt(at(event)) - this.xAt(began)) > 8) {
        const [from, to] = [began, at(event)].sort((a, b) => a - b);
        this.brush = began = null;
        zoom(from, to);
      }
      this.brush = began = null;
      this.draw();
    });
    const leave = () => { this.cursor = this.brush = began = null; this.draw(); };
    svg.addEventListener("pointercancel", leave);
    svg.addEventListener("pointerleave", () => { if (began === null) leave(); });
    svg.addEventListener("dblclick", () => zoom(...whole));
    svg.addEventListener("keydown", (event) => this.key(event));
    svg.addEventListener("blur", leave);
  }

  key(event) {
    const size = view.to - view.from;
    const side = event.key === "ArrowLeft" ? -1 : event.key === "ArrowRight" ? 1 : 0;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (side && event.shiftKey) zoom(view.from + side * size / 4, view.to + side * size / 4);
    else if (side) this.move(side);
    else if (event.key === "Home") { this.cursor = view.from; this.draw(); }
    else if (event.key === "End") { this.cursor = view.to; this.draw(); }
    else if (event.key === "+" || event.key === "=") zoomBy(0.5, this.cursor ?? undefined);
    else if (event.key === "-") zoomBy(2, this.cursor ?? undefined);
    else if (event.key === "0" || event.key === "Escape") zoom(...whole);
    else return;
    event.preventDefault();
  }

  // The next step in view, to one side of the cursor, at which any line has a point.
  move(side) {
    const from = this.cursor ?? (side > 0 ? view.from - 1e-9 : view.to + 1e-9);
    let best = null;
    this.visible().forEach(({ one }) => one.x.forEach((x) => {
      if ((x - from) * side > 1e-9 && x >= view.from && x <= view.to && (best === null || (x - best) * side < 0)) best = x;
    }));
    if (best !== null) this.cursor = best;
    this.draw();
  }

  visible() {
    return this.spec.series.map((one, place) => ({ one, place })).filter(({ place }) => !this.hidden.has(place));
  }

  stepAt(x) {
    return view.from + Math.min(1, Math.max(0, (x - this.left) / (this.width - this.left - 10))) * (view.to - view.from);
  }

  xAt(step) { return this.left + (step - view.from) / (view.to - view.from) * (this.width - this.left - 10); }
  yAt(value) {
    const scale = this.isLog ? Math.log10 : (v) => v;
    return 8 + (1 - (scale(value) - scale(this.low)) / (scale(this.high) - scale(this.low))) * (this.height - 32);
  }

  // What is in view, with one point more to each side so that lines run to the edge.
  lines() {
    return this.visible().map(({ one, place }) => {
      const weight = one.dots ? 0 : view.smoothing;
      if (weight !== one.weight) { one.smooth = weight ? smooth(one.y, weight) : one.y; one.weight = weight; }
      let from = one.x.findIndex((x) => x >= view.from), to = one.x.findLastIndex((x) => x <= view.to);
      if (from < 0) from = one.x.length;
      return { one, place, from: Math.max(0, from - 1), to: Math.min(one.x.length - 1, to + 1), inside: [from, to] };
    });
  }

  range(lines) {
    let low = Infinity, high = -Infinity, positive = true;
    for (const { one, from, to, inside } of lines) {
      const [first, last] = inside[1] >= inside[0] ? inside : [from, to];
      for (let i = first; i <= last; i++) {
        low = Math.min(low, one.smooth[i], view.smoothing || !one.lo ? one.y[i] : one.lo[i]);
        high = Math.max(high, one.smooth[i], view.smoothing || !one.hi ? one.y[i] : one.hi[i]);
      }
      positive &&= one.y.every((y) => y > 0) && (!one.lo || one.lo.every((y) => y > 0));
    }
    if (low > high) [low, high] = [0, 1];
    this.isLog = view.log && positive && low > 0;
    const spare = low === high ? Math.abs(low) * 0.05 || 1 : (high - low) * 0.06;
    this.low = this.isLog ? low / 1.05 : low - spare;
    this.high = this.isLog ? high * 1.05 : high + spare;
    if (!this.isLog && low >= 0 && this.low < 0) this.low = 0;
  }

  draw() {
    const { svg } = this;
    this.width = this.box.clientWidth;
    if (!this.width) return;
    this.height = Math.round(Math.min(260, Math.max(180, this.width * 0.42)));
    const lines = this.lines();
    this.range(lines);
    const marks = this.isLog ? logTicks(this.low, this.high) : ticks(this.low, this.high, 4);
    this.left = 10 + 6.4 * Math.max(3, ...marks.map((value) => shown(value).length));
    svg.setAttribute("height", this.height);
    svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    svg.replaceChildren();
    this.axes(marks);
    const id = `clip${drawn.indexOf(this)}`;
    const clip = make("clipPath", { id }, svg);
    make("rect", { x: this.left, y: 0, width: Math.max(0, this.width - this.left - 4), height: this.height - 22 }, clip);
    const inside = make("g", { "clip-path": `url(#${id})` }, svg);
    this.eventMarks(inside);
    lines.forEach((line) => this.drawLine(line, inside));
    this.drawCursor(lines, inside);
    if (this.brush) {
      const [from, to] = this.brush.map((step) => this.xAt(step)).sort((a, b) => a - b);
      make("rect", { class: "brush", x: from, y: 0, width: to - from, height: this.height - 22 }, svg);
    }
  }

  axes(marks) {
    const { svg } = this;
    for (const value of marks) {
      const y = this.yAt(value);
      make("line", { class: "axis", x1: this.left, x2: this.width - 10, y1: y, y2: y }, svg);
      make("text", { x: this.left - 7, y: y + 4, "text-anchor": "end" }, svg, shown(value));
    }
    const steps = ticks(view.from, view.to, Math.max(2, this.width / 110)).filter((step) => Number.isInteger(step) || view.to - view.from < 4);
    for (const step of steps) {
      const x = this.xAt(step);
      const anchor = x > this.width - 30 ? "end" : "middle";
      make("text", { x: anchor === "end" ? this.width - 4 : x, y: this.height - 5, "text-anchor": anchor }, svg, shown(step));
    }
  }

  eventMarks(parent) {
    const { runs } = data;
    const used = new Set(this.spec.series.map((one) => one.run));
    for (const run of used) {
      for (const [step, kind] of runs[run].marks) {
        const x = this.xAt(step);
        const line = make("line", { class: `mark ${kind}`, x1: x, x2: x, y1: 0, y2: this.height - 22 }, parent);
        make("title", {}, line, `${kind} at step ${step}`);
      }
    }
  }

  drawLine({ one, place, from, to }, parent) {
    const color = this.color(place);
    const path = (values) => {
      let text = "";
      for (let i = from; i <= to; i++) text += `${i === from ? "M" : "L"}${this.xAt(one.x[i]).toFixed(1)} ${this.yAt(values[i]).toFixed(1)}`;
      return text;
    };
    if (one.lo && to >= from) {
      let text = path(one.hi);
      for (let i = to; i >= from; i--) text += `L${this.xAt(one.x[i]).toFixed(1)} ${this.yAt(one.lo[i]).toFixed(1)}`;
      make("path", { class: "band", d: `${text}Z`, style: `fill:${color}` }, parent);
    }
    if (view.smoothing && !one.dots) make("path", { class: "raw", d: path(one.y), style: `stroke:${color}` }, parent);
    const dashes = ["none", "7 4", "2 3"][this.dash(place)];
    make("path", { class: "line", d: path(one.smooth), style: `stroke:${color};stroke-dasharray:${dashes}` }, parent);
    if (one.dots) {
      for (let i = from; i <= to; i++) make("circle", { cx: this.xAt(one.x[i]), cy: this.yAt(one.y[i]), r: 2.6, style: `fill:${color}` }, parent);
    }
  }

  drawCursor(lines, parent) {
    if (this.cursor === null || this.cursor === undefined) { this.read.textContent = ""; return; }
    const found = [];
    let step = null;
    for (const { one, place, inside } of lines) {
      let best = -1;
      for (let i = Math.max(0, inside[0]); i <= inside[1]; i++) {
        if (best < 0 || Math.abs(one.x[i] - this.cursor) < Math.abs(one.x[best] - this.cursor)) best = i;
      }
      if (best < 0) continue;
      found.push({ one, place, best });
      if (step === null || Math.abs(one.x[best] - this.cursor) < Math.abs(step - this.cursor)) step = one.x[best];
    }
    if (step === null) { this.read.textContent = ""; return; }
    make("line", { class: "cursor", x1: this.xAt(step), x2: this.xAt(step), y1: 0, y2: this.height - 22 }, parent);
    const parts = [];
    for (const { one, place, best } of found) {
      make("circle", { cx: this.xAt(one.x[best]), cy: this.yAt(one.smooth[best]), r: 3.6, style: `fill:${this.color(place)}` }, parent);
      if (parts.length < 4) parts.push(`${this.spec.series.length > 1 ? `${this.nameOf(one)} ` : ""}${shown(one.smooth[best])}`);
    }
    this.read.textContent = `step ${shown(Math.round(step))} · ${parts.join(" · ")}`;
  }
}

function drawCharts() {
  drawn.forEach((chart) => chart.draw());
  const all = view.from === whole[0] && view.to === whole[1];
  if (byId("range")) byId("range").textContent = all ? "" : `steps ${shown(Math.round(view.from))} to ${shown(Math.round(view.to))}`;
}

for (const spec of data.charts) {
  const parent = document.querySelector(`.charts[data-place="${spec.place}"]`);
  drawn.push(new Chart(spec, parent));
}
if (byId("smoothing")) {
  byId("smoothing").addEventListener("input", (event) => {
    view.smoothing = Number(event.target.value);
    byId("smoothed").textContent = event.target.value;
    drawCharts();
  });
  byId("log").addEventListener("change", (event) => { view.log = event.target.checked; drawCharts(); });
  byId("zoom-in").addEventListener("click", () => zoomBy(0.5));
  byId("zoom-out").addEventListener("click", () => zoomBy(2));
  byId("zoom-all").addEventListener("click", () => zoom(...whole));
}
if (byId("more")) byId("more").addEventListener("toggle", drawCharts);

// ── loss by σ over time ─────────────────────────────────────────────────────────────────────────────────────────────────

let heatMode = "change";
const heatPlaces = new Map();

function heatColor(map, row, value) {
  const style = getComputedStyle(root);
  if (heatMode === "value") {
    const all = map.values.flat().filter((v) => v !== null);
    const low = Math.min(...all), high = Math.max(...all);
    return `rgba(${style.getPropertyValue("--fell")},${(0.06 + 0.94 * (value - low) / (high - low || 1)).toFixed(3)})`;
  }
  const most = Math.max(...map.values.map((values, i) => Math.max(...values.map((v) => v === null ? 0 : Math.abs(change(map, i, v)))))) || 1;
  const share = change(map, row, value) / most;
  return `rgba(${style.getPropertyValue(share > 0 ? "--rose" : "--fell")},${Math.min(1, Math.abs(share)).toFixed(3)})`;
}

function change(map, row, value) {
  const first = map.values[row].find((v) => v !== null);
  return first ? value / first - 1 : 0;
}

function drawHeatMap(map, box) {
  const width = box.clientWidth, left = 44, rows = map.sigmas.length, columns = map.steps.length;
  if (!width) return;
  const tall = Math.max(16, Math.min(30, 220 / rows)), wide = (width - left - 4) / columns;
  const svg = box.querySelector("svg");
  svg.setAttribute("height", rows * tall + 24);
  svg.setAttribute("viewBox", `0 0 ${width} ${rows * tall + 24}`);
  svg.replaceChildren();
  map.sigmas.forEach((sigma, row) => {
    make("text", { x: left - 8, y: (row + 0.5) * tall + 4, "text-anchor": "end" }, svg, `σ ${sigma}`);
    map.values[row].forEach((value, column) => {
      const place = { x: (left + column * wide).toFixed(2), y: row * tall, width: Math.max(0.5, wide - (wide > 6 ? 1.5 : 0)).toFixed(2), height: tall - 1.5 };
      make("rect", { ...place, rx: wide > 6 ? 2 : 0, style: "fill:var(--flat)" }, svg);
      if (value !== null) make("rect", { ...place, rx: wide > 6 ? 2 : 0, class: "cell", "data-row": row, "data-column": column, style: `fill:${heatColor(map, row, value)}` }, svg);
    });
  });
  const every = Math.ceil(columns / Math.max(2, Math.floor(width / 70)));
  map.steps.forEach((step, column) => {
    const x = left + (column + 0.5) * wide, anchor = x > width - 24 ? "end" : "middle";
    if (column % every === 0) make("text", { x: anchor === "end" ? width - 2 : x, y: rows * tall + 16, "text-anchor": anchor }, svg, shown(step));
  });
  const [row, column] = heatPlaces.get(map) || [-1, -1];
  if (row >= 0) make("rect", { class: "chosen", x: left + column * wide, y: row * tall, width: wide, height: tall - 1.5, rx: 2 }, svg);
  const value = row >= 0 ? map.values[row][column] : null;
  const text = row < 0 ? "" : `σ ${map.sigmas[row]} · step ${shown(map.steps[column])} · ${shown(value)}`;
  const percent = 100 * (value === null ? 0 : change(map, row, value));
  box.querySelector(".read").textContent = text && value !== null ? `${text} (${percent > 0 ? "+" : ""}${percent.toFixed(1)} %)` : text;
}

function drawHeatMaps() {
  document.querySelectorAll(".heat").forEach((box, place) => drawHeatMap(data.heat_maps[place], box));
}

function choose(map, row, column) {
  const inside = (value, count) => Math.max(0, Math.min(count - 1, value));
  heatPlaces.set(map, [inside(row, map.sigmas.length), inside(column, map.steps.length)]);
  drawHeatMaps();
}

data.heat_maps.forEach((map) => {
  const box = make("div", { class: "heat" }, byId("heat-maps"));
  const top = make("div", { class: "top" }, box);
  const few = map.all_steps > map.steps.length ? ` (means of ${map.all_steps} steps in ${map.steps.length} columns)` : "";
  make("h3", {}, top, `${several ? `${data.runs[map.run].name}: ` : ""}${map.name.replaceAll("_", " ")}${few}`);
  make("span", { class: "read" }, top);
  const svg = make("svg", { tabindex: "0", role: "application", "aria-label": `${map.name} by noise level over steps; arrow keys read cells` }, box);
  svg.addEventListener("pointermove", (event) => {
    const { row, column } = event.target.dataset;
    if (row !== undefined) choose(map, Number(row), Number(column));
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    const [row, column] = heatPlaces.get(map) || [0, -move[1]];
    choose(map, row + move[0], column + move[1]);
    event.preventDefault();
  });
});
for (const mode of ["change", "value"]) {
  byId(`heat-${mode}`)?.addEventListener("click", () => {
    heatMode = mode;
    for (const each of ["change", "value"]) byId(`heat-${each}`).setAttribute("aria-pressed", String(each === mode));
    drawHeatMaps();
  });
}

// ── sample images ───────────────────────────────────────────────────────────────────────────────────────────────────────

function picture(parent, caption) {
  const figure = make("figure", {}, parent);
  const image = make("img", { alt: "" }, figure);
  const gone = make("div", { class: "gone", hidden: "" }, figure, "no picture");
  const below = make("figcaption", {}, figure, caption);
  return (found, text, alt) => {
    image.hidden = !found;
    gone.hidden = Boolean(found);
    below.textContent = text;
    if (!found) return;
    image.src = found.url;
    image.alt = alt;
    image.className = found.width < 160 ? "small" : "";
    image.style.aspectRatio = `${found.width} / ${found.height}`;
  };
}

document.querySelectorAll(".samples").forEach((box) => {
  const { steps, prompts } = data.samples[Number(box.dataset.sample)];
  const slider = box.querySelector(".slider"), output = box.querySelector(".step"), play = box.querySelector(".play");
  const cards = prompts.map((prompt) => {
    const card = make("div", { class: "card" }, box.querySelector(".cards"));
    const pair = make("div", { class: prompt.base ? "pair" : "pair one" }, card);
    if (prompt.base) picture(pair, "base")(prompt.base, "base", `base model: ${prompt.text}`);
    const show = picture(pair, "");
    make("p", { title: prompt.text }, card, prompt.text || prompt.name);
    return { prompt, show };
  });
  const show = () => {
    const place = Number(slider.value);
    output.textContent = `step ${shown(steps[place])}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    for (const card of cards) card.show(card.prompt.images[place], `LoRA, step ${shown(steps[place])}`, `step ${steps[place]}: ${card.prompt.text}`);
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶"; play.setAttribute("aria-label", "Play"); };
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (Number(slider.value) >= steps.length - 1) slider.value = 0;
    show();
    play.textContent = "⏸";
    play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => {
      if (Number(slider.value) >= steps.length - 1) { stop(); return; }
      slider.value = Number(slider.value) + 1;
      show();
    }, 700);
  });
  slider.addEventListener("input", () => { if (timer) stop(); show(); });
  show();
});

// ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

document.querySelectorAll(".events").forEach((box) => {
  box.querySelectorAll(".chips button").forEach((button) => button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(pressed));
    box.querySelectorAll("tbody tr").forEach((row) => { if (row.dataset.kind === button.dataset.kind) row.hidden = !pressed; });
  }));
});

const redraw = () => { drawCharts(); drawHeatMaps(); };
new ResizeObserver(redraw).observe(document.querySelector("main"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
redraw();
