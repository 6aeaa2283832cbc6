// The state, and what follows from it. The state is kept in the URL's hash: every place can be linked to, and Back works.

const initial = {
  view: "tree", step: present, level: -1, cluster: 0, show: -1, picture: -1, color: "level-0", label: -1, at: "", theme: "",
};
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const scrolled = new Map(); // page of the tree -> where it was left
let state = initial;
let drawnTree = "";
let drawnCluster = ""; // the cluster that the disk flew to last

const isDark = () => (state.theme || (systemDark.matches ? "dark" : "light")) === "dark";
const treePage = ({ step, level, cluster, show }) => [step, level, cluster, show].join();

/** Whether a text is "x,y,zoom" with a point in the disk. */
function isPlace(text) {
  const [x, y, zoom] = text.split(",").map(Number);
  return Math.hypot(x, y) < 1 && zoom > 0;
}

/** A hash may be anything: what does not exist on this page is as if it were not given. */
function valid(given) {
  const within = (value, limit, otherwise) => (Number.isInteger(value) && value >= 0 && value < limit ? value : otherwise);
  const step = within(given.step, steps.length, present);
  const { levels } = steps[step];
  const level = within(given.level, levels.length, -1);
  return {
    step,
    level,
    view: given.view === "disk" ? "disk" : "tree",
    cluster: level < 0 ? 0 : within(given.cluster, levels[level].clusters, 0),
    show: within(given.show, levels.length, -1),
    picture: within(given.picture, n, -1),
    color: colorChoices(clusterings[step]).some(([value]) => value === given.color) ? given.color : initial.color,
    label: labels ? within(given.label, labels.length, -1) : -1,
    at: isPlace(given.at) ? given.at : "",
    theme: ["dark", "light"].includes(given.theme) ? given.theme : "",
  };
}

function readHash() {
  const given = { ...initial };
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    given[key] = typeof initial[key] === "number" ? Number(value) : value;
  }
  return valid(given);
}

function writeHash(next, replace) {
  const told = Object.entries(next).filter(([key, value]) => value !== initial[key]);
  history[replace ? "replaceState" : "pushState"](null, "", `#${new URLSearchParams(told)}`);
}

function go(change, replace = false) {
  const next = valid({ ...state, ...change });
  scrolled.set(treePage(state), scrollY);
  writeHash(next, replace);
  update(next);
}

/** Show a state; `back` if it was shown before, or comes with the URL. */
function update(next, back = false) {
  const before = state;
  state = next;
  document.documentElement.style.colorScheme = state.theme || "light dark";
  for (const view of ["tree", "disk"]) byId(`view-${view}`).setAttribute("aria-pressed", String(state.view === view));
  byId("tree").hidden = state.view !== "tree";
  byId("disk-view").hidden = state.view !== "disk";
  byId("step").value = state.step;
  byId("step-name").textContent = count(steps[state.step].step);
  showPanel(state);
  if (state.view === "tree") updateTree(before, back);
  else updateDiskView(before, back);
}

function updateTree(before, back) {
  const page = `${treePage(state)},${isDark()}`;
  const again = page === drawnTree;
  if (!again) {
    const hadFocus = drawnTree && (byId("tree").contains(document.activeElement) || document.activeElement === document.body);
    showTree(state, clusterings[state.step]);
    if (hadFocus) byId("tree").querySelector("h2").focus({ preventScroll: true });
    drawnTree = page;
  }
  const sameCluster = before.level === state.level && before.cluster === state.cluster;
  if (back || before.view !== state.view) scrollTo(0, scrolled.get(treePage(state)) ?? 0);
  else if (!sameCluster) scrollTo(0, 0);
}

function updateDiskView(before, back) {
  const clustering = clusterings[state.step];
  const { level, cluster, label, picture } = state;
  const coloring = colorBy(state.color, clustering, isDark());
  let lit = null;
  if (label >= 0) lit = Uint8Array.from(arrays.label.data, (other) => other === label);
  else if (level >= 0) {
    lit = new Uint8Array(n);
    for (const member of clustering.members(level, cluster)) lit[member] = 1;
  }
  const finest = clustering.levels.length - 1;
  const path = picture < 0 ? [] : clustering.path(finest, clustering.clusterOf(finest)[picture]).reverse();
  updateDisk({
    coloring, lit, picture,
    path: path.map((station) => place(clustering.standing(...station))),
    links: picture < 0 ? [] : row("neighbors", picture),
  });
  showChoices(clustering);
  showLegend(coloring);
  showSelection(clustering);
  const selected = [state.step, level, cluster].join();
  if (back) {
    const [x, y, zoom] = state.at ? state.at.split(",").map(Number) : [0, 0, 1];
    setView(inverse(translation([x, y])), zoom);
  }
  if (level >= 0 && selected !== drawnCluster && !(back && state.at)) flyToCluster(clustering, level, cluster);
  else if (picture >= 0 && picture !== before.picture && !back) showInDisk(picture);
  drawnCluster = selected;
}

function showChoices(clustering) {
  const options = colorChoices(clustering).map(([value, name]) => h("option", { value, selected: value === state.color }, name));
  byId("color-by").replaceChildren(...options);
}

