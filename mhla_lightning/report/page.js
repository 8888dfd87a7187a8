"use strict";
// Draws curves, matrices, pictures and intervals from the JSON in the page. Texts of run folders are only ever
// set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const state = { hidden: new Set(), log: false, smooth: 0 };
const COLOURS = 8;
const redraws = [];

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function colour(series) {
  return `s${series % COLOURS}` + (series >= COLOURS ? " again" : "");
}

function swatch(series) {
  return html("i", { class: `swatch ${colour(series)}` });
}

function number(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e9 || size < 1e-4) return value.toExponential(3);
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1e4 ? 6 : 5 });
}

function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e4) return value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 2 });
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

// --- axes

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  const wide = Math.log10(high / low);
  const factors = wide > 4 ? [1] : wide > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(Number(value.toPrecision(6)));
    }
  }
  if (found.length < 3) return ticks(low, high, 5).filter((value) => value > 0); // a narrow range
  return found.length > 8 ? found.filter((_, index) => index % Math.ceil(found.length / 8) === 0) : found;
}

function axis(values, log) {
  let low = Math.min(...values.map((one) => one[0]));
  let high = Math.max(...values.map((one) => one[1]));
  if (!(high > low)) {
    const room = Math.abs(low) * 0.05 || 1;
    [low, high] = log ? [low / 1.2, high * 1.2] : [low === 0 ? 0 : low - room, high + room];
  } else if (!log) {
    const room = (high - low) * 0.05;
    low = low >= 0 ? Math.max(0, low - room) : low - room;
    high += room;
  }
  const to = log ? Math.log10 : (value) => value;
  return { low, high, share: (value) => (to(value) - to(low)) / (to(high) - to(low)) };
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

function smoothed(values, weight) {
  if (weight === 0) return values;
  let sum = 0, mass = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

// --- curves

class Chart {
  constructor(chart, place) {
    this.chart = chart;
    this.noisy = chart.curves.some((curve) => curve.x.length > 12) && chart.tag.startsWith("train/");
    this.key = html("p", { class: "key" });
    this.plot = svg("svg", { tabindex: "0", role: "img", "aria-label": `${chart.tag} over optimizer steps; arrow keys read values` });
    this.tip = html("div", { class: "tip", hidden: "" });
    this.card = html("figure", { class: "card", "data-tag": chart.tag }, html("h4", {}, chart.tag), this.key, this.plot, this.tip);
    this.card.style.margin = "0";
    place.append(this.card);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.leave());
    this.plot.addEventListener("blur", () => this.leave());
    this.plot.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(this.card);
    redraws.push(() => this.draw());
  }

  draw() {
    const { chart, plot } = this;
    this.width = this.card.clientWidth - 24;
    if (this.width < 50) return;
    const height = 230;
    const log = state.log && chart.curves.every((curve) => curve.y.every((value) => value > 0));
    const weight = this.noisy ? state.smooth : 0;
    this.shown = chart.curves
      .filter((curve) => !state.hidden.has(curve.series))
      .map((curve) => ({ ...curve, drawn: smoothed(curve.y, weight) }));
    this.leave();
    plot.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    plot.setAttribute("height", height);
    plot.replaceChildren();
    const styles = [];
    if (chart.curves.some((curve) => curve.averaged)) styles.push("solid: weights as trained, dashed: their average (EMA)");
    if (chart.curves.some((curve) => curve.seed)) styles.push("thin: seeds, thick: their mean");
    if (state.log && !log) styles.push("has zeros, so the axis stays linear");
    this.key.textContent = styles.join("; ");
    if (this.shown.length === 0) {
      plot.append(svg("text", { x: this.width / 2, y: height / 2, "text-anchor": "middle" }, "no run is shown"));
      this.box = null;
      return;
    }
    const across = axis([extent(chart.curves.flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]]))], false);
    const [first, last] = extent(chart.curves.flatMap((curve) => [curve.x[0], curve.x[curve.x.length - 1]]));
    if (last > first) Object.assign(across, { low: first, high: last, share: (value) => (value - first) / (last - first) });
    const up = axis(this.shown.map((curve) => extent(curve.drawn)), log);
    const marks = log ? logTicks(up.low, up.high) : ticks(up.low, up.high, 5);
    const left = 14 + Math.max(...marks.map((mark) => short(mark).length)) * 6.6;
    const box = { left, right: this.width - 10, top: 22, bottom: height - 36 };
    this.box = box;
    this.x = (value) => box.left + across.share(value) * (box.right - box.left);
    this.y = (value) => box.bottom - up.share(value) * (box.bottom - box.top);
    for (const mark of marks) {
      plot.append(
        svg("line", { class: "rule", x1: box.left, x2: box.right, y1: this.y(mark), y2: this.y(mark) }),
        svg("text", { x: box.left - 6, y: this.y(mark) + 4, "text-anchor": "end" }, short(mark)),
      );
    }
    for (const mark of ticks(across.low, across.high, Math.max(2, this.width / 90)).filter(Number.isInteger)) {
      plot.append(
        svg("line", { class: "axis", x1: this.x(mark), x2: this.x(mark), y1: box.bottom, y2: box.bottom + 4 }),
        svg("text", { x: this.x(mark), y: box.bottom + 17, "text-anchor": "middle" }, short(mark)),
      );
    }
    plot.append(
      svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
      svg("text", { x: 0, y: 11 }, chart.unit + (log ? " (logarithmic)" : "")),
      svg("text", { x: box.right, y: height - 4, "text-anchor": "end" }, "optimizer steps"),
    );
    for (const curve of this.shown) this.line(curve, weight);
    this.marker = svg("g");
    plot.append(this.marker);
  }

  line(curve, weight) {
    const kinds = `curve ${colour(curve.series)}${curve.averaged ? " averaged" : ""}${curve.seed ? " seed" : ""}`;
    const path = (values) => curve.x.map((step, k) => `${k ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(values[k]).toFixed(1)}`).join("");
    if (weight > 0) {
      const [low, high] = extent(curve.drawn);
      const clip = curve.y.map((value) => Math.min(Math.max(value, low), high));
      this.plot.append(svg("path", { class: `${kinds} raw`, d: path(clip) }));
    }
    this.plot.append(svg("path", { class: kinds, d: path(curve.drawn) }));
    if (curve.x.length <= 12 && !curve.seed) {
      for (let k = 0; k < curve.x.length; k++) {
        this.plot.append(svg("circle", { class: `dot ${colour(curve.series)}`, cx: this.x(curve.x[k]), cy: this.y(curve.drawn[k]), r: 3 }));
      }
    }
  }

  steps() {
    return [...new Set(this.shown.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  }

  point(event) {
    if (!this.box) return;
    const at = ((event.clientX - this.plot.getBoundingClientRect().left) / this.plot.getBoundingClientRect().width) * this.width;
    const steps = this.steps();
    this.show(steps[nearest(steps.map((step) => this.x(step)), at)]);
  }

  press(event) {
    if (!this.box || !["ArrowLeft", "ArrowRight", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") return void this.leave();
    const steps = this.steps();
    const now = this.step === undefined ? -1 : steps.indexOf(this.step);
    const next = now + (event.key === "ArrowRight" ? 1 : -1);
    this.show(steps[Math.min(Math.max(next, 0), steps.length - 1)]);
  }

  show(step) {
    this.step = step;
    const reach = 6; // pixels
    const rows = [];
    this.marker.replaceChildren(svg("line", { class: "cross", x1: this.x(step), x2: this.x(step), y1: this.box.top, y2: this.box.bottom }));
    for (const curve of this.shown.filter((one) => !one.seed)) {
      const k = nearest(curve.x, step);
      if (Math.abs(this.x(curve.x[k]) - this.x(step)) > reach) continue;
      this.marker.append(svg("circle", { class: `dot ${colour(curve.series)}`, cx: this.x(curve.x[k]), cy: this.y(curve.drawn[k]), r: 4 }));
      rows.push({ curve, value: curve.drawn[k], raw: curve.y[k] });
    }
    rows.sort((a, b) => b.value - a.value);
    this.tip.replaceChildren(
      html("div", {}, html("span", {}, `step ${step.toLocaleString("en")}`)),
      ...rows.slice(0, 16).map(({ curve, value, raw }) =>
        html("div", {}, swatch(curve.series), html("span", {}, curve.name + (curve.averaged ? ", average" : "")),
          html("b", {}, number(value) + (value === raw ? "" : ` (logged ${number(raw)})`))),
      ),
    );
    this.tip.hidden = false;
    const x = this.x(step) + 12, width = this.tip.offsetWidth, all = this.card.clientWidth;
    const right = x + 12 + width <= all, left = x - 12 - width >= 0;
    this.tip.style.left = `${right ? x + 12 : left ? x - 12 - width : 4}px`;
    const plot = this.plot.getBoundingClientRect();
    const top = plot.top - this.card.getBoundingClientRect().top + (right || left ? 26 : plot.height); // else below
    this.tip.style.top = `${top}px`;
  }

  leave() {
    this.tip.hidden = true;
    this.step = undefined;
    if (this.marker) this.marker.replaceChildren();
  }
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle; else high = middle;
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}

function drawCharts() {
  const place = document.getElementById("charts");
  for (const group of new Set((data.charts || []).map((chart) => chart.group))) {
    const grid = html("div", { class: "grid" });
    place.append(html("h3", {}, group), grid);
    for (const chart of data.charts.filter((one) => one.group === group)) new Chart(chart, grid);
  }
}

// --- a slider over some places, which calls `show` with the number of the place

function slider(labels, show, word) {
  const range = html("input", { type: "range", min: 0, max: labels.length - 1, value: labels.length - 1, "aria-label": word });
  const output = html("output");
  const update = () => {
    const place = Number(range.value);
    output.textContent = `${labels[place]} (${place + 1} of ${labels.length})`;
    show(place);
  };
  range.addEventListener("input", update);
  range.disabled = labels.length < 2;
  return { row: html("div", { class: "slider" }, range, output), update };
}

// --- mixing matrices

const RAMP = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"].map((hex) => [
  parseInt(hex.slice(0, 2), 16), parseInt(hex.slice(2, 4), 16), parseInt(hex.slice(4), 16),
]);

function ramp(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((value, k) => value + (RAMP[low + 1][k] - value) * (place - low));
}

function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return Array.from({ length: bytes.length / 2 }, (_, k) => (bytes[2 * k] + 256 * bytes[2 * k + 1]) / 65535);
}

