// The page: the selection, and everything that depends on it.
const $ = (id) => document.getElementById(id);
const MOST_CLASSES = 8;
const state = { site: null, numbers: null, classes: [], channel: 0 };
const plot = new Plot($("plot"));
let imageNames = [];

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const percent = (share) => (share === null || Number.isNaN(share) ? "—" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);
const say = (text) => { $("live").textContent = text; };

// ---- gates

const ORDERS = {
  depth: (a, b) => report.sites.indexOf(a) - report.sites.indexOf(b),
  selectivity: (a, b) => (b.selectivity ?? -1) - (a.selectivity ?? -1),
  variation: (a, b) => (a.variation ?? 9e9) - (b.variation ?? 9e9),
  findings: (a, b) => b.findings.length - a.findings.length,
};

function listSites() {
  const order = $("site-order").value;
  const sorted = [...report.sites].sort((a, b) => ORDERS[order](a, b) || ORDERS.depth(a, b));
  const rows = sorted.map((site) => {
    const row = element("label", "site"), input = element("input");
    Object.assign(input, { type: "radio", name: "site", value: site.name, checked: site === state.site });
    input.addEventListener("change", () => choose(site));
    const meter = element("span", "meter"), fill = element("i");
    fill.style.width = `${100 * (site.selectivity ?? 0)}%`;
    meter.append(fill);
    meter.title = `class selectivity ${percent(site.selectivity)}`;
    row.append(input, element("span", "name", site.name), element("span", "size", `${site.channels} ch · ${percent(site.selectivity)}`), meter);
    const badges = element("span", "badges");
    for (const finding of site.findings) {
      const badge = element("span", "badge", finding.kind);
      badge.style.color = `var(--${finding.kind})`;
      badges.append(badge);
    }
    if (site.findings.length) row.append(badges);
    return row;
  });
  $("sites").replaceChildren(...rows);
}

async function choose(site) {
  state.site = site;
  const numbers = await numbersOf(site);
  if (state.site !== site) return; // another gate was selected in the meantime
  state.numbers = numbers;
  state.channel = 0;
  $("channels").value = "";
  const range = site.range.map((v) => (v === null ? "∞" : v)).join(" to ");
  $("site-name").textContent = site.name;
  $("site-numbers").textContent = `${site.channels} channels, ${site.function} (${range}); mean ${format(site.mean)}, ` +
    `movement from image to image ${format(site.std)} (${percent(site.variation)} of its size); the class explains ${percent(site.selectivity)} of its variance`;
  $("thinned").textContent = site.step > 1 ? ` To stay small, this page holds only one in ${site.step} of the ${site.channels} channels.` : "";
  showFindings();
  draw();
}

// ---- the plot

function chosenPlaces() {
  const { numbers, site } = state;
  let wanted = null;
  try {
    wanted = parseChannels($("channels").value, site.channels);
    $("channels-error").textContent = "";
  } catch (error) {
    $("channels-error").textContent = error.message;
  }
  let places = [...numbers.channel.keys()].filter((i) => wanted === null || wanted.has(numbers.channel[i]));
  if (!places.length) {
    $("channels-error").textContent = `This page holds only one in ${site.step} channels, and none of these.`;
    places = [...numbers.channel.keys()];
  }
  const order = $("channel-order").value;
  if (order !== "index") {
    const key = (i) => (Number.isNaN(numbers[order][i]) ? -1 : numbers[order][i]);
    places.sort((a, b) => key(b) - key(a) || a - b);
  }
  return places;
}

function linesOf(places) {
  const { numbers } = state;
  const lines = state.classes.map((k, i) => ({
    name: report.classes[k], color: `--s${i}`, dash: DASHES[i], width: 1.8,
    y: places.map((p) => numbers.classMean(k, p)), half: places.map((p) => numbers.classStd(k, p)),
  }));
  lines.push({ name: "all images", color: "--ink", dash: "", width: 2.4, y: places.map((p) => numbers.mean[p]), half: places.map((p) => numbers.std[p]) });
  return lines;
}

function domainOf(lines) {
  const { site } = state;
  if (!$("zoom").checked && site.range[0] !== null && site.range[1] !== null) return site.range;
  const band = $("band").checked;
  const all = lines.flatMap((l) => l.y.flatMap((y, i) => (band ? [y - l.half[i], y + l.half[i]] : [y]))).filter(Number.isFinite);
  const low = Math.min(...all), high = Math.max(...all), air = (high - low) * 0.06 || 0.01;
  return [Math.max(site.range[0] ?? -Infinity, low - air), Math.min(site.range[1] ?? Infinity, high + air)];
}

