// The Poincaré disk. Points are set pixel by pixel in an ImageData: 60,000 take a few milliseconds on any machine, with or
// without a GPU. Thumbnails, geodesics and the rim are drawn over them.

const ZOOM_MOST = 2.5; // pictures are spread evenly over the space, and more zoom would show few or none
const TILE_HALF = 30; // half the side of a thumbnail in the middle, CSS pixels
const TILE_LEAST = 6;
const TILES_MOST = 250;
const FRINGE = 0.95; // a hand beyond this part of the disk would move it too far
const canvas = byId("disk");
const pen = canvas.getContext("2d");
const dots = document.createElement("canvas");
const dotsPen = dots.getContext("2d");
const stillPlease = matchMedia("(prefers-reduced-motion: reduce)");

const screen = new Float32Array(2 * n); // device pixels; NaN off the canvas
const dotSize = Math.min(4, Math.max(1.5, 220 / Math.sqrt(n)));
const outwards = everything.slice().sort((a, b) => Math.hypot(...place(a)) - Math.hypot(...place(b)));
let view = { moebius: IDENTITY, zoom: 1 };
let look = { coloring: null, lit: null, picture: -1, path: [], links: [] }; // what update() was given
let tiles = []; // thumbnails drawn, [picture, x, y, half size]
let pixels = null;
let frame = 0;
let flight = 0;
let resting = 0;

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

function drawDots() {
  const { width, height, data } = pixels;
  data.fill(0);
  const [ar, ai, br, bi] = view.moebius;
  const disk = arrays.disk.data;
  const { rgb } = look.coloring;
  const scale = diskRadius();
  const size = Math.min(6, dotSize * (1 + 0.25 * Math.log2(view.zoom))) * ratio();
  const bySize = Array.from({ length: 9 }, (_, i) => stampOf(size * (0.45 + (0.55 * i) / 8)));
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

/**
 * Thumbnails where there is room, each at its own picture's place and smaller towards the rim. Pictures near the origin of
 * the space go first: they stand for the largest clusters.
 */
function drawTiles(ink, ground) {
  const most = TILE_HALF * Math.min(2, Math.sqrt(view.zoom)) * ratio();
  const radius = diskRadius();
  tiles = [];
  const missing = [];
  const add = (picture, unlit) => {
    const [x, y] = [screen[2 * picture], screen[2 * picture + 1]];
    const depth = 1 - ((x - canvas.width / 2) ** 2 + (y - canvas.height / 2) ** 2) / radius ** 2;
    const half = most * depth;
    if (!(half > TILE_LEAST * ratio())) return; // nor if x is NaN
    if (look.lit && !look.lit[picture] && !unlit) return;
    if (tiles.some(([, tx, ty, other]) => Math.abs(tx - x) < half + other && Math.abs(ty - y) < half + other)) return;
    tiles.push([picture, x, y, half]);
    if (!cutTiles.has(picture)) missing.push(picture);
  };
  if (look.picture >= 0) for (const picture of [look.picture, ...look.links]) add(picture, true);
  for (const picture of outwards) {
    if (tiles.length >= TILES_MOST) break;
    add(picture, false);
  }
  const { rgb } = look.coloring;
  const edge = Math.ceil(1.5 * ratio());
  for (const [picture, x, y, half] of tiles) {
    const size = Math.round(half * 0.94); // whole pixels: a frame of 1.5 is uneven
    const inner = 2 * (size - edge);
    pen.fillStyle = picture === look.picture ? ink : `rgb(${rgb[3 * picture]} ${rgb[3 * picture + 1]} ${rgb[3 * picture + 2]})`;
    pen.beginPath();
    pen.roundRect(x - size, y - size, 2 * size, 2 * size, 3 * ratio());
    pen.fill();
    if (cutTiles.has(picture)) pen.drawImage(use(cutTiles, picture), x - size + edge, y - size + edge, inner, inner);
    else {
      pen.fillStyle = ground;
      pen.fillRect(x - size + edge, y - size + edge, inner, inner);
    }
  }
  cut(missing, redraw);
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
  const { color: ink, backgroundColor: ground } = getComputedStyle(canvas);
  drawDots();
  pen.clearRect(0, 0, canvas.width, canvas.height);
  drawSpace(ink);
  pen.drawImage(dots, 0, 0);
  drawChosen(ink);
  drawTiles(ink, ground);
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
  clearTimeout(resting);
  resting = setTimeout(diskMoved, 300); // browsers refuse to have the URL changed in every frame
}

/** Move so that what is at `from` comes to `to`, both places of the canvas as points of the disk. */
function drag(from, to) {
  setView(compose(translationBetween(inFringe(from), inFringe(to)), view.moebius));
}

/** Zoom, with the place under the pointer held. Beyond the limits it goes on as a way: into the place, or back to the origin. */
function zoomAt(factor, x, y) {
  const from = toDisk(x, y);
  if (factor < 1 && view.zoom === 1) {
    const origin = move(view.moebius, [0, 0]);
    setView(compose(translationBetween(origin, towards(origin, factor)), view.moebius));
  } else if (factor > 1 && view.zoom === ZOOM_MOST) {
    drag(from, towards(inFringe(from), 1 / factor));
  } else {
    setView(view.moebius, view.zoom * factor);
    drag(from, toDisk(x, y));
  }
}

/** Fly along the geodesic until a point of the space is in the middle. */
function flyTo(point, zoom = view.zoom) {
  cancelAnimationFrame(flight);
  const from = view;
  const target = move(from.moebius, point);
  const at = (share) => {
    const onTheWay = inverse(translation(towards(target, share)));
    return [compose(onTheWay, from.moebius), from.zoom * (zoom / from.zoom) ** share];
  };
  if (stillPlease.matches) return setView(...at(1));
  const start = performance.now();
  const step = (now) => {
    const t = Math.min(1, Math.max(0, (now - start) / 600));
    setView(...at(t * t * (3 - 2 * t)));
    if (t < 1) flight = requestAnimationFrame(step);
  };
  flight = requestAnimationFrame(step);
}

const resetDisk = () => flyTo([0, 0], 1);

/** Bring a cluster to the middle, so large that most of it fills half of the disk's radius on the screen. */
function flyToCluster(clustering, level, cluster) {
  const members = clustering.members(level, cluster);
  const center = hyperbolicMean(members);
  const back = inverse(translation(center));
  const reach = Array.from(members, (picture) => Math.hypot(...move(back, place(picture)))).sort((a, b) => a - b);
  flyTo(center, Math.min(ZOOM_MOST, Math.max(1, 0.55 / (reach[Math.floor(0.8 * reach.length)] || 1))));
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
