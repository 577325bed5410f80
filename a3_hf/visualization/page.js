"use strict";
// Tooltips on every page, and the replay on a page that has controls. Texts enter the page through textContent only.

const tokens = Array.from(document.querySelectorAll(".token"));
const columns = Array.from(document.querySelectorAll(".column"));
const tip = document.getElementById("tip");
const slider = document.getElementById("at");

// Our own tooltip, without the browser's delay, replaces the title attribute.
for (const token of tokens) {
  token.dataset.description = token.title;
  token.removeAttribute("title");
}

// The token, or the same token in every column.
function everywhere(token) {
  if (columns.length === 0) return [token];
  return columns.map((column) => column.querySelector(`.token[data-index="${token.dataset.index}"]`));
}

function describe(token) {
  const column = token.closest(".column");
  const description = token.dataset.description;
  if (column) return column.dataset.name + ": " + description;
  return token.classList.contains("open") ? "open, " + description.split(", ")[0] : description;
}

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest ? event.target.closest(".token") : null;
  for (const marked of document.querySelectorAll(".here")) marked.classList.remove("here");
  tip.hidden = !token;
  if (!token) return;
  const marked = everywhere(token);
  for (const same of marked) same.classList.add("here");
  tip.textContent = marked.map(describe).join("\n");
  const box = token.querySelector(".ink").getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (above < 4 ? box.bottom + 8 : above) + "px";
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

function startReplay() {
  const [play, back, next, speed, counter] =
    ["play", "back", "next", "speed", "counter"].map((id) => document.getElementById(id));
  const last = Number(slider.max);
  const steps = tokens.map((token) => Number(token.dataset.step));
  const written = steps.filter((step) => step >= 0).length;
  const pause = Math.max(40, Math.min(450, 20000 / last));  // milliseconds per step at 1×
  let done = last;
  let timer = null;

  function show(count) {
    done = Math.max(0, Math.min(last, count));
    let shown = 0;
    tokens.forEach((token, index) => {
      const open = steps[index] >= done;
      token.classList.toggle("open", open);
      token.classList.toggle("fresh", steps[index] >= 0 && steps[index] === done - 1 && done < last);
      if (open) token.setAttribute("aria-hidden", "true"); else token.removeAttribute("aria-hidden");
      if (steps[index] >= 0 && !open) shown += 1;
    });
    slider.value = String(done);
    slider.setAttribute("aria-valuetext", "step " + done + " of " + last);
    counter.textContent = "step " + done + " of " + last + " · " + shown + " of " + written + " tokens";
    document.body.dataset.done = String(done);
  }
  function label(text, name, live) {
    play.textContent = text;
    play.setAttribute("aria-label", name);
    counter.setAttribute("aria-live", live);
  }
  function stop() {
    clearTimeout(timer);
    timer = null;
    label("▶ Play", "Play", "polite");
  }
  function tick() {
    show(done + 1);
    if (done >= last) stop(); else timer = setTimeout(tick, pause / Number(speed.value));
  }
  function toggle() {
    if (timer !== null) return stop();
    if (done >= last) show(0);
    label("❚❚ Pause", "Pause", "off");
    timer = setTimeout(tick, pause / Number(speed.value));
  }
  function goTo(count) {
    stop();
    show(count);
  }
  function followAddress() {
    const found = /^#step=(\d+)$/.exec(location.hash);
    if (found) goTo(Number(found[1]));
  }

  play.addEventListener("click", toggle);
  back.addEventListener("click", () => goTo(done - 1));
  next.addEventListener("click", () => goTo(done + 1));
  slider.addEventListener("input", () => goTo(Number(slider.value)));
  window.addEventListener("hashchange", followAddress);
  document.addEventListener("keydown", (event) => {
    const name = event.target.tagName;
    if (event.ctrlKey || event.altKey || event.metaKey || name === "SELECT") return;
    if (event.key === " " && name !== "BUTTON") toggle();
    else if (event.key === "ArrowRight" && name !== "INPUT") goTo(done + 1);
    else if (event.key === "ArrowLeft" && name !== "INPUT") goTo(done - 1);
    else return;
    event.preventDefault();
  });
  document.querySelector(".controls").hidden = false;
  document.body.classList.add("replaying");
  show(last);
  followAddress();
}

if (slider) startReplay();
document.body.dataset.ready = "true";
