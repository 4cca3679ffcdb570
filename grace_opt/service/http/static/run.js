"use strict";
const report = document.getElementById("report");
const say = (text) => { document.getElementById("message").textContent = text; };

async function draw() {
  const answer = await fetch(report.dataset.address);
  const made = await answer.json();
  if (!answer.ok) throw new Error(made.detail);
  report.hidden = made.sets.length === 0;
  if (made.sets.length) startReport(made);
}

// A run that is being worked on: its progress, and the page anew at its end.
function watch() {
  const stream = new EventSource(`/api/runs/${report.dataset.run}/events`);
  stream.addEventListener("progress", (event) => {
    const run = JSON.parse(event.data);
    document.getElementById("state").textContent = run.state;
    document.getElementById("progress").value = run.done;
    document.getElementById("count").textContent = `${run.done} of ${run.total}`;
  });
  stream.addEventListener("end", () => { stream.close(); location.reload(); });
}

document.addEventListener("click", async (event) => {
  if (!event.target.matches("button.cancel")) return;
  const answer = await fetch(`/api/runs/${event.target.dataset.run}/cancel`, {method: "POST"});
  if (!answer.ok) say((await answer.json()).detail);
});

draw().catch((error) => say(error.message));
if ("live" in report.dataset) watch();
