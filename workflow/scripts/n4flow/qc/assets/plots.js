"use strict";
// Strip plots: a dot per scan, dots open their scan. Flagged scans are triangles, the one that is pointed at is ringed.
function stripPlot(heading, values, digits, { flagged, name, open }) {
  // values: a number or null per row. The dots of a column of pixels are piled up by their order, not at random.
  const known = values.map((value, row) => ({ value, row })).filter((dot) => dot.value !== null);
  known.sort((a, b) => a.value - b.value);
  const [lowest, highest] = [known[0], known[known.length - 1]];
  const quantile = (share) => {
    const place = share * (known.length - 1);
    const [below, above] = [known[Math.floor(place)].value, known[Math.ceil(place)].value];
    return below + (place % 1) * (above - below);
  };
  const text = (value) => shownNumber(value, digits);
  const figure = document.createElement("figure");
  figure.className = "strip";
  const caption = document.createElement("figcaption");
  const told = document.createElement("span");
  caption.append(Object.assign(document.createElement("b"), { textContent: heading }), " ", told);
  const canvas = Object.assign(document.createElement("canvas"), { tabIndex: 0 });
  canvas.setAttribute("role", "img");
  const spread = `median ${text(quantile(0.5))}; ${text(lowest.value)} to ${text(highest.value)}`;
  canvas.setAttribute("aria-label", `${heading} of ${known.length} scans: ${spread} (${name(lowest.row)} to ${name(highest.row)}). Arrow keys go from scan to scan, Enter opens.`);
  figure.append(caption, canvas);
  let shown = new Set(known.map((dot) => dot.row));
  let current = -1;
  let xOf = null;

  function place() {
    const width = canvas.clientWidth || 400;
    const [low, high] = [lowest.value, highest.value];
    const piles = new Map();
    xOf = (value) => 8 + (high > low ? (value - low) / (high - low) : 0.5) * (width - 16);
    for (const dot of known) {
      dot.x = xOf(dot.value);
      const column = Math.round(dot.x / 4);
      const n = piles.get(column) || 0;
      piles.set(column, n + 1);
      dot.y = 24 + (n % 2 ? 1 : -1) * ((Math.ceil(n / 2) * 4) % 20);
    }
  }

  function draw() {
    const [width, ratio] = [canvas.clientWidth || 400, window.devicePixelRatio || 1];
    Object.assign(canvas, { width: width * ratio, height: 48 * ratio });
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const colour = (variable) => style.getPropertyValue(variable);
    pen.scale(ratio, ratio);
    place();
    pen.strokeStyle = colour("--line");
    const [left, middle, right] = [0.25, 0.5, 0.75].map((share) => xOf(quantile(share)));
    pen.strokeRect(left, 2.5, Math.max(1, right - left), 43);
    pen.strokeStyle = colour("--soft");
    pen.beginPath();
    pen.moveTo(middle, 2);
    pen.lineTo(middle, 46);
    pen.stroke();
    for (const pass of [false, true]) {
      // flagged ones on top
      pen.fillStyle = colour(pass ? "--warn" : "--link");
      pen.beginPath();
      for (const { row, x, y } of known) {
        if (!shown.has(row) || flagged(row) !== pass) continue;
        if (pass) {
          pen.moveTo(x, y - 5);
          pen.lineTo(x + 5, y + 4);
          pen.lineTo(x - 5, y + 4);
        } else {
          pen.moveTo(x + 2.5, y);
          pen.arc(x, y, 2.5, 0, 7);
        }
      }
      pen.fill();
    }
    pen.strokeStyle = colour("--ink");
    pen.lineWidth = 2;
    if (current >= 0) {
      pen.beginPath();
      pen.arc(known[current].x, known[current].y, 7, 0, 7);
      pen.stroke();
    }
    told.textContent = current < 0 ? spread : `${name(known[current].row)}: ${text(known[current].value)}`;
  }

  function nearest(event) {
    let [best, found] = [100, -1];
    for (const [n, dot] of known.entries()) {
      const off = (dot.x - event.offsetX) ** 2 + (dot.y - event.offsetY) ** 2;
      if (shown.has(dot.row) && off < best) [best, found] = [off, n];
    }
    return found;
  }
  const point = (n) => {
    if (n === current) return;
    current = n;
    draw();
  };
  canvas.addEventListener("mousemove", (event) => point(nearest(event)));
  canvas.addEventListener("mouseleave", () => point(-1));
  canvas.addEventListener("blur", () => point(-1));
  canvas.addEventListener("click", (event) => {
    const n = nearest(event);
    if (n >= 0) open(known[n].row);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) {
      event.preventDefault();
      let n = current < 0 ? (step > 0 ? -1 : known.length) : current;
      do n += step; while (n >= 0 && n < known.length && !shown.has(known[n].row));
      if (n >= 0 && n < known.length) point(n);
    } else if (event.key === "Enter" && current >= 0) {
      event.stopPropagation();
      open(known[current].row);
    }
  });
  return {
    figure,
    show(rows) {
      shown = rows;
      draw();
    },
  };
}
