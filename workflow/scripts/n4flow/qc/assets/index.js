"use strict";
// The dataset: table, strip plots and pictures of all scans, and the review, which shows their pages one after the other.
// Ratings are kept here alone: browsers may give every file of a folder a storage of its own, so pages only send key presses.
const ROWS_A_PAGE = { table: 200, pictures: 50 };
const FIRST_NUMBER = 7; // a row is [name, link, flags, worst z, report hash, pictures, list of panels, numbers…]
const data = JSON.parse(document.getElementById("data").textContent);
const { columns, rows, ranked, groups } = data;
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
const columnOf = new Map(columns.map((column, n) => [column.key, { ...column, place: FIRST_NUMBER + n }]));
const usual = columns.filter((column) => column.shown).map((column) => column.key);
// key: what the table is sorted by, null for worst first. raised: names of flags. group: a way to tell scans apart.
const state = { view: "table", key: null, down: true, page: 0, kept: [], selected: 0, raised: new Set(), columns: usual, group: null };
const collator = new Intl.Collator(undefined, { numeric: true });

function shownNumber(number, places) {
  if (number === null || number === undefined) return "n/a";
  if (typeof number === "string") return number;
  if (number === 0 || Math.abs(number) >= 0.5 * 10 ** -places) return number.toFixed(places);
  return Math.abs(number) >= 1e-3 ? String(Number(number.toPrecision(2))) : number.toExponential(1); // as rendering.py
}

// ---------------------------------------------------------------- which scans, in which order

const texts = rows.map((row) => `${row[0]} ${row[2].join(" ")}`.replaceAll("_", " ").toLowerCase());
const only = {
  __proto__: null,
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
  if (state.key === "group") return groupOf(rowOf.get(row[0]));
  return row[state.key === "z" ? 3 : columnOf.get(state.key).place];
}

const flagName = (flag) => flag.split(":")[0];
const groupOf = (n) => (state.group ? state.group.values[state.group.of[n]] : "");

function choose() {
  const words = $("filter").value.toLowerCase().replaceAll("_", " ").split(/\s+/).filter(Boolean);
  const wanted = only[$("only").value];
  const names = [...state.raised];
  const raised = (row) => names.every((name) => row[2].some((flag) => flagName(flag) === name));
  const kept = rows.map((_, n) => n).filter((n) => wanted(rows[n]) && raised(rows[n]) && words.every((word) => texts[n].includes(word)));
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

const headings = () => [
  ["Scan", "name"],
  ["Rating", "rating"],
  ["Flags", "flags"],
  ...(state.group ? [[state.group.name, "group"]] : []),
  ...(ranked ? [["Worst z", "z"]] : []),
  ...state.columns.map((key) => [columnOf.get(key).heading, key]),
];

function drawHead() {
  $("scans").tHead.rows[0].replaceChildren(...headings().map(([text, key]) => {
    const button = made("button", {}, text);
    button.addEventListener("click", () => {
      // numbers start with the largest, names with A
      if (state.key === key) state.down = !state.down;
      else Object.assign(state, { key, down: !["name", "group"].includes(key) });
      choose();
    });
    const heading = made("th", { scope: "col", className: ["flags", "rating", "group"].includes(key) ? "words" : "" }, button);
    Object.assign(heading.dataset, { key, text });
    return heading;
  }));
}

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

const inWords = (text) => text.replaceAll("_", " ");
const flagChip = (flag) => made("span", { className: "flag", title: inWords(flag) }, `▲ ${inWords(flagName(flag))}`);

// Names of the flags in one line; a click shows what they say.
function flagsOf(row) {
  if (!row[2].length) return ["● none"];
  const button = made("button", { title: row[2].map(inWords).join("\n") }, ...row[2].map(flagChip));
  button.setAttribute("aria-expanded", "false");
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", String(open));
    if (open) button.after(...row[2].map((flag) => made("span", { className: "sentence" }, `▲ ${inWords(flag)}`)));
    else button.parentElement.querySelectorAll(".sentence").forEach((sentence) => sentence.remove());
  });
  return [button];
}

const linkTo = (row) => made("a", { href: `#${encodeURIComponent(row[0])}` }, row[0]);
function tableRow(row, shownHeadings) {
  const cells = shownHeadings.map(([, key]) => {
    if (key === "name") return made("th", { scope: "row" }, linkTo(row));
    if (key === "rating") return made("td", { className: "words rating" }, ...ratingLines(row[0]));
    if (key === "flags") return made("td", { className: "words why" }, ...flagsOf(row));
    if (key === "group") return made("td", { className: "words" }, groupOf(rowOf.get(row[0])) || "none");
    if (key === "z") return made("td", {}, shownNumber(row[3], 1));
    return made("td", {}, shownNumber(row[columnOf.get(key).place], columnOf.get(key).digits));
  });
  return made("tr", {}, ...cells);
}

