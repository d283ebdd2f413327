"use strict";
// The pictures of a page: which of those that lie on one place is on show, in which window, and one of them in full size.
const page = document.documentElement;
const radio = (name) => document.getElementById(`show-${name}`);
let image = "corrected";
let last = -Infinity;

function showImage(name) {
  radio(name).checked = true;
  page.dataset.show = name;
}

const MODES = { w: "own", m: "mask", s: "steep" };
// A held key does nothing, and 6 changes a second (3 Hz) are the most.
function panelKey(key) {
  if (![" ", "b"].includes(key) && !MODES[key]) return false;
  const now = performance.now();
  if (now - last < 170) return true;
  last = now;
  const field = radio("field").checked;
  if (MODES[key]) {
    const on = page.classList.toggle(MODES[key]);
    for (const button of document.querySelectorAll(`[data-key="${key}"]`)) button.setAttribute("aria-pressed", String(on));
  } else if (key === "b") showImage(field ? image : "field");
  else {
    if (!field) image = radio("original").checked ? "corrected" : "original";
    showImage(image);
  }
  return true;
}
for (const name of ["original", "corrected", "field"]) {
  radio(name).addEventListener("change", () => {
    if (name !== "field") image = name;
    showImage(name);
  });
}
showImage("corrected"); // a browser that goes back fills in what was checked

// In full size a panel is the same panel, with its keys.
const zoom = document.querySelector("dialog#zoom");
for (const picture of document.querySelectorAll("figure img")) {
  if (picture.matches(".on-mask")) continue;
  Object.assign(picture, { tabIndex: 0, title: "Enter or a click: full size" });
  const enlarge = () => {
    const whole = (picture.closest(".panel") || picture).cloneNode(true);
    for (const part of [whole, ...whole.querySelectorAll("img")]) part.removeAttribute("tabindex");
    zoom.replaceChildren(whole);
    zoom.showModal();
  };
  picture.addEventListener("click", enlarge);
  picture.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(); });
}
zoom.addEventListener("click", () => zoom.close());
