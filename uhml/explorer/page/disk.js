// The Poincaré disk. Points are set pixel by pixel in an ImageData: 60,000 take a few milliseconds on any machine, with or
// without a GPU. Thumbnails, geodesics and the rim are drawn over them.

const ZOOM_MOST = 400;
const FRINGE = 0.95; // a hand beyond this part of the disk would move it too far
const canvas = byId("disk");
const pen = canvas.getContext("2d");
const dots = document.createElement("canvas");
const dotsPen = dots.getContext("2d");
const stillPlease = matchMedia("(prefers-reduced-motion: reduce)");

const screen = new Float32Array(2 * n); // device pixels; NaN off the canvas
const dotSize = Math.min(4, Math.max(1.5, 220 / Math.sqrt(n)));
let view = { moebius: IDENTITY, zoom: 1 };
let look = { coloring: null, lit: null, picture: -1, links: [], landmarks: [] }; // what update() was given
let tiles = []; // thumbnails drawn, [picture, x, y, half size]
let pixels = null;
let frame = 0;
let flight = 0;

const ratio = () => Math.min(2, devicePixelRatio);
const diskRadius = () => 0.47 * Math.min(canvas.width, canvas.height) * view.zoom;
const toScreen = ([x, y]) => [canvas.width / 2 + x * diskRadius(), canvas.height / 2 - y * diskRadius()];
const toDisk = (x, y) => [(x * ratio() - canvas.width / 2) / diskRadius(), (canvas.height / 2 - y * ratio()) / diskRadius()];
const inFringe = ([x, y]) => {
  const scale = Math.min(1, FRINGE / Math.hypot(x, y));
  return [x * scale, y * scale];
};

function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    draw();
  });
}

new ResizeObserver(() => {
  canvas.width = dots.width = Math.round(canvas.clientWidth * ratio());
  canvas.height = dots.height = Math.round(canvas.clientHeight * ratio());
  pixels = canvas.width && canvas.height ? dotsPen.createImageData(dots.width, dots.height) : null;
  if (pixels) draw(); // at once: a canvas is empty after it was sized
}).observe(canvas);

/** Coverage of the pixels around a dot's middle, as [offset x, offset y, 0..255]. */
function makeStamp(radius) {
  const reach = Math.ceil(radius + 0.5);
  const stamp = [];
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const cover = Math.min(1, Math.max(0, radius + 0.5 - Math.hypot(x, y)));
      if (cover > 0) stamp.push(x, y, cover * 255);
    }
  }
  return Int16Array.from(stamp);
}

const stamps = new Map();
function stampOf(radius) {
  const key = Math.round(radius * 4);
  if (!stamps.has(key)) stamps.set(key, makeStamp(key / 4));
  return stamps.get(key);
}

/** Set all dots; returns how many are on the screen. */
function drawDots() {
  const { width, height, data } = pixels;
  data.fill(0);
  const [ar, ai, br, bi] = view.moebius;
  const disk = arrays.disk.data;
  const { rgb } = look.coloring;
  const scale = diskRadius();
  const size = Math.min(6, dotSize * (1 + 0.25 * Math.log2(view.zoom))) * ratio();
  const bySize = Array.from({ length: 9 }, (_, i) => stampOf(size * (0.45 + (0.55 * i) / 8)));
  let visible = 0;
  // Dots that are not selected come first, to lie under the others.
  for (const pass of look.lit ? [0, 1] : [1]) {
    for (let picture = 0; picture < n; picture++) {
      if (look.lit && look.lit[picture] !== pass) continue;
      const x = disk[2 * picture];
      const y = disk[2 * picture + 1];
      const pr = ar * x - ai * y + br;
      const pi = ar * y + ai * x + bi;
      const qr = br * x + bi * y + ar;
      const qi = br * y - bi * x - ai;
      const q = qr * qr + qi * qi;
      const wx = (pr * qr + pi * qi) / q;
      const wy = (pi * qr - pr * qi) / q;
      const sx = Math.round(width / 2 + wx * scale);
      const sy = Math.round(height / 2 - wy * scale);
      if (!(sx > 8 && sy > 8 && sx < width - 8 && sy < height - 8)) {
        screen[2 * picture] = NaN;
        continue;
      }
      screen[2 * picture] = sx;
      screen[2 * picture + 1] = sy;
      const near = Math.max(0, 1 - wx * wx - wy * wy);
      visible++;
      const stamp = bySize[Math.round(8 * near)];
      const strength = pass ? 0.9 : 0.14;
      for (let i = 0; i < stamp.length; i += 3) {
        const at = 4 * ((sy + stamp[i + 1]) * width + sx + stamp[i]);
        const cover = stamp[i + 2] * strength;
        const under = data[at + 3];
        const alpha = cover + under * (1 - cover / 255);
        const share = cover / alpha;
        data[at] += (rgb[3 * picture] - data[at]) * share;
        data[at + 1] += (rgb[3 * picture + 1] - data[at + 1]) * share;
        data[at + 2] += (rgb[3 * picture + 2] - data[at + 2]) * share;
        data[at + 3] = alpha;
      }
    }
  }
  dotsPen.putImageData(pixels, 0, 0);
  return visible;
}