function paint(canvas, shares) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  shares.forEach((share, k) => image.data.set([...ramp(share), 255], 4 * k));
  context.putImageData(image, 0, 0);
}

function drawMatrices(run, place) {
  const read = html("p", { class: "read" }, "Point at a matrix to read a weight.");
  const maps = html("div", { class: "maps" });
  let at = 0;
  const canvases = run.layers.map((layer) => {
    const canvas = html("canvas", { width: layer.columns, height: layer.rows, role: "img", "aria-label": layer.title });
    canvas.style.setProperty("--ratio", `${layer.columns} / ${layer.rows}`);
    canvas.addEventListener("pointermove", (event) => {
      if (layer.values[at] === null) return;
      const box = canvas.getBoundingClientRect();
      const row = Math.min(layer.rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * layer.rows)));
      const column = Math.min(layer.columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * layer.columns)));
      const weight = unpacked(layer.values[at])[row * layer.columns + column] * run.largest;
      read.textContent = `${layer.title} (${layer.name}): query block ${row}, key block ${column}: ${weight.toFixed(4)}`;
    });
    maps.append(
      html("figure", { title: layer.name }, html("figcaption", {}, layer.title), html("span", { class: "down" }, "query block"), canvas,
        html("span", { class: "across" }, "key block")),
    );
    return canvas;
  });
  const { row, update } = slider(
    run.steps.map((step) => `step ${step.toLocaleString("en")}`),
    (place) => {
      at = place;
      run.layers.forEach((layer, k) => {
        const values = layer.values[place];
        canvases[k].style.visibility = values === null ? "hidden" : "visible";
        if (values !== null) paint(canvases[k], unpacked(values));
      });
    },
    `step of the mixing matrices of ${run.name}`,
  );
  const bar = html("canvas", { width: 120, height: 1 });
  row.append(html("span", { class: "ramp" }, "0", bar, run.largest.toFixed(3)));
  const block = html("div", { "data-series": run.series, class: "mixing" }, html("h3", {}, swatch(run.series), run.name), row, maps, read);
  place.append(block);
  paint(bar, Array.from({ length: 120 }, (_, k) => k / 119));
  update();
}

