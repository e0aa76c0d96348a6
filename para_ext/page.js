// What the page of `para-ext report` does: draws its data, and follows the slider. All numbers come from Python, but the
// sums of σ² that a plan's errors per module are.

"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { modules, stops } = data;
const COLORS = ["#3b82c4", "#e08a1e", "#2a9d74", "#c75fa0", "#8a6fd1", "#d1495b", "#6b8e23", "#5aa9c9", "#a0724a", "#888888"];
const state = { stop: data.start, module: null, sort: "index", ascending: true };

const element = (id) => document.getElementById(id);
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Plotly reads tags and entities in its texts; names are no markup.
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const digits = (x) => (x === 0 ? "0" : x.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2")); // as Python writes it
const percent = (x) => `${(Math.floor(x * 1e4 + 1e-9) / 100).toFixed(2)}%`;

// Rounded up, so that an upper bound stays one.
function atMost(x) {
  const text = digits(x);
  return Number(text) >= x ? text : digits(Number(text) + 10 ** (Math.floor(Math.log10(x)) - 2));
}

// Σσ² of what every rank drops, from the smallest on.
for (const module of modules) {
  module.dropped = new Array(module.sigma.length + 1).fill(0);
  for (let k = module.sigma.length - 1; k >= 0; k--) module.dropped[k] = module.dropped[k + 1] + module.sigma[k] ** 2;
}
const floor = (module, rank) => Math.sqrt(module.dropped[Math.min(rank, module.sigma.length)]);

function row(i) {
  const module = modules[i], stop = stops[state.stop], rank = stop.ranks[i], least = floor(module, rank);
  return {
    index: i, name: module.name, type: module.type, shape: module.m * module.n, before: module.rank, rank,
    sigma: module.sigma[0], error: stop.errors ? stop.errors[i] : least, floor: least,
    energy: stop.energies ? stop.energies[i] : module.dropped[0] ? 1 - least ** 2 / module.dropped[0] : 1,
    parameters: rank * (module.m + module.n),
  };
}

// Plots

function draw(id, traces, { xaxis, yaxis, ...layout }) {
  const axis = { gridcolor: variable("--line"), zeroline: false, linecolor: variable("--line"), automargin: true, fixedrange: true };
  return Plotly.react(id, traces, {
    font: { family: "system-ui, sans-serif", size: 13, color: variable("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
    hoverlabel: { bgcolor: variable("--card"), bordercolor: variable("--line"), font: { color: variable("--ink") }, align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, margin: { l: 50, r: 10, t: 12, b: 40 },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...layout,
  }, { responsive: true, displayModeBar: false });
}

// Ticks at whole numbers, where few would be between them.
const whole = (most) => (most < 20 ? { dtick: Math.ceil(most / 10) || 1, tick0: 0 } : { tickformat: "d" });

function drawCurve() {
  const planned = stops.filter((s) => s.origin.startsWith("--keep")), named = stops.filter((s) => s.name), now = stops[state.stop];
  const points = (list, name, extra) => ({
    x: list.map((s) => s.size), y: list.map((s) => s.error), name, hoverinfo: "text", ...extra,
    hovertext: list.map((s) => (s.words
      ? `${plain(s.name || s.origin)}<br>${s.words.parameters}, ${s.words.bytes}<br>error ${s.words.error}`
      : `rank ${s.rank} for all<br>${percent(s.size)} of the parameters<br>error ${atMost(s.error)}`)),
  });
  const symbols = ["diamond", "square", "star", "triangle-up", "pentagon", "hexagon", "cross", "x"];
  draw("curve", [
    points(data.uniform, "one rank for all", { mode: "lines+markers", line: { color: variable("--soft"), dash: "dot" }, marker: { size: 4 } }),
    points(planned, "one threshold for all", { mode: "lines", line: { color: COLORS[0], width: 2.5 } }),
    ...named.map((s, i) => points([s], plain(short(s.name)), {
      mode: "markers", marker: { size: 11, symbol: symbols[i % symbols.length], color: COLORS[(i + 1) % COLORS.length] },
    })),
    points([now], "this budget", {
      mode: "markers", showlegend: false, marker: { size: 17, symbol: "circle-open", color: variable("--ink"), line: { width: 2.5 } },
    }),
  ], {
    xaxis: { tickformat: ".0%", rangemode: "tozero", title: { text: "parameters kept" } },
    yaxis: { rangemode: "tozero", title: { text: "relative error" } },
    legend: { x: 1, xanchor: "right", y: 1, yanchor: "top", bgcolor: "rgba(0,0,0,0)" }, // the curve falls
  });
}

function drawHistogram() {
  const ranks = stops[state.stop].ranks, last = Math.max(...stops.map((s) => s.ranks.reduce((a, b) => Math.max(a, b), 0)));
  const counts = new Array(last + 1).fill(0);
  for (const rank of ranks) counts[rank]++;
  draw("histogram", [{
    type: "bar", x: counts.map((_, rank) => rank), y: counts, marker: { color: COLORS[0] }, hoverinfo: "text",
    hovertext: counts.map((count, rank) => `rank ${rank}: ${count} modules`), textposition: "none",
  }], {
    xaxis: { title: { text: "rank" }, range: [-0.6, last + 0.6], ...whole(last) }, bargap: 0.15,
    yaxis: { title: { text: "modules" }, ...whole(Math.max(...counts)), rangemode: "tozero" },
  });
}

function drawMap() {
  const { layers, labels, kinds } = data.map, width = element("map").clientWidth;
  const grid = (value) => kinds.map(() => new Array(layers.length).fill(value));
  const z = grid(null), text = grid(""), hover = grid("");
  const most = modules.reduce((most, module) => Math.max(most, module.rank), 1);
  modules.forEach((module, i) => {
    const [x, y] = module.cell, rank = stops[state.stop].ranks[i];
    z[y][x] = Math.sqrt(rank); // small ranks differ more in use than large ones
    text[y][x] = rank;
    hover[y][x] = `${plain(module.name)}<br>rank ${module.rank} → ${rank}`;
  });
  const ends = kinds.map((kind) => kind.match(/[^.]*(\.\d+)*$/)[0]), narrow = width < 600, left = narrow ? 90 : 150;
  const headings = narrow && new Set(ends).size === kinds.length ? ends : kinds;
  const cell = (width - left - 80) / layers.length, every = Math.ceil(Math.max(...labels.map((l) => l.length)) > 4 ? 16 / cell : 24 / cell);
  const shown = layers.map((_, i) => i).filter((i) => i % every === 0);
  const ticks = [...new Set([0, Math.round(most / 4), most])]; // evenly spaced by their roots
  const none = variable("--none"), steps = ["#16325c", "#1f5a8f", "#2a7f94", "#7fcf9a", "#f7e85b"];
  const first = 0.5 / Math.sqrt(most); // below rank 1: no module
  const scale = [[0, none], [first, none], ...steps.map((color, i) => [first + (1 - first) * i / (steps.length - 1), color])];
  element("map").style.height = `${Math.max(26 * kinds.length, 80) + 90}px`;
  draw("map", [{
    type: "heatmap", z, text, hovertext: hover, hoverinfo: "text", hoverongaps: false, zmin: 0, zmax: Math.sqrt(most),
    xgap: 1, ygap: 1, colorscale: scale, ...(cell > 20 ? { texttemplate: "%{text}", textfont: { size: 12 } } : {}),
    colorbar: { thickness: 12, outlinewidth: 0, tickvals: ticks.map(Math.sqrt), ticktext: ticks },
  }], {
    xaxis: { tickvals: shown, ticktext: shown.map((i) => plain(labels[i])), showgrid: false, title: { text: "layer" } },
    yaxis: {
      tickvals: kinds.map((_, i) => i), ticktext: headings.map((kind) => plain(short(kind, narrow ? 12 : 24))),
      autorange: "reversed", showgrid: false,
    },
  });
}

function drawSpectra() {
  const traces = [];
  data.types.forEach((type, t) => {
    const color = COLORS[t % COLORS.length], spectra = modules.filter((m) => m.type === type).map((m) => m.sigma);
    const x = [], low = [], middle = [], high = [];
    for (let j = 0; ; j++) {
      const values = spectra.map((sigma) => sigma[j]).filter((s) => s > 0).sort((a, b) => a - b);
      if (!values.length) break;
      x.push(j + 1);
      low.push(values[0]);
      middle.push(values[values.length >> 1]);
      high.push(values[values.length - 1]);
    }
    const band = { x, mode: "lines", line: { width: 0, color }, legendgroup: t, showlegend: false, hoverinfo: "skip" };
    traces.push({ ...band, y: low }, { ...band, y: high, fill: "tonexty", fillcolor: `${color}20` }, {
      x, y: middle, mode: "lines", name: plain(short(type)), legendgroup: t, hoverinfo: "text",
      line: { color, width: 2, dash: ["solid", "dash", "dot"][Math.floor(t / COLORS.length) % 3] },
      hovertext: x.map((j, i) => `${plain(type)}, component ${j}<br>${digits(low[i])} – ${digits(high[i])}, median ${digits(middle[i])}`),
    });
  });
  if (state.module !== null) {
    const { name, sigma } = modules[state.module], x = sigma.map((_, j) => j + 1);
    traces.push({
      x, y: sigma.map((s) => s || null), name: plain(short(name)), mode: "lines+markers", marker: { size: 5 }, hoverinfo: "text",
      line: { color: variable("--ink"), width: 2 }, hovertext: sigma.map((s, j) => `${plain(name)}<br>σ${j + 1} = ${digits(s)}`),
    });
  }
  draw("spectra", traces, {
    xaxis: { title: { text: "component" }, ...whole(Math.max(...modules.map((m) => m.sigma.length))) },
    yaxis: { type: "log", exponentformat: "power", title: { text: "σ" } },
  });
}

// The end of a name tells it from others.
function short(name, length = 32) {
  return name.length <= length ? name : `…${name.slice(1 - length)}`;
}

// Table

const TABLE = [
  ["name", "module"], ["type", "type"], ["shape", "m × n"], ["before", "rank before"], ["rank", "rank"], ["sigma", "σ₁"],
  ["error", "error"], ["floor", "floor"], ["energy", "energy"], ["parameters", "parameters"],
];
const natural = new Intl.Collator("en", { numeric: true }).compare;
const [head, body, foot] = ["thead tr", "tbody", "tfoot tr"].map((part) => document.querySelector(`#certificate ${part}`));

function make(parent, tag, text = "") {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;
  return made;
}

function button(parent, text, act) {
  const made = make(parent, "button", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

for (const [key, label] of TABLE) {
  const cell = make(head, "th");
  cell.scope = "col";
  cell.dataset.key = key;
  button(cell, label, () => {
    state.ascending = state.sort === key ? !state.ascending : key === "name" || key === "type";
    state.sort = key;
    fillTable();
  });
  make(foot, "td");
}
const rows = modules.map((module, i) => {
  const made = make(body, "tr");
  TABLE.forEach(() => make(made, "td"));
  button(made.cells[0], module.name, () => select(i));
  made.cells[1].textContent = module.type;
  made.cells[2].textContent = `${module.m} × ${module.n}`;
  made.cells[3].textContent = module.rank;
  made.cells[5].textContent = digits(module.sigma[0]);
  return made;
});

function fillTable() {
  const values = modules.map((_, i) => row(i)), { sort, ascending } = state;
  for (const { index, rank, error, floor, energy, parameters } of values) {
    const cells = rows[index].cells;
    cells[4].textContent = rank;
    cells[6].textContent = atMost(error);
    cells[7].textContent = digits(floor);
    cells[8].textContent = percent(energy);
    cells[9].textContent = parameters.toLocaleString("en");
    rows[index].classList.toggle("selected", index === state.module);
  }
  const compare = typeof values[0][sort] === "string" ? (a, b) => natural(a[sort], b[sort]) : (a, b) => a[sort] - b[sort];
  values.sort((a, b) => (ascending ? compare(a, b) : compare(b, a)) || a.index - b.index);
  body.append(...values.map(({ index }) => rows[index]));
  for (const cell of head.cells) {
    if (cell.dataset.key === sort) cell.ariaSort = ascending ? "ascending" : "descending";
    else cell.removeAttribute("aria-sort");
  }
  const { words, errors, origin } = stops[state.stop], root = (key) => Math.sqrt(values.reduce((sum, v) => sum + v[key] ** 2, 0));
  const before = modules.reduce(([low, high], { rank }) => [Math.min(low, rank), Math.max(high, rank)], [Infinity, 0]);
  const total = [
    "all", `×${modules.length}`, "", [...new Set(before)].join("–"), words.ranks.replace(/ .*/, ""),
    digits(values.reduce((most, v) => Math.max(most, v.sigma), 0)), atMost(root("error")), digits(root("floor")), words.energy,
    words.parameters.replace(/ .*/, ""),
  ];
  total.forEach((text, i) => { foot.cells[i].textContent = text; });
  element("heading").textContent = errors ? "Certificate" : "Prediction";
  element("certainty").textContent = errors ? `Errors ${origin}.` : "Errors as the plan predicts them, before storage rounding.";
}

// The slider

function show(stop) {
  state.stop = stop;
  const { name, origin, words } = stops[stop];
  element("slider").value = stop;
  element("slider").ariaValueText = `${name || origin}, ${words.parameters}`;
  element("origin").textContent = stops[stop].errors ? short(name) : origin;
  for (const [key, text] of Object.entries(words)) element(key).textContent = text;
  for (const choice of element("named").children) choice.ariaPressed = Number(choice.dataset.stop) === stop;
  drawCurve();
  drawHistogram();
  drawMap();
  fillTable();
}

function select(i) {
  state.module = i;
  rows.forEach((made, j) => made.classList.toggle("selected", i === j));
  drawSpectra();
}

function drawAll() {
  show(state.stop);
  drawSpectra();
}

element("facts").textContent = data.facts;
element("version").textContent = data.version;
element("slider").max = stops.length - 1;
let next = null; // at most one redraw per frame
element("slider").addEventListener("input", ({ target }) => {
  if (next === null) requestAnimationFrame(() => { show(next); next = null; });
  next = Number(target.value);
});
stops.forEach(({ name }, stop) => {
  if (!name) return;
  const made = button(element("named"), name, () => show(stop));
  made.dataset.stop = stop;
  made.title = name;
});
drawAll();
element("map").on("plotly_click", ({ points: [{ x, y }] }) => {
  const found = modules.findIndex(({ cell }) => cell[0] === x && cell[1] === y);
  if (found >= 0) select(found);
});
addEventListener("resize", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
