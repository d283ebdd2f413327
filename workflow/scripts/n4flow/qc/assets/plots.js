"use strict";
// Distributions: a dot per scan on an axis, a lane per group, and one metric against another. Flagged scans are triangles; the
// scan that is pointed at is ringed in all plots; dots open their scan. What can be seen is for the arrow keys, too.
const MANY = 300; // so many scans of a lane are a histogram, with the flagged ones as dots,
const MANY_FLAGGED = 60; // unless they are so many
// Colours that colour-blind people tell apart (after Okabe & Ito), on light and dark, with a shape each.
const GROUP_COLOURS = ["#2b87c8", "#d9660f", "#119a72", "#c86fa0", "#a58220", "#8a6fd1", "#808080"];

function ticks(low, high, most) {
  const raw = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  const digits = Math.max(0, Math.min(9, -Math.floor(Math.log10(step) + 1e-9)));
  return found.map((value) => [value, Math.abs(value) >= 1e5 ? value.toExponential(0) : value.toFixed(digits)]);
}

function quantile(sorted, share) {
  const place = share * (sorted.length - 1);
  const [below, above] = [sorted[Math.floor(place)], sorted[Math.ceil(place)]];
  return below + (place % 1) * (above - below);
}

// From where to where an axis runs: over all values, and no closer than a difference that matters.
function axisOf(column, sorted) {
  const [low, high] = [sorted[0], sorted[sorted.length - 1]];
  const floor = Math.max(column.floor, column.floorShare * Math.abs(quantile(sorted, 0.5)));
  const least = Math.max(10.4 * floor, 1e-9 * Math.max(Math.abs(low), Math.abs(high)), 1e-12);
  const half = Math.max(high - low, least) / 2;
  const start = (low + high) / 2 - half;
  const ends = low >= 0 && start < 0 ? [0, 2 * half] : [start, start + 2 * half]; // what is never below 0 has no axis there
  for (const line of column.lines) {
    // a limit that is near is on show
    if (line < ends[0] && line > ends[0] - half) ends[0] = line;
    if (line > ends[1] && line < ends[1] + half) ends[1] = line;
  }
  return ends;
}

// A canvas that is as sharp as the screen, and the colours of the page.
function pencil(canvas, height) {
  const [width, ratio] = [canvas.clientWidth || 400, window.devicePixelRatio || 1];
  canvas.style.height = `${height}px`;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `11.5px ${getComputedStyle(document.body).fontFamily}`;
  const style = getComputedStyle(document.documentElement);
  return { pen, width, colour: (variable) => style.getPropertyValue(variable) };
}

function mark(pen, x, y, shape) {
  if (shape === "triangle") {
    pen.moveTo(x, y - 5);
    pen.lineTo(x + 5, y + 4);
    pen.lineTo(x - 5, y + 4);
    pen.closePath();
  } else if (shape === "square") pen.rect(x - 3, y - 3, 6, 6);
  else if (shape === "diamond") {
    pen.moveTo(x, y - 4.5);
    pen.lineTo(x + 4.5, y);
    pen.lineTo(x, y + 4.5);
    pen.lineTo(x - 4.5, y);
    pen.closePath();
  } else {
    pen.moveTo(x + 2.7, y);
    pen.arc(x, y, 2.7, 0, 7);
  }
}

// What plots share: dots that can be pointed at, by mouse and keys. dots(): those on show, in the order of the arrow keys.
function pointable(canvas, { dots, light, open }) {
  let current = null;
  const nearest = (event) => {
    let [best, found] = [100, null];
    for (const dot of dots()) {
      const off = (dot.x - event.offsetX) ** 2 + (dot.y - event.offsetY) ** 2;
      if (off < best) [best, found] = [off, dot.row];
    }
    return found;
  };
  const point = (row) => {
    if (row === current) return;
    current = row;
    light(row);
  };
  canvas.addEventListener("mousemove", (event) => point(nearest(event)));
  canvas.addEventListener("mouseleave", () => point(null));
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener("click", (event) => {
    const row = nearest(event);
    if (row !== null) open(row);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) {
      event.preventDefault();
      const all = dots();
      const at = all.findIndex((dot) => dot.row === current);
      const next = all[at < 0 ? (step > 0 ? 0 : all.length - 1) : at + step];
      if (next) point(next.row);
    } else if (event.key === "Enter" && current !== null) {
      event.stopPropagation();
      open(current);
    }
  });
}

function plotFigure(heading) {
  const figure = document.createElement("figure");
  figure.className = "strip";
  const told = document.createElement("span");
  const caption = document.createElement("figcaption");
  caption.append(Object.assign(document.createElement("b"), { textContent: heading }), " ", told);
  const canvas = Object.assign(document.createElement("canvas"), { tabIndex: 0 });
  canvas.setAttribute("role", "img");
  figure.append(caption, canvas);
  return { figure, caption, told, canvas };
}

