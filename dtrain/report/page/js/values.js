// Values and elements. Whatever comes from a run becomes text of a node, never markup.

const SVG = "http://www.w3.org/2000/svg";

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const drawn = (tag, attributes, ...children) => put(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

// Returns the number that a history's cell holds, NaN and the infinities included; null where it holds none.
function numberOf(text) {
  if (text === "" || text === undefined || text === null) return null;
  const known = { nan: NaN, "-nan": NaN, inf: Infinity, "-inf": -Infinity, infinity: Infinity, "-infinity": -Infinity };
  const word = text.toLowerCase();
  if (word in known) return known[word];
  const value = Number(text);
  return Number.isNaN(value) ? null : value;
}

// A cell for a table: so many digits, in the manner of the numbers that it was rounded from.
function rounded(text, digits = 5) {
  const value = numberOf(text);
  if (value === null) return text || "–";
  if (!Number.isFinite(value) || Number.isInteger(value)) return text;
  const plain = Number(value.toPrecision(digits));
  const size = Math.abs(plain);
  return size !== 0 && (size < 1e-4 || size >= 1e9) ? plain.toExponential() : String(plain);
}

function duration(seconds) {
  if (seconds < 10) return `${Number(seconds.toPrecision(2))} s`;
  const whole = Math.round(seconds);
  for (const [size, name, part, less] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (whole < size) continue;
    const rest = Math.floor((whole % size) / part);
    return `${Math.floor(whole / size)} ${name}${rest ? ` ${rest} ${less}` : ""}`;
  }
  return `${whole} s`;
}

function moment(at) {
  const date = new Date(at * 1000);
  if (Number.isNaN(date.getTime())) return "?";
  const two = (n) => String(n).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

// Short text for an axis.
function tick(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return String(Number(value.toPrecision(6)));
}

function median(numbers) {
  const sorted = numbers.filter((x) => x !== null && Number.isFinite(x)).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
