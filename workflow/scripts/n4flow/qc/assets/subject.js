"use strict";
// The keys of a page: those of its pictures (panels.js) and its viewer are its own. In the review the page lies in a frame of
// index.html, which is told the other keys and keeps the ratings; alone, the keys lead there.
const framed = window.parent !== window;
document.documentElement.classList.toggle("framed", framed);
// A comment is written here where the key was pressed here: what is typed goes nowhere else from that moment on. The bar of the
// review shows it as it comes, and keeps it.
const note = document.querySelector("dialog#note");
const noteInput = note.querySelector("input");
let comment = ""; // as the review has it
let unanswered = 0; // comments that the review has not kept yet: what it says of older ones is out of date
let writing = false; // browsers say that a dialog has closed some time after it has: the key may have come again by then
let leaving = false; // an alone page that a key leads away from takes no other
function writeNote() {
  writing = true;
  noteInput.value = comment;
  note.showModal();
  noteInput.setSelectionRange(comment.length, comment.length);
}
function keepNote() {
  if (!writing) return;
  writing = false;
  note.close();
  const [text, before] = [noteInput.value, comment];
  if (framed) {
    comment = text; // the key may come again before the review answers
    unanswered += 1;
    tellReview({ comment: text, before, done: true });
  } else if (text.trim()) toReview(`c:${encodeURIComponent(text)}`);
}
// What only the dataset tells, as its table has it: outliers.js lies beside the pages, unless one was taken elsewhere.
function showOutliers(found) {
  const [name, main] = [document.querySelector("h1").textContent, document.querySelector("main")];
  if (!Object.hasOwn(found, name)) return;
  if (!main.querySelector(".flags")) main.prepend(Object.assign(document.createElement("ul"), { className: "flags warn" }));
  const flags = main.querySelector(".flags");
  const line = document.createElement("li");
  const [flag, reason] = found[name].split(/: (.*)/s);
  line.append(Object.assign(document.createElement("b"), { textContent: flag }), `: ${reason}`);
  flags.append(line);
  const count = flags.children.length;
  Object.assign(document.getElementById("flagged"), { className: "chip warn", textContent: `▲ ${count} flag${count > 1 ? "s" : ""}` });
}
const index = document.body.dataset.index; // a page without one belongs to no report
if (index) document.head.append(Object.assign(document.createElement("script"), { src: "outliers.js" }));
const tellReview = (message) => parent.postMessage({ n4flow: message }, "*");
const toReview = (action) => {
  leaving = true;
  location.href = `${index}/${action}`;
};
noteInput.addEventListener("input", () => { if (framed) tellReview({ comment: noteInput.value, before: comment }); });
note.addEventListener("close", () => { if (!note.open) keepNote(); }); // not by a key: a phone's back, say
window.addEventListener("pageshow", () => { leaving = false; });
function act(key) {
  if (key === "c" && index) {
    writeNote();
    return true;
  }
  if (document.querySelector("#viewer[open]") && viewerKey(key)) return true;
  if (panelKey(key)) return true;
  if (zoom.open) return false;
  if (key === "v") window.openViewer?.();
  else if (framed && /^([1-8jku?]|Escape)$/.test(key)) tellReview(key);
  else if (index && /^[123jk]$/.test(key)) toReview(key);
  else return false;
  return true;
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (leaving) {
    event.preventDefault();
    return;
  }
  if (note.open) {
    if (["Enter", "Escape"].includes(event.key)) {
      event.preventDefault();
      keepNote();
    } else if (event.target !== noteInput) noteInput.focus(); // the key is text
    return;
  }
  if ([" ", "Enter"].includes(event.key) && event.target.closest("summary, a, button, select")) return;
  if (event.repeat) return; // pages that rush by flicker
  if (event.key === "Escape" && document.querySelector("dialog[open]")) return;
  if (act(event.key)) event.preventDefault();
});
// The viewer's data, before they are asked for: when nothing else is to be done.
function loadAhead() {
  const done = () => tellReview("loaded");
  if (!window.loadViewer) done();
  else if (window.requestIdleCallback) requestIdleCallback(() => loadViewer(done));
  else setTimeout(() => loadViewer(done), 200);
}
window.addEventListener("message", (event) => {
  const said = event.data?.n4flow;
  if (!framed || event.source !== parent || said === undefined) return;
  if (typeof said === "string") act(said);
  else if (said.viewer !== undefined) window.followViewer?.(said.viewer);
  else if (said.load) loadAhead();
  else if (said.leave) keepNote();
  else if (said.kept) unanswered -= 1;
  else if (typeof said.comment === "string" && !note.open && !unanswered) comment = said.comment;
});
for (const button of document.querySelectorAll("[data-key]")) button.addEventListener("click", () => act(button.dataset.key));
if (framed) tellReview("ready");
