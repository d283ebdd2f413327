"use strict";
// The dataset: table, strip plots and pictures of all scans, and the review, which shows their pages one after the other.
// Ratings are kept here alone: browsers may give every file of a folder a storage of its own, so pages only send key presses.
const ROWS_A_PAGE = { table: 200, pictures: 50 };
const FIRST_NUMBER = 7; // a row is [name, link, flags, worst z, report hash, pictures, list of panels, numbers…]
const data = JSON.parse(document.getElementById("data").textContent);
const { columns, rows, ranked } = data;
const $ = (id) => document.getElementById(id);
const made = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
function folderName() {
  const folder = location.pathname.replace(/[^/]*$/, "");
  try {
    return decodeURI(folder);
  } catch {
    return folder; // its bytes are no UTF-8
  }
}
const rowOf = new Map(rows.map((row, n) => [row[0], n]));
const ratings = new Ratings(
  new Map(rows.map((row) => [row[0], row[4]])),
  data.ratings,
  `n4flow ratings ${folderName()}`,
);
const state = { view: "table", key: null, down: true, page: 0, kept: [], selected: 0 };
const collator = new Intl.Collator(undefined, { numeric: true });

function shownNumber(number, places) {
  if (number === null || number === undefined) return "n/a";
  if (typeof number === "string") return number;
  return number !== 0 && Math.abs(number) < 0.5 * 10 ** -places ? number.toExponential(1) : number.toFixed(places);
}

// ---------------------------------------------------------------- which scans, in which order

const texts = rows.map((row) => `${row[0]} ${row[2].join(" ")}`.replaceAll("_", " ").toLowerCase());
const only = {
  all: () => true,
  flagged: (row) => row[2].length > 0,
  unrated: (row) => !ratings.mine(row[0]) || ratings.stale(ratings.mine(row[0])),
  pass: (row) => ratings.of(row[0]).some((entry) => entry.rating === "pass"),
  warn: (row) => ratings.of(row[0]).some((entry) => entry.rating === "warn"),
  fail: (row) => ratings.of(row[0]).some((entry) => entry.rating === "fail"),
  stale: (row) => ratings.of(row[0]).some((entry) => ratings.stale(entry)),
  disagree: (row) => ratings.disagree(row[0]),
};

function sortValue(row) {
  if (state.key === "name") return row[0];
  if (state.key === "flags") return row[2].length;
  if (state.key === "rating") return 1 + ["pass", "warn", "fail"].indexOf((ratings.mine(row[0]) || {}).rating);
  return row[state.key];
}

