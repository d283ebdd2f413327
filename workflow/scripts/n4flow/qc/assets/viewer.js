"use strict";
// The viewer: three planes on 2-D canvases with a crosshair, a window, and the bias field over them. Its data are a script
// beside the page, loaded when it is first opened. The field is evaluated from its control points, slice by slice.
const viewer = document.getElementById("viewer");
const part = (name) => viewer.querySelector(`[data-part=${name}]`);
let scan = null; // what the script brings
let view = null; // where we look

function openViewer() {
  viewer.showModal();
  if (scan) return resize();
  part("told").textContent = "loading…";
  const script = document.createElement("script");
  script.src = document.body.dataset.viewer;
  script.onerror = () => {
    script.remove(); // so that it can be tried again
    part("told").textContent = `The viewer's data (${decodeURIComponent(document.body.dataset.viewer)}) are not beside this page: an archive leaves them out`;
  };
  document.head.append(script);
  return undefined;
}

async function bytes(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Called by the script. Axis 0 runs fastest in the volumes.
async function showVolumes(content) {
  try {
    const [mask, original, corrected] = await Promise.all([content.mask, content.original, content.corrected].map(bytes));
    scan = { ...content, mask, original, corrected };
  } catch (error) {
    part("told").textContent = `This browser cannot unpack the viewer's data (${error.message})`;
    return;
  }
  const [n0, n1] = scan.shape;
  scan.strides = [1, n0, n0 * n1];
  for (const field of scan.fields) field.bases = [0, 1, 2].map((axis) => basis(field, axis));
  view = { at: scan.shape.map((n) => n >> 1), image: "corrected", overlay: false, low: 0, high: 255, opacity: 0.5, field: 0 };
  part("field").replaceChildren(...scan.fields.map(({ title }, n) => new Option(title, n)));
  part("field").parentElement.hidden = scan.fields.length < 2;
  part("planes").replaceChildren(...scan.planes.map(makePlane));
  part("told").textContent = scan.steps.some((step) => step > 1)
    ? `${scan.steps.join(" × ")} voxels of the file are averaged to one here` : "every voxel of the file";
  part("legend").style.background = `linear-gradient(to right, ${scan.colours.join(", ")})`;
  part("legend-low").textContent = `×${Math.exp(-scan.windowLog).toFixed(2)}`;
  part("legend-high").textContent = `×${Math.exp(scan.windowLog).toFixed(2)}`;
  resize();
}

// The middle of a voxel of the volumes, in voxels of the file; the last one of an axis may hold fewer of them.
function middle(n, axis) {
  const first = n * scan.steps[axis];
  return (first + Math.min(first + scan.steps[axis], scan.fileShape[axis]) - 1) / 2;
}
const placeText = (axis) => `${"ijk"[axis]} ${Math.floor(middle(view.at[axis], axis))}`;

// Weights of all control points at the centre of each voxel of an axis: uniform cubic B-splines, as in bspline.py.
function basis({ spans, start, spanVoxels }, axis) {
  const points = spans[axis] ? spans[axis] + 3 : 1;
  return Array.from({ length: scan.shape[axis] }, (_, n) => {
    const weights = new Float64Array(points);
    if (!spans[axis]) return weights.fill(1);
    const p = Math.min(Math.max((middle(n, axis) - start[axis]) / spanVoxels[axis], 0), spans[axis]);
    const column = Math.min(Math.floor(p), spans[axis] - 1);
    const t = p - column;
    [(1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3].forEach((weight, k) => {
      weights[column + k] = weight / 6;
    });
    return weights;
  });
}

// Log field at one voxel.
function logField({ bases, lattice }, at) {
  const [a, b, c] = bases.map((weights, axis) => weights[at[axis]]);
  let sum = 0;
  for (let i = 0, n = 0; i < a.length; i += 1) {
    for (let j = 0; j < b.length; j += 1) {
      const weight = a[i] * b[j];
      if (weight === 0) n += c.length;
      else for (let k = 0; k < c.length; k += 1, n += 1) sum += weight * c[k] * lattice[n];
    }
  }
  return sum;
}

// Log field on a slice, [up * width + across]: the lattice is contracted along the normal, then along the two others.
function fieldSlice({ bases, lattice }, { normal, across, up }) {
  const points = bases.map((weights) => weights[0].length);
  const strides = [points[1] * points[2], points[2], 1];
  const [width, height] = [scan.shape[across], scan.shape[up]];
  const through = bases[normal][view.at[normal]];
  const result = new Float64Array(width * height);
  for (let u = 0; u < points[up]; u += 1) {
    const line = new Float64Array(width);
    for (let a = 0; a < points[across]; a += 1) {
      let sum = 0;
      for (let n = 0; n < through.length; n += 1) sum += through[n] * lattice[n * strides[normal] + a * strides[across] + u * strides[up]];
      for (let x = 0; x < width; x += 1) line[x] += sum * bases[across][x][a];
    }
    for (let y = 0; y < height; y += 1) {
      const weight = bases[up][y][u];
      if (weight) for (let x = 0; x < width; x += 1) result[y * width + x] += weight * line[x];
    }
  }
  return result;
}

function makePlane(plane) {
  const canvas = Object.assign(document.createElement("canvas"), { tabIndex: 0 });
  canvas.setAttribute("role", "img");
  Object.assign(plane, { canvas, slice: document.createElement("canvas") });
  Object.assign(plane.slice, { width: scan.shape[plane.across], height: scan.shape[plane.up] });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    plane.from = { x: event.offsetX, y: event.offsetY, low: view.low, high: view.high };
    drag(plane, event);
  });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) drag(plane, event); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    move(plane.normal, Math.sign(event.deltaY));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const sign = (flipped) => (flipped ? -1 : 1);
    const steps = {
      ArrowRight: [plane.across, sign(plane.flipAcross)], ArrowLeft: [plane.across, -sign(plane.flipAcross)],
      ArrowUp: [plane.up, sign(plane.flipUp)], ArrowDown: [plane.up, -sign(plane.flipUp)],
      PageUp: [plane.normal, 1], PageDown: [plane.normal, -1],
    }[event.key];
    if (!steps) return;
    event.preventDefault();
    move(...steps);
  });
  return canvas;
}

