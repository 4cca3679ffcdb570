"use strict";
function show(row, run) {
  row.querySelector("progress").value = run.done;
  row.querySelector(".count").textContent = `${run.done} of ${run.total}`;
  row.querySelector(".state").textContent = run.state;
}

// One request for all rows.
async function look() {
  const rows = new Map([...document.querySelectorAll("tr[data-live]")].map((row) => [Number(row.dataset.run), row]));
  if (rows.size === 0) return false;
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
  return true;
}

watching(look);

// ---------------------------------------------------------------- the form for a new run

const form = document.getElementById("new-run");

// What is wrong with a field is said beside it.
class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

// The numbers of a field, with commas between them; none if it is empty.
function numbers(field, right, what) {
  const text = form.elements[field].value.trim();
  if (text === "") return [];
  return text.split(",").map((part) => {
    const word = part.trim(), value = Number(word);
    if (word === "") throw new FieldError(field, "A number is missing before or after a comma; write them as in 0.5, 0.6.");
    if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(word) || !right(value)) throw new FieldError(field, `${what}, not ${word}.`);
    return value;
  });
}

const READ = {
  solver: () => {
    const solvers = new FormData(form).getAll("solver");
    if (solvers.length === 0) throw new FieldError("solver", "Choose at least one solver.");
    return solvers.map((solver) => ({solver}));
  },
  ratios: () => {
    const found = numbers("ratios", (value) => value >= 0 && value < 1, "A ratio must be at least 0 and less than 1");
    if (found.length === 0 && form.elements.budget_bytes.value.trim() === "") throw new FieldError("ratios", "Give at least one ratio, or bytes.");
    return found;
  },
  budget_bytes: () => numbers("budget_bytes", (value) => value > 0 && value <= 1e300, "Bytes must be a number above 0"),
  time_limit: () => {
    const found = numbers("time_limit", (value) => value >= 0 && value <= 1e6, "Seconds must be from 0 to 1000000");
    if (found.length > 1) throw new FieldError("time_limit", "Give one number of seconds, or none.");
    return found.length ? found[0] : null;
  },
  bundle: () => {
    const file = form.elements.file.files[0];
    if (!file && !form.elements.bundle.value) throw new FieldError("bundle", "Choose a bundle, or a file to upload.");
    return file || form.elements.bundle.value;
  },
};

// The service's names of what it refuses, and the fields that they are about.
const FIELDS_OF = {solvers: "solver", limits: "time_limit", value_ratio: "ratios", method_options: "method", config: "method"};

function fieldOf(error) {
  if (error instanceof FieldError) return error.field;
  const named = /^body\.(\w+)/.exec(error.message), name = named && (FIELDS_OF[named[1]] || named[1]);
  return name && document.getElementById(`error-${name}`) ? name : "submit";
}

function complain(errors) {
  for (const error of errors) {
    const place = document.getElementById(`error-${fieldOf(error)}`);
    place.textContent = error.message;
    for (const input of place.closest(".field").querySelectorAll("input, select")) input.setAttribute("aria-invalid", "true");
  }
  const first = form.querySelector(".error:not(:empty)").closest(".field").querySelector("input, select, button");
  first.focus({preventScroll: true});
  first.closest(".field").scrollIntoView({block: "center"});
}

async function submit() {
  for (const place of form.querySelectorAll(".error")) place.textContent = "";
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  const read = {}, wrong = [];
  for (const [name, value] of Object.entries(READ)) {
    try { read[name] = value(); } catch (error) { wrong.push(error); }
  }
  if (wrong.length) return complain(wrong);
  try {
    if (read.bundle instanceof File) {
      say(`Uploading ${read.bundle.name}`);
      const headers = {"Content-Type": "application/octet-stream"}, name = [...read.bundle.name].slice(0, 200).join("");
      try {
        read.bundle = (await asked(`/api/bundles?name=${encodeURIComponent(name)}`, {method: "POST", body: read.bundle, headers})).digest;
      } catch (error) {
        throw new FieldError("bundle", error.message);
      } finally {
        say("");
      }
    }
    const run = await asked("/api/runs", {
      method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({
        bundle: read.bundle, name: form.elements.name.value, solvers: read.solver, method: form.elements.method.value,
        ratios: read.ratios, budget_bytes: read.budget_bytes, limits: read.time_limit === null ? {} : {time_limit: read.time_limit},
      }),
    });
    location.href = `${root}/runs/${run.id}`;
  } catch (error) {
    complain([error]);
  }
}

if (form) form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
