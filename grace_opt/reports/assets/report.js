"use strict";
let data; // what grace_opt.reports.report.report_data makes; see startReport
const FIELDS = ["head", "solver", "status", "limit", "objective", "lower_bound", "bound_kind", "gap", "over_best",
  "reference_gap", "best_bound_solver", "milliseconds", "nodes", "iterations", "warnings", "pruned"];
const FLOOR = 1e-4; // per cent; closer than this counts as equal
// Okabe and Ito's palette, told apart in the usual forms of colour blindness, shifted for each background.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b5548f", "#b07d00", "#2f9bd8", "#1b1f24", "#7a7f87"];
const DARK = ["#4aa8e0", "#ff8a3c", "#2fc79a", "#e49ac4", "#f0c040", "#9cd6f7", "#e4e7eb", "#959ca6"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const SYMBOLS = ["circle", "square", "diamond", "cross", "triangle-up", "x", "star", "pentagon"];
const darkScheme = matchMedia("(prefers-color-scheme: dark)");

const byId = (id) => document.getElementById(id);
const choice = (id) => byId(id) ? byId(id).value : "";
const currentSet = () => data.sets[Number(choice("set") || 0)];
const field = (row, name) => row[FIELDS.indexOf(name)];
const isMissing = (value) => value === null || value === undefined;
// The first digits of a number, more of them where neighbours differ late; with an exponent where it is huge or tiny.
const number = (value, digits = 6) => {
  if (isMissing(value)) return "\u2013";
  const rounded = Number(Number(value).toPrecision(digits)), size = Math.abs(rounded);
  return size >= 10 ** Math.max(digits, 9) || (size > 0 && size < 1e-4) ? rounded.toExponential() : String(rounded);
};
const precise = (value) => number(value, 10);
const percent = (value) => isMissing(value) ? "\u2013" : `${Number((100 * value).toPrecision(4))} %`;

function element(name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function fill(id, options) { // keeps the choice where it still exists
  const select = byId(id);
  if (!select) return;
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => element("option", {value}, text)));
  if (options.some(([value]) => String(value) === before)) select.value = before;
}

// ---------------------------------------------------------------- tables

// columns: [title, value(row), text(value), isNumber, address(row) to link to if any]. A click or Enter on a header sorts; missing values stay last.
function table(host, caption, columns, rows, pageSize) {
  let sorted = rows.slice(), page = 0;
  const made = element("table"), head = element("tr"), body = element("tbody");
  const pager = element("div", {class: "pager"}), shown = element("span", {"aria-live": "polite"});
  const back = element("button", {type: "button"}, "Previous"), next = element("button", {type: "button"}, "Next");
  const headers = columns.map(([title, value, , isNumber]) => {
    const header = element("th", {scope: "col", "aria-sort": "none", ...(isNumber ? {class: "number"} : {})});
    const button = element("button", {type: "button"}, title);
    button.addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending", sign = ascending ? 1 : -1;
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const keyed = rows.map((row) => [value(row), row]);
      keyed.sort(([a], [b]) => {
        if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
        return sign * (isNumber ? a - b : String(a).localeCompare(String(b), "en", {numeric: true}));
      });
      sorted = keyed.map(([, row]) => row);
      page = 0;
      render();
    });
    header.append(button);
    return header;
  });
  function render() {
    const first = page * pageSize, visible = sorted.slice(first, first + pageSize);
    body.replaceChildren(...visible.map((row) => {
      const line = element("tr");
      for (const [, value, text, isNumber, link] of columns) {
        const cell = element("td", {class: isNumber ? "number" : "text"}), target = link && link(row);
        if (target) cell.append(element("a", {href: target}, text(value(row))));
        else cell.textContent = text(value(row));
        line.append(cell);
      }
      return line;
    }));
    shown.textContent = `${first + 1} to ${first + visible.length} of ${rows.length}`;
    back.disabled = page === 0;
    next.disabled = first + pageSize >= rows.length;
  }
  back.addEventListener("click", () => { page -= 1; render(); });
  next.addEventListener("click", () => { page += 1; render(); });
  head.append(...headers);
  const top = element("thead");
  top.append(head);
  made.append(element("caption", {}, caption), top, body);
  const scroll = element("div", {class: "scroll"});
  scroll.append(made);
  pager.append(back, shown, next);
  pager.hidden = rows.length <= pageSize;
  host.replaceChildren(scroll, pager);
  render();
}

