// The plot: activation over channels, one line per class, drawn as SVG.
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "5 2", "12 4", "3 2 8 2", "1 4"];
const MARGIN = { left: 52, right: 14, top: 10, bottom: 42 };
const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

function format(value) {
  if (!Number.isFinite(value)) return "—";
  return Math.abs(value) >= 0.0005 || value === 0 ? value.toFixed(3) : value.toExponential(1);
}

function ticks(low, high, about) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(Number(v.toPrecision(10)));
  return found;
}

class Plot {
  constructor(box) {
    this.box = box;
    this.note = document.createElement("div");
    this.note.className = "note";
    this.note.hidden = true;
    this.note.setAttribute("aria-hidden", "true");
    new ResizeObserver(() => this.lines && this.draw()).observe(box);
  }

  // lines: [{name, color, dash, width, y: [], half: []}]; labels: channel numbers in drawing order.
  show(lines, labels, domain, band, byIndex) {
    Object.assign(this, { lines, labels, domain, band, byIndex });
    this.draw();
  }

  x(place) {
    const span = Math.max(this.labels.length - 1, 1);
    return MARGIN.left + (this.labels.length > 1 ? place / span : 0.5) * (this.width - MARGIN.left - MARGIN.right);
  }

  y(value) {
    const [low, high] = this.domain;
    return this.height - MARGIN.bottom - ((value - low) / (high - low || 1)) * (this.height - MARGIN.top - MARGIN.bottom);
  }

  // The place of the channel closest to a horizontal position in the box.
  placeAt(position) {
    const share = (position - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    return Math.min(this.labels.length - 1, Math.max(0, Math.round(share * (this.labels.length - 1))));
  }

  draw() {
    [this.width, this.height] = [Math.max(this.box.clientWidth, 240), this.box.clientHeight];
    const root = svg("svg", { viewBox: `0 0 ${this.width} ${this.height}`, "aria-hidden": "true", focusable: "false" });
    this.drawAxes(root);
    if (this.band) for (const line of this.lines) this.drawBand(root, line);
    for (const line of this.lines) this.drawLine(root, line);
    this.cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: this.height - MARGIN.bottom, visibility: "hidden" }, root);
    this.box.replaceChildren(root, this.note);
    if (this.place !== undefined) this.moveTo(Math.min(this.place, this.labels.length - 1), false);
  }

  drawAxes(root) {
    const right = this.width - MARGIN.right, bottom = this.height - MARGIN.bottom;
    for (const value of ticks(...this.domain, 5)) {
      svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: this.y(value), y2: this.y(value) }, root);
      svg("text", { x: MARGIN.left - 8, y: this.y(value) + 4, "text-anchor": "end" }, root).textContent = String(value);
    }
    svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }, root);
    const places = this.labels.length > 1 ? ticks(0, this.labels.length - 1, this.width < 500 ? 4 : 9).filter(Number.isInteger) : [0];
    for (const place of places) {
      svg("text", { x: this.x(place), y: bottom + 18, "text-anchor": "middle" }, root).textContent = this.labels[place];
    }
    const middle = (MARGIN.top + bottom) / 2;
    svg("text", { x: (MARGIN.left + right) / 2, y: this.height - 6, "text-anchor": "middle" }, root).textContent =
      this.byIndex ? "channel index" : "channel index (in the selected order)";
    svg("text", { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }, root).textContent = "activation";
  }

  drawBand(root, line) {
    const clip = (value) => Math.min(this.domain[1], Math.max(this.domain[0], value));
    const up = [...line.y].map((y, i) => `${this.x(i).toFixed(1)},${this.y(clip(y + line.half[i])).toFixed(1)}`);
    const down = [...line.y].map((y, i) => `${this.x(i).toFixed(1)},${this.y(clip(y - line.half[i])).toFixed(1)}`);
    const points = [...up, ...down.reverse()].join(" ");
    svg("polygon", { class: "band", points, fill: `var(${line.color})`, "fill-opacity": 0.16, stroke: "none" }, root);
  }

  drawLine(root, line) {
    const points = [...line.y].map((y, i) => `${this.x(i).toFixed(1)},${this.y(y).toFixed(1)}`);
    const stroke = { stroke: `var(${line.color})`, "stroke-width": line.width, "stroke-dasharray": line.dash };
    if (points.length > 1) svg("polyline", { class: "line", points: points.join(" "), "data-name": line.name, ...stroke }, root);
    else svg("circle", { class: "line", cx: this.x(0), cy: this.y(line.y[0]), r: 4, "data-name": line.name, ...stroke }, root);
  }

  // Moves the cursor to a channel by its place in the drawing; shows its values if `speak` is set.
  moveTo(place, speak) {
    this.place = place;
    for (const side of ["x1", "x2"]) this.cursor.setAttribute(side, this.x(place));
    this.cursor.setAttribute("visibility", "visible");
    this.note.hidden = !speak;
    if (!speak) return;
    const title = document.createElement("b");
    title.textContent = `channel ${this.labels[place]}`;
    this.note.replaceChildren(title, ...this.lines.map((line) => {
      const row = document.createElement("div"), name = document.createElement("span"), value = document.createElement("span");
      name.textContent = line.name;
      name.style.borderLeft = `4px solid var(${line.color})`;
      value.textContent = format(line.y[place]) + (this.band ? ` ± ${format(line.half[place])}` : "");
      row.append(name, value);
      return row;
    }));
    const left = this.x(place), flip = left > this.width * 0.6;
    this.note.style.left = flip ? "" : `${left + 12}px`;
    this.note.style.right = flip ? `${this.width - left + 12}px` : "";
    this.note.style.top = `${MARGIN.top + 6}px`;
  }

  hush() {
    this.note.hidden = true;
  }
}