function line(points) {
  pen.beginPath();
  for (const point of points) pen.lineTo(...toScreen(point));
  pen.stroke();
}

/** The rim, and circles and geodesics around the origin of the space: they show where it is after a move. */
function drawSpace(ink) {
  pen.strokeStyle = ink;
  pen.lineWidth = ratio();
  pen.globalAlpha = 0.1;
  const origin = move(view.moebius, [0, 0]);
  const away = Math.hypot(...origin);
  for (const distance of [1, 2, 3, 4, 5]) {
    // A circle stays a circle; its far and near ends lie on the line through the middle.
    const r = Math.tanh(distance / 2);
    const [far, near] = [(away + r) / (1 + away * r), (away - r) / (1 - away * r)];
    const middle = (far + near) / 2 / (away || 1);
    pen.beginPath();
    pen.arc(...toScreen([origin[0] * middle, origin[1] * middle]), ((far - near) / 2) * diskRadius(), 0, 2 * Math.PI);
    pen.stroke();
  }
  for (let i = 0; i < 6; i++) {
    const end = [0.9999 * Math.cos((i * Math.PI) / 6), 0.9999 * Math.sin((i * Math.PI) / 6)];
    line(geodesic(move(view.moebius, end), move(view.moebius, [-end[0], -end[1]]), 48));
  }
  pen.globalAlpha = 0.5;
  pen.beginPath();
  pen.arc(canvas.width / 2, canvas.height / 2, diskRadius(), 0, 2 * Math.PI);
  pen.stroke();
  pen.globalAlpha = 1;
}

const diskTiles = new Map(); // picture -> canvas, least recently used first
const DISK_TILES = 400;

function diskTile(picture) {
  let image = diskTiles.get(picture);
  diskTiles.delete(picture);
  if (!image) {
    image = document.createElement("canvas");
    const shown = image;
    paintTile(image, picture, () => diskTiles.get(picture) === shown && !byId("disk-view").hidden, () => {
      shown.ready = true;
      redraw();
    });
    if (diskTiles.size >= DISK_TILES) diskTiles.delete(diskTiles.keys().next().value);
  }
  diskTiles.set(picture, image);
  return image;
}

/**
 * Thumbnails where there is room: those of the largest clusters while there are many dots, all when few are near.
 * Each lies on its own picture's place.
 */
function drawTiles(visible, ink) {
  const few = visible <= 600;
  const half = (few ? 26 : 21) * ratio();
  const apart = half * (few ? 2.1 : 3.2);
  const most = few ? 150 : 40;
  tiles = [];
  const seen = new Set();
  const add = (picture) => {
    const [x, y] = [screen[2 * picture], screen[2 * picture + 1]];
    if (tiles.length >= most || Number.isNaN(x) || seen.has(picture) || (look.lit && !look.lit[picture])) return;
    seen.add(picture);
    const depth = 1 - ((x - canvas.width / 2) ** 2 + (y - canvas.height / 2) ** 2) / diskRadius() ** 2;
    if (depth < 0.04) return; // at the rim everything is small
    if (tiles.some(([, tx, ty]) => Math.abs(tx - x) < apart && Math.abs(ty - y) < apart)) return;
    const image = diskTile(picture);
    if (image.ready) tiles.push([picture, x, y, half * (0.6 + 0.4 * depth)]);
  };
  if (look.picture >= 0) for (const picture of [look.picture, ...look.links]) add(picture);
  for (const picture of look.landmarks) add(picture);
  if (few) for (let picture = 0; picture < n; picture++) add(picture);
  const { rgb } = look.coloring;
  for (const [picture, x, y, size] of tiles) {
    const frameWidth = 2 * ratio();
    pen.fillStyle = picture === look.picture ? ink : `rgb(${rgb[3 * picture]} ${rgb[3 * picture + 1]} ${rgb[3 * picture + 2]})`;
    pen.beginPath();
    pen.roundRect(x - size - frameWidth, y - size - frameWidth, 2 * (size + frameWidth), 2 * (size + frameWidth), 4 * ratio());
    pen.fill();
    pen.drawImage(diskTile(picture), x - size, y - size, 2 * size, 2 * size);
  }
}