const asText = (value) => isMissing(value) ? "\u2013" : String(value);

function drawSummary() {
  const counted = (title, name) => [title, (row) => row[name], asText, true];
  const share = (title, name) => [title, (row) => row[name], percent, true];
  const rows = currentSet().summary;
  const columns = [
    ["Solver", (row) => row.solver, asText, false],
    counted("Heads", "heads"),
    share("Mean over best known", "over_best_mean"),
    share("Max over best known", "over_best_max"),
    share("Mean gap, own proven bound", "gap_mean"),
    share("Mean gap, best proven bound", "reference_gap_mean"),
    share("Proven optimal", "optimal_share"),
    ["Time a head (ms)", (row) => isMissing(row.time) ? null : 1000 * row.time, number, true],
    counted("Errors", "errors"),
    counted("No selection in time", "no_selection"),
    counted("Not supported", "not_supported"),
  ].filter(([title], i) => i < 9 || rows.some((row) => row[i === 9 ? "no_selection" : "not_supported"]));
  table(byId("summary"), "Means are over the heads that have a value. Time is the shifted geometric mean (shift 10 ms) of the " +
    "wall-clock time; a run that came to its limit counts as long as it took. Click a header to sort.", columns, rows, 100);
}

// The service has a page for each head; an offline report has not.
const headAddress = (set, head) => data.head_pages && `${data.head_pages}${encodeURIComponent(head)}?${new URLSearchParams(set.query)}`;

function drawRecords() {
  const set = currentSet();
  const of = (name) => (row) => field(row, name);
  table(byId("records"), "One row for each head and solver. Click a header to sort.", [
    ["Head", (row) => set.heads[field(row, "head")], asText, false, (row) => headAddress(set, set.heads[field(row, "head")])],
    ["Solver", (row) => data.solvers[field(row, "solver")], asText, false],
    ["Status", of("status"), asText, false],
    ["Limit", of("limit"), asText, false],
    ["Objective", of("objective"), precise, true],
    ["Lower bound", of("lower_bound"), precise, true],
    ["Bound", of("bound_kind"), asText, false],
    ["Gap", of("gap"), percent, true],
    ["Over best known", of("over_best"), percent, true],
    ["Gap to best bound", of("reference_gap"), percent, true],
    ["Time (ms)", of("milliseconds"), number, true],
    ["Best bound by", of("best_bound_solver"), asText, false],
    ["Nodes", of("nodes"), asText, true],
    ["Iterations", of("iterations"), asText, true],
    ...(set.rows.some(of("warnings")) ? [["Warnings", of("warnings"), asText, false]] : []),
  ], set.rows, 50);
}

// ---------------------------------------------------------------- pictures

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (i) => (darkScheme.matches ? DARK : LIGHT)[i % LIGHT.length];

// Nothing leaves this machine: by default plotly.js has a button that sends a picture's data to its makers' cloud.
const CONFIG = {
  responsive: true, displaylogo: false, watermark: false, showLink: false, linkText: "", showEditInChartStudio: false, sendData: false,
  showSendToCloud: false, plotlyServerURL: "", topojsonURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "sendDataToCloud", "sendChartToCloud", "editInChartStudio"],
};

