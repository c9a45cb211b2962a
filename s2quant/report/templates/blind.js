"use strict";
const form = document.getElementById("test");
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  player.addEventListener("play", () => players.forEach((other) => other !== player && other.pause()));
}

function answers() {
  return [...form.querySelectorAll("fieldset")].map((pair) => {
    const chosen = pair.querySelector("input:checked");
    return { pair: pair.dataset.pair, choice: chosen ? chosen.value : null };
  });
}

function showProgress() {
  const all = answers();
  const done = all.filter((answer) => answer.choice !== null).length;
  document.getElementById("progress").textContent = `${done} of ${all.length} answered`;
}

function save() {
  const listener = document.getElementById("listener").value.trim() || null;
  const result = { blind_version: 1, test: form.dataset.test, listener, answers: answers() };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(result, null, 2) + "\n"], { type: "application/json" }));
  link.download = `blind-answers-${form.dataset.test}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Two-sided sign test: how likely a split at least this uneven is when both sound the same.
function signTest(first, second) {
  const n = first + second;
  let probability = 0.5 ** n;
  let tail = 0;
  for (let k = 0; k <= Math.min(first, second); k += 1) {
    tail += probability;
    probability *= (n - k) / (k + 1);
  }
  return Math.min(1, 2 * tail);
}

function score(key) {
  if (key.test !== form.dataset.test) return "This key belongs to another test.";
  const arms = Object.fromEntries(key.pairs.map((pair) => [pair.pair, pair]));
  const count = { model: 0, baseline: 0, none: 0 };
  for (const { pair, choice } of answers()) {
    if (choice !== null) count[choice === "none" ? "none" : arms[pair][choice]] += 1;
  }
  const total = count.model + count.baseline + count.none;
  if (total === 0) return "No pair is answered yet.";
  const p = signTest(count.model, count.baseline).toFixed(3);
  return (
    `Of ${total} answered: the model sounded better in ${count.model}, the baseline in ${count.baseline}, ` +
    `no difference in ${count.none}. Sign test p = ${p}.`
  );
}

if (form) {
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", showProgress);
  document.getElementById("save").addEventListener("click", save);
  document.getElementById("key").addEventListener("change", async (event) => {
    const out = document.getElementById("score");
    try {
      out.textContent = score(JSON.parse(await event.target.files[0].text()));
    } catch (error) {
      out.textContent = `This file is no key: ${error.message}`;
    }
  });
  showProgress();
}
