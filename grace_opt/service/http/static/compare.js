"use strict";
// As `budget_words` of grace_opt.records says it.
function budgetOf(row) {
  if (!isMissing(row.budget_bytes)) return `${row.budget_bytes} bytes a token`;
  return isMissing(row.value_ratio) ? `ratio ${row.ratio}` : `ratios ${row.ratio} and ${row.value_ratio}`;
}

async function drawTables() {
  const {runs, summary, differences} = await asked(byId("summary").dataset.address);
  const share = (title, name) => [title, (row) => row[name], percent, true];
  table(byId("summary"), "A row for each run, budget and solver.", [
    ["Run", (row) => row.run, asText, true, (row) => `${root}/runs/${row.run}`],
    ["Budget", budgetOf, asText, false],
    ["Solver", (row) => row.solver, asText, false],
    ["Heads", (row) => row.heads, asText, true],
    share("Mean over best known", "over_best_mean"),
    share("Max over best known", "over_best_max"),
    share("Mean gap, best proven bound", "reference_gap_mean"),
    share("Proven optimal", "optimal_share"),
    ["Time a head (ms)", (row) => isMissing(row.time) ? null : 1000 * row.time, number, true],
  ], summary, 50);
  const objectives = runs.map((run, i) => [`Objective, run ${run.id}`, (row) => row.objective[i], precise, true]);
  if (differences.length === 0) {
    byId("differences").append(element("p", {}, "The runs have no budget, solver and head in common."));
    return;
  }
  table(byId("differences"), "The heads that all runs have, by budget and solver.", [
    ["Head", (row) => row.problem, asText, false], ["Budget", budgetOf, asText, false], ["Solver", (row) => row.solver, asText, false],
    ...objectives,
    ["Pruned by all", (row) => row.pruned_by_all, asText, true],
    ["Of", (row) => Math.min(...row.prune), asText, true],
  ], differences, 50);
}

const SHARES = ["pruned by both", "only left keeps", "only right keeps", "kept by both"];

async function drawChannels() {
  const query = new URLSearchParams({left: choice("left"), right: choice("right")});
  const {heads, pruned} = await asked(`/compare/channels.json?${query}`);
  const width = 1 + Math.max(0, ...pruned.flat(2));
  const rows = heads.map((head, i) => {
    const [left, right] = pruned.map((side) => new Set(side[i] || []));
    const cells = Array.from({length: width}, (_, channel) => (left.has(channel) ? 0 : 1) + (right.has(channel) ? 0 : 2));
    return {head, cells, counts: SHARES.map((_, code) => cells.filter((cell) => cell === code).length)};
  });
  const colours = [css("--panel"), colour(1), colour(2), colour(0)];
  byId("channels").style.height = `${Math.min(1400, 160 + Math.max(4, Math.min(14, 700 / Math.max(1, heads.length))) * heads.length)}px`;
  plot("channels", [{
    type: "heatmap", z: rows.map((row) => row.cells), y: heads, zmin: -0.5, zmax: 3.5,
    colorscale: colours.flatMap((value, i) => [[i / 4, value], [(i + 1) / 4, value]]),
    colorbar: {tickvals: [0, 1, 2, 3], ticktext: SHARES, thickness: 14, outlinewidth: 0},
    hovertemplate: "%{y}, channel %{x}<extra></extra>",
  }], {xaxis: {title: {text: "Channel"}, showgrid: false, zeroline: false}, yaxis: {type: "category", autorange: "reversed", showgrid: false, tickfont: {size: 10}}},
  heads.length ? "" : "The two have no head in common.");
  const same = rows.filter((row) => row.counts[1] + row.counts[2] === 0).length;
  byId("overlap").textContent = `${same} of ${heads.length} heads keep the same channels in both.`;
  if (rows.length) table(byId("overlaps"), "How many channels of each head.", [
    ["Head", (row) => row.head, asText, false], ...SHARES.map((name, code) => [name, (row) => row.counts[code], asText, true]),
  ], rows, 25);
}

const options = byId("right").options;
if (options.length > 1) byId("right").selectedIndex = options.length - 1;
for (const id of ["left", "right"]) byId(id).addEventListener("change", () => drawChannels().catch((error) => say(error.message)));
drawTables().then(drawChannels).catch((error) => say(error.message));
