"use strict";
// Before the path of everything that the service has: it may be below another one, behind a reverse proxy.
const root = document.documentElement.dataset.root;
const say = (text) => { document.getElementById("message").textContent = text; };

// The JSON at a path of the service. Throws an Error with a sentence.
async function asked(path, options) {
  let answer;
  try {
    answer = await fetch(root + path, options);
  } catch {
    throw new Error("The service cannot be reached");
  }
  const body = await answer.json().catch(() => null);
  if (body === null) throw new Error(`The service cannot be reached: something else answered, with ${answer.status}`);
  if (!answer.ok) throw new Error(body.detail);
  return body;
}

// Look once a second until `look` gives false. A stream would hold one of the six connections that a browser has to a
// server for all of its tabs: the seventh would get no answer to anything.
async function watching(look) {
  let seconds = 1;
  for (;;) {
    try {
      if (await look() === false) return;
      if (seconds > 1) say("");
      seconds = 1;
    } catch (error) {
      seconds = Math.min(2 * seconds, 30);
      say(`${error.message}; trying again.`);
    }
    await new Promise((done) => {
      setTimeout(done, 1000 * (document.hidden ? 10 * seconds : seconds));
      document.addEventListener("visibilitychange", done, {once: true});
    });
  }
}

// Buttons that cancel runs.
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