// --- pictures

function drawPictures(set, place) {
  const image = html("img", { class: "frame", alt: `${set.title} of ${set.name}` });
  image.addEventListener("load", () => {
    const factor = Math.max(1, Math.floor(Math.min(480, place.clientWidth) / image.naturalWidth));
    image.style.width = `${image.naturalWidth * factor}px`;
    image.style.imageRendering = factor > 1 ? "pixelated" : "auto"; // small pictures keep their pixels
  });
  const { row, update } = slider(set.frames.map((frame) => frame.label), (at) => { image.src = set.frames[at].source; }, `${set.title} of ${set.name}`);
  place.append(html("div", { class: "card", "data-series": set.series }, html("h4", {}, swatch(set.series), `${set.name}: ${set.title}`), row, image));
  update();
}

// --- means and intervals

function drawIntervals(plot, place) {
  const area = svg("svg", { role: "img", "aria-label": `${plot.tag}: means of the rows` });
  const several = plot.rows.some((row) => row.half !== null);
  const card = html("figure", { class: "card", "data-interval": plot.tag }, html("h4", {}, `${plot.tag} ${plot.high ? "↑" : "↓"}`),
    html("p", { class: "key" }, several ? "ring: mean, bar: 95 % interval, dots: seeds" : "ring: one seed"), area);
  card.style.margin = "0";
  place.append(card);
  const draw = () => {
    const rows = plot.rows.filter((row) => !state.hidden.has(row.series));
    const width = card.clientWidth - 24, height = rows.length * 38 + 44;
    if (width < 50) return;
    area.setAttribute("viewBox", `0 0 ${width} ${height}`);
    area.setAttribute("height", height);
    area.replaceChildren();
    if (!rows.length) return void area.append(svg("text", { x: 0, y: 20 }, "no row is shown"));
    const across = axis(rows.map((row) => extent([...row.values, row.mean - (row.half || 0), row.mean + (row.half || 0)])), false);
    const x = (value) => 8 + across.share(value) * (width - 16);
    const bottom = rows.length * 38 + 8;
    for (const mark of ticks(across.low, across.high, Math.max(2, width / 100))) {
      area.append(svg("line", { class: "rule", x1: x(mark), x2: x(mark), y1: 0, y2: bottom }), svg("text", { x: x(mark), y: bottom + 14, "text-anchor": "middle" }, short(mark)));
    }
    area.append(svg("text", { x: width - 2, y: bottom + 32, "text-anchor": "end" }, plot.unit));
    rows.forEach((row, k) => {
      const y = k * 38 + 28;
      const group = svg("g", { class: colour(row.series) });
      group.append(svg("title", {}, `${row.name}: ${row.text}`));
      if (row.half !== null) {
        group.append(svg("line", { class: "span", x1: x(row.mean - row.half), x2: x(row.mean + row.half), y1: y, y2: y }));
        for (const value of row.values) group.append(svg("circle", { cx: x(value), cy: y, r: 2.5, fill: "currentColor" }));
      }
      const ring = svg("circle", { cx: x(row.mean), cy: y, r: 5, fill: "none", stroke: "currentColor", "stroke-width": 2.4 });
      group.append(ring);
      const name = svg("text", { class: "name", x: 8, y: y - 13 }, row.name.length > 44 ? `${row.name.slice(0, 43)}…` : row.name);
      const value = svg("text", { x: width - 8, y: y - 13, "text-anchor": "end" }, row.text);
      area.append(group, name, value);
    });
  };
  new ResizeObserver(draw).observe(card);
  redraws.push(draw);
}

