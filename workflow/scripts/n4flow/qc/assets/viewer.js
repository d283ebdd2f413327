"use strict";
// The viewer: three planes on 2-D canvases with a crosshair, a window, and the bias field over them. Its data are a script
// beside the page, loaded when it is first opened, or ahead of that: the corrected image as pictures, and the fields as control points. The
// original is the corrected image times the field, which is evaluated slice by slice.
const viewer = document.getElementById("viewer");
const part = (name) => viewer.querySelector(`[data-part=${name}]`);
let scan = null; // what the script brings
let view = null; // where we look
let wanted = null; // how the viewer of the scan before was left

// What stays from scan to scan; places are shares of the image, the window shares of that of the page.
const START = {
  image: "corrected", overlay: false, mask: false, steep: false, own: false, opacity: 0.5, field: 0, low: 0, high: 1,
  zoom: 1, at: [0.5, 0.5, 0.5], centre: [0.5, 0.5, 0.5], layout: "", plane: 0,
};

function openViewer(state) {
  if (state) wanted = state;
  if (!viewer.open) viewer.showModal();
  if (scan) {
    if (wanted) takeState();
    return arrange();
  }
  loadViewer();
  return undefined;
}

// Calls back when there is no more to wait for: the data are here, or cannot be had.
function loadViewer(done) {
  if (done) whenLoaded.push(done);
  if (scan) return endLoading();
  if (viewer.querySelector("script")) return undefined;
  part("told").textContent = "loading…";
  const script = document.createElement("script");
  script.src = document.body.dataset.viewer;
  script.onerror = () => {
    script.remove(); // so that it can be tried again
    part("told").textContent = `The viewer's data (${decodeURIComponent(document.body.dataset.viewer)}) are not beside this page: an archive leaves them out`;
    endLoading();
  };
  viewer.append(script);
  return undefined;
}
const whenLoaded = [];
const endLoading = () => whenLoaded.splice(0).forEach((call) => call());
const closeViewer = () => viewer.close();
// As the viewer of the scan before was left; null: closed.
function followViewer(state) {
  if (state) openViewer(state);
  else if (viewer.open) viewer.close();
}
viewer.addEventListener("close", () => tellState());

const unpacked = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