// Words in lines of at most so many characters, where one does not fill them by itself.
function lines(words, most) {
  return words.split(" ").reduce((text, word) => {
    const last = text.slice(text.lastIndexOf("<br>") + 1);
    return text + (last.length + word.length > most ? "<br>" : text && " ") + word;
  }, "");
}

function plot(id, traces, layout, message = "") {
  const text = css("--text"), line = css("--line");
  const axis = {gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true};
  const narrow = byId(id).clientWidth < 700;
  for (const part of narrow ? [layout.xaxis, layout.yaxis] : []) {
    if (part && part.title) part.title = {text: lines(part.title.text, 36), font: {size: 12}};
  }
  const settled = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: text, family: "system-ui, sans-serif", size: 13},
    margin: {l: 60, r: 20, t: 16, b: 56},
    hoverlabel: {bgcolor: css("--panel"), bordercolor: line, font: {color: text}},
    legend: narrow ? {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: {size: 12}} : {x: 1.02, y: 1},
    ...layout,
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  };
  if (message) {
    settled.annotations = [{text: message, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: {size: 15, color: css("--soft")}}];
  }
  Plotly.react(id, traces, settled, CONFIG);
}

const styled = (i) => ({color: colour(i), dash: DASHES[i % DASHES.length], width: 2.25});

// Ticks at powers of ten of per cent; the first stands for everything up to it.
function percentAxis(title, largest) {
  const top = Math.max(1, Math.ceil(Math.log10(Math.max(largest, FLOOR)))), low = Math.log10(FLOOR);
  const powers = Array.from({length: top - low + 1}, (_, i) => low + i);
  return {
    type: "log", title: {text: title}, range: [low - 0.03, Math.max(Math.log10(Math.max(largest, FLOOR)) + 0.15, low + 1)],
    tickvals: powers.map((p) => 10 ** p),
    ticktext: powers.map((p, i) => (i ? "" : "\u2264 ") + Number((10 ** p).toPrecision(1))),
  };
}

// Powers of ten, with 2 and 5 times them where the values span less than two, and whatever there is within a factor of five.
function factorTicks(values) {
  const [low, high] = extent(values);
  if (!(high >= 5 * low)) return PLAIN;
  return {tickformat: "~g", dtick: high > 100 * low ? 1 : "D2"};
}

// Not Math.min and Math.max, which take only so many arguments.
const extent = (values) => [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];

// As many digits as tell one tick from the next: plotly.js finds them by itself where no format is given.
const PLAIN = {exponentformat: "e", separatethousands: false, hoverformat: ".10~g"};

// The share of `count` that is at most x, as a step line from `from` to `to`; values are sorted.
function shareLine(values, count, from, to, name, i) {
  const x = [from], y = [0];
  values.forEach((value, k) => {
    if (x[x.length - 1] === value) y[y.length - 1] = (k + 1) / count;
    else { x.push(value); y.push((k + 1) / count); }
  });
  x.push(to);
  y.push(y[y.length - 1]);
  return {x, y, name, type: "scatter", mode: "lines", line: {...styled(i), shape: "hv"}};
}

const shareAxis = (title) => ({title: {text: title}, range: [0, 1.03], tickformat: ".0%"});

function drawDistance() {
  const set = currentSet(), name = choice("distance-from");
  const values = data.solvers.map(() => []), used = new Set(set.rows.map((row) => field(row, "solver")));
  for (const row of set.rows) {
    const value = field(row, name);
    if (!isMissing(value)) values[field(row, "solver")].push(Math.max(FLOOR, 100 * value));
  }
  const largest = Math.max(FLOOR * 10, ...values.flat());
  const traces = data.solvers.map((solver, i) => {
    values[i].sort((a, b) => a - b);
    return {...shareLine(values[i], set.heads.length, FLOOR, largest * 1.4, solver, i), hovertemplate: "%{y:.1%} of heads within %{x:.4~g} %"};
  }).filter((_, i) => used.has(i));
  const from = name === "over_best" ? "best known objective" : "best proven lower bound";
  plot("distance", traces, {xaxis: percentAxis(`Distance to the ${from} (%)`, largest), yaxis: shareAxis("Share of heads")},
    values.flat().length ? "" : "No solver proved a bound.");
}

