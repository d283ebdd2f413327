"use strict";
// Space swaps the two images in place. A held key does nothing, and 6 swaps a second (3 Hz) are the most.
const radios = [document.getElementById("show-original"), document.getElementById("show-corrected")];
let last = 0;
function swap() {
  const now = performance.now();
  if (now - last < 170) return;
  last = now;
  radios[radios[0].checked ? 1 : 0].checked = true;
}
const zoom = document.querySelector("dialog");
document.addEventListener("keydown", (event) => {
  if (event.key !== " " || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("summary, a, button")) return;
  event.preventDefault();
  if (!event.repeat && !zoom.open) swap();
});
for (const picture of document.querySelectorAll("figure img")) {
  picture.addEventListener("click", () => {
    zoom.firstElementChild.src = picture.src;
    zoom.firstElementChild.alt = picture.alt;
    zoom.showModal();
  });
}
zoom.addEventListener("click", () => zoom.close());
