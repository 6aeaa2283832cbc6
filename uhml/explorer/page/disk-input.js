// Hands: one pointer drags, two pinch, the wheel zooms.
const pointers = new Map();
let dragged = false;
let pressed = null;
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

for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, (event) => pointers.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => showHint(-1));

// A double click is two clicks before it is one: only the first opens, and the place is that of the first.
let clicked = null;
canvas.addEventListener("click", (event) => {
  if (dragged || event.detail > 1) return;
  clicked = move(inverse(view.moebius), inFringe(toDisk(...offset(event))));
  const picture = pick(...offset(event));
  if (picture >= 0) openPicture(picture, canvas);
});
canvas.addEventListener("dblclick", () => clicked && flyTo(clicked));

canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  cancelAnimationFrame(flight);
  const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
  zoomAt(Math.exp(-Math.max(-200, Math.min(200, event.deltaY * lines)) / 400), ...offset(event));
}, { passive: false });

const zoomMiddle = (factor) => zoomAt(factor, canvas.clientWidth / 2, canvas.clientHeight / 2);
byId("zoom-in").addEventListener("click", () => zoomMiddle(1.5));
byId("zoom-out").addEventListener("click", () => zoomMiddle(1 / 1.5));
byId("zoom-reset").addEventListener("click", resetDisk);

canvas.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const step = 0.12 / view.zoom;
  const way = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  if (way) drag([0, 0], way);
  else if (event.key === "+" || event.key === "=") zoomMiddle(1.3);
  else if (event.key === "-") zoomMiddle(1 / 1.3);
  else if (event.key === "Home") resetDisk();
  else if (event.key === "Enter") {
    const picture = pick(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity);
    if (picture < 0) return;
    flyTo(place(picture));
    openPicture(picture, canvas);
  } else return;
  event.preventDefault();
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
    const label = labels ? h("span", { class: "name" }, labelOf(picture)) : null;
    fill(hint, tile(picture), h("span", {}, h("b", { class: "name" }, fileName(picture)), label));
  }
  hint.style.left = `${Math.max(4, Math.min(x + 16, canvas.clientWidth - hint.offsetWidth - 8))}px`;
  hint.style.top = `${y + 16 + hint.offsetHeight > canvas.clientHeight ? y - 16 - hint.offsetHeight : y + 16}px`;
}