function drawProfile() {
  const {heads, ratios} = currentSet().profiles[choice("criterion")];
  const all = Object.values(ratios).flat(), largest = Math.max(2, ...all) * 1.15;
  const traces = data.solvers.flatMap((solver, i) => solver in ratios
    ? [{...shareLine(ratios[solver], heads, 1, largest, solver, i), hovertemplate: "%{y:.1%} of heads within %{x:.4~g} times the fastest"}] : []);
  plot("profile", traces, {
    xaxis: {type: "log", title: {text: "Time / time of the fastest solver on the same head (factor)"}, range: [0, Math.log10(largest)], ...factorTicks([1, largest])},
    yaxis: shareAxis("Share of heads finished"),
  }, all.length ? "" : "No solver finished a head by this criterion.");
}

function drawMap() {
  const set = currentSet(), name = choice("map-value"), solver = Number(choice("map-solver"));
  const layers = [...new Set(set.layers)], columns = [...new Set(set.columns)];
  const z = columns.map(() => layers.map(() => null)), heads = columns.map(() => layers.map(() => ""));
  for (const row of set.rows) {
    if (field(row, "solver") !== solver) continue;
    const head = field(row, "head"), value = field(row, name);
    const proven = name !== "gap" || field(row, "bound_kind") === "proven";
    const y = columns.indexOf(set.columns[head]), x = layers.indexOf(set.layers[head]);
    heads[y][x] = set.heads[head];
    if (proven && !isMissing(value)) z[y][x] = 100 * value;
  }
  const found = z.flat().filter((value) => value !== null);
  const largest = Math.max(0, ...found), close = found.filter((value) => value <= FLOOR).length;
  byId("map-note").textContent = `${found.length} of ${set.heads.length} heads have a value; ${close} are within ${FLOOR} %, the largest is ${percent(largest / 100)}.`;
  byId("map").style.height = `${Math.min(900, 150 + 34 * columns.length)}px`;
  plot("map", [{
    type: "heatmap", z, x: layers.map(String), y: columns.map(String), customdata: heads, colorscale: "Cividis", zmin: 0,
    zmax: largest > FLOOR ? largest : 1, xgap: 2, ygap: 2, hoverongaps: false, hovertemplate: "%{customdata}: %{z:.4~g} %<extra></extra>",
    showscale: found.length > 0, colorbar: {title: {text: "%", side: "top"}, tickformat: "~g", thickness: 14, outlinewidth: 0},
  }], {
    xaxis: {type: "category", title: {text: "Layer"}, showgrid: false}, yaxis: {type: "category", title: {text: "KV head"}, showgrid: false, autorange: "reversed"},
  }, found.length ? "" : `No value: ${data.solvers[solver]} has ${name === "over_best" ? "no selection" : "no proven bound to measure from"}.`);
}