function card(row) {
  const panel = $("panel").value;
  const panels = data.panels[row[6]] || [];
  const place = panels.indexOf(panel);
  const known = state.columns.map((key) => columnOf.get(key)).filter((column) => row[column.place] !== null); // MRI and microscopy differ
  const numbers = known.slice(0, 2).map((column) => `${column.heading} ${shownNumber(row[column.place], column.digits)}`);
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
  const shownHeadings = headings();
  $("table").hidden = !table;
  $("pictures").hidden = table;
  $("scans").tBodies[0].replaceChildren(...(table ? part.map((n) => tableRow(rows[n], shownHeadings)) : []));
  $("pictures").replaceChildren(...(table ? [] : part.map((n) => card(rows[n]))));
  $("count").textContent = `${state.kept.length} of ${rows.length} scans`;
  $("all").hidden = state.kept.length === rows.length;
  $("where").textContent = `page ${state.page + 1} of ${pages}`;
  $("back").disabled = state.page === 0;
  $("next").disabled = state.page === pages - 1;
  $("paging").hidden = pages === 1;
  for (const heading of $("scans").tHead.rows[0].cells) {
    const sorted = heading.dataset.key === String(state.key);
    heading.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
    heading.firstElementChild.textContent = heading.dataset.text + (sorted ? (state.down ? " ▼" : " ▲") : "");
  }
  $("worst").hidden = state.key === null;
  select(Math.max(state.page * size, Math.min(state.selected, state.page * size + part.length - 1)), false);
  drawProgress();
  addressChanged();
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

// ---------------------------------------------------------------- the address

// What is filtered, sorted and chosen, so that a link shows the same; nothing of what is as it comes.
function stateText() {
  const found = new URLSearchParams();
  const add = (name, value, asItComes) => { if (value !== asItComes) found.set(name, value); };
  add("view", state.view, "table");
  add("sort", state.key === null ? "" : `${state.down ? "-" : ""}${state.key}`, "");
  add("filter", $("filter").value, "");
  add("only", $("only").value, "all");
  add("flags", [...state.raised].join(" "), "");
  add("columns", state.columns.join(" "), usual.join(" "));
  add("group", state.group ? state.group.name : "", "");
  add("panel", state.view === "pictures" ? $("panel").value : "", "");
  return found.toString();
}
const address = (scan) => {
  const text = stateText();
  return `#${scan === null ? "" : encodeURIComponent(scan)}${text ? `?${text}` : ""}`;
};

function takeState(text) {
  if (text === stateText()) return;
  const found = new URLSearchParams(text);
  const words = (name) => (found.get(name) || "").split(" ").filter(Boolean);
  const sort = found.get("sort") || "";
  const key = sort.replace(/^-/, "");
  state.view = found.get("view") === "pictures" ? "pictures" : "table";
  state.group = groups.find(({ name }) => name === found.get("group")) || null;
  const chosen = words("columns").filter((name) => columnOf.has(name));
  state.columns = found.has("columns") ? chosen : usual;
  const sortable = headings().some(([, name]) => name === key);
  Object.assign(state, { key: sortable ? key : null, down: sort.startsWith("-") });
  state.raised = new Set(words("flags").filter((name) => raisedBy.has(name)));
  $("filter").value = found.get("filter") || "";
  $("only").value = found.get("only") in only ? found.get("only") : "all";
  if (panelNames.includes(found.get("panel"))) $("panel").value = found.get("panel");
  drawControls();
  drawHead();
  chooseAndPlot();
}

// Not at every key in the filter: browsers allow a page only so many changes of its address.
let waiting = 0;
let followed = ""; // the address that was last followed
function addressChanged() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    // the browser has gone elsewhere, and is about to say so: what is on show would take it back
    if (location.hash !== followed) return addressChanged();
    const now = address(reviewing() ? scanShown() : null);
    if (now !== (location.hash || "#")) location.replace(now);
    return undefined;
  }, 300);
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
  const inField = event.target.closest("input:not([type=checkbox], [type=radio]), select, textarea");
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