function showLegend({ rows, more, repeat, range }) {
  const body = byId("legend-body");
  const [, name] = colorChoices(clusterings[state.step]).find(([value]) => value === state.color);
  byId("legend-title").textContent = name[0].toUpperCase() + name.slice(1);
  if (range) {
    const [low, high] = range.map((value) => h("span", {}, value.toFixed(2)));
    return void body.replaceChildren(h("div", { class: "ramp" }), h("div", { class: "ends" }, low, high));
  }
  const level = levelOf(state.color);
  const lit = (group) => (level === null ? state.label === group : state.label < 0 && state.level === level && state.cluster === group);
  const items = rows.map(({ group, name, size, color }) => {
    const content = [swatch(color), h("span", { class: "name", title: name }, name), h("small", {}, count(size))];
    if (state.color === "super-label") return h("li", {}, h("span", { class: "entry" }, ...content));
    const attributes = { type: "button", class: "entry", "aria-pressed": String(lit(group)), "data-group": group };
    return h("li", {}, h("button", attributes, ...content));
  });
  const rest = more ? h("p", {}, `and ${count(more)} more${repeat ? "; colours repeat" : ""}`) : null;
  fill(body, h("ul", {}, ...items), rest);
}

/** What is lit in the disk, with the way to its page and out. */
function showSelection(clustering) {
  const box = byId("selection");
  const { level, cluster, label } = state;
  box.hidden = level < 0 && label < 0;
  if (box.hidden) return;
  const what = label >= 0 ? labels[label] : `${clusterName(cluster)} · ${count(clustering.size(level, cluster))}`;
  fill(box,
    h("span", { class: "name" }, what),
    label >= 0 ? null : h("button", { type: "button", class: "plain", "data-to-tree": true }, "Open in the tree"),
    h("button", { type: "button", class: "close", "aria-label": "Deselect", "data-deselect": true }, "×"));
}

/** Keep in the URL where the disk is. */
function diskMoved() {
  const [x, y] = diskCenter();
  const moved = view.zoom > 1 || Math.hypot(x, y) > 1e-6;
  state = { ...state, at: moved ? `${x.toPrecision(7)},${y.toPrecision(7)},${view.zoom.toFixed(2)}` : "" };
  writeHash(state, true);
}

function openPicture(picture, from = document.activeElement) {
  if (state.picture < 0) opener = from;
  go({ picture });
  say(`${fileName(picture)} opened`);
}

function openCluster(level, cluster, view = state.view) {
  go({ level, cluster, show: -1, label: -1, view });
  say(level < 0 ? "All pictures" : `${clusterName(cluster)} opened`);
}

/** To the smallest larger cluster around the present one. */
function goUp() {
  if (state.level < 0) return;
  const clustering = clusterings[state.step];
  const size = clustering.size(state.level, state.cluster);
  const larger = clustering.path(state.level, state.cluster).findLast((station) => clustering.size(...station) > size);
  openCluster(...(larger ?? [-1, 0]));
}

const deselect = () => go({ level: -1, cluster: 0, label: -1 });
const closePanel = () => go({ picture: -1 });

/** The cluster shown stays the one with most of its pictures. */
function goToStep(step) {
  const [level, cluster] = clusterings[step].counterpart(clusterings[state.step], state.level, state.cluster);
  go({ step, level, cluster }, true);
}

document.addEventListener("click", ({ target }) => {
  const at = (selector) => target.closest(selector);
  if (at("#results, #disk")) return;
  const group = at("[data-group]");
  const cluster = at("[data-cluster]");
  if (at("button[data-picture]")) openPicture(Number(at("button[data-picture]").dataset.picture), at("button"));
  else if (cluster) openCluster(Number(cluster.dataset.level), Number(cluster.dataset.cluster));
  else if (at("[data-show]")) go({ show: Number(at("[data-show]").dataset.show) }, true);
  else if (at("[data-to-disk]")) {
    go({ view: "disk", label: -1 });
    if (at("#panel")) showInDisk(state.picture);
  } else if (at("[data-to-tree]")) go({ view: "tree" });
  else if (at("[data-deselect]")) deselect();
  else if (at("#panel .close")) closePanel();
  else if (group && group.getAttribute("aria-pressed") === "true") deselect();
  else if (group && state.color === "label") go({ label: Number(group.dataset.group) });
  else if (group) openCluster(levelOf(state.color), Number(group.dataset.group));
});

byId("view-tree").addEventListener("click", () => go({ view: "tree" }));
byId("view-disk").addEventListener("click", () => go({ view: "disk" }));
byId("color-by").addEventListener("change", ({ target }) => go({ color: target.value }, true));
byId("step").addEventListener("input", ({ target }) => goToStep(Number(target.value)));
byId("theme").addEventListener("click", () => go({ theme: isDark() ? "light" : "dark" }, true));
byId("help").addEventListener("click", () => byId("manual").showModal());
systemDark.addEventListener("change", () => update(state));
addEventListener("popstate", () => update(readHash(), true));

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input, select") || byId("manual").open) return;
  const action = {
    "/": () => searchBox.focus(),
    "?": () => byId("manual").showModal(),
    t: () => go({ view: "tree" }),
    d: () => go({ view: "disk" }),
    u: goUp,
    Escape: () => (state.picture >= 0 ? closePanel() : state.view === "disk" ? deselect() : null),
  }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

byId("facts").textContent = [
  meta.num_all > n ? `${count(n)} of ${pictures(meta.num_all)}` : pictures(n), `step ${count(meta.step)}`,
].join(" · ");
byId("origin").textContent = `Made by uhml from ${meta.run} on ${meta.created.slice(0, 10)}; curvature ${meta.curvature}.`;
byId("step-choice").hidden = steps.length < 2;
byId("step").max = present;
byId("legend").open = innerWidth > 900; // it would cover half of a small disk
update(readHash(), true);

Object.assign(window.uhml, {
  openPicture,
  openCluster: (level, cluster) => openCluster(level, cluster, "tree"),
  disk: {
    center: diskCenter,
    panTo(x, y) {
      cancelAnimationFrame(flight);
      setView(inverse(translation([x, y])));
    },
    pick,
    screen: (picture) => toScreen(move(view.moebius, place(picture))).map((value) => value / ratio()),
  },
});
requestAnimationFrame(() => markReady());