// --- controls

function shown() {
  const hidden = state.hidden.size, all = data.series.length;
  document.getElementById("shown").textContent = all > 1 ? `${all - hidden} of ${all} shown` : "";
  for (const node of document.querySelectorAll(".mixing[data-series], .card[data-series]")) {
    node.hidden = state.hidden.has(Number(node.dataset.series));
  }
  for (const node of document.querySelectorAll("tr[data-series]")) {
    node.classList.toggle("off", state.hidden.has(Number(node.dataset.series)));
  }
  for (const redraw of redraws) redraw();
}

for (const box of document.querySelectorAll("[data-toggle]")) {
  box.checked = true; // a reload keeps what was there before
  box.addEventListener("change", () => {
    if (box.checked) state.hidden.delete(Number(box.dataset.toggle)); else state.hidden.add(Number(box.dataset.toggle));
    shown();
  });
}
const scale = document.getElementById("scale"), smooth = document.getElementById("smooth");
scale.value = "linear";
scale.addEventListener("change", () => { state.log = scale.value === "log"; shown(); });
smooth.value = 0;
smooth.addEventListener("input", () => {
  state.smooth = Number(smooth.value);
  document.getElementById("smoothed").textContent = state.smooth ? state.smooth.toFixed(2) : "off";
  shown();
});

drawCharts();
for (const run of data.matrices || []) drawMatrices(run, document.getElementById("matrices"));
const frames = document.getElementById("frames");
if (frames) {
  frames.classList.add("sets");
  for (const set of data.pictures) if (set.frames.length) drawPictures(set, frames);
}
for (const plot of data.intervals || []) drawIntervals(plot, document.getElementById("intervals"));
shown();