const raisedBy = new Map();
for (const row of rows) for (const flag of row[2]) raisedBy.set(flagName(flag), (raisedBy.get(flagName(flag)) || 0) + 1);
const flagChips = [...raisedBy].sort(([, a], [, b]) => b - a).map(([name, count]) => {
  const button = made("button", { className: "chip", title: "only scans with this flag" }, `▲ ${inWords(name)} `, made("b", {}, String(count)));
  button.dataset.flag = name;
  button.addEventListener("click", () => {
    if (!state.raised.delete(name)) state.raised.add(name);
    drawControls();
    chooseAndPlot();
  });
  return button;
});
$("flags").append(...flagChips);
const columnBoxes = columns.map(({ key, heading }) => {
  const box = made("input", { type: "checkbox", value: key });
  box.addEventListener("change", () => {
    state.columns = columnBoxes.filter((one) => one.checked).map((one) => one.value);
    if (columnOf.has(state.key) && !state.columns.includes(state.key)) state.key = null;
    drawHead();
    chooseAndPlot();
  });
  $("column-boxes").append(made("label", {}, box, " ", heading));
  return box;
});
$("group").append(...groups.map(({ name }) => made("option", { value: name }, name)));
$("group").parentElement.hidden = !groups.length;
$("group").addEventListener("change", () => {
  state.group = groups.find(({ name }) => name === $("group").value) || null;
  if (state.key === "group") state.key = null;
  drawHead();
  chooseAndPlot();
});
$("worst").addEventListener("click", () => {
  state.key = null;
  choose();
});
$("all").addEventListener("click", () => {
  $("filter").value = "";
  $("only").value = "all";
  state.raised.clear();
  drawControls();
  chooseAndPlot();
});

// What the state says that is not drawn with the table.
function drawControls() {
  for (const button of flagChips) button.setAttribute("aria-pressed", String(state.raised.has(button.dataset.flag)));
  for (const box of columnBoxes) box.checked = state.columns.includes(box.value);
  for (const radio of document.getElementsByName("view")) radio.checked = radio.value === state.view;
  $("group").value = state.group ? state.group.name : "";
  $("which-panel").hidden = state.view !== "pictures";
}

const panelNames = [...new Set(data.panels.flat())];
$("panel").append(...panelNames.map((panel) => made("option", { value: panel }, panel)));
$("panel").value = panelNames.includes("corrected") ? "corrected" : panelNames[0];
const pointed = {
  flagged: (n) => rows[n][2].length > 0,
  name: (n) => rows[n][0],
  open: goToScan,
  light: (n) => { for (const plot of [...plots.values(), scatter]) plot.light(n); },
};
const valuesOf = ({ place }) => rows.map((row) => row[place]);
const plotted = [...columnOf.values()].filter((column) => {
  const values = valuesOf(column).filter((value) => value !== null);
  return typeof values[0] === "number" && new Set(values).size > 1;
});
const plots = new Map();
const scatter = scatterPlot(pointed);
for (const axis of ["across", "up"]) {
  $(axis).append(...plotted.map(({ key, heading }) => made("option", { value: key }, heading)));
  $(axis).addEventListener("change", drawPlots);
}
$("up").selectedIndex = Math.min(1, plotted.length - 1);
$("scatter").append(scatter.figure);
$("scatter").hidden = plotted.length < 2;
$("scatter").addEventListener("toggle", drawPlots);

function drawPlots() {
  if (!$("distributions").open || reviewing()) return;
  const shown = new Set(state.kept);
  const chosen = plotted.filter(({ key }) => state.columns.includes(key));
  for (const column of chosen) if (!plots.has(column.key)) plots.set(column.key, stripPlot(column, valuesOf(column), pointed));
  $("plots").replaceChildren(...chosen.map(({ key }) => plots.get(key).figure));
  for (const { key } of chosen) plots.get(key).show(shown, state.group);
  if (!$("scatter").open || plotted.length < 2) return;
  const [across, up] = ["across", "up"].map((axis) => columnOf.get($(axis).value));
  scatter.show({ ...across, values: valuesOf(across) }, { ...up, values: valuesOf(up) }, shown, state.group);
}
$("distributions").hidden = rows.length < 2 || !plotted.length;
// Ten rows of the table come first: the plots are folded where they leave no room for these.
function foldPlots() {
  $("distributions").open = true;
  drawPlots();
  const { rows: lines } = $("scans").tBodies[0];
  const last = lines[Math.min(10, lines.length) - 1];
  $("distributions").open = !last || last.getBoundingClientRect().bottom <= window.innerHeight;
}
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
    drawControls();
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
$("show-methods").addEventListener("click", () => {
  $("methods").open = true;
  $("methods").scrollIntoView();
  $("copy").focus();
});
$("copy").addEventListener("click", async () => {
  const text = $("methods-text");
  try {
    await navigator.clipboard.writeText(text.value);
  } catch {
    text.select(); // where a page from a folder may not write there
    document.execCommand("copy");
  }
  $("copied").textContent = "copied";
});