function drawTime() {
  const set = currentSet(), name = choice("time-value"), head = choice("time-head");
  const axisName = name === "own" ? "Gap to the solver's own proven bound (%)" : "Distance to the best known objective (%)";
  const column = name === "own" ? 1 : 2, traces = [];
  data.solvers.forEach((solver, i) => {
    let points = [];
    if (head === "") {
      points = (set.time[name][solver] || []).map((value, k) => [set.time.times[k], value]);
    } else if (set.details[head][solver]) {
      points = set.details[head][solver].trace.map((step) => [Math.max(step[0], 1e-6), step[column]]);
    }
    points = points.filter(([, value]) => !isMissing(value)).map(([time, value]) => [time, Math.max(FLOOR, 100 * value)]);
    if (!points.length) return;
    // Where nothing changes there is no corner to draw.
    points = points.filter(([, value], k) => k === 0 || value !== points[k - 1][1]);
    const start = points[0], end = [set.time.times.at(-1) * 1.1, points.at(-1)[1]];
    traces.push({
      x: [...points, end].map(([time]) => 1000 * time), y: [...points, end].map(([, value]) => value), name: solver, type: "scatter", mode: "lines",
      legendgroup: solver, line: {...styled(i), shape: "hv"}, hovertemplate: "%{y:.4~g} % after %{x:.4~g} ms",
    }, {
      x: [1000 * start[0]], y: [start[1]], name: solver, type: "scatter", mode: "markers", legendgroup: solver, showlegend: false, hoverinfo: "skip",
      marker: {color: colour(i), size: 10, symbol: SYMBOLS[i % SYMBOLS.length]},
    });
  });
  const largest = Math.max(FLOOR, ...traces.flatMap((trace) => trace.y)), times = traces.flatMap((trace) => trace.x);
  plot("time", traces, {xaxis: {type: "log", title: {text: "Time since the start of a head's run (ms)"}, ...factorTicks(times)}, yaxis: percentAxis(axisName, largest)},
    traces.length ? "" : "No solver has a proven bound.");
}

function drawGraph() {
  const set = currentSet(), head = choice("graph-head"), solver = choice("graph-solver");
  const graph = data.graphs[set.bundle][head], detail = set.details[head][solver];
  const pruned = new Set((detail && detail.pruned) || []), guarded = new Set(graph.protected);
  const logs = graph.own.map((value) => Math.log10(Math.max(value, Number.MIN_VALUE)));
  const sorted = logs.slice().sort((a, b) => a - b);
  const low = sorted[Math.floor(0.02 * (sorted.length - 1))], high = sorted[Math.ceil(0.98 * (sorted.length - 1))];
  const size = (i) => 8 + 14 * Math.min(1, Math.max(0, (logs[i] - low) / (high - low || 1)));
  const edges = {other: [[], []], adds: [[], []], saves: [[], []]};
  for (let k = 0; k < graph.edges.length; k += 3) {
    const [i, j, positive] = graph.edges.slice(k, k + 3);
    const [x, y] = edges[pruned.has(i) && pruned.has(j) ? (positive ? "adds" : "saves") : "other"];
    x.push(graph.x[i], graph.x[j], null);
    y.push(graph.y[i], graph.y[j], null);
  }
  const orange = colour(1), blue = colour(0), green = colour(2);
  const lines = (kind, name, line, opacity) => ({x: edges[kind][0], y: edges[kind][1], name, type: "scatter", mode: "lines", line, opacity, hoverinfo: "skip"});
  const nodes = (name, symbol, fillColour, includes, outline) => {
    const chosen = graph.x.map((_, i) => i).filter(includes);
    return {
      x: chosen.map((i) => graph.x[i]), y: chosen.map((i) => graph.y[i]), customdata: chosen.map((i) => [i, graph.own[i]]),
      name: `${name} (${chosen.length})`, type: "scatter", mode: "markers", hovertemplate: `channel %{customdata[0]}, ${name}<br>W_ii = %{customdata[1]:.4~g}<extra></extra>`,
      marker: {symbol, color: fillColour, opacity: 1, size: chosen.map(size), line: {color: outline, width: 1.5}},
    };
  };
  const traces = [
    lines("other", "edge", {color: css("--soft"), width: 0.8}, 0.45),
    lines("adds", "pruned pair, W_ij > 0", {color: orange, width: 1.6}, 0.75),
    lines("saves", "pruned pair, W_ij < 0", {color: green, width: 1.6, dash: "dot"}, 0.9),
    nodes("kept", "circle", blue, (i) => !pruned.has(i) && !guarded.has(i), css("--page")),
    nodes("pruned", "diamond", orange, (i) => pruned.has(i), css("--page")),
    nodes("protected", "square", blue, (i) => guarded.has(i), css("--text")),
  ].filter((trace) => trace.x.length);
  const hidden = {visible: false};
  plot("graph", traces, {xaxis: hidden, yaxis: {...hidden, scaleanchor: "x"}, margin: {l: 10, r: 10, t: 10, b: 10}, hovermode: "closest"},
    detail && detail.pruned ? "" : `${solver} has no selection for this head.`);
}

