// Colours of the pictures, and their legend. Palettes are Paul Tol's (light for the dark page, muted for the light one) and
// cividis: all are made for colour-blind eyes. There are ten; more groups than that take them in turn.

const categorical = {
  light: ["#332288", "#cc6677", "#117733", "#5aa9d6", "#882255", "#44aa99", "#999933", "#aa4499", "#d3b94f", "#888888"],
  dark: ["#77aadd", "#ee8866", "#44bb99", "#ffaabb", "#eedd88", "#cc99dd", "#bbcc33", "#99ddff", "#dddddd", "#aaaa00"],
};
const cividis = ["#00224e", "#2a3f6d", "#575c6d", "#7d7c78", "#a59c74", "#d2c060", "#fee838"];
const LEGEND_ROWS = 12;

const hexToRgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** Values of the choice "colour by" and their names. */
function colorChoices(clustering) {
  const choices = clustering.levels.map((level, index) => [`level-${index}`, level.name]);
  if (labels) choices.push(["label", "label"]);
  if (superLabels) choices.push(["super-label", "super-label"]);
  return [...choices, ["radius", "radius"]];
}

/** The level whose clusters have the colours, or null. */
const levelOf = (choice) => (choice.startsWith("level-") ? Number(choice.slice("level-".length)) : null);

/** Rank of each group by size: the largest groups are to differ in colour. */
function bySize(values, groups) {
  const sizes = new Int32Array(groups);
  for (const value of values) sizes[value]++;
  const order = Array.from(sizes.keys()).sort((a, b) => sizes[b] - sizes[a]);
  const rank = new Int32Array(groups);
  order.forEach((group, i) => (rank[group] = i));
  return { rank, order, sizes };
}

/**
 * Colours by a choice: {rgb: Uint8Array [3n], of: group of each picture or null, rows: [{group, name, size, color}],
 * more: groups that have no row, range: of a continuous colour}.
 */
function colorBy(choice, clustering, dark) {
  if (choice === "radius") return colorByRadius();
  const palette = categorical[dark ? "dark" : "light"];
  const level = levelOf(choice);
  const [of, classes] =
    choice === "label" ? [arrays.label.data, labels]
    : choice === "super-label" ? [arrays.super_label.data, superLabels]
    : [clustering.clusterOf(level), null];
  const { rank, order, sizes } = bySize(of, classes?.length ?? clustering.clusters(level));
  const color = (group) => (classes ? palette[rank[group] % palette.length] : clusterColor(clustering, level, group, dark));
  const colors = Array.from(rank.keys(), (group) => hexToRgb(color(group)));
  const rgb = new Uint8Array(3 * n);
  for (let picture = 0; picture < n; picture++) rgb.set(colors[of[picture]], 3 * picture);
  const groups = order.filter((group) => sizes[group]);
  const rows = groups.slice(0, LEGEND_ROWS).map((group) => ({
    group, name: classes ? classes[group] : `Cluster ${group}`, size: sizes[group], color: color(group),
  }));
  return { rgb, of, rows, more: groups.length - rows.length, repeat: groups.length > palette.length };
}

/** An earlier cluster has the colour of the present one that most of its pictures went to, so that colours tell what moved. */
function clusterColor(clustering, level, cluster, dark) {
  const palette = categorical[dark ? "dark" : "light"];
  const [, hue] = clustering.index === present ? [level, cluster] : clusterings[present].counterpart(clustering, level, cluster);
  return palette[hue % palette.length];
}

function colorByRadius() {
  const { data } = arrays.radius;
  const sorted = Float32Array.from(data).sort();
  // Not least and greatest: a few outliers would leave one colour for all others.
  const [low, high] = [sorted[Math.floor(0.01 * n)], sorted[Math.ceil(0.99 * (n - 1))]];
  const stops = cividis.map(hexToRgb);
  const rgb = new Uint8Array(3 * n);
  for (let picture = 0; picture < n; picture++) {
    const at = (Math.min(1, Math.max(0, (data[picture] - low) / (high - low || 1)))) * (stops.length - 1);
    const [i, t] = [Math.min(Math.floor(at), stops.length - 2), at - Math.min(Math.floor(at), stops.length - 2)];
    for (let c = 0; c < 3; c++) rgb[3 * picture + c] = stops[i][c] * (1 - t) + stops[i + 1][c] * t;
  }
  return { rgb, of: null, rows: [], more: 0, range: [low, high] };
}
