// The tree: one page for each cluster, with the clusters inside it as cards, and all its pictures at the end.

const NESTED = 3; // smaller clusters that a card shows
let grids = [];

const clusterName = (cluster) => `Cluster ${cluster}`;
const clusterColorNow = (clustering, level, cluster) => clusterColor(clustering, level, cluster, isDark());

function swatch(color) {
  const element = h("i", { class: "swatch", "aria-hidden": "true" });
  element.style.background = color;
  return element;
}

/** "87 % Cyrillic", with a bar. */
function purity({ name, share }) {
  const bar = h("i", { class: "share", "aria-hidden": "true" });
  bar.style.setProperty("--share", share);
  return h("span", { class: "purity" }, bar, h("b", {}, percent(share)), h("span", { class: "name", title: name }, name));
}

/** A small card: a cluster as one picture and its size. */
function mini(clustering, level, cluster) {
  const size = clustering.size(level, cluster);
  const title = `${clusterName(cluster)} of ${clustering.levels[level].name}, ${pictures(size)}`;
  const attributes = { type: "button", class: "card mini", "data-level": level, "data-cluster": cluster, title, "aria-label": title };
  return h("button", attributes,
    tile(clustering.central(level, cluster)[0]), h("small", {}, count(size)));
}

function card(clustering, level, cluster) {
  const members = clustering.members(level, cluster);
  const central = clustering.central(level, cluster).slice(0, 5);
  const unusual = clustering.unusual(level, cluster).filter((picture) => !central.includes(picture)).slice(0, NESTED);
  const finer = clustering.splitLevel(level, cluster);
  const inside = finer === null ? [] : clustering.inside(level, cluster, finer);
  const foot = h("div", { class: "foot" });
  const part = (title, elements) => foot.append(h("div", {}, h("small", {}, title), h("div", {}, ...elements)));
  if (unusual.length) part("Most unusual", unusual.map((picture) => thumbnail(picture)));
  const nested = Array.from(inside.slice(0, NESTED), (smaller) => mini(clustering, finer, smaller));
  if (inside.length) part(`${count(inside.length)} clusters inside`, nested);
  return h("article", { class: "card", "data-level": level, "data-cluster": cluster },
    h("header", {},
      swatch(clusterColorNow(clustering, level, cluster)),
      h("button", { type: "button", class: "title" }, clusterName(cluster)),
      h("span", { class: "size" }, pictures(members.length))),
    ...majorities(members).map(purity),
    h("div", { class: "mosaic" }, ...central.map((picture) => thumbnail(picture))),
    foot);
}

function addGrid(parent, options) {
  const grid = new Grid(options);
  grids.push(grid);
  parent.append(grid.element);
}

function addPictures(parent, members, label) {
  const cell = (i) => thumbnail(members[i]);
  addGrid(parent, { cells: members.length, width: 68, height: (width) => width, gap: 6, label, cell });
}

function breadcrumb(clustering, level, cluster) {
  const items = [[-1, 0], ...clustering.path(level, cluster)].map(([at, which]) => {
    const name = at < 0 ? "All pictures" : clusterName(which);
    const title = at < 0 ? null : clustering.levels[at].name;
    const link = { type: "button", class: "link", "data-level": at, "data-cluster": which, title };
    return h("li", {}, at === level ? h("span", { "aria-current": "page", title }, name) : h("button", link, name));
  });
  return h("nav", { class: "crumbs", "aria-label": "Path" }, h("ol", {}, ...items));
}

/** Which level's clusters to show: the next one unless another is chosen. */
function levelChoice(clustering, level, shown) {
  const finer = clustering.levels.slice(level + 1).map((_, i) => level + 1 + i);
  if (finer.length < 2) return null;
  const attributes = (at) => ({ type: "button", "data-show": at, "aria-pressed": String(at === shown) });
  const buttons = finer.map((at) => h("button", attributes(at), clustering.levels[at].name));
  return h("div", { class: "choice", role: "group", "aria-label": "Level of the clusters" }, ...buttons);
}

function showTree({ level, cluster, show }, clustering) {
  for (const grid of grids) grid.remove();
  grids = [];
  const members = clustering.members(level, cluster);
  const shown = show > level ? Math.min(show, clustering.levels.length - 1) : clustering.splitLevel(level, cluster);
  const inside = shown === null ? [] : Array.from(clustering.inside(level, cluster, shown));
  const several = inside.filter((smaller) => clustering.size(shown, smaller) > 1);
  const single = inside.filter((smaller) => clustering.size(shown, smaller) === 1);
  const height = level < 0 ? null : clustering.height(level, cluster);
  const facts = [pictures(members.length)];
  if (level >= 0) facts.push(`one of ${clustering.levels[level].name}`);
  if (height) facts.push(`joined at height ${height.toPrecision(3)}`);
  const name = level < 0 ? "All pictures" : clusterName(cluster);
  const mark = level < 0 ? null : swatch(clusterColorNow(clustering, level, cluster));
  const section = (title, choice = null) => page.append(h("div", { class: "section" }, h("h3", {}, title), choice));
  const page = byId("tree");
  fill(page,
    level < 0 ? null : breadcrumb(clustering, level, cluster),
    h("header", { class: "head" },
      h("div", {},
        h("h2", { tabindex: "-1" }, mark, name),
        h("p", { class: "facts" }, facts.join(" · ")),
        ...(level < 0 ? [] : majorities(members).map(purity))),
      level < 0 ? null : h("button", { type: "button", class: "plain", "data-to-disk": true }, "Show in the disk")));
  if (level >= 0 && members.length > 8) {
    const strip = (label, list) =>
      h("div", {}, h("h3", {}, label), h("div", { class: "strip" }, ...list.map((picture) => thumbnail(picture))));
    const unusual = clustering.unusual(level, cluster);
    page.append(h("div", { class: "strips" },
      strip("Most central", clustering.central(level, cluster)),
      unusual.length ? strip("Most unusual", unusual) : null));
  }
  if (several.length) {
    const title = `${count(inside.length)} clusters`;
    section(title, levelChoice(clustering, level, shown));
    const lines = (labels ? 1 : 0) + (superLabels ? 1 : 0);
    addGrid(page, {
      cells: several.length, width: 264, gap: 16, label: title,
      height: (width) => Math.round((width - 32) / 2) + 134 + 24 * lines,
      cell: (i) => card(clustering, shown, several[i]),
    });
  }
  if (single.length) {
    section(`${pictures(single.length)} on ${single.length === 1 ? "its" : "their"} own`);
    addPictures(page, single.map((smaller) => clustering.members(shown, smaller)[0]), "Pictures on their own");
  }
  section(level < 0 ? `All ${pictures(n)}` : `All ${pictures(members.length)} of ${name}`);
  addPictures(page, members, "All pictures");
}
