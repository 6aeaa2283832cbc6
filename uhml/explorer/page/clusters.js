// One saved clustering: which pictures and which clusters are in a cluster. Level -1 is the root, which holds everything;
// level 0 is the coarsest. Levels are sorted into clusters on first use.

const everything = Int32Array.from({ length: n }, (_, picture) => picture);

class Clustering {
  constructor(index) {
    this.index = index;
    this.levels = steps[index].levels;
    this.sorted = [];
  }

  /** Int32Array [n]: cluster of each picture. */
  clusterOf(level) {
    return arrays[`levels-${this.index}`].data.subarray(level * n, (level + 1) * n);
  }

  clusters(level) {
    return level < 0 ? 1 : this.levels[level].clusters;
  }

  /** Pictures of a cluster, in the order of the page, which is that of the tree's leaves. */
  members(level, cluster) {
    if (level < 0) return everything;
    const { start, order } = (this.sorted[level] ??= this.sort(level));
    return order.subarray(start[cluster], start[cluster + 1]);
  }

  sort(level) {
    const clusterOf = this.clusterOf(level);
    const start = new Int32Array(this.clusters(level) + 1);
    for (const cluster of clusterOf) start[cluster + 1]++;
    for (let cluster = 1; cluster < start.length; cluster++) start[cluster] += start[cluster - 1];
    const next = start.slice();
    const order = new Int32Array(n);
    for (let picture = 0; picture < n; picture++) order[next[clusterOf[picture]]++] = picture;
    return { start, order };
  }

  size(level, cluster) {
    return this.members(level, cluster).length;
  }

  /** Clusters of a finer level inside a cluster, largest first as they are numbered. */
  inside(level, cluster, finer) {
    const clusterOf = this.clusterOf(finer);
    const found = new Set();
    for (const picture of this.members(level, cluster)) found.add(clusterOf[picture]);
    return Int32Array.from(found).sort();
  }

  /** The next level on which a cluster is split, or null. */
  splitLevel(level, cluster) {
    for (let finer = level + 1; finer < this.levels.length; finer++) {
      if (this.inside(level, cluster, finer).length > 1) return finer;
    }
    return null;
  }

  /** Clusters around a cluster, coarsest first, itself last. */
  path(level, cluster) {
    const [picture] = this.members(level, cluster);
    return Array.from({ length: level + 1 }, (_, coarser) => [coarser, this.clusterOf(coarser)[picture]]);
  }

  /** The most central pictures. Earlier clusterings carry none: pictures spread evenly over the cluster stand for them. */
  central(level, cluster) {
    if (this.index === present) return row(`central-${level}`, cluster);
    const members = this.members(level, cluster);
    const shown = Math.min(6, members.length);
    return Array.from({ length: shown }, (_, i) => members[Math.floor(((i + 0.5) * members.length) / shown)]);
  }

  unusual(level, cluster) {
    return this.index === present ? row(`unusual-${level}`, cluster) : [];
  }

  height(level, cluster) {
    return this.index === present ? arrays[`height-${level}`].data[cluster] : null;
  }

  /** The picture that stands for a cluster in the disk: the one nearest to the origin. */
  standing(level, cluster) {
    const fromOrigin = (picture) => Math.hypot(...place(picture));
    return this.members(level, cluster).reduce((best, picture) => (fromOrigin(picture) < fromOrigin(best) ? picture : best));
  }

  /** The cluster of this clustering that has most pictures of a cluster of another one. */
  counterpart(other, level, cluster) {
    const own = Math.min(level, this.levels.length - 1);
    return [own, level < 0 ? 0 : mostFrequent(this.clusterOf(own), other.members(level, cluster)).value];
  }
}

/** The most frequent of the values of some pictures, and its share. */
function mostFrequent(values, members) {
  const seen = new Map();
  let best = -1;
  for (const picture of members) {
    const value = values[picture];
    const times = (seen.get(value) ?? 0) + 1;
    seen.set(value, times);
    if (best < 0 || times > seen.get(best)) best = value;
  }
  return { value: best, share: seen.get(best) / members.length };
}

const clusterings = steps.map((_, index) => new Clustering(index));
const labelOf = (picture) => labels[arrays.label.data[picture]];
const superLabelOf = (picture) => superLabels[arrays.super_label.data[picture]];

/** [{name, share}] of the most frequent label, and of the super-label, as far as they are known. */
function majorities(members) {
  const known = [];
  for (const [classes, name] of [[labels, "label"], [superLabels, "super_label"]]) {
    if (!classes) continue;
    const { value, share } = mostFrequent(arrays[name].data, members);
    known.push({ name: classes[value], share });
  }
  return known;
}
