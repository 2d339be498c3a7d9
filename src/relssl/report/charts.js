// The curves of one run, or of several in one figure each.

const WIDE = 360, HIGH = 200, LEFT = 44, RIGHT = 10, TOP = 8, BOTTOM = 26;

// Round numbers that span low..high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const ticks = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) ticks.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const digit of high / low > 1000 ? [1] : [1, 2, 5]) if (digit * 10 ** power >= low && digit * 10 ** power <= high) ticks.push(digit * 10 ** power);
  return ticks;
}

// The pattern of a line, beside its name.
const swatch = (line) =>
  svg("svg", { viewBox: "0 0 36 12", "aria-hidden": "true" }, svg("path", { class: `line ${lineClass(line)}`, d: "M0 6L36 6" }));
const lineClass = (line) => `run${Math.min(line.run, 3)} column${line.column}`;

function chart(curve, lines, levels, axis) {
  const title = curve.title;
  const points = lines.flatMap((line) => line.points);
  const values = [...points.map((point) => point[1]), ...levels.map((level) => level[1])];
  const xs = points.map((point) => point[0]);
  const extent = (list) => list.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const [x0, x1] = extent(xs);
  let [y0, y1] = extent(values);
  const log = curve.log && y0 > 0 && y1 / y0 > 5;
  const pad = log ? 0 : (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || 1;
  [y0, y1] = [y0 - (y0 >= 0 ? Math.min(pad, y0) : pad), y1 + pad];
  const scale = log ? Math.log10 : (value) => value;
  const px = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDE - LEFT - RIGHT);
  const py = (y) => HIGH - BOTTOM - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0) || 1)) * (HIGH - TOP - BOTTOM);

  const ends = lines.map((line) => `${line.name} from ${short(line.points[0][1])} to ${short(line.points.at(-1)[1])}`).join("; ");
  const drawing = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", tabindex: 0, "aria-label": `${title}: ${ends}. Arrow keys read values.` });
  for (const y of log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
    drawing.append(svg("line", { class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: py(y), y2: py(y) }));
    drawing.append(svg("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, short(y)));
  }
  for (const x of ticks(x0, x1, 5)) drawing.append(svg("text", { x: px(x), y: HIGH - 8, "text-anchor": "middle" }, short(x)));
  for (const [name, level] of levels) {
    drawing.append(svg("line", { class: "level", x1: LEFT, x2: WIDE - RIGHT, y1: py(level), y2: py(level) }));
    drawing.append(svg("text", { x: WIDE - RIGHT, y: py(level) - 4, "text-anchor": "end" }, `${name} ${short(level)}`));
  }
  for (const line of [...lines].reverse()) {
    const path = line.points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
    drawing.append(svg("path", { class: `line ${lineClass(line)}`, d: path }));
  }
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HIGH - BOTTOM, visibility: "hidden" });
  drawing.append(cursor);

  const readout = el("p", { class: "values", "aria-live": "polite" });
  const say = (lead, valueOf) => readout.replaceChildren(lead, ...lines.flatMap((line) =>
    [...(lines.length > 1 ? [swatch(line)] : []), `${line.name} ${short(valueOf(line))}   `]));
  say("", (line) => line.points.at(-1)[1]);
  const stops = [...new Set(xs)].sort((a, b) => a - b);
  let stop = stops.length - 1;
  const read = (index) => {
    stop = Math.max(0, Math.min(stops.length - 1, index));
    const x = stops[stop];
    cursor.setAttribute("x1", px(x));
    cursor.setAttribute("x2", px(x));
    cursor.setAttribute("visibility", "visible");
    say(`${axis} ${short(x)}:  `, (line) => line.points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best))[1]);
  };
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const x = x0 + (((event.clientX - box.left) / box.width) * WIDE - LEFT) / (WIDE - LEFT - RIGHT) * (x1 - x0);
    read(stops.reduce((best, each, i) => (Math.abs(each - x) < Math.abs(stops[best] - x) ? i : best), 0));
  });
  drawing.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: stop - 1, ArrowRight: stop + 1, Home: 0, End: stops.length - 1 };
    if (event.key in moves) { read(moves[event.key]); event.preventDefault(); }
  });
  return el("figure", { class: "chart" }, el("h3", {}, title), readout, drawing, el("p", {}, curve.about));
}

(function drawCharts() {
  const many = DATA.runs.length > 1, target = by("charts");
  const titles = [...new Set(DATA.runs.flatMap((run) => run.curves.map((curve) => curve.title)))];
  if (!titles.length) target.append(el("p", {}, "No rows yet."));
  if (many) target.before(el("p", { class: "legend" }, ...DATA.runs.map((run, i) => el("span", {}, swatch({ run: i, column: 0 }), run.name))));
  for (const title of titles) {
    const lines = [], levels = [], curves = [];
    DATA.runs.forEach((run, number) => {
      const curve = run.curves.find((each) => each.title === title);
      if (!curve) return;
      curves.push(curve);
      if (!many) levels.push(...curve.levels);
      curve.lines.slice(0, many ? 1 : 2).forEach((line, column) =>
        lines.push({ name: many ? run.name : line.name, points: line.points, run: number, column }));
    });
    (curves[0].about ? target : by("more-charts")).append(chart(curves[0], lines, levels, DATA.runs[0].axis));
  }
  by("more").hidden = !by("more-charts").children.length;
})();
