"use strict";
const report = document.getElementById("report");

async function draw() {
  const made = await asked(report.dataset.address);
  if ("heads" in report.dataset) made.head_pages = root + report.dataset.heads;
  report.hidden = made.sets.length === 0;
  if (made.sets.length) startReport(made);
}

// A run that is being worked on: its progress, and the page anew at its end.
async function look() {
  const run = await asked(`/api/runs/${report.dataset.run}`);
  document.getElementById("state").textContent = run.state;
  document.getElementById("progress").value = run.done;
  document.getElementById("count").textContent = `${run.done} of ${run.total}`;
  if (["queued", "running"].includes(run.state)) return true;
  location.reload();
  return false;
}

draw().catch((error) => say(error.message));
if ("live" in report.dataset) watching(look);
