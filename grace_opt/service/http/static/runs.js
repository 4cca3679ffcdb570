"use strict";
const message = document.getElementById("message");
const say = (text) => { message.textContent = text; };

async function asked(path, options) {
  const answer = await fetch(path, options);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail);
  return body;
}

function show(row, run) {
  row.querySelector("progress").value = run.done;
  row.querySelector(".count").textContent = `${run.done} of ${run.total}`;
  row.querySelector(".state").textContent = run.state;
}

// One request for all rows: a browser opens only six streams to a server.
async function watch() {
  const rows = new Map([...document.querySelectorAll("tr[data-live]")].map((row) => [Number(row.dataset.run), row]));
  if (rows.size === 0) return;
  try {
    const {runs} = await asked("/api/runs?state=queued&state=running&limit=1000");
    for (const run of runs) {
      if (rows.has(run.id)) show(rows.get(run.id), run);
      rows.delete(run.id);
    }
    for (const [id, row] of rows) { // what is no longer unfinished
      show(row, await asked(`/api/runs/${id}`));
      row.removeAttribute("data-live");
      const cancel = row.querySelector("button.cancel");
      if (cancel) cancel.remove();
    }
    say("");
  } catch (error) {
    say(`${error.message}; trying again`);
  }
  setTimeout(watch, 1000);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.cancel");
  if (!button) return;
  button.disabled = true;
  try {
    await asked(`/api/runs/${button.dataset.run}/cancel`, {method: "POST"});
  } catch (error) {
    say(error.message);
    button.disabled = false;
  }
});

const numbers = (text) => text.split(",").map((part) => part.trim()).filter(Boolean).map(Number);

const form = document.getElementById("new-run");
if (form) form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const fields = new FormData(form), file = fields.get("file");
  try {
    let bundle = fields.get("bundle");
    if (file && file.size) {
      say(`uploading ${file.name}`);
      const address = `/api/bundles?name=${encodeURIComponent(file.name)}`;
      bundle = (await asked(address, {method: "POST", body: file, headers: {"Content-Type": "application/octet-stream"}})).digest;
    }
    const limit = fields.get("time_limit");
    const run = await asked("/api/runs", {
      method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({
        bundle, name: fields.get("name"), solvers: fields.getAll("solver").map((solver) => ({solver})),
        method: fields.get("method"), ratios: numbers(fields.get("ratios")), budget_bytes: numbers(fields.get("budget_bytes")), limits: limit ? {time_limit: Number(limit)} : {},
      }),
    });
    location.href = `/runs/${run.id}`;
  } catch (error) {
    say(error.message);
  }
});

watch();
