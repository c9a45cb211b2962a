"use strict";
// One clip at a time; Escape stops it.
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  player.addEventListener("play", () => players.forEach((other) => other !== player && other.pause()));
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") players.forEach((player) => player.pause());
});
// Paper shows what is folded away.
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
