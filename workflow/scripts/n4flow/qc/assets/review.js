"use strict";
// The review: pages of scans, one after the other, in frames below a bar. Where a key says what is on show next, it is on
// show at once: what is typed after it may not reach the scan before it.
const review = {
  order: [], at: -1, frames: new Map(), ready: new Set(), since: 0, spent: new Map(), arrived: -Infinity, before: "",
  viewer: null, viewed: false, asked: new Set(), loaded: new Set(),
};
const reviewing = () => review.at >= 0;
const scanShown = () => rows[review.order[review.at]][0];
const frameShown = () => review.frames.get(scanShown());

function countTime() {
  const now = performance.now();
  if (reviewing() && review.since) review.spent.set(scanShown(), (review.spent.get(scanShown()) || 0) + (now - review.since) / 1000);
  review.since = reviewing() && !document.hidden ? now : 0;
}
document.addEventListener("visibilitychange", countTime);

// The address says what is on show, so the browser's own back works.
function route() {
  followed = location.hash;
  const [place, text] = location.hash.slice(1).split("?");
  const [name, action] = place.split("/").map(decodeURIComponent);
  if (text !== undefined) takeState(text);
  const n = rowOf.get(name);
  if (n === undefined) return closeReview();
  openScan(n);
  if (action) {
    // what was pressed or written on a page of its own
    location.replace(address(name));
    const { comment } = ratings.note(name);
    if (action.startsWith("c:")) keepComment(name, [comment, action.slice(2)].filter(Boolean).join("; "), comment);
    else reviewKey(action);
  }
}

function openScan(n) {
  if (reviewing() && review.order[review.at] === n) return;
  if (!reviewing() || !review.order.includes(n)) review.order = state.kept.includes(n) ? [...state.kept] : rows.map((_, m) => m);
  show(review.order.indexOf(n));
}

// As a key or a click does: at once, and the address follows.
function goToScan(n) {
  openScan(n);
  location.hash = address(rows[n][0]);
}

function goTo(at) {
  if (at < 0 || at >= review.order.length) return;
  show(at);
  location.replace(address(scanShown()));
}

function show(at) {
  leaveScan();
  review.at = at;
  const near = [at, at + 1, at - 1].filter((n) => n >= 0 && n < review.order.length);
  const names = near.map((n) => rows[review.order[n]][0]);
  for (const [name, frame] of review.frames) {
    if (names.includes(name)) continue;
    frame.remove();
    review.frames.delete(name);
    for (const set of [review.ready, review.asked, review.loaded]) set.delete(name);
  }
  const frameOf = (name) => {
    if (!review.frames.has(name)) {
      const frame = made("iframe", { title: `page of ${name}`, src: rows[rowOf.get(name)][1], className: "away", inert: true });
      review.frames.set(name, frame);
      $("frames").append(frame);
    }
    return review.frames.get(name);
  };
  for (const name of names.filter((name) => review.frames.has(name) || name === names[0])) {
    frameOf(name).classList.toggle("away", name !== names[0]);
    frameOf(name).inert = name !== names[0];
  }
  // neighbours too, so that the next scan is there at once; but this one is drawn first
  requestAnimationFrame(() => setTimeout(() => {
    if (reviewing() && review.at === at) names.forEach(frameOf);
  }));
  $("review").hidden = false;
  document.body.classList.add("reviewing");
  countTime();
  drawReview();
  tellPage({ viewer: review.viewer }); // it opens as that of the scan before was left; null: closed
  focusPage();
  loadAhead();
}

// Who has used the viewer finds its data loaded on the next scans too; nobody else loads them. One after the other, what is on
// show first; a frame that goes takes them with it.
function loadAhead() {
  if (!reviewing() || !review.viewed || [...review.asked].some((scan) => !review.loaded.has(scan))) return;
  const next = [review.at, review.at + 1, review.at - 1].map((n) => rows[review.order[n]]?.[0])
    .find((scan) => review.frames.has(scan) && !review.loaded.has(scan));
  if (next === undefined || !review.ready.has(next)) return;
  review.asked.add(next);
  tellPage({ load: true }, next);
}

// What was being written is of the scan that goes.
function leaveScan() {
  if (!reviewing()) return;
  keepWritten();
  $("comment").blur();
  tellPage({ leave: true });
  tell("");
  countTime();
}

// Before it has loaded, a page would swallow the keys.
function focusPage() {
  const typing = document.activeElement.matches("input[type=text]") || $("keys").open;
  if (review.ready.has(scanShown()) && !typing) frameShown().contentWindow.focus();
  else if (!typing) document.activeElement.blur();
}

const tellPage = (message, scan = scanShown()) => review.frames.get(scan).contentWindow.postMessage({ n4flow: message }, "*");