/** The chosen picture's way up the tree as geodesics between the places of its clusters, and rings around its neighbours. */
function drawChosen(ink) {
  const { picture, path, links } = look;
  if (picture < 0) return;
  pen.strokeStyle = pen.fillStyle = ink;
  pen.lineWidth = 1.5 * ratio();
  const stations = [place(picture), ...path].map((point) => move(view.moebius, point));
  for (let i = 1; i < stations.length; i++) {
    line(geodesic(stations[i - 1], stations[i]));
    const [x, y] = toScreen(stations[i]);
    pen.beginPath();
    pen.arc(x, y, 3.5 * ratio(), 0, 2 * Math.PI);
    pen.fill();
  }
  for (const linked of [picture, ...links]) {
    pen.beginPath();
    pen.arc(...toScreen(move(view.moebius, place(linked))), (linked === picture ? 8 : 5) * ratio(), 0, 2 * Math.PI);
    pen.stroke();
  }
}

function draw() {
  if (!pixels || !look.coloring) return;
  const ink = getComputedStyle(canvas).color;
  const visible = drawDots();
  pen.clearRect(0, 0, canvas.width, canvas.height);
  drawSpace(ink);
  pen.drawImage(dots, 0, 0);
  drawChosen(ink);
  drawTiles(visible, ink);
  if (canvas.matches(":focus-visible")) {
    const [x, y, arm] = [canvas.width / 2, canvas.height / 2, 9 * ratio()];
    pen.strokeStyle = ink;
    pen.beginPath();
    pen.moveTo(x - arm, y);
    pen.lineTo(x + arm, y);
    pen.moveTo(x, y - arm);
    pen.lineTo(x, y + arm);
    pen.stroke();
  }
}

/** The picture at a place of the canvas in CSS pixels: a thumbnail there, or a dot within reach, or -1. */
function pick(x, y, reach = 12) {
  const [px, py] = [x * ratio(), y * ratio()];
  const over = tiles.findLast(([, tx, ty, half]) => Math.abs(tx - px) <= half && Math.abs(ty - py) <= half);
  if (over) return over[0];
  let [best, nearest] = [-1, (reach * ratio()) ** 2];
  for (let picture = 0; picture < n; picture++) {
    const distance = (screen[2 * picture] - px) ** 2 + (screen[2 * picture + 1] - py) ** 2;
    if (distance < nearest) [best, nearest] = [picture, distance];
  }
  return best;
}

const diskCenter = () => move(inverse(view.moebius), [0, 0]);

function setView(moebius, zoom = view.zoom) {
  view = { moebius, zoom: Math.min(ZOOM_MOST, Math.max(1, zoom)) };
  redraw();
}

/** Move so that what is at `from` comes to `to`, both places of the canvas as points of the disk. */
function drag(from, to) {
  setView(compose(translationBetween(inFringe(from), inFringe(to)), view.moebius));
}

/** Zoom, with the place under the pointer held. */
function zoomAt(factor, x, y) {
  const from = toDisk(x, y);
  setView(view.moebius, view.zoom * factor);
  if (Math.hypot(...from) < FRINGE) drag(from, toDisk(x, y));
}

function land(moebius, zoom) {
  cancelAnimationFrame(flight);
  setView(moebius, zoom);
  diskMoved();
}

/** Fly along the geodesic until a point of the space is in the middle. */
function flyTo(point, zoom = view.zoom) {
  cancelAnimationFrame(flight);
  const from = view;
  const target = move(from.moebius, point);
  const at = (share) => [compose(inverse(translation(towards(target, share))), from.moebius), from.zoom * (zoom / from.zoom) ** share];
  if (stillPlease.matches) return land(...at(1));
  const start = performance.now();
  const step = (now) => {
    const t = Math.min(1, Math.max(0, (now - start) / 600));
    if (t === 1) return land(...at(1));
    setView(...at(t * t * (3 - 2 * t)));
    flight = requestAnimationFrame(step);
  };
  flight = requestAnimationFrame(step);
}

const resetDisk = () => flyTo([0, 0], 1);

/** Bring a cluster to the middle, so large that most of it fills half of the disk's radius on the screen. */
function flyToCluster(clustering, level, cluster) {
  const center = clustering.centroid(level, cluster);
  const back = inverse(translation(center));
  const reach = Array.from(clustering.members(level, cluster), (picture) => Math.hypot(...move(back, place(picture)))).sort((a, b) => a - b);
  flyTo(center, Math.min(40, Math.max(1, 0.55 / (reach[Math.floor(0.8 * reach.length)] || 1))));
}