// values: a number or null per row. The dots of a column of pixels are piled up by their order, not at random.
function stripPlot(column, values, { flagged, name, open, light }) {
  const known = values.map((value, row) => ({ value, row })).filter((dot) => dot.value !== null);
  known.sort((a, b) => a.value - b.value);
  const sorted = known.map((dot) => dot.value);
  const [low, high] = axisOf(column, sorted);
  const text = (value) => shownNumber(value, column.digits);
  const { figure, told, canvas } = plotFigure(column.heading);
  const lines = column.lines.length ? `; limit ${column.lines.map((line) => shownNumber(line, Math.min(column.digits, 3))).join(", ")}` : "";
  const spread = `median ${text(quantile(sorted, 0.5))}; ${text(sorted[0])} to ${text(sorted[sorted.length - 1])}${lines}`;
  canvas.setAttribute("aria-label", `${column.heading} of ${known.length} scans: ${spread} (${name(known[0].row)} to ${name(known[known.length - 1].row)}). Arrow keys go from scan to scan, Enter opens.`);
  let [shown, lanes, lit, drawn] = [null, null, null, []];

  function draw() {
    const names = lanes ? lanes.values : [""];
    const [left, lane] = [lanes ? 76 : 10, lanes ? 24 : 42];
    const { pen, width, colour } = pencil(canvas, names.length * lane + 18);
    const xOf = (value) => left + ((value - low) / (high - low)) * (width - left - 10);
    const bottom = names.length * lane;
    pen.textBaseline = "top";
    pen.textAlign = "center";
    for (const [value, label] of ticks(low, high, width / 90)) {
      pen.fillStyle = colour("--line");
      pen.fillRect(xOf(value), 0, 1, bottom + 3);
      pen.fillStyle = colour("--soft");
      pen.fillText(label, Math.min(width - 14, Math.max(left + 6, xOf(value))), bottom + 5);
    }
    drawn = [];
    const paths = { "--link": new Path2D(), "--warn": new Path2D() };
    for (const [n, laneName] of names.entries()) {
      const middle = n * lane + lane / 2;
      const all = lanes ? known.filter((dot) => lanes.of[dot.row] === n) : known;
      if (lanes) {
        pen.fillStyle = colour("--soft");
        pen.textAlign = "left";
        pen.fillText(laneName || "none", 2, middle - 6, left - 8);
      }
      if (!all.length) continue;
      const its = all.map((dot) => dot.value);
      const [q1, q2, q3] = [0.25, 0.5, 0.75].map((share) => xOf(quantile(its, share)));
      const here = all.filter((dot) => !shown || shown.has(dot.row));
      const many = here.length > MANY;
      const crowd = many && here.filter((dot) => flagged(dot.row)).length > MANY_FLAGGED;
      if (many) {
        const counted = (dots) => {
          const bars = new Map();
          for (const dot of dots) {
            const bar = Math.floor(xOf(dot.value) / 4);
            bars.set(bar, (bars.get(bar) || 0) + 1);
          }
          return bars;
        };
        const bars = counted(here);
        const tallest = Math.max(...bars.values());
        const drawBars = (counts) => {
          for (const [bar, count] of counts) {
            const tall = Math.max(1, (count / tallest) * (lane - 4));
            pen.fillRect(bar * 4, (n + 1) * lane - tall, 3, tall);
          }
        };
        pen.fillStyle = colour("--bars");
        drawBars(bars);
        pen.fillStyle = colour("--warn");
        if (crowd) drawBars(counted(here.filter((dot) => flagged(dot.row))));
      }
      pen.strokeStyle = colour("--soft");
      pen.strokeRect(q1, middle - lane / 2 + 2.5, Math.max(1, q3 - q1), lane - 5);
      pen.fillStyle = colour("--soft");
      pen.fillRect(q2 - 1, middle - lane / 2 + 2, 2, lane - 4);
      const piles = new Map();
      for (const dot of here) {
        if (many && (crowd || !flagged(dot.row))) continue;
        const x = xOf(dot.value);
        const pile = Math.round(x / 4);
        const height = piles.get(pile) || 0;
        piles.set(pile, height + 1);
        const y = middle + (height % 2 ? 1 : -1) * ((Math.ceil(height / 2) * 4) % (lane / 2 - 3));
        drawn.push({ row: dot.row, x, y });
        const path = paths[flagged(dot.row) ? "--warn" : "--link"];
        mark(path, x, y, flagged(dot.row) ? "triangle" : "dot");
      }
    }
    for (const [variable, path] of Object.entries(paths)) {
      // flagged ones on top
      pen.fillStyle = colour(variable);
      pen.fill(path);
    }
    pen.fillStyle = colour("--warn");
    for (const line of column.lines.filter((value) => value >= low && value <= high)) {
      for (let y = 0; y < bottom; y += 6) pen.fillRect(xOf(line) - 0.5, y, 1.5, 3.5);
    }
    const value = lit === null ? null : values[lit];
    if (value !== null) {
      const { x, y } = drawn.find((dot) => dot.row === lit) || { x: xOf(value), y: (lanes ? lanes.of[lit] * lane : 0) + lane / 2 };
      pen.strokeStyle = colour("--ink");
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(x, y, 7, 0, 7);
      pen.stroke();
    }
    told.textContent = value === null ? spread : `${name(lit)}: ${text(value)}`;
  }

  const inOrder = () => known.filter((dot) => !shown || shown.has(dot.row));
  pointable(canvas, {
    dots: () => (drawn.length === inOrder().length ? [...drawn].sort((a, b) => values[a.row] - values[b.row]) : drawn),
    light,
    open,
  });
  return {
    figure,
    show(rowsShown, lanesShown) {
      [shown, lanes] = [rowsShown, lanesShown];
      draw();
    },
    light(row) {
      if (row === lit) return;
      lit = row;
      if (shown) draw();
    },
  };
}