function draw() {
  state.places = chosenPlaces();
  const lines = linesOf(state.places);
  const labels = state.places.map((p) => state.numbers.channel[p]);
  const byIndex = $("channel-order").value === "index";
  plot.show(lines, labels, domainOf(lines), $("band").checked, byIndex);
  $("plot").setAttribute("aria-valuemin", 0);
  $("plot").setAttribute("aria-valuemax", labels.length - 1);
  $("legend").replaceChildren(...lines.map((line, i) => legendItem(line, state.classes[i])));
  if ($("table-box").open) fillTable();
  moveTo(Math.max(0, state.places.indexOf(state.channel)), false);
}

function legendItem(line, k) {
  const item = element("li"), key = svg("svg", { width: 26, height: 10, "aria-hidden": "true" });
  svg("line", { x1: 1, x2: 25, y1: 5, y2: 5, "stroke-width": line.width + 0.6, "stroke-dasharray": line.dash, stroke: `var(${line.color})` }, key);
  item.append(key, element("span", "text", line.name));
  if (k !== undefined) {
    const remove = element("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${line.name}`);
    remove.addEventListener("click", () => { setClasses(state.classes.filter((c) => c !== k)); $("class-filter").focus(); });
    item.append(remove);
  }
  return item;
}

function moveTo(place, speak) {
  state.channel = state.places[place];
  plot.moveTo(place, speak);
  const values = plot.lines.map((line) => `${line.name} ${format(line.y[place])}`).join(", ");
  $("plot").setAttribute("aria-valuenow", place);
  $("plot").setAttribute("aria-valuetext", `channel ${state.numbers.channel[state.channel]}: ${values}`);
  showChannel();
}

function fillTable() {
  const head = element("tr"), body = element("tbody"), top = element("thead");
  for (const title of ["channel", ...plot.lines.flatMap((line) => [line.name, "std"])]) {
    const cell = element("th", "", title);
    cell.scope = "col";
    head.append(cell);
  }
  plot.labels.forEach((label, i) => {
    const row = element("tr"), first = element("th", "", label);
    first.scope = "row";
    row.append(first, ...plot.lines.flatMap((line) => [element("td", "", format(line.y[i])), element("td", "", format(line.half[i]))]));
    body.append(row);
  });
  top.append(head);
  $("table").replaceChildren(element("caption", "unseen", `Mean activation of ${state.site.name} by channel`), top, body);
}

// ---- classes

function listClasses() {
  const rows = report.classes.map((name, k) => {
    const row = element("label"), input = element("input"), count = report.counts[k];
    Object.assign(input, { type: "checkbox", value: k, disabled: !count });
    input.addEventListener("change", () => toggle(k, input.checked));
    row.append(input, element("span", "", name), element("span", "count", count ? `${count} images` : "no images"));
    return row;
  });
  $("classes").append(...rows);
}

function toggle(k, on) {
  if (on && state.classes.length >= MOST_CLASSES) {
    say(`The plot shows at most ${MOST_CLASSES} classes; remove one first.`);
    $("class-count").textContent = `at most ${MOST_CLASSES}; remove one first`;
    markClasses(true);
    return;
  }
  setClasses(on ? [...state.classes, k] : state.classes.filter((c) => c !== k));
}

function setClasses(classes) {
  state.classes = classes;
  markClasses(false);
  draw();
}

function markClasses(keepCount) {
  for (const input of $("classes").querySelectorAll("input")) input.checked = state.classes.includes(Number(input.value));
  if (!keepCount) $("class-count").textContent = `${state.classes.length} of ${report.classes.length} selected`;
}

// The four classes whose means differ most from those of all images, over the channels in the plot.
function mostDifferent() {
  const far = (k) => state.places.reduce((sum, p) => sum + (state.numbers.classMean(k, p) - state.numbers.mean[p]) ** 2, 0);
  const filled = [...report.classes.keys()].filter((k) => report.counts[k]).map((k) => [far(k), k]);
  setClasses(filled.sort((a, b) => b[0] - a[0]).slice(0, 4).map(([, k]) => k));
  say(`Showing ${state.classes.map((k) => report.classes[k]).join(", ")}`);
}

// ---- findings

function showFindings() {
  const { site } = state;
  const parts = site.findings.map((finding) => {
    const part = element("div", "finding");
    part.style.setProperty("--tone", `var(--${finding.kind})`);
    part.append(element("b", "", finding.kind), element("p", "", finding.sentence));
    if (finding.count && finding.count < site.channels) {
      const button = element("button", "", finding.count === 1 ? "Show this channel" : `Show these ${finding.count} channels`);
      button.type = "button";
      button.addEventListener("click", () => { $("channels").value = finding.channels; draw(); say(`The plot shows ${state.places.length} of these channels.`); });
      part.append(button);
    }
    return part;
  });
  if (!parts.length) parts.push(element("p", "", "Nothing odd: the gate opens and closes with the image."));
  $("findings").replaceChildren(...parts);
}

// ---- one channel

function showChannel() {
  const { numbers, channel } = state;
  $("channel-title").textContent = `Channel ${numbers.channel[channel]} of ${state.site.name}`;
  $("channel-numbers").textContent = `mean ${format(numbers.mean[channel])} ± ${format(numbers.std[channel])}, ` +
    `range ${format(numbers.lowest[channel])} to ${format(numbers.highest[channel])}; the class explains ${percent(numbers.selectivity[channel])} of its variance`;
  const means = [...report.classes.keys()].map((k) => [numbers.classMean(k, channel), k]).filter(([v]) => !Number.isNaN(v));
  means.sort((a, b) => b[0] - a[0]);
  bars($("class-open"), means.slice(0, 5));
  bars($("class-close"), means.slice(-5).reverse());
  const top = state.site.top, from = channel * top;
  pictures($("images-open"), numbers.openImages.subarray(from, from + top), numbers.openValues.subarray(from, from + top));
  pictures($("images-close"), numbers.closeImages.subarray(from, from + top), numbers.closeValues.subarray(from, from + top));
}

function bars(list, means) {
  const [low, high] = [state.site.range[0] ?? 0, state.site.range[1] ?? state.site.high];
  const rows = means.map(([value, k]) => {
    const row = element("li"), track = element("span", "track"), fill = element("i");
    fill.style.width = `${Math.min(100, Math.max(0, (100 * (value - low)) / (high - low || 1)))}%`;
    track.append(fill);
    row.append(element("span", "text", report.classes[k]), track, element("span", "value", format(value)));
    return row;
  });
  list.replaceChildren(...(rows.length ? rows : [element("li", "", "The images have no classes.")]));
}

function pictures(list, images, values) {
  const rows = [];
  images.forEach((image, i) => {
    if (image === NOBODY) return;
    const row = element("li"), name = imageNames[image] ?? `image ${image}`, uri = report.pictures[image];
    const picture = element(uri ? "img" : "div", uri?.startsWith("data:image/png") ? "picture tiny" : "picture");
    if (uri) Object.assign(picture, { src: uri, alt: name });
    row.title = name;
    row.append(picture, element("b", "", format(values[i])), " ", element("span", "", name));
    rows.push(row);
  });
  list.replaceChildren(...(rows.length ? rows : [element("li", "", "No images were kept.")]));
}

// ---- startup

const STEPS = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity };

function listen() {
  $("site-order").addEventListener("change", listSites);
  for (const id of ["channel-order", "band", "zoom"]) $(id).addEventListener("change", draw);
  $("channels").addEventListener("change", draw);
  $("channels").addEventListener("keydown", (event) => { if (event.key === "Enter") draw(); });
  $("table-box").addEventListener("toggle", () => $("table-box").open && fillTable());
  $("most-different").addEventListener("click", mostDifferent);
  $("no-classes").addEventListener("click", () => setClasses([]));
  $("class-filter").addEventListener("input", () => {
    const wanted = $("class-filter").value.trim().toLowerCase();
    for (const row of $("classes").querySelectorAll("label")) row.hidden = !row.children[1].textContent.toLowerCase().includes(wanted);
  });
  const box = $("plot");
  const under = (event) => plot.placeAt(event.clientX - box.getBoundingClientRect().left);
  box.addEventListener("pointermove", (event) => { plot.moveTo(under(event), true); });
  box.addEventListener("pointerleave", () => { plot.moveTo(state.places.indexOf(state.channel), false); });
  box.addEventListener("click", (event) => moveTo(under(event), true));
  box.addEventListener("blur", () => plot.hush());
  box.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    moveTo(Math.min(state.places.length - 1, Math.max(0, state.places.indexOf(state.channel) + STEPS[event.key])), true);
  });
  $("theme").addEventListener("click", () => setTheme(!isDark()));
}

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function nameTheme() {
  $("theme").textContent = isDark() ? "☀ Light" : "☾ Dark";
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  nameTheme();
}

// "doctor: 8 class-selective, …": the number of findings of each kind over all gates.
function found() {
  const kinds = new Map();
  for (const site of report.sites) for (const { kind } of site.findings) kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
  return kinds.size ? [`doctor: ${[...kinds].map(([kind, count]) => `${count} ${kind}`).join(", ")}`] : [];
}

async function start() {
  const about = report.about, count = report.sites.length;
  document.title = `Gate report${about.model ? `: ${about.model}` : ""}`;
  $("about").textContent = [about.model, `${count} gates`, `${report.images.toLocaleString("en")} images`,
    `${report.classes.length.toLocaleString("en")} classes`, ...found()].filter(Boolean).join(" · ");
  $("footer").textContent = Object.entries(about).filter(([key]) => key !== "model").map(([key, value]) => `${key}: ${value}`).join(" · ");
  $("thresholds").textContent = report.thresholds;
  nameTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  imageNames = JSON.parse(new TextDecoder().decode(await inflate(report.imageNames)));
  listClasses();
  listen();
  await choose([...report.sites].sort(ORDERS.selectivity)[0]);
  listSites();
  if (report.classes.length) mostDifferent();
  markClasses(false);
  say("");
  document.documentElement.dataset.ready = "";
}

start();