function choose() {
  const words = $("filter").value.toLowerCase().replaceAll("_", " ").split(/\s+/).filter(Boolean);
  const wanted = only[$("only").value];
  const kept = rows.map((_, n) => n).filter((n) => wanted(rows[n]) && words.every((word) => texts[n].includes(word)));
  if (state.key !== null) {
    const sign = state.down ? -1 : 1;
    const values = new Map(kept.map((n) => [n, sortValue(rows[n])]));
    kept.sort((a, b) => {
      const [x, y] = [values.get(a), values.get(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a - b; // what is unknown comes last
      return sign * (typeof x === "string" ? collator.compare(x, y) : x - y) || a - b;
    });
  }
  state.kept = kept; // otherwise as they came: worst first
  state.page = 0;
  state.selected = 0;
  draw();
}

// ---------------------------------------------------------------- table and pictures

const headings = [
  ["Scan", "name"],
  ["Rating", "rating"],
  ["Flags", "flags"],
  ...(ranked ? [["Worst z", 3]] : []),
  ...columns.map(([heading], n) => [heading, FIRST_NUMBER + n]),
];
const digitsOf = (key) => (key === 3 ? 1 : columns[key - FIRST_NUMBER][1]);

function ratingLines(scan) {
  const line = (entry, who) => {
    const old = ratings.stale(entry) ? " (stale)" : "";
    return made("span", { className: `rated ${old ? "soft" : entry.rating}` }, `${who}${MARKS[entry.rating]} ${entry.rating}${old}`);
  };
  const own = ratings.mine(scan);
  const lines = own ? [line(own, "")] : [];
  lines.push(...ratings.others(scan).map((entry) => line(entry, `${entry.rater || "unnamed"}: `)));
  if (ratings.disagree(scan)) lines.push(made("span", { className: "rated disagree" }, "≠ raters disagree"));
  const comment = ratings.note(scan).comment ? ", with a comment" : "";
  if (!own && (comment || !lines.length)) lines.unshift(made("span", { className: "rated soft" }, `○ not rated${comment}`));
  if (ratings.all(scan).length > ratings.of(scan).length) lines.push(made("span", { className: "rated soft" }, "others hidden"));
  return lines;
}

function flagChip(flag) {
  const [name, sentence] = [flag.split(":")[0], flag.replaceAll("_", " ")];
  return made("span", { className: "flag", title: sentence }, `▲ ${name.replaceAll("_", " ")}`);
}

const linkTo = (row) => made("a", { href: `#${encodeURIComponent(row[0])}` }, row[0]);
const flagLines = (row) => (row[2].length ? row[2].map((flag) => made("span", {}, `▲ ${flag.replaceAll("_", " ")}`)) : ["● none"]);

function tableRow(row) {
  const cells = headings.map(([, key]) => {
    if (key === "name") return made("th", { scope: "row" }, linkTo(row));
    if (key === "rating") return made("td", { className: "words rating" }, ...ratingLines(row[0]));
    if (key === "flags") return made("td", { className: "words why" }, ...flagLines(row));
    return made("td", {}, shownNumber(row[key], digitsOf(key)));
  });
  return made("tr", {}, ...cells);
}

function card(row) {
  const panel = $("panel").value;
  const panels = data.panels[row[6]] || [];
  const place = panels.indexOf(panel);
  const known = columns.map((_, n) => n).filter((n) => row[FIRST_NUMBER + n] !== null); // MRI and microscopy differ
  const numbers = known.slice(0, 2).map((n) => `${columns[n][0]} ${shownNumber(row[FIRST_NUMBER + n], columns[n][1])}`);
  const figure = made("figure", { className: "thumbnail" });
  const link = made("a", { href: `#${encodeURIComponent(row[0])}`, className: "crop" });
  if (place < 0 || !row[5]) link.append(made("span", { className: "soft" }, `no ${panel}`));
  else {
    const image = made("img", { loading: "lazy", src: row[5], alt: `${row[0]}, ${panel}; ${numbers.join(", ")}` });
    image.style.top = `${-100 * place}%`;
    link.append(image);
  }
  const flags = row[2].length ? made("span", { className: "rated warn", title: row[2].join("\n") }, `▲ ${row[2].length} flagged`) : "";
  figure.append(link, made("figcaption", {}, linkTo(row), " ", flags, " ", made("span", { className: "rating" }, ...ratingLines(row[0])),
    made("span", { className: "hint" }, numbers.join(", "))));
  return figure;
}

function draw() {
  const size = ROWS_A_PAGE[state.view];
  const pages = Math.max(1, Math.ceil(state.kept.length / size));
  state.page = Math.min(state.page, pages - 1);
  const part = state.kept.slice(state.page * size, (state.page + 1) * size);
  const table = state.view === "table";
  $("table").hidden = !table;
  $("pictures").hidden = table;
  $("scans").tBodies[0].replaceChildren(...(table ? part.map((n) => tableRow(rows[n])) : []));
  $("pictures").replaceChildren(...(table ? [] : part.map((n) => card(rows[n]))));
  $("count").textContent = `${state.kept.length} of ${rows.length} scans`;
  $("where").textContent = `page ${state.page + 1} of ${pages}`;
  $("back").disabled = state.page === 0;
  $("next").disabled = state.page === pages - 1;
  $("paging").hidden = pages === 1;
  for (const heading of $("scans").tHead.rows[0].cells) {
    const sorted = heading.dataset.key === String(state.key);
    heading.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
    heading.firstElementChild.textContent = heading.dataset.text + (sorted ? (state.down ? " ▼" : " ▲") : "");
  }
  select(Math.max(state.page * size, Math.min(state.selected, state.page * size + part.length - 1)), false);
  drawProgress();
}

const itemAt = (n) => (state.view === "table" ? $("scans").tBodies[0] : $("pictures")).children[n - state.page * ROWS_A_PAGE[state.view]];

function select(n, scroll = true) {
  if (n < 0 || n >= state.kept.length) return;
  const page = Math.floor(n / ROWS_A_PAGE[state.view]);
  itemAt(state.selected)?.removeAttribute("aria-current");
  state.selected = n;
  if (page !== state.page) {
    state.page = page;
    draw();
  }
  itemAt(n)?.setAttribute("aria-current", "true");
  if (scroll) itemAt(n)?.scrollIntoView({ block: "nearest" });
}

// The ratings of one scan have changed: nothing moves.
function redrawRating(scan) {
  const item = itemAt(state.kept.indexOf(rowOf.get(scan)));
  item?.querySelector(".rating").replaceChildren(...ratingLines(scan));
  drawProgress();
}

function drawProgress() {
  const counts = { pass: 0, warn: 0, fail: 0 };
  let [done, stale, any, apart] = [0, 0, 0, 0];
  for (const [scan] of rows) {
    const own = ratings.mine(scan);
    if (own && ratings.stale(own)) stale += 1;
    else if (own) {
      done += 1;
      counts[own.rating] += 1;
    }
    any += ratings.all(scan).length > 0;
    apart += ratings.disagree(scan);
  }
  $("progress").max = Math.max(1, rows.length);
  $("progress").value = done;
  const fresh = ratings.unexported().length;
  const without = ratings.unrated().length;
  $("rated").textContent = [
    `${done} of ${rows.length} rated by ${ratings.rater || "you"}: ● ${counts.pass} pass, ▲ ${counts.warn} warn, ✕ ${counts.fail} fail`,
    stale ? `${stale} stale` : "",
    any > done + stale ? `${any} rated by anybody` : "",
    apart ? `≠ raters disagree on ${apart}` : "",
    without ? `${without} with a comment and no rating` : "",
    ratings.saved ? "" : "this browser keeps nothing: export before you close the page",
  ].filter(Boolean).join("; ");
  for (const place of document.querySelectorAll(".unexported")) place.textContent = fresh ? `▲ ${fresh} not exported` : "";
  $("autosave").textContent = file.handle ? "saving into a file ●" : "Save into a file…";
  drawAgreement();
}

// As exclude.tsv's companion, agreement.tsv, has it.
function drawAgreement() {
  const found = ratings.agreements();
  $("agreement").hidden = !found.length;
  $("agreement").replaceChildren(...found.map(({ raters: [a, b], scans, alike, kappa: plainKappa, weighted }) => {
    const shown = (number) => (Number.isFinite(number) ? number.toFixed(2) : "n/a");
    return made("span", {}, `${a || "you"} and ${b || "you"}: ${alike} of ${scans} alike, κ ${shown(plainKappa)}, weighted κ ${shown(weighted)}`);
  }));
}

// ---------------------------------------------------------------- keys and controls

function tableKey(key) {
  const n = state.kept[state.selected];
  if (key === "u") undo();
  else if (key === "?") $("keys").showModal();
  else if (n === undefined) return false;
  else if (RATE_KEYS[key]) giveRating(rows[n][0], RATE_KEYS[key]);
  else if (key === "j") select(state.selected + 1);
  else if (key === "k") select(state.selected - 1);
  else if (key === "Enter" || key === "c") {
    goToScan(n);
    if (key === "c") reviewKey("c");
  } else if (key === "b" || key === " ") {
    if (state.view !== "pictures") return false;
    const swap = key === "b" ? "bias field" : "original";
    showPanel($("panel").value === swap ? "corrected" : swap);
  } else return false;
  return true;
}

let swapped = -Infinity;
function showPanel(panel) {
  if (performance.now() - swapped < 170) return; // never above 3 Hz
  swapped = performance.now();
  $("panel").value = panel;
  draw();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if ($("keys").open) {
    if (event.key === "?") $("keys").close();
    return;
  }
  const inField = event.target.closest("input:not([type=checkbox], [type=radio]), select");
  if (inField && ["Escape", "Enter"].includes(event.key) && reviewing()) {
    inField.blur();
    focusPage();
    event.preventDefault();
    return;
  }
  if (inField || ([" ", "Enter"].includes(event.key) && event.target.closest("button, a, summary, canvas, input"))) return;
  if (event.repeat && (reviewing() || !["j", "k"].includes(event.key))) return; // pages that rush by flicker
  if ((reviewing() ? reviewKey : tableKey)(event.key)) event.preventDefault();
});
window.addEventListener("hashchange", route);
window.addEventListener("storage", (event) => {
  if (event.key !== ratings.key) return;
  ratings.read();
  nameRater();
  draw();
  if (reviewing()) drawReview();
});

// ---------------------------------------------------------------- controls

for (const [text, key] of headings) {
  const button = made("button", {}, text);
  button.addEventListener("click", () => {
    // numbers start with the largest, names with A
    if (state.key === key) state.down = !state.down;
    else Object.assign(state, { key, down: key !== "name" });
    choose();
  });
  const heading = made("th", { scope: "col", className: key === "flags" || key === "rating" ? "words" : "" }, button);
  Object.assign(heading.dataset, { key, text });
  $("scans").tHead.rows[0].append(heading);
}
const panelNames = [...new Set(data.panels.flat())];
$("panel").append(...panelNames.map((panel) => made("option", { value: panel }, panel)));
$("panel").value = panelNames.includes("corrected") ? "corrected" : panelNames[0];
const plots = columns
  .map(([heading, digits, worse], n) => ({ heading, digits, worse, values: rows.map((row) => row[FIRST_NUMBER + n]) }))
  .filter(({ worse, values }) => worse && new Set(values.filter((value) => value !== null)).size > 1)
  .map(({ heading, digits, values }) => stripPlot(heading, values, digits, {
    flagged: (n) => rows[n][2].length > 0,
    name: (n) => rows[n][0],
    open: goToScan,
  }));
$("plots").append(...plots.map((plot) => plot.figure));
const drawPlots = () => {
  if (!$("distributions").open) return;
  const shown = new Set(state.kept);
  for (const plot of plots) plot.show(shown);
};
$("distributions").hidden = rows.length < 2;
$("distributions").addEventListener("toggle", drawPlots);
window.addEventListener("resize", drawPlots);

const chooseAndPlot = () => {
  choose();
  drawPlots();
};
$("filter").addEventListener("input", chooseAndPlot);
$("only").addEventListener("change", chooseAndPlot);
$("panel").addEventListener("change", draw);
for (const radio of document.getElementsByName("view")) {
  radio.addEventListener("change", () => {
    state.view = radio.value;
    $("which-panel").hidden = state.view !== "pictures";
    state.page = Math.floor(state.selected / ROWS_A_PAGE[state.view]);
    draw();
  });
}
for (const [id, step] of [["back", -1], ["next", 1]]) {
  $(id).addEventListener("click", () => {
    state.page += step;
    state.selected = state.page * ROWS_A_PAGE[state.view];
    draw();
  });
}
const raters = document.querySelectorAll(".rater");
function nameRater() {
  for (const input of raters) if (document.activeElement !== input) input.value = ratings.rater;
}
for (const input of raters) {
  input.addEventListener("change", () => {
    ratings.rename(input.value);
    nameRater();
    draw();
    if (reviewing()) drawReview();
    autosave();
  });
}
nameRater();
$("open").checked = ratings.open;
$("open").addEventListener("change", () => {
  ratings.open = $("open").checked;
  ratings.write();
  draw();
});
$("start").addEventListener("click", () => {
  const next = state.kept.find((n) => only.unrated(rows[n])) ?? state.kept[0];
  if (next !== undefined) goToScan(next);
});
$("advance").checked = ratings.advance;
// A link is followed at once, as a key is.
$("dataset").addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  goToScan(rowOf.get(decodeURIComponent(link.hash.slice(1))));
});
