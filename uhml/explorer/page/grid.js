// A grid of many equal cells in the page, of which only those on the screen exist. One cell is in the tab order; arrow keys
// go to the others.

class Grid {
  /** `cell(i)` makes cell i; it is at least `width` px wide, and `height(width)` px high. */
  constructor({ cells, width, height, gap, label, cell }) {
    Object.assign(this, { cells, width, height, gap, cell });
    this.shown = new Map();
    this.active = 0;
    this.element = h("div", { class: "grid", role: "list", "aria-label": label });
    this.element.addEventListener("keydown", (event) => this.onKey(event));
    this.element.addEventListener("focusin", (event) => this.activate(this.indexOf(event.target)));
    this.resizing = new ResizeObserver(() => this.layout());
    this.resizing.observe(this.element);
    this.onScroll = () => this.fill();
    addEventListener("scroll", this.onScroll, { passive: true });
  }

  remove() {
    this.resizing.disconnect();
    removeEventListener("scroll", this.onScroll);
    this.element.remove();
  }

  layout() {
    const space = this.element.clientWidth;
    if (!space) return;
    this.columns = Math.max(1, Math.floor((space + this.gap) / (this.width + this.gap)));
    this.cellWidth = (space - (this.columns - 1) * this.gap) / this.columns;
    this.cellHeight = this.height(this.cellWidth);
    const rows = Math.ceil(this.cells / this.columns);
    this.element.style.height = `${rows * (this.cellHeight + this.gap) - this.gap}px`;
    for (const [i, element] of this.shown) this.put(i, element);
    this.fill();
  }

  put(i, element) {
    const x = (i % this.columns) * (this.cellWidth + this.gap);
    const y = Math.floor(i / this.columns) * (this.cellHeight + this.gap);
    const [width, height] = [`${this.cellWidth}px`, `${this.cellHeight}px`];
    Object.assign(element.style, { transform: `translate(${x}px, ${y}px)`, width, height });
  }

  /** Make the cells on the screen, and half a screen around it; drop the others, but never the one that has the focus. */
  fill() {
    if (!this.columns) return;
    const { top } = this.element.getBoundingClientRect();
    const step = this.cellHeight + this.gap;
    const first = Math.max(0, Math.floor((-top - innerHeight / 2) / step)) * this.columns;
    const last = Math.min(this.cells, Math.ceil((1.5 * innerHeight - top) / step) * this.columns);
    for (const [i, element] of this.shown) {
      if ((i < first || i >= last) && !element.contains(document.activeElement)) {
        element.remove();
        this.shown.delete(i);
      }
    }
    for (let i = first; i < last; i++) this.show(i);
    if (!this.shown.has(this.active) && this.shown.size) this.activate(Math.min(...this.shown.keys()));
  }

  show(i) {
    if (this.shown.has(i)) return this.shown.get(i);
    const element = h("div", { role: "listitem", "aria-posinset": i + 1, "aria-setsize": this.cells }, this.cell(i));
    this.put(i, element);
    this.tabbable(element, i === this.active);
    // In the page as on the screen, because the tab key goes by the page.
    let before = this.element.lastElementChild;
    while (before && Number(before.ariaPosInSet) > i + 1) before = before.previousElementSibling;
    this.element.insertBefore(element, before ? before.nextElementSibling : this.element.firstElementChild);
    this.shown.set(i, element);
    return element;
  }

  tabbable(element, yes) {
    for (const button of element.querySelectorAll("button")) button.tabIndex = yes ? 0 : -1;
  }

  indexOf(target) {
    return Number(target.closest("[role=listitem]").ariaPosInSet) - 1;
  }

  activate(i) {
    if (this.shown.has(this.active)) this.tabbable(this.shown.get(this.active), false);
    this.active = i;
    this.tabbable(this.shown.get(i), true);
  }

  onKey(event) {
    const page = this.columns * Math.max(1, Math.floor((innerHeight * 0.8) / (this.cellHeight + this.gap)));
    const by = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -page, PageDown: page,
      Home: -this.cells, End: this.cells,
    }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const from = this.indexOf(event.target);
    const to = Math.max(0, Math.min(this.cells - 1, from + by));
    if (Math.abs(by) === this.columns && Math.floor(to / this.columns) === Math.floor(from / this.columns)) return;
    const element = this.show(to);
    element.querySelector("button").focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest" });
  }
}