function closeReview() {
  if (!reviewing()) return;
  leaveScan();
  const last = state.kept.indexOf(review.order[review.at]);
  for (const frame of review.frames.values()) frame.remove();
  for (const known of [review.frames, review.ready, review.asked, review.loaded]) known.clear();
  review.at = -1;
  review.since = 0;
  review.viewer = null; // what a page says after the key that left it is not heard
  $("review").hidden = true;
  document.body.classList.remove("reviewing");
  document.title = titleOfTable;
  if (last >= 0) state.selected = last;
  state.page = Math.floor(state.selected / ROWS_A_PAGE[state.view]);
  draw();
  drawPlots();
  select(state.selected);
}

const titleOfTable = document.title;

function drawReview() {
  const scan = scanShown();
  const own = ratings.mine(scan);
  const note = ratings.note(scan);
  const given = own && !ratings.stale(own) ? own.rating : "";
  document.title = `${scan} · n4flow`;
  $("scan").textContent = scan;
  $("position").textContent = `${review.at + 1} of ${review.order.length}`;
  $("raised").replaceChildren(...rows[review.order[review.at]][2].map((flag) => flagChip(flag)));
  $("previous").disabled = review.at === 0;
  $("following").disabled = review.at === review.order.length - 1;
  for (const button of document.querySelectorAll("[data-rate]")) {
    button.setAttribute("aria-pressed", String(button.dataset.rate !== "" && button.dataset.rate === given));
  }
  const reasons = own ? reasonsOf(own) : [];
  for (const box of $("why").querySelectorAll("input")) {
    box.checked = reasons.includes(box.value);
    box.disabled = !own || own.rating === "pass";
  }
  showComment(note.comment, note.comment);
  tellPage({ comment: note.comment });
  $("said").replaceChildren(...ratingLines(scan));
}

function showComment(text, before) {
  if (document.activeElement === $("comment")) return; // it is being written
  $("comment").value = text;
  review.before = before;
}

function tell(text) {
  $("heard").textContent = text;
  if (!reviewing()) $("told").textContent = text;
}

// Ratings, reasons and comments have changed: nothing moves.
function ratingsChanged(...scans) {
  scans.forEach(redrawRating);
  drawProgress();
  if (reviewing()) drawReview();
  autosave();
}

function rate(scan, change) {
  countTime();
  const time = review.spent.get(scan);
  ratings.set(scan, "rating" in change && time !== undefined ? { ...change, time_sec: time.toFixed(1) } : change);
  ratingsChanged(scan);
}

// `before` is the comment with which the writing began. It may be out of date by now: what was kept since is not lost.
function keepComment(scan, text, before) {
  const kept = ratings.note(scan).comment;
  const [written, start] = [cellText(text), cellText(before)];
  let comment = written;
  if (kept !== start && !written.startsWith(kept)) {
    comment = written.startsWith(start) ? kept + written.slice(start.length) : [kept, written].filter(Boolean).join("; ");
  }
  if (comment !== kept) rate(scan, { comment });
}

function keepWritten() {
  keepComment(scanShown(), $("comment").value, review.before);
  // the field may stay the one that is written in, as when another window comes to the front
  const { comment } = ratings.note(scanShown());
  if (cellText($("comment").value) !== comment) $("comment").value = comment;
  review.before = comment;
}

function giveRating(scan, rating) {
  rate(scan, { rating });
  if (!reviewing() || !ratings.advance || rating !== "pass" || review.at + 1 === review.order.length) return;
  goTo(review.at + 1);
  review.arrived = performance.now();
}

function undo() {
  const scan = ratings.undo();
  if (scan === undefined) return tell("nothing to undo");
  if (reviewing() && scan !== scanShown()) goToScan(rowOf.get(scan));
  if (!reviewing()) select(state.kept.indexOf(rowOf.get(scan)));
  ratingsChanged(scan);
  const { rating, comment } = ratings.note(scan);
  tell(`undone: ${scan} is ${rating || "not rated"}${comment ? `, “${comment}”` : ""}`);
}

function toggleReason(box) {
  const own = ratings.mine(scanShown());
  if (!own || own.rating === "pass") return tell("a reason goes with warn or fail: rate first");
  const checked = REASONS.filter((reason) => reasonsOf(own).includes(reason) !== (reason === box.value));
  const written = reasonsOf(own).filter((other) => !REASONS.includes(other)); // by hand, in the table
  return rate(scanShown(), { reasons: [...checked, ...written].join("; ") });
}

const RATE_KEYS = { __proto__: null, 1: "pass", 2: "warn", 3: "fail" };
const FIRST_REASON_KEY = 4;

function reviewKey(key) {
  const reason = $("why").querySelectorAll("input")[key - FIRST_REASON_KEY];
  if (RATE_KEYS[key]) {
    // the key for the scan before may have been pressed twice
    if (performance.now() - review.arrived > 300) giveRating(scanShown(), RATE_KEYS[key]);
  } else if (reason) toggleReason(reason);
  else if (key === "j") goTo(review.at + 1);
  else if (key === "k") goTo(review.at - 1);
  else if (key === "c") $("comment").focus();
  else if (key === "u") undo();
  else if (key === "?") $("keys").showModal();
  else if (key === "Escape") {
    closeReview();
    location.hash = address(null);
  } else if (key.length === 1 && " bvmsw+=-0lr".includes(key)) tellPage(key);
  else return false;
  return true;
}

