// Isometries of the Poincaré disk, w = (a z + b) / (conj(b) z + conj(a)) with |a|² - |b|² = 1, as [re a, im a, re b, im b],
// and points as [x, y].

const IDENTITY = [1, 0, 0, 0];

function move([ar, ai, br, bi], [x, y]) {
  const [pr, pi] = [ar * x - ai * y + br, ar * y + ai * x + bi];
  const [qr, qi] = [br * x + bi * y + ar, br * y - bi * x - ai];
  const q = qr * qr + qi * qi;
  return [(pr * qr + pi * qi) / q, (pi * qr - pr * qi) / q];
}

/** First `inner`, then `outer`. Scaled anew each time: rounding would leave the isometries after many drags. */
function compose([ar, ai, br, bi], [cr, ci, dr, di]) {
  const [er, ei] = [ar * cr - ai * ci + br * dr + bi * di, ar * ci + ai * cr + bi * dr - br * di];
  const [fr, fi] = [ar * dr - ai * di + br * cr + bi * ci, ar * di + ai * dr + bi * cr - br * ci];
  const scale = 1 / Math.sqrt(er * er + ei * ei - fr * fr - fi * fi);
  return [er * scale, ei * scale, fr * scale, fi * scale];
}

const inverse = ([ar, ai, br, bi]) => [ar, -ai, -br, -bi];

/** z -> (z + t) / (1 + conj(t) z): the origin goes to t, without a turn. */
function translation([x, y]) {
  const scale = 1 / Math.sqrt(1 - x * x - y * y);
  return [scale, 0, x * scale, y * scale];
}

/** The translation that takes `from` to `to`: t = (d + q conj(d)) / (1 - |q|²), where q = from·to and d = to - from. */
function translationBetween([ux, uy], [vx, vy]) {
  const [dx, dy] = [vx - ux, vy - uy];
  const [qx, qy] = [ux * vx - uy * vy, ux * vy + uy * vx];
  const scale = 1 / (1 - qx * qx - qy * qy);
  return translation([(dx + qx * dx + qy * dy) * scale, (dy + qy * dx - qx * dy) * scale]);
}

/** The part `share` of the way from the origin to a point. */
function towards([x, y], share) {
  const r = Math.hypot(x, y);
  if (!r) return [0, 0];
  const scale = Math.tanh(share * Math.atanh(r)) / r;
  return [x * scale, y * scale];
}

/** Points on the geodesic between two points, both included. */
function geodesic(from, to, parts = 24) {
  const there = translation(from);
  const end = move(inverse(there), to);
  return Array.from({ length: parts + 1 }, (_, i) => move(there, towards(end, i / parts)));
}

/** Centroid of pictures: the mean in the hyperboloid model, back in the disk. */
function hyperbolicMean(members) {
  let [x, y, t] = [0, 0, 0];
  for (const picture of members) {
    const [px, py] = place(picture);
    const weight = 1 / (1 - px * px - py * py);
    x += 2 * px * weight;
    y += 2 * py * weight;
    t += (1 + px * px + py * py) * weight;
  }
  const length = Math.sqrt(t * t - x * x - y * y);
  return [x / (t + length), y / (t + length)];
}