function move(axis, step) {
  view.at[axis] = Math.min(Math.max(view.at[axis] + step, 0), scan.shape[axis] - 1);
  drawPlanes();
}

// Left button: the crosshair. Right button, or with shift: the window; across its width, up and down its middle.
function drag(plane, event) {
  const { canvas, across, up, flipAcross, flipUp, from } = plane;
  if (event.shiftKey || event.buttons === 2) {
    const middle = (from.low + from.high) / 2 + (event.offsetY - from.y) / 2;
    const half = Math.max(1, (from.high - from.low) / 2 + (event.offsetX - from.x) / 2);
    [view.low, view.high] = [Math.max(0, Math.min(254, middle - half)), Math.min(255, Math.max(1, middle + half))];
  } else {
    const at = (share, n, flipped) => Math.min(n - 1, Math.max(0, Math.floor((flipped ? 1 - share : share) * n)));
    view.at[across] = at(event.offsetX / canvas.clientWidth, scan.shape[across], flipAcross);
    view.at[up] = at(1 - event.offsetY / canvas.clientHeight, scan.shape[up], flipUp);
  }
  drawPlanes();
}

const short = (value) => String(Number(value.toPrecision(4)));
const colour = (hex) => [1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16));

function drawPlanes() {
  const slope = 255 / Math.max(1, view.high - view.low);
  const grey = Uint8Array.from({ length: 256 }, (_, n) => Math.min(255, Math.max(0, (n - view.low) * slope)));
  scan.map ||= scan.colours.map(colour);
  for (const plane of scan.planes) drawPlane(plane, grey);
  const at = view.at;
  const voxel = at[0] * scan.strides[0] + at[1] * scan.strides[1] + at[2] * scan.strides[2];
  // what is beyond the window was cut off
  const value = (image) => (scan[image][voxel] === 255 ? "≥ " : "") + short((scan[image][voxel] / 255) * scan.displayMax);
  const place = [0, 1, 2].map(placeText).join(", ");
  const fields = scan.fields.map((field) => `${field.title} ×${Math.exp(logField(field, at)).toFixed(3)}`).join(" · ");
  part("readout").textContent = `${place} · original ${value("original")} · corrected ${value("corrected")} · ${fields}`;
  part("swap").textContent = view.image;
  part("overlay").setAttribute("aria-pressed", String(view.overlay));
  part("low").value = view.low;
  part("high").value = view.high;
  part("window").textContent = [view.low, view.high].map((n) => short((n / 255) * scan.displayMax)).join(" to ");
}

