"use strict";
// Ask every two seconds for the parts of the page, and put in place those that have changed.
const link = document.getElementById("link");
const pause = document.getElementById("pause");
const sections = [...document.querySelectorAll("[data-part]")];
const drawn = {};
let tag = "";

function say(text) {
  if (link.textContent !== text) link.textContent = text;
}

// What the reader has opened, moved and marked stays as it is.
function put(section, inner) {
  const inside = (name) => [...section.querySelectorAll(name)];
  const open = inside("details").map((item) => item.open);
  const moved = inside(".wide").map((item) => item.scrollLeft);
  const marked = inside("summary, .wide").indexOf(document.activeElement);
  section.innerHTML = inner;
  inside("details").forEach((item, place) => { item.open = open[place] || false; });
  inside(".wide").forEach((item, place) => { item.scrollLeft = moved[place] || 0; });
  inside("summary, .wide")[marked]?.focus({ preventScroll: true });
}

async function look() {
  const answer = await fetch("parts.json" + location.search, {
    cache: "no-store", headers: tag ? { "If-None-Match": tag } : {},
  });
  if (answer.status !== 200 && answer.status !== 304) throw new Error(answer.status);
  if (answer.status === 304) return;
  const parts = await answer.json();
  tag = answer.headers.get("ETag");
  // A coordinator has begun another run: the page as a whole is another one.
  if (Object.keys(parts).sort().join() !== sections.map((item) => item.dataset.part).sort().join()) {
    location.reload();
    return;
  }
  for (const section of sections) {
    const inner = parts[section.dataset.part];
    if (drawn[section.dataset.part] !== inner) put(section, inner);
    drawn[section.dataset.part] = inner;
  }
}

async function follow() {
  if (pause.getAttribute("aria-pressed") === "false" && !document.hidden) {
    try {
      await look();
      say("Live: this page follows what is recorded.");
    } catch (error) {
      say("fedpeft watch does not answer, so this page stands still.");
    }
  }
  setTimeout(follow, 2000);
}

pause.addEventListener("click", () => {
  const paused = pause.getAttribute("aria-pressed") === "false";
  pause.setAttribute("aria-pressed", String(paused));
  say(paused ? "Paused." : "Live: this page follows what is recorded.");
});
follow();
