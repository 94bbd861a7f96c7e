"use strict";
// A curve of losses over steps as inline SVG: raw and smoothed training loss, held-out losses as dots.

const SVG = "http://www.w3.org/2000/svg";
const MOST_POINTS = 8000;  // that are kept: beyond, the lowest and the highest of every few

class Chart {
  constructor(words) {
    this.words = words;
    this.losses = [];
    this.heldOut = [];
    this.width = 1;
    this.figure = document.createElement("figure");
    this.key = document.createElement("div");
    this.key.className = "key";
    this.place = document.createElement("div");
    this.caption = document.createElement("figcaption");
    this.figure.append(this.key, this.place, this.caption);
    this.place.addEventListener("pointermove", (event) => this.point(event));
    this.place.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.later()).observe(this.place);
  }

  set(losses, heldOut, width) {
    this.losses = losses.filter((one) => one[1] !== null);
    this.heldOut = heldOut.filter((one) => one[1] !== null);
    this.width = width;
    this.later();
  }

  add(losses, heldOut) {
    for (const one of losses) if (one[1] !== null) put(this.losses, one);
    for (const one of heldOut) if (one[1] !== null) put(this.heldOut, one);
    if (this.losses.length > MOST_POINTS) {
      this.losses = thinned(this.losses, MOST_POINTS / 2);
      this.width = Math.max(2, Math.round(this.losses.at(-1)[0] / (MOST_POINTS / 4)));
    }
    if (losses.length || heldOut.length) this.later();
  }

  later() {  // at most once a frame
    if (!this.waits) this.waits = requestAnimationFrame(() => { this.waits = 0; this.draw(); });
  }

  draw() {
    const width = this.place.clientWidth, all = [...this.losses, ...this.heldOut];
    this.caption.textContent = !all.length ? this.words.no_step
      : this.width > 1 ? this.words.of_every.replace("{0}", this.width) : "";
    if (!width || !all.length) { this.place.replaceChildren(); this.key.replaceChildren(); return; }
    const height = Math.round(Math.min(340, Math.max(200, width * 0.38)));
    const values = all.map((one) => one[1]), low = Math.min(...values), high = Math.max(...values);
    const isLog = low > 0 && high / low > 8, last = Math.max(1, ...all.map((one) => one[0]));
    const scale = isLog ? Math.log : (value) => value;
    const pad = (scale(high) - scale(low)) * 0.05 || Math.abs(scale(low)) * 0.05 || 1;
    const bottom = scale(low) - pad, top = scale(high) + pad;
    const ticks = isLog ? logTicks(low, high) : linearTicks(low, high, 5);
    const left = 12 + 6.5 * Math.max(...ticks.map((one) => plain(one).length)), right = width - 12, base = height - 24;
    const x = (step) => left + (step / last) * (right - left);
    const y = (value) => base - ((scale(value) - bottom) / (top - bottom)) * (base - 10);
    const svg = part("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": this.words.curve });
    for (const one of ticks) {
      svg.append(part("line", { class: "grid", x1: left, x2: right, y1: y(one), y2: y(one) }));
      svg.append(part("text", { x: left - 6, y: y(one) + 4, "text-anchor": "end" }, plain(one)));
    }
    for (const one of linearTicks(0, last, width < 500 ? 4 : 8)) {
      if (one % 1) continue;
      svg.append(part("text", { x: x(one), y: height - 6, "text-anchor": "middle" }, one.toLocaleString("en")));
    }
    const raw = thinned(this.losses, right - left), smooth = smoothed(raw);
    svg.append(part("path", { class: smooth ? "raw" : "smooth", d: path(raw, x, y) }));
    if (smooth) svg.append(part("path", { class: "smooth", d: path(smooth, x, y) }));
    svg.append(part("path", { class: "heldline", d: path(this.heldOut, x, y) }));
    for (const one of thinned(this.heldOut, 150)) {
      svg.append(part("circle", { class: "held", cx: x(one[0]), cy: y(one[1]), r: 4 }));
    }
    this.cursor = part("line", { class: "cursor", y1: 10, y2: base, x1: -9, x2: -9 });
    svg.append(this.cursor);
    this.place.replaceChildren(svg);
    this.x = x;
    this.span = [left, right, last];
    this.names = [smooth ? ["raw", this.words.training_loss] : ["", this.words.training_loss],
      ...(smooth ? [["", this.words.smoothed]] : []), ...(this.heldOut.length ? [["held", this.words.held_out]] : [])];
    this.read("");
  }

  read(text) {
    const names = this.names.map(([kind, name]) => labelled(kind, name));
    this.key.replaceChildren(...names, ...(text ? [labelled("read", text)] : []));
  }

  point(event) {  // what is drawn under the pointer, in the line above
    if (!this.span || !this.losses.length) return;
    const [left, right, last] = this.span;
    if (!event) { this.cursor.setAttribute("x1", -9); this.cursor.setAttribute("x2", -9); this.read(""); return; }
    const wanted = ((event.clientX - this.place.getBoundingClientRect().left - left) / (right - left)) * last;
    const near = nearest(this.losses, wanted), held = nearest(this.heldOut, wanted);
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(near[0]));
    const beside = held && Math.abs(held[0] - near[0]) <= last / 60 ? ` · ${this.words.held_out} ${plain(held[1])}` : "";
    this.read(`${this.words.step} ${near[0].toLocaleString("en")} · ${this.words.loss} ${plain(near[1])}${beside}`);
  }
}