function drawPlane(plane, grey) {
  const { canvas, slice, normal, across, up, flipAcross, flipUp, labels, name } = plane;
  const { strides, shape } = scan;
  const [width, height] = [shape[across], shape[up]];
  const picture = new ImageData(width, height);
  const field = view.overlay ? fieldSlice(scan.fields[view.field], plane) : null;
  const volume = scan[view.image];
  const top = scan.map.length - 1;
  for (let y = 0; y < height; y += 1) {
    const row = flipUp ? y : height - 1 - y; // superior or anterior is up
    for (let x = 0; x < width; x += 1) {
      const from = flipAcross ? width - 1 - x : x;
      const voxel = view.at[normal] * strides[normal] + from * strides[across] + row * strides[up];
      const pixel = 4 * (y * width + x);
      const g = grey[volume[voxel]];
      let [red, green, blue] = [g, g, g];
      if (field && (scan.mask[voxel >> 3] >> (7 - (voxel & 7))) & 1) {
        const share = Math.min(1, Math.max(0, (field[row * width + from] / scan.windowLog + 1) / 2)) * top;
        const [low, high, t] = [scan.map[Math.floor(share)], scan.map[Math.ceil(share)], share % 1];
        const mix = (base, n) => (1 - view.opacity) * base + view.opacity * (low[n] + t * (high[n] - low[n]));
        [red, green, blue] = [mix(g, 0), mix(g, 1), mix(g, 2)];
      }
      picture.data.set([red, green, blue, 255], pixel);
    }
  }
  slice.getContext("2d").putImageData(picture, 0, 0);
  const pen = canvas.getContext("2d");
  const ratio = window.devicePixelRatio || 1;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(slice, 0, 0, canvas.width, canvas.height);
  const centre = (n, size, flipped) => ((flipped ? size - 1 - n : n) + 0.5) / size;
  const x = centre(view.at[across], width, flipAcross) * canvas.width;
  const y = (1 - centre(view.at[up], height, flipUp)) * canvas.height;
  pen.strokeStyle = "#ffd23c";
  pen.lineWidth = ratio;
  const gap = 12 * ratio; // nothing over the voxel itself
  pen.beginPath();
  for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, canvas.width, y], [x, 0, x, y - gap], [x, y + gap, x, canvas.height]]) {
    pen.moveTo(x0, y0);
    pen.lineTo(x1, y1);
  }
  pen.stroke();
  pen.font = `${14 * ratio}px system-ui, sans-serif`;
  pen.lineWidth = 3 * ratio;
  pen.strokeStyle = "black";
  pen.fillStyle = "white";
  const write = (text, tx, ty, align, baseline) => {
    Object.assign(pen, { textAlign: align, textBaseline: baseline });
    pen.strokeText(text, tx, ty);
    pen.fillText(text, tx, ty);
  };
  const [left, right, bottom, upper] = labels;
  const edge = 4 * ratio;
  write(left, edge, canvas.height / 2, "left", "middle");
  write(right, canvas.width - edge, canvas.height / 2, "right", "middle");
  write(bottom, canvas.width / 2, canvas.height - edge, "center", "bottom");
  write(upper, canvas.width / 2, edge, "center", "top");
  const place = placeText(normal);
  write(place, canvas.width - edge, canvas.height - edge, "right", "bottom");
  canvas.setAttribute("aria-label", `${name} plane of the ${view.image} image, ${place}; ${left} is on the left, ${upper} on top`);
}

// The planes lie side by side, in one scale, as large as the window allows.
function resize() {
  if (!viewer.open || !scan) return;
  const mm = (axis) => scan.shape[axis] * scan.sizeMm[axis];
  const room = { width: viewer.clientWidth - 24 - 8 * scan.planes.length, height: viewer.clientHeight - 130 };
  const scale = Math.min(
    room.width / scan.planes.reduce((sum, plane) => sum + mm(plane.across), 0),
    room.height / Math.max(...scan.planes.map((plane) => mm(plane.up))),
  );
  const ratio = window.devicePixelRatio || 1;
  for (const { canvas, across, up } of scan.planes) {
    const [width, height] = [Math.max(1, scale * mm(across)), Math.max(1, scale * mm(up))];
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  }
  drawPlanes();
}
window.addEventListener("resize", resize);

let swappedAt = -Infinity;
function swapViewed(key) {
  if (performance.now() - swappedAt < 170) return; // never above 3 Hz
  swappedAt = performance.now();
  if (key === "b") view.overlay = !view.overlay;
  else view.image = view.image === "original" ? "corrected" : "original";
  drawPlanes();
}
// Of the page's keys, those that mean something else while the viewer is open.
function viewerKey(key) {
  if (key === "v") viewer.close();
  else if (scan) swapViewed(key);
  return true;
}
part("swap").addEventListener("click", () => scan && swapViewed(" "));
part("overlay").addEventListener("click", () => scan && swapViewed("b"));
part("close").addEventListener("click", () => viewer.close());
for (const name of ["low", "high", "opacity", "field"]) {
  part(name).addEventListener("input", () => {
    if (!scan) return;
    view.low = Math.min(Number(part("low").value), 254);
    view.high = Math.max(Number(part("high").value), view.low + 1);
    view.opacity = part("opacity").value / 100;
    view.field = Number(part("field").value);
    if (name === "opacity" || name === "field") view.overlay = true;
    drawPlanes();
  });
}