// Which channels of every head a solver keeps: a row a head, a column a channel.
function drawKept() {
  const set = currentSet(), solver = Number(choice("kept-solver"));
  const width = Math.max(...set.sizes.map(([n]) => n)), z = set.heads.map(() => Array(width).fill(null));
  let counted = 0;
  for (const row of set.rows) {
    const bits = field(row, "pruned");
    if (field(row, "solver") !== solver || isMissing(bits)) continue;
    const [n, digits] = bits.split(":"), line = z[field(row, "head")];
    for (let i = 0; i < Number(n); i += 1) line[i] = (parseInt(digits[i >> 2], 16) >> (3 - (i & 3))) & 1 ? 0 : 1;
    counted += 1;
  }
  byId("kept").style.height = `${Math.min(1400, 140 + Math.max(4, Math.min(14, 700 / set.heads.length)) * set.heads.length)}px`;
  plot("kept", [{
    type: "heatmap", z, y: set.heads, colorscale: [[0, css("--panel")], [1, colour(0)]], zmin: 0, zmax: 1, showscale: false,
    hovertemplate: "%{y}, channel %{x}: %{z}<extra>1 kept, 0 pruned</extra>",
  }], {
    xaxis: {title: {text: "Channel"}, showgrid: false, zeroline: false},
    yaxis: {type: "category", autorange: "reversed", showgrid: false, tickfont: {size: 10}},
  }, counted ? "" : `${data.solvers[solver]} has no selection.`);
}

// The incumbent's objective and the lower bound of one run over its time.
function drawIncumbent() {
  const set = currentSet(), head = choice("incumbent-head"), traces = [], end = set.time.times.at(-1) * 1.1;
  data.solvers.forEach((solver, i) => {
    const detail = set.details[head] && set.details[head][solver];
    if (!detail) return;
    for (const [column, name, dash] of [[3, "incumbent", "solid"], [4, "lower bound", "dot"]]) {
      const points = detail.trace.filter((step) => !isMissing(step[column])).map((step) => [Math.max(step[0], 1e-6), step[column]]);
      if (!points.length) continue;
      points.push([end, points.at(-1)[1]]);
      traces.push({
        x: points.map(([time]) => 1000 * time), y: points.map(([, value]) => value), name: `${solver}, ${name}`, type: "scatter", mode: "lines",
        line: {color: colour(i), dash, width: 2.25, shape: "hv"}, hovertemplate: "%{y:.10~g} after %{x:.4~g} ms",
      });
    }
  });
  plot("incumbent", traces, {
    xaxis: {type: "log", title: {text: "Time since the start of the run (ms)"}, ...factorTicks(traces.flatMap((trace) => trace.x))},
    yaxis: {title: {text: "Objective"}, ...PLAIN},
  }, traces.length ? "" : "No solver has a selection or a bound for this head.");
}

// ---------------------------------------------------------------- the page