function part(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function labelled(kind, text) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  return made;
}

function put(points, one) {  // a step that is trained again takes its place
  let at = points.length;
  while (at > 0 && points[at - 1][0] > one[0]) at -= 1;
  points.splice(at > 0 && points[at - 1][0] === one[0] ? at - 1 : at, at > 0 && points[at - 1][0] === one[0] ? 1 : 0, one);
}

function thinned(points, columns) {  // the lowest and the highest of each column
  if (points.length <= 2 * columns) return points;
  const every = points.length / columns, found = [];
  for (let column = 0; column < columns; column += 1) {
    const own = points.slice(Math.floor(column * every), Math.floor((column + 1) * every));
    if (!own.length) continue;
    let low = own[0], high = own[0];
    for (const one of own) { if (one[1] < low[1]) low = one; if (one[1] > high[1]) high = one; }
    found.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  }
  return found;
}

function smoothed(points) {  // the mean of a thirtieth of what is drawn, half of it on each side: it lags behind nothing
  if (points.length < 40) return null;
  const half = Math.max(2, Math.round(points.length / 60)), sums = [0];
  for (const one of points) sums.push(sums.at(-1) + one[1]);
  return points.map(([step], at) => {
    const first = Math.max(0, at - half), end = Math.min(points.length, at + half + 1);
    return [step, (sums[end] - sums[first]) / (end - first)];
  });
}

function path(points, x, y) {
  return points.map(([step, value], at) => `${at ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1; else high = middle;
  }
  const before = points[low - 1], here = points[low];
  return before && here && step - before[0] < here[0] - step ? before : here;
}

function linearTicks(low, high, count) {
  const rough = (high - low || 1) / count, size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * size).find((one) => one >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) found.push(Number((at * step).toPrecision(12)));
  return found.length ? found : [low];
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const one of [1, 2, 5]) found.push(Number((one * 10 ** power).toPrecision(6)));
  }
  const inside = found.filter((one) => one >= low * 0.97 && one <= high * 1.03);
  const decades = inside.filter((one) => Math.abs(Math.log10(one) % 1) < 1e-9);
  const shown = inside.length > 7 && decades.length > 1 ? decades : inside.length < 4 ? linearTicks(low, high, 5) : inside;
  return shown.length ? shown : [low, high];
}

function plain(value) {
  return Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}