/** Fly to a picture unless it is well in sight. */
function showInDisk(picture) {
  const [x, y] = toScreen(move(view.moebius, place(picture)));
  const [dx, dy] = [x / canvas.width - 0.5, y / canvas.height - 0.5];
  const far = Math.hypot(...move(view.moebius, place(picture))) > 0.85;
  if (far || Math.abs(dx) > 0.4 || Math.abs(dy) > 0.4) flyTo(place(picture));
}

function updateDisk(changes) {
  look = { ...look, ...changes };
  redraw();
}

// Hands: one pointer drags, two pinch, the wheel zooms.
const pointers = new Map();
let dragged = false;
let pressed = null;
let wheelEnd = 0;
const offset = (event) => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

canvas.addEventListener("pointerdown", (event) => {
  cancelAnimationFrame(flight);
  canvas.setPointerCapture(event.pointerId);
  if (!pointers.size) [dragged, pressed] = [false, offset(event)];
  pointers.set(event.pointerId, offset(event));
  showHint(-1);
});

canvas.addEventListener("pointermove", (event) => {
  const to = offset(event);
  if (!pointers.has(event.pointerId)) return showHint(pick(...to), to);
  const before = [...pointers.values()];
  if (!dragged && before.length === 1 && Math.hypot(to[0] - pressed[0], to[1] - pressed[1]) < 4) return; // a click may tremble
  dragged = true;
  pointers.set(event.pointerId, to);
  const after = [...pointers.values()];
  const middle = (points) => [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);
  const spread = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]);
  if (after.length === 2) zoomAt(spread(after) / Math.max(1, spread(before)), ...middle(before));
  drag(toDisk(...middle(before)), toDisk(...middle(after)));
});

for (const type of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(type, (event) => {
    pointers.delete(event.pointerId);
    if (dragged) diskMoved();
  });
}
canvas.addEventListener("pointerleave", () => showHint(-1));

// A double click is two clicks before it is one: only the first opens, and the place is that of the first.
let clicked = null;
canvas.addEventListener("click", (event) => {
  if (dragged || event.detail > 1) return;
  clicked = move(inverse(view.moebius), inFringe(toDisk(...offset(event))));
  const picture = pick(...offset(event));
  if (picture >= 0) openPicture(picture, canvas);
});
canvas.addEventListener("dblclick", () => clicked && flyTo(clicked, view.zoom * 1.5));

canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  cancelAnimationFrame(flight);
  const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
  zoomAt(Math.exp(-Math.max(-200, Math.min(200, event.deltaY * lines)) / 400), ...offset(event));
  clearTimeout(wheelEnd);
  wheelEnd = setTimeout(diskMoved, 200);
}, { passive: false });

canvas.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const step = 0.12 / view.zoom;
  const way = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  const [middleX, middleY] = [canvas.clientWidth / 2, canvas.clientHeight / 2];
  if (way) drag([0, 0], way);
  else if (event.key === "+" || event.key === "=") zoomAt(1.3, middleX, middleY);
  else if (event.key === "-") zoomAt(1 / 1.3, middleX, middleY);
  else if (event.key === "Home") resetDisk();
  else if (event.key === "Enter") {
    const picture = pick(middleX, middleY, Infinity);
    if (picture < 0) return;
    flyTo(place(picture));
    openPicture(picture, canvas);
  } else return;
  event.preventDefault();
  if (event.key === "Home" || event.key === "Enter") return;
  diskMoved();
});
canvas.addEventListener("focus", redraw);
canvas.addEventListener("blur", redraw);

/** A picture and its name beside the pointer. */
function showHint(picture, [x, y] = [0, 0]) {
  const hint = byId("hint");
  hint.hidden = picture < 0;
  canvas.classList.toggle("over", picture >= 0);
  if (picture < 0) return;
  if (Number(hint.dataset.shown) !== picture) {
    hint.dataset.shown = picture;
    fill(hint, tile(picture), h("span", {}, h("b", { class: "name" }, fileName(picture)), labels ? h("span", { class: "name" }, labelOf(picture)) : null));
  }
  hint.style.left = `${Math.max(4, Math.min(x + 16, canvas.clientWidth - hint.offsetWidth - 8))}px`;
  hint.style.top = `${y + 16 + hint.offsetHeight > canvas.clientHeight ? y - 16 - hint.offsetHeight : y + 16}px`;
}
