// The panel: one picture, its way up the tree, and its neighbours.

let opener = null; // where the focus goes back to

function showPanel({ picture, step, view }) {
  const panel = byId("panel");
  const wasOpen = !panel.hidden;
  const held = panel.contains(document.activeElement); // asked first: what is hidden has no focus
  panel.hidden = picture < 0;
  if (picture < 0) {
    if (held) opener?.focus({ preventScroll: true });
    return panel.replaceChildren();
  }
  const clustering = clusterings[step];
  const facts = h("dl", {});
  const fact = (name, value) => facts.append(h("div", {}, h("dt", {}, name), h("dd", { class: "name", title: value }, value)));
  if (labels) fact("Label", labelOf(picture));
  if (superLabels) fact("Super-label", superLabelOf(picture));
  fact("Radius", arrays.radius.data[picture].toFixed(3));

  fill(panel,
    h("header", {},
      h("h2", { class: "name" }, fileName(picture)),
      h("button", { type: "button", class: "close", "aria-label": "Close", title: "Close (Esc)" }, "×")),
    h("p", { class: "folder name", title: names[picture] }, folder(picture)),
    h("div", { class: "portrait" }, tile(picture), facts),
    view === "tree" ? h("button", { type: "button", class: "plain", "data-to-disk": true }, "Show in the disk") : null,
    h("h3", {}, "Path up the tree"),
    pathList(clustering, picture),
    h("h3", {}, "Neighbours", labels ? " · framed if of another label" : ""),
    neighborList(picture));
  panel.scrollTop = 0;
  // Following neighbours with the keyboard keeps the focus here.
  if (held || !wasOpen) panel.focus({ preventScroll: true });
}

/** From the picture upwards: the finest cluster first, everything last. */
function pathList(clustering, picture) {
  const finest = clustering.levels.length - 1;
  const path = clustering.path(finest, clustering.clusterOf(finest)[picture]).reverse();
  const items = [...path, [-1, 0]].map(([level, cluster]) => {
    const size = pictures(clustering.size(level, cluster));
    return h("li", {}, h("button", { type: "button", class: "station", "data-level": level, "data-cluster": cluster },
      level < 0 ? h("i", { class: "swatch" }) : swatch(clusterColorNow(clustering, level, cluster)),
      h("b", {}, level < 0 ? "All pictures" : clusterName(cluster)),
      h("small", {}, level < 0 ? size : `${size} · one of ${clustering.levels[level].name}`)));
  });
  return h("ol", { id: "path" }, ...items);
}

function neighborList(picture) {
  const { data: distances, columns } = arrays.distances;
  const items = row("neighbors", picture).map((neighbor, i) => {
    const distance = distances[picture * columns + i].toFixed(3);
    const same = labels && arrays.label.data[neighbor] === arrays.label.data[picture];
    const label = labels ? `${labelOf(neighbor)}, ${same ? "same label" : "another label"}, ` : "";
    const button = thumbnail(neighbor, { "aria-label": `${names[neighbor]}, ${label}distance ${distance}` });
    button.append(h("small", {}, distance));
    if (labels) button.dataset.same = same;
    return h("li", {}, button);
  });
  return h("ol", { id: "neighbors" }, ...items);
}