function drawFacts() {
  const run = data.run, list = byId("facts");
  if (!list) return; // the service says these things itself
  const shell = (word) => /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
  const listed = (object) => Object.entries(object).map(([key, value]) => `${key} ${value}`).join(", ");
  const add = (title, text, name = "span") => {
    if (!text) return;
    const definition = element("dd");
    definition.append(element(name, {}, text));
    list.append(element("dt", {}, title), definition);
  };
  for (const [bundle, metadata] of Object.entries(run.bundles)) add("Bundle", `${bundle}: ${metadata.model || "model not stated"}`);
  add("Heads", data.sets.map((set) => `${set.heads.length} at ${set.budget} (${set.sizes.map(([n, m]) => `${m} of ${n} channels pruned`).join(", ")})`).join("; "));
  for (const [solver, options] of Object.entries(run.solvers)) add("Solver", solver + (Object.keys(options).length ? `: ${listed(options)}` : ""));
  if (run.command) add("Command", run.command.map(shell).join(" "), "code");
  const limits = Object.fromEntries(Object.entries(run.limits).filter(([, value]) => value !== null));
  add("Limits", listed(limits));
  add("Seed, threads, workers", `${run.seed}, ${run.threads}, ${run.workers}`);
  add("Versions", listed(run.versions));
  add("Machine", `${run.platform}, ${run.cpus} CPUs`);
  add("Date", `${run.started} to ${run.ended}`);
  if (run.state === "interrupted") {
    byId("state").hidden = false;
    byId("state").textContent = "This comparison was interrupted: the page shows the heads that were finished. The same command goes on from there.";
  }
}

let chosen = false; // the first choices of solvers, once
const prefer = (id, value) => { if (byId(id)) byId(id).value = value; };

function fillChoices() {
  const set = currentSet();
  const used = data.solvers.map((solver, i) => [i, solver]).filter(([i]) => set.rows.some((row) => field(row, "solver") === i));
  const proves = (i) => set.rows.some((row) => field(row, "solver") === i && field(row, "bound_kind") === "proven");
  const shown = Object.keys(set.details);
  const firstTime = !chosen;
  chosen = true;
  fill("map-solver", used);
  fill("kept-solver", used);
  fill("graph-solver", used.map(([, solver]) => [solver, solver]));
  for (const id of ["graph-head", "incumbent-head"]) fill(id, shown.map((head) => [head, head]));
  fill("time-head", [["", `all ${set.heads.length}: median`], ...shown.map((head) => [head, head])]);
  if (firstTime) { // begin with something to see
    const provers = used.filter(([i]) => proves(i));
    if (provers.length) { prefer("map-solver", provers[0][0]); prefer("graph-solver", provers.at(-1)[1]); }
    else { prefer("map-value", "over_best"); prefer("time-value", "best"); }
  }
  if (byId("graph-which")) byId("graph-which").textContent = shown.length === set.heads.length ? "" :
    `Drawn are ${shown.length} of ${set.heads.length} heads: the first, the hardest, and the worst of each layer.`;
}

const PICTURES = {
  distance: [drawDistance, ["distance-from"]], profile: [drawProfile, ["criterion"]], map: [drawMap, ["map-solver", "map-value"]],
  kept: [drawKept, ["kept-solver"]], incumbent: [drawIncumbent, ["incumbent-head"]],
  time: [drawTime, ["time-head", "time-value"]], graph: [drawGraph, ["graph-head", "graph-solver"]],
};

// Those that the page has a place for.
const pictures = () => Object.entries(PICTURES).filter(([id]) => byId(id)).map(([, picture]) => picture);

function drawPictures() {
  for (const [draw] of pictures()) draw();
}

function drawSet() {
  fillChoices();
  if (byId("summary")) drawSummary();
  if (byId("records")) drawRecords();
  drawPictures();
}

// Draw what report_data made into the sections of the page.
function startReport(made) {
  data = made;
  drawFacts();
  fill("set", data.sets.map((set, i) => [i, data.head_pages ? set.budget : `${set.bundle}, ${set.budget}`]));
  if (byId("set-controls")) byId("set-controls").hidden = data.sets.length < 2;
  fill("criterion", data.criteria.map(({key, words}) => [key, words]));
  for (const [draw, ids] of pictures()) {
    for (const id of ids) byId(id).addEventListener("change", draw);
  }
  if (byId("set")) byId("set").addEventListener("change", drawSet);
  darkScheme.addEventListener("change", drawPictures);
  drawSet();
}