async function inflated(text) {
  const stream = new Blob([unpacked(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The slices of a picture, into the volume; its grey is in each channel.
async function readSheet(text, n, { shape, columns }, volume) {
  const picture = await createImageBitmap(new Blob([unpacked(text)], { type: "image/webp" }), { colorSpaceConversion: "none" });
  const { width, height } = picture;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(picture, 0, 0);
  const [n0, n1, n2] = shape;
  const pixels = pen.getImageData(0, 0, width, height).data;
  const across = width / n0;
  const first = n * columns * rowsOfSheet({ shape, columns });
  for (let k = first, place = 0; k < n2 && Math.floor(place / across) * n1 < height; k += 1, place += 1) {
    const from = (Math.floor(place / across) * n1 * width + (place % across) * n0) * 4;
    for (let y = 0, to = k * n0 * n1; y < n1; y += 1) {
      for (let x = 0, pixel = from + 4 * y * width; x < n0; x += 1, to += 1, pixel += 4) volume[to] = pixels[pixel];
    }
  }
}
// As viewer.py lays the slices out.
const SHEET_PIXELS = 2 ** 24;
const SHEET_SIDE = 4096;
const rowsOfSheet = ({ shape, columns }) => Math.max(1, Math.floor(Math.min(SHEET_SIDE, Math.floor(SHEET_PIXELS / (columns * shape[0]))) / shape[1]));

// Called by the script. Axis 0 runs fastest in the volume.
async function showVolumes(content) {
  const volume = new Uint8Array(content.shape.reduce((a, b) => a * b));
  let mask;
  try {
    [mask] = await Promise.all([inflated(content.mask), ...content.sheets.map((sheet, n) => readSheet(sheet, n, content, volume))]);
  } catch (error) {
    part("told").textContent = `This browser cannot unpack the viewer's data (${error.message})`;
    endLoading();
    return;
  }
  scan = { ...content, mask, volume, sheets: null };
  const [n0, n1] = scan.shape;
  scan.strides = [1, n0, n0 * n1];
  const colours = scan.colours.map(colour);
  scan.fieldColours = Uint8Array.from(Array.from({ length: FIELD_COLOURS }, (_, n) => mixed(colours, n / (FIELD_COLOURS - 1))).flat());
  for (const field of scan.fields) {
    field.bases = [0, 1, 2].map((axis) => basis(field, axis));
    field.own = ownWindow(field);
  }
  part("field").replaceChildren(...scan.fields.map(({ title }, n) => new Option(title, n)));
  part("field").parentElement.hidden = scan.fields.length < 2;
  part("planes").replaceChildren(...scan.planes.map(makePlane), part("notes"));
  part("told").textContent = scan.steps.some((step) => step > 1)
    ? `${scan.steps.join(" × ")} voxels of the file are averaged to one here` : "every voxel of the file";
  part("legend").style.background = `linear-gradient(to right, ${scan.colours.join(", ")})`;
  takeState();
  if (viewer.open) arrange();
  endLoading();
}

function takeState() {
  const state = { ...START, ...(wanted || {}) };
  wanted = null;
  const place = (shares) => shares.map((share, axis) => clamp(Math.round(share * (scan.shape[axis] - 1)), 0, scan.shape[axis] - 1));
  const scale = (scan.displayMax / scan.top) * 255;
  view = {
    ...state, at: place(state.at), centre: state.centre.map((share, axis) => share * (scan.shape[axis] - 1)),
    low: state.low * scale, high: state.high * scale,
    field: Math.min(state.field, scan.fields.length - 1), plane: Math.min(state.plane, scan.planes.length - 1),
  };
}

// The review hands it to the next scan.
function tellState() {
  if (window.parent === window) return;
  let state = null;
  if (viewer.open && view) {
    const shares = (place) => place.map((n, axis) => (scan.shape[axis] > 1 ? n / (scan.shape[axis] - 1) : 0.5));
    const scale = (scan.displayMax / scan.top) * 255;
    state = { ...view, at: shares(view.at), centre: shares(view.centre), low: view.low / scale, high: view.high / scale };
  }
  parent.postMessage({ n4flow: { viewer: state } }, "*");
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// The middle of a voxel of the volume, in voxels of the file; the last one of an axis may hold fewer of them.
function middle(n, axis) {
  const first = n * scan.steps[axis];
  return (first + Math.min(first + scan.steps[axis], scan.fileShape[axis]) - 1) / 2;
}
const placeText = (axis) => `${"ijk"[axis]} ${Math.floor(middle(view.at[axis], axis))}`;

// In mm of the world, or along the axes of the file where these say nothing of the subject.
function mmText() {
  const at = [0, 1, 2].map((axis) => middle(view.at[axis], axis));
  if (scan.planes[0].labels[0]) {
    const world = scan.affine.map(([a, b, c, d]) => a * at[0] + b * at[1] + c * at[2] + d);
    return world.map((mm, n) => `${"xyz"[n]} ${mm.toFixed(1)}`).join(", ") + " mm";
  }
  return at.map((n, axis) => lengthText((n * scan.sizeMm[axis]) / scan.steps[axis])).join(", ");
}

function lengthText(mm) {
  const [size, unit] = [[1000, "m"], [1, "mm"], [1e-3, "µm"], [1e-6, "nm"]].find(([least]) => Math.abs(mm) >= least) || [1, "mm"];
  return `${Number((mm / size).toPrecision(4))} ${unit}`;
}

// Weights of all control points at the centre of each voxel of an axis: uniform cubic B-splines, as in bspline.py. Where planes
// have gains, these are the weights of one more.
function basis({ spans, start, spanVoxels, gains }, axis) {
  const points = spans[axis] ? spans[axis] + 3 : 1;
  const own = gains?.axis === axis ? gains.log : null;
  return Array.from({ length: scan.shape[axis] }, (_, n) => {
    const weights = new Float64Array(points + (own ? 1 : 0));
    if (own) weights[points] = own[Math.floor(middle(n, axis))];
    if (!spans[axis]) {
      weights[0] = 1;
      return weights;
    }
    const p = clamp((middle(n, axis) - start[axis]) / spanVoxels[axis], 0, spans[axis]);
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

const inMask = (voxel) => (scan.mask[voxel >> 3] >> (7 - (voxel & 7))) & 1;

// The window that just holds a field in the mask, on a coarse grid.
function ownWindow(field) {
  const steps = scan.shape.map((n) => Math.max(1, Math.floor(n / 16)));
  let most = 0.002;
  for (let k = 0; k < scan.shape[2]; k += steps[2]) {
    for (let j = 0; j < scan.shape[1]; j += steps[1]) {
      for (let i = 0; i < scan.shape[0]; i += steps[0]) {
        if (inMask(i + j * scan.strides[1] + k * scan.strides[2])) most = Math.max(most, Math.abs(logField(field, [i, j, k])));
      }
    }
  }
  return most;
}

const windowLog = () => (view.own ? scan.fields[view.field].own : scan.windowLog);

// ---------------------------------------------------------------- what the hand does

function makePlane(plane, number) {
  const canvas = Object.assign(document.createElement("canvas"), { tabIndex: 0 });
  canvas.setAttribute("role", "img");
  Object.assign(plane, { canvas, slice: document.createElement("canvas"), fingers: new Map() });
  Object.assign(plane.slice, { width: scan.shape[plane.across], height: scan.shape[plane.up] });
  canvas.addEventListener("focus", () => { view.plane = number; });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", () => toggleLayout("one"));
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button === 1) event.preventDefault(); // no scrolling by the wheel's button
    canvas.focus();
    canvas.setPointerCapture(event.pointerId);
    plane.fingers.set(event.pointerId, event);
    plane.from = { x: event.offsetX, y: event.offsetY, low: view.low, high: view.high, centre: [...view.centre] };
    if (event.button === 0 && plane.fingers.size === 1) drag(plane, event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (plane.fingers.size === 2 && plane.fingers.has(event.pointerId)) pinch(plane, event);
    else if (event.buttons) drag(plane, event);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => plane.fingers.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) zoomAt(plane, event, Math.exp(-event.deltaY / (event.deltaMode ? 10 : 250)));
    else move(plane.normal, -Math.sign(event.deltaY));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const sign = (flipped) => (flipped ? -1 : 1);
    const through = sign(plane.flipNormal);
    const steps = event.shiftKey ? {
      ArrowRight: [plane.across, sign(plane.flipAcross)], ArrowLeft: [plane.across, -sign(plane.flipAcross)],
      ArrowUp: [plane.up, sign(plane.flipUp)], ArrowDown: [plane.up, -sign(plane.flipUp)],
    } : {
      ArrowUp: [plane.normal, through], ArrowRight: [plane.normal, through], ArrowDown: [plane.normal, -through],
      ArrowLeft: [plane.normal, -through], PageUp: [plane.normal, 10 * through], PageDown: [plane.normal, -10 * through],
    };
    if (!steps[event.key]) return;
    event.preventDefault();
    move(...steps[event.key]);
  });
  return canvas;
}

function move(axis, step) {
  view.at[axis] = clamp(view.at[axis] + step, 0, scan.shape[axis] - 1);
  drawPlanes();
}

// The part of a slice that its canvas shows, in voxels from its upper left.
function shownPart({ across, up, flipAcross, flipUp }) {
  const [width, height] = [scan.shape[across], scan.shape[up]];
  const [w, h] = [width / view.zoom, height / view.zoom];
  const x = flipAcross ? width - 1 - view.centre[across] : view.centre[across];
  const y = flipUp ? view.centre[up] : height - 1 - view.centre[up];
  return { x: clamp(x + 0.5 - w / 2, 0, width - w), y: clamp(y + 0.5 - h / 2, 0, height - h), w, h };
}

// The voxel, with fractions, at a place of a canvas: along across and up.
function voxelAt(plane, event) {
  const { canvas, across, up, flipAcross, flipUp } = plane;
  const { x, y, w, h } = shownPart(plane);
  const column = x + (event.offsetX / canvas.clientWidth) * w - 0.5;
  const row = y + (event.offsetY / canvas.clientHeight) * h - 0.5;
  return [flipAcross ? scan.shape[across] - 1 - column : column, flipUp ? row : scan.shape[up] - 1 - row];
}

// Left button: the crosshair. Right button, or with shift: the window; across its width, up and down its middle. Middle
// button, or with ctrl: what is seen moves.
function drag(plane, event) {
  const { canvas, across, up, flipAcross, flipUp, from } = plane;
  if (event.buttons === 4 || event.ctrlKey || event.metaKey) {
    const { w, h } = shownPart(plane);
    const [dx, dy] = [((event.offsetX - from.x) / canvas.clientWidth) * w, ((event.offsetY - from.y) / canvas.clientHeight) * h];
    pan(across, from.centre[across] + (flipAcross ? dx : -dx));
    pan(up, from.centre[up] + (flipUp ? -dy : dy));
  } else if (event.shiftKey || event.buttons === 2) {
    const centre = (from.low + from.high) / 2 + (event.offsetY - from.y) / 2;
    const half = Math.max(1, (from.high - from.low) / 2 + (event.offsetX - from.x) / 2);
    [view.low, view.high] = [clamp(centre - half, 0, 254), clamp(centre + half, 1, 255)];
  } else {
    const [column, row] = voxelAt(plane, event);
    view.at[across] = clamp(Math.round(column), 0, scan.shape[across] - 1);
    view.at[up] = clamp(Math.round(row), 0, scan.shape[up] - 1);
  }
  drawPlanes();
}

// So far that the canvas stays full.
function pan(axis, centre) {
  const half = scan.shape[axis] / view.zoom / 2;
  view.centre[axis] = clamp(centre, half - 0.5, scan.shape[axis] - 0.5 - half);
}

const MOST_ZOOM = 16;

// What lies under the pointer stays there.
function zoomAt(plane, event, factor) {
  const axes = [plane.across, plane.up];
  const before = voxelAt(plane, event);
  view.zoom = clamp(view.zoom * factor, 1, MOST_ZOOM);
  for (const axis of [0, 1, 2]) pan(axis, view.centre[axis]);
  const after = voxelAt(plane, event);
  axes.forEach((axis, n) => pan(axis, view.centre[axis] + before[n] - after[n]));
  drawPlanes();
}

function zoomBy(factor) {
  view.zoom = clamp(view.zoom * factor, 1, MOST_ZOOM);
  for (const axis of [0, 1, 2]) pan(axis, view.at[axis]); // around the crosshair
  drawPlanes();
}

// Two fingers: what is seen grows and moves with them.
function pinch(plane, event) {
  const other = [...plane.fingers].find(([id]) => id !== event.pointerId)[1];
  const old = plane.fingers.get(event.pointerId);
  const apart = (a) => Math.max(20, Math.hypot(a.offsetX - other.offsetX, a.offsetY - other.offsetY));
  const between = (a) => ({ offsetX: (a.offsetX + other.offsetX) / 2, offsetY: (a.offsetY + other.offsetY) / 2 });
  const moved = voxelAt(plane, between(old));
  zoomAt(plane, between(event), apart(event) / apart(old));
  const now = voxelAt(plane, between(event));
  [plane.across, plane.up].forEach((axis, n) => pan(axis, view.centre[axis] + moved[n] - now[n]));
  plane.fingers.set(event.pointerId, event);
  drawPlanes();
}

// ---------------------------------------------------------------- what is drawn

const FIELD_COLOURS = 513;
const short = (value) => String(Number(value.toPrecision(4)));
const colour = (hex) => [1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16));
const mixed = (colours, share) => {
  const place = clamp(share, 0, 1) * (colours.length - 1);
  const [low, high, t] = [colours[Math.floor(place)], colours[Math.ceil(place)], place % 1];
  return low.map((from, n) => from + t * (high[n] - from));
};

// The colours of stored values, three bytes for each: grey in the window, or steep colours over the brighter part of it.
function colourTable() {
  const width = Math.max(1, view.high - view.low);
  const steep = scan.steep.map(colour);
  const table = new Uint8ClampedArray(3 * 256);
  for (let n = 0; n < 256; n += 1) {
    const share = (n - view.low) / width;
    if (!view.steep) table.fill(255 * clamp(share, 0, 1), 3 * n, 3 * n + 3);
    else if (share < scan.steepFrom) table.fill((80 * Math.max(0, share)) / scan.steepFrom, 3 * n, 3 * n + 3);
    else table.set(mixed(steep, (share - scan.steepFrom) / (1 - scan.steepFrom)), 3 * n);
  }
  return table;
}

function drawPlanes() {
  const table = colourTable();
  for (const plane of scan.planes) if (!plane.canvas.hidden) drawPlane(plane, table);
  const at = view.at;
  const stored = scan.volume[at[0] * scan.strides[0] + at[1] * scan.strides[1] + at[2] * scan.strides[2]];
  const ratios = scan.fields.map((field) => Math.exp(logField(field, at)));
  const corrected = (stored / 255) * scan.top;
  const values = [["original", corrected * ratios[0]], ["corrected", corrected]]
    .map(([name, value]) => `${name} ${stored === 255 ? "≥" : "≈"} ${Number(value.toPrecision(3))}`).join(" · ");
  const place = [0, 1, 2].map(placeText).join(", ");
  const fields = scan.fields.map(({ title }, n) => `${title} ×${ratios[n].toFixed(3)}`).join(" · ");
  const log = windowLog();
  const unit = scan.top / 255;
  part("readout").textContent = `${place} · ${mmText()} · ${values} · ${fields}`;
  part("swap").textContent = view.image;
  for (const name of ["overlay", "mask", "steep", "own"]) part(name).setAttribute("aria-pressed", String(view[name]));
  part("low").value = view.low;
  part("high").value = view.high;
  part("opacity").value = 100 * view.opacity;
  part("field").value = view.field;
  part("window").textContent = `${short(view.low * unit)} to ${short(view.high * unit)}`;
  part("zoom").textContent = `× ${Number(view.zoom.toPrecision(2))}`;
  part("legend-low").textContent = `×${Number(Math.exp(-log).toPrecision(3))}`;
  part("legend-high").textContent = `×${Number(Math.exp(log).toPrecision(3))}`;
  tellState();
}

// The pixels of a slice, from its upper left, unless they are there already.
function paint(plane, table) {
  const { slice, normal, across, up, flipAcross, flipUp } = plane;
  const { strides, shape, volume } = scan;
  const shown = JSON.stringify([view.at[normal], view.image, view.overlay, view.mask, view.steep, view.own, view.opacity, view.field, view.low, view.high]);
  if (plane.painted === shown) return;
  plane.painted = shown;
  const [width, height] = [shape[across], shape[up]];
  plane.picture ||= new ImageData(new Uint8ClampedArray(4 * width * height).fill(255), width, height);
  const pixels = plane.picture.data;
  const ratio = view.image === "original" ? fieldSlice(scan.fields[0], plane) : null;
  const field = view.overlay ? fieldSlice(scan.fields[view.field], plane) : null;
  const half = (FIELD_COLOURS - 1) / 2;
  const perLog = half / windowLog();
  const [keep, over] = [1 - view.opacity, view.opacity];
  const through = view.at[normal] * strides[normal];
  const step = flipAcross ? -strides[across] : strides[across];
  for (let y = 0, pixel = 0; y < height; y += 1) {
    const row = flipUp ? y : height - 1 - y; // superior or anterior is up
    let voxel = through + row * strides[up] + (flipAcross ? (width - 1) * strides[across] : 0);
    let place = row * width + (flipAcross ? width - 1 : 0);
    for (let x = 0; x < width; x += 1, pixel += 4, voxel += step, place += flipAcross ? -1 : 1) {
      let stored = volume[voxel];
      if (ratio && stored) stored = Math.min(255, Math.round(stored * Math.exp(ratio[place])));
      stored *= 3;
      let red = table[stored];
      let green = table[stored + 1];
      let blue = table[stored + 2];
      if ((field || view.mask) && inMask(voxel)) {
        if (field) {
          const colours = 3 * Math.round(clamp(half + field[place] * perLog, 0, 2 * half));
          red = keep * red + over * scan.fieldColours[colours];
          green = keep * green + over * scan.fieldColours[colours + 1];
          blue = keep * blue + over * scan.fieldColours[colours + 2];
        }
        if (view.mask) {
          red = 0.6 * red + 102;
          green = 0.6 * green + 78;
          blue *= 0.6;
        }
      }
      pixels[pixel] = red;
      pixels[pixel + 1] = green;
      pixels[pixel + 2] = blue;
    }
  }
  slice.getContext("2d").putImageData(plane.picture, 0, 0);
}

function drawPlane(plane, table) {
  paint(plane, table);
  const { canvas, slice, normal, across, up, flipAcross, flipUp, labels, name } = plane;
  const [width, height] = [scan.shape[across], scan.shape[up]];
  const pen = canvas.getContext("2d");
  const ratio = window.devicePixelRatio || 1;
  const seen = shownPart(plane);
  const size = canvas.width / seen.w; // of a voxel
  pen.imageSmoothingEnabled = size < 6 * ratio; // a voxel that is that large is shown as one
  pen.imageSmoothingQuality = "high";
  pen.drawImage(slice, seen.x, seen.y, seen.w, seen.h, 0, 0, canvas.width, canvas.height);
  const x = (((flipAcross ? width - 1 - view.at[across] : view.at[across]) + 0.5 - seen.x) / seen.w) * canvas.width;
  const y = (((flipUp ? view.at[up] : height - 1 - view.at[up]) + 0.5 - seen.y) / seen.h) * canvas.height;
  pen.strokeStyle = "#ffd23c";
  pen.lineWidth = ratio;
  const gap = Math.max(12 * ratio, size); // nothing over the voxel itself
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
  drawScaleBar(pen, canvas, scan.sizeMm[across] / size, ratio, write);
  const turned = left ? `; ${left} is on the left, ${upper} on top` : "";
  canvas.setAttribute("aria-label", `${name} plane of the ${view.image} image, ${place}${turned}`);
}

// A round length of at most a quarter of the canvas, lower left.
function drawScaleBar(pen, canvas, mmPerPixel, ratio, write) {
  const most = (canvas.width / 4) * mmPerPixel;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].find((step) => step * power <= most) * power;
  const [x, y, width] = [6 * ratio, canvas.height - 8 * ratio, length / mmPerPixel];
  pen.strokeRect(x, y, width, 2 * ratio);
  pen.fillRect(x, y, width, 2 * ratio);
  write(lengthText(length), x, y - 4 * ratio, "left", "bottom");
}

// ---------------------------------------------------------------- where the planes lie

const mm = (axis) => scan.shape[axis] * scan.sizeMm[axis];

// The planes that are shown, in columns and rows: side by side; in two rows, whose planes have their axes in common; or one.
function layouts() {
  const { planes } = scan;
  const found = { row: [planes] };
  if (planes.length === 3) found.grid = [[planes[1], planes[2]], [planes[0]]];
  found.one = [[planes[view.plane]]];
  return found;
}

function scaleOf(rows, room) {
  const columns = Math.max(...rows.map((row) => row.length));
  const widths = Array.from({ length: columns }, (_, n) => Math.max(...rows.map((row) => (row[n] ? mm(row[n].across) : 0))));
  const heights = rows.map((row) => Math.max(...row.map(({ up }) => mm(up))));
  const total = (lengths) => lengths.reduce((sum, length) => sum + length, 0);
  return Math.min((room.width - 8 * (columns - 1)) / total(widths), (room.height - 8 * (rows.length - 1)) / total(heights));
}

// In one scale, as large as the window allows: in the layout that was chosen, or the one that gives more.
function arrange() {
  if (!viewer.open || !scan) return;
  const place = part("planes");
  const room = { width: viewer.clientWidth - 24, height: viewer.clientHeight - place.offsetTop - 34 };
  const all = layouts();
  const best = all.grid && scaleOf(all.grid, room) > scaleOf(all.row, room) ? "grid" : "row";
  const rows = all[view.layout] || all[best];
  const scale = scaleOf(rows, room);
  const ratio = window.devicePixelRatio || 1;
  for (const { canvas } of scan.planes) canvas.hidden = true;
  rows.forEach((row, r) => row.forEach(({ canvas, across, up }, c) => {
    const [width, height] = [Math.max(1, scale * mm(across)), Math.max(1, scale * mm(up))];
    canvas.hidden = false;
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px`, gridArea: `${r + 1} / ${c + 1}` });
    Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  }));
  part("notes").style.gridArea = rows === all.grid ? "2 / 2" : `${rows.length + 1} / 1 / auto / -1`;
  part("layout").setAttribute("aria-pressed", String(rows === all.grid));
  place.style.gridTemplateColumns = `repeat(${rows[0].length}, max-content)`;
  drawPlanes();
  if (!viewer.contains(document.activeElement) || document.activeElement === viewer || document.activeElement === document.body
      || document.activeElement.hidden || document.activeElement === part("swap")) scan.planes[view.plane].canvas.focus();
}
window.addEventListener("resize", arrange);

function toggleLayout(layout) {
  view.layout = view.layout === layout ? "" : layout;
  arrange();
}

// ---------------------------------------------------------------- keys and controls

let swappedAt = -Infinity;
function swapViewed(key) {
  if (performance.now() - swappedAt < 170) return; // never above 3 Hz
  swappedAt = performance.now();
  const modes = { b: "overlay", m: "mask", s: "steep", w: "own" };
  if (modes[key]) view[modes[key]] = !view[modes[key]];
  else view.image = view.image === "original" ? "corrected" : "original";
  if (key === "w") view.overlay = true;
  drawPlanes();
}

const VIEWER_KEYS = {
  v: closeViewer,
  l: () => toggleLayout(view.layout === "grid" || part("layout").getAttribute("aria-pressed") === "true" ? "row" : "grid"),
  r: () => {
    [view.low, view.high] = [0, (scan.displayMax / scan.top) * 255];
    drawPlanes();
  },
  "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: () => zoomBy(0),
};
// Of the page's keys, those that mean something else while the viewer is open.
function viewerKey(key) {
  if (key === "v") closeViewer();
  else if ([" ", "b", "m", "s", "w"].includes(key)) {
    if (scan) swapViewed(key);
  } else if (Object.hasOwn(VIEWER_KEYS, key)) {
    if (scan) VIEWER_KEYS[key]();
  } else return false;
  return true;
}
for (const button of viewer.querySelectorAll("button[data-viewer-key]")) {
  button.addEventListener("click", () => viewerKey(button.dataset.viewerKey));
}
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
