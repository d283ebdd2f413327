"use strict";
// Space swaps original and corrected in place, b shows the field there, v opens the viewer. In the review the page lies in
// a frame of index.html, which is told the other keys and keeps the ratings; alone, the keys lead there.
const framed = window.parent !== window;
document.documentElement.classList.toggle("framed", framed);
const radio = (name) => document.getElementById(`show-${name}`);
let image = "corrected";
let last = -Infinity;
// A held key does nothing, and 6 swaps a second (3 Hz) are the most.
function swap(key) {
  const now = performance.now();
  if (now - last < 170) return;
  last = now;
  const field = radio("field").checked;
  if (key === "b") radio(field ? image : "field").checked = true;
  else {
    if (!field) image = radio("original").checked ? "corrected" : "original";
    radio(image).checked = true;
  }
}
const zoom = document.querySelector("dialog#zoom");
function act(key) {
  if (zoom.open) return false;
  if (document.querySelector("#viewer[open]") && [" ", "b", "v"].includes(key)) return viewerKey(key);
  if (key === " " || key === "b") swap(key);
  else if (key === "v") window.openViewer?.();
  else if (["1", "2", "3", "j", "k", "c", "Escape"].includes(key)) {
    if (framed) parent.postMessage({ n4flow: key }, "*");
    else if (key !== "Escape") location.href = `${document.body.dataset.index}/${key}`;
  } else return false;
  return true;
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ([" ", "Enter"].includes(event.key) && event.target.closest("summary, a, button, select")) return;
  if (event.repeat) return; // pages that rush by flicker
  if (event.key === "Escape" && document.querySelector("dialog[open]")) return;
  if (act(event.key)) event.preventDefault();
});
window.addEventListener("message", (event) => {
  if (framed && event.source === parent && typeof event.data?.n4flow === "string") act(event.data.n4flow);
});
for (const button of document.querySelectorAll("[data-key]")) button.addEventListener("click", () => act(button.dataset.key));
for (const name of ["original", "corrected"]) radio(name).addEventListener("change", () => { image = name; });
for (const picture of document.querySelectorAll("figure img")) {
  Object.assign(picture, { tabIndex: 0, title: "Enter or a click: full size" });
  const enlarge = () => {
    zoom.firstElementChild.src = picture.src;
    zoom.firstElementChild.alt = picture.alt;
    zoom.showModal();
  };
  picture.addEventListener("click", enlarge);
  picture.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(); });
}
zoom.addEventListener("click", () => zoom.close());