// One metric against another; a colour and a shape per group.
function scatterPlot({ flagged, name, open, light }) {
  const { figure, told, canvas } = plotFigure("");
  let [across, up, shown, groups, lit, drawn] = [null, null, null, null, null, []];
  const shapes = ["dot", "square", "diamond"];

  function draw() {
    const here = [...shown].filter((row) => across.values[row] !== null && up.values[row] !== null);
    const { pen, width, colour } = pencil(canvas, 300);
    drawn = [];
    const said = `${up.heading} against ${across.heading}`;
    canvas.setAttribute("aria-label", `${said} of ${here.length} scans. Arrow keys go from scan to scan, Enter opens.`);
    told.textContent = here.length ? said : `no scan has both ${across.heading} and ${up.heading}`;
    if (!here.length) return;
    const [x0, x1] = axisOf(across, here.map((row) => across.values[row]).sort((a, b) => a - b));
    const [y0, y1] = axisOf(up, here.map((row) => up.values[row]).sort((a, b) => a - b));
    const [left, bottom, right] = [72, 262, groups ? width - 110 : width - 14];
    const xOf = (value) => left + ((value - x0) / (x1 - x0)) * (right - left - 10) + 5;
    const yOf = (value) => bottom - 6 - ((value - y0) / (y1 - y0)) * (bottom - 18);
    pen.strokeStyle = colour("--line");
    pen.strokeRect(left, 6, right - left, bottom - 6);
    pen.fillStyle = colour("--soft");
    pen.textBaseline = "top";
    pen.textAlign = "center";
    for (const [value, label] of ticks(x0, x1, width / 90)) {
      pen.fillText(label, xOf(value), bottom + 4);
      pen.fillRect(xOf(value), bottom - 4, 1, 4);
    }
    pen.fillText(across.heading, (left + right) / 2, bottom + 20);
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    pen.save();
    pen.translate(9, bottom / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(up.heading, 0, 0);
    pen.restore();
    for (const [value, label] of ticks(y0, y1, 5)) {
      pen.fillText(label, left - 6, yOf(value));
      pen.fillRect(left, yOf(value), 4, 1);
    }
    for (const [column, place, vertical] of [[across, xOf, true], [up, yOf, false]]) {
      const [low, high] = vertical ? [x0, x1] : [y0, y1];
      pen.fillStyle = colour("--warn");
      for (const line of column.lines.filter((value) => value >= low && value <= high)) {
        const at = place(line);
        const [from, to] = vertical ? [6, bottom] : [left, right];
        for (let n = from; n < to; n += 7) pen.fillRect(vertical ? at : n, vertical ? n : at, vertical ? 1.5 : 4, vertical ? 4 : 1.5);
      }
    }
    const order = here.sort((a, b) => flagged(a) - flagged(b));
    for (const row of order) {
      const group = groups ? groups.of[row] : -1;
      const [x, y] = [xOf(across.values[row]), yOf(up.values[row])];
      drawn.push({ row, x, y });
      pen.beginPath();
      mark(pen, x, y, flagged(row) ? "triangle" : shapes[Math.max(0, group) % shapes.length]);
      pen.fillStyle = group >= 0 ? GROUP_COLOURS[group % GROUP_COLOURS.length] : colour(flagged(row) ? "--warn" : "--link");
      pen.fill();
    }
    drawn.sort((a, b) => a.x - b.x);
    if (groups) {
      pen.textAlign = "left";
      for (const [n, value] of groups.values.slice(0, 16).entries()) {
        pen.fillStyle = GROUP_COLOURS[n % GROUP_COLOURS.length];
        pen.beginPath();
        mark(pen, right + 14, 16 + 16 * n, shapes[n % shapes.length]);
        pen.fill();
        pen.fillStyle = colour("--ink");
        pen.fillText(value || "none", right + 24, 16 + 16 * n, 82);
      }
    }
    const dot = drawn.find(({ row }) => row === lit);
    if (!dot) return;
    pen.strokeStyle = colour("--ink");
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(dot.x, dot.y, 7, 0, 7);
    pen.stroke();
    told.textContent = `${name(lit)}: ${shownNumber(across.values[lit], across.digits)}, ${shownNumber(up.values[lit], up.digits)}`;
  }

  pointable(canvas, { dots: () => drawn, light, open });
  return {
    figure,
    show(x, y, rowsShown, groupsShown) {
      [across, up, shown, groups] = [x, y, rowsShown, groupsShown];
      draw();
    },
    light(row) {
      if (row === lit) return;
      lit = row;
      if (shown) draw();
    },
  };
}
