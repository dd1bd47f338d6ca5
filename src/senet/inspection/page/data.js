// Unpacks the data from page_data.py.
const report = JSON.parse(document.getElementById("report-data").textContent);
const NOBODY = 0xffffffff, NO_NUMBER = 0xffff;
const unpacked = new Map();

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// The numbers of one gate: arrays over its kept channels, and functions that read the row of a class.
async function numbersOf(site) {
  if (!unpacked.has(site)) unpacked.set(site, read(site, await inflate(site.data)));
  return unpacked.get(site);
}

function read(site, buffer) {
  const n = site.kept, images = n * site.top;
  let at = 0;
  const take = (Kind, count) => {
    const part = new Kind(buffer, at, count);
    at += part.byteLength;
    return part;
  };
  const scaled = (values, low, high) => Float32Array.from(values, (v) => low + (v / 65535) * (high - low));
  const inRange = (count) => scaled(take(Uint16Array, count), site.low, site.high);
  const openImages = take(Uint32Array, images), closeImages = take(Uint32Array, images);
  const mean = inRange(n), lowest = inRange(n), highest = inRange(n);
  const std = scaled(take(Uint16Array, n), 0, site.widest);
  const selectivity = Float32Array.from(take(Uint16Array, n), (v) => (v === NO_NUMBER ? NaN : v / (NO_NUMBER - 1)));
  const openValues = inRange(images), closeValues = inRange(images);
  const away = take(Uint8Array, n * report.classes.length), within = take(Uint8Array, n * report.classes.length);
  const [floor, ceiling] = [site.range[0] ?? -Infinity, site.range[1] ?? Infinity];
  return {
    n, mean, lowest, highest, std, selectivity, openImages, closeImages, openValues, closeValues,
    channel: Uint32Array.from({ length: n }, (_, i) => i * site.step),
    classMean: (k, i) => {
      const step = away[k * n + i];
      return step === 0 ? NaN : Math.min(ceiling, Math.max(floor, mean[i] + ((step - 128) / 127) * site.reach));
    },
    classStd: (k, i) => (within[k * n + i] / 255) * site.widest,
  };
}

// "0-15, 40" → a set of channels; null means all. Throws a message for invalid input.
function parseChannels(text, channels) {
  if (!text.trim() || text.trim() === "all") return null;
  const chosen = new Set();
  for (const part of text.split(",")) {
    const match = /^\s*(\d+)\s*(?:[-–]\s*(\d+)\s*)?$/.exec(part);
    if (!match) throw new Error(`“${part.trim()}” is not a channel; enter numbers and ranges, such as 0-15, 40.`);
    const first = Number(match[1]), last = Number(match[2] ?? match[1]);
    if (first > last || last >= channels) throw new Error(`This gate has channels 0 to ${channels - 1}.`);
    for (let c = first; c <= last; c++) chosen.add(c);
  }
  return chosen;
}