window.addEventListener("message", (event) => {
  const said = event.data?.n4flow;
  const [scan] = [...review.frames].find(([, frame]) => frame.contentWindow === event.source) || [];
  if (scan === undefined || said === undefined) return;
  if (typeof said.comment === "string") {
    // a comment is of its page, though another may be on show by now
    if (reviewing() && scan === scanShown()) showComment(said.comment, said.before);
    if (!said.done) return;
    keepComment(scan, said.comment, said.before);
    event.source.postMessage({ n4flow: { kept: true } }, "*");
  } else if (said.viewer !== undefined) {
    if (!reviewing() || scan !== scanShown()) return;
    review.viewer = said.viewer;
    review.viewed ||= said.viewer !== null;
    loadAhead();
  } else if (said === "loaded") {
    review.loaded.add(scan);
    loadAhead();
  } else if (said === "ready") {
    review.ready.add(scan);
    loadAhead();
    if (scan !== scanShown()) return;
    if (review.viewer) tellPage({ viewer: review.viewer }); // closed it is, unless a key came first
    tellPage({ comment: ratings.note(scan).comment });
    focusPage();
  } else if (typeof said === "string" && scan === scanShown() && !$("keys").open) reviewKey(said);
});

// A page that loads may not take the keys away from what is being written.
$("comment").addEventListener("focus", () => { frameShown().inert = true; });
$("comment").addEventListener("blur", () => {
  if (!reviewing()) return;
  frameShown().inert = false;
  keepWritten();
});

for (const [n, reason] of REASONS.entries()) {
  const box = made("input", { type: "checkbox", value: reason });
  box.addEventListener("change", () => toggleReason(box));
  $("why").append(made("label", {}, made("kbd", {}, String(FIRST_REASON_KEY + n)), " ", box, reason));
}
$("previous").addEventListener("click", () => reviewKey("k"));
$("following").addEventListener("click", () => reviewKey("j"));
$("close").addEventListener("click", () => reviewKey("Escape"));
$("undo").addEventListener("click", undo);
$("advance").addEventListener("change", () => {
  ratings.advance = $("advance").checked;
  ratings.write();
});
for (const button of document.querySelectorAll("[data-rate]")) {
  button.addEventListener("click", (event) => {
    giveRating(scanShown(), button.dataset.rate);
    if (event.detail) focusPage(); // a mouse leaves the keys to the page
  });
}
for (const button of document.querySelectorAll("[data-help]")) button.addEventListener("click", () => $("keys").showModal());

// ---------------------------------------------------------------- ratings in files

const file = { handle: null, last: Promise.resolve() };

// Whether there is a name to export under.
function named() {
  if (ratings.rater || ![...ratings.entries.values()].some((entry) => !entry.rater)) return true;
  tell("Give your name first, so that your ratings can be told from others'.");
  $("rater").focus();
  return false;
}

function exportRatings() {
  if (!named()) return;
  const url = URL.createObjectURL(new Blob([ratings.toTsv()], { type: "text/tab-separated-values" }));
  made("a", { href: url, download: "ratings.tsv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  ratings.markExported(ratings.entries.values());
  drawProgress();
  const without = ratings.unrated().length;
  tell([
    "ratings.tsv is in your downloads. Name it in the config (qc.ratings), and the workflow takes it back.",
    without ? `${without} comments are not in it: their scans have no rating.` : "",
  ].join(" "));
}

async function importRatings() {
  const told = [];
  for (const one of $("import").files) told.push(`${one.name}: ${ratings.fromTsv(await one.text()).told}`);
  $("import").value = "";
  draw();
  tell(told.join(" "));
  autosave();
}

async function chooseFile() {
  if (!named()) return;
  try {
    const types = [{ description: "ratings", accept: { "text/tab-separated-values": [".tsv"] } }];
    file.handle = await window.showSaveFilePicker({ suggestedName: "ratings.tsv", types });
  } catch (error) {
    if (error.name !== "AbortError") tell(`No file to save into (${error.message}): export instead.`);
    return;
  }
  await autosave();
}

// One after the other, each with all there is by then.
function autosave() {
  if (!file.handle) return file.last;
  file.last = file.last.then(async () => {
    if (!file.handle) return;
    const written = [...ratings.entries.values()];
    try {
      const stream = await file.handle.createWritable();
      await stream.write(ratings.toTsv());
      await stream.close();
      ratings.markExported(written);
    } catch (error) {
      file.handle = null;
      tell(`Saving into the file failed (${error.message}): export instead.`);
    }
    drawProgress();
  });
  return file.last;
}

$("export").addEventListener("click", exportRatings);
$("import").addEventListener("change", importRatings);
$("autosave").hidden = !window.showSaveFilePicker;
$("autosave").addEventListener("click", chooseFile);
window.addEventListener("beforeunload", (event) => {
  if (reviewing()) keepWritten();
  if (ratings.unexported().length) event.preventDefault();
});
