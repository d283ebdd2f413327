"use strict";
// A row is [name, link, flags, worst z, numbers…]; only the page on show exists as elements.
const PAGE = 200;
const { columns, rows, ranked } = JSON.parse(document.getElementById("data").textContent);
const table = document.getElementById("subjects");
const filter = document.getElementById("filter");
const only = document.getElementById("only");
const state = { key: null, down: true, page: 0 };
const first = ranked ? 3 : 4; // a few subjects have no robust z
const headings = [["Subject", 0], ["Flags", 2], ...(ranked ? [["Worst z", 3]] : []), ...columns.map(([text], n) => [text, n + 4])];
const digits = (n) => (n === 3 ? 1 : columns[n - 4][1]);

function shown(number, places) {
  if (number === null) return "n/a";
  if (typeof number === "string") return number;
  return number !== 0 && Math.abs(number) < 0.5 * 10 ** -places ? number.toExponential(1) : number.toFixed(places);
}

function cell(row, tag, text) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  row.append(made);
  return made;
}

function value(row, key) {
  return key === 2 ? row[2].length : key === 0 ? String(row[0]) : row[key];
}

function chosen() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const kept = rows.filter((row) => {
    if (only.checked && !row[2].length) return false;
    const text = `${row[0]} ${row[2].join(" ")}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  if (state.key === null) return kept; // as they came: worst first
  const sign = state.down ? -1 : 1;
  return kept.sort((a, b) => {
    const [x, y] = [value(a, state.key), value(b, state.key)];
    if (x === null || y === null) return (x === null) - (y === null); // what is unknown comes last
    return sign * (typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
  });
}

function draw() {
  const kept = chosen();
  const pages = Math.max(1, Math.ceil(kept.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const body = document.createElement("tbody");
  for (const row of kept.slice(state.page * PAGE, (state.page + 1) * PAGE)) {
    const line = document.createElement("tr");
    const link = cell(cell(line, "td"), "a", row[0]);
    link.href = row[1];
    const why = cell(line, "td", row[2].length ? undefined : "● none");
    why.className = "why";
    for (const flag of row[2]) cell(why, "span", `▲ ${flag.replaceAll("_", " ")}`);
    for (let n = first; n < row.length; n += 1) cell(line, "td", shown(row[n], digits(n)));
    body.append(line);
  }
  table.tBodies[0].replaceWith(body);
  document.getElementById("count").textContent = `${kept.length} of ${rows.length} subjects`;
  document.getElementById("where").textContent = `page ${state.page + 1} of ${pages}`;
  document.getElementById("back").disabled = state.page === 0;
  document.getElementById("next").disabled = state.page === pages - 1;
  document.getElementById("paging").hidden = pages === 1;
  for (const heading of table.tHead.rows[0].cells) {
    const sorted = heading.dataset.key === String(state.key);
    heading.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
    heading.firstElementChild.textContent = heading.dataset.text + (sorted ? (state.down ? " ▼" : " ▲") : "");
  }
}

for (const [text, key] of headings) {
  const heading = cell(table.tHead.rows[0], "th");
  Object.assign(heading.dataset, { key, text });
  if (key === 2) heading.className = "why";
  cell(heading, "button", text).addEventListener("click", () => {
    // numbers start with the largest, names with A
    if (state.key === key) state.down = !state.down;
    else Object.assign(state, { key, down: key !== 0 });
    state.page = 0;
    draw();
  });
}
filter.addEventListener("input", () => { state.page = 0; draw(); });
only.addEventListener("change", () => { state.page = 0; draw(); });
document.getElementById("back").addEventListener("click", () => { state.page -= 1; draw(); });
document.getElementById("next").addEventListener("click", () => { state.page += 1; draw(); });
draw();
