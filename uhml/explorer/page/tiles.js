// Thumbnails: tiles of sprite sheets. The browser decodes a sheet when a tile of it is on the screen, and forgets it again;
// hundreds of canvases, each a layer of its own, would not scroll smoothly.

const { tile: tileSide, columns: tileColumns, per_sheet: perSheet } = meta.sheets;
const sheetFiles = new Map(); // sheet -> {blob, url}

function sheetFile(sheet) {
  if (!sheetFiles.has(sheet)) {
    const blob = new Blob([takeBytes(byId(`sheet-${sheet}`))], { type: "image/jpeg" });
    sheetFiles.set(sheet, { blob, url: URL.createObjectURL(blob) });
  }
  return sheetFiles.get(sheet);
}

/** Sheet, column and row of a picture's tile. */
function tileAt(picture) {
  const i = picture % perSheet;
  return [Math.floor(picture / perSheet), i % tileColumns, Math.floor(i / tileColumns)];
}

/** A thumbnail, without a button around it. */
function tile(picture) {
  const [sheet, x, y] = tileAt(picture);
  const rows = Math.ceil(Math.min(perSheet, n - sheet * perSheet) / tileColumns);
  const part = (at, of) => `${of > 1 ? (100 * at) / (of - 1) : 0}%`;
  const element = h("span", { class: "tile", "data-picture": picture, "aria-hidden": "true" });
  element.style.backgroundImage = `url(${sheetFile(sheet).url})`;
  element.style.backgroundPosition = `${part(x, tileColumns)} ${part(y, rows)}`;
  element.style.backgroundSize = `${100 * tileColumns}% ${100 * rows}%`;
  return element;
}

/** A thumbnail that opens its picture. */
function thumbnail(picture, attributes = {}) {
  const title = labels ? `${names[picture]}\n${labelOf(picture)}` : names[picture];
  const all = { type: "button", class: "thumb", "data-picture": picture, "aria-label": names[picture], title, ...attributes };
  return h("button", all, tile(picture));
}

// Tiles to draw on a canvas: cut out of decoded sheets, of which not all are kept, for they would take a gigabyte.
const TILES_CUT = 600;
const SHEETS_DECODED = Math.max(2, Math.floor(16e6 / (perSheet * tileSide ** 2))); // 16 million pixels are 64 MB
const cutTiles = new Map(); // picture -> ImageBitmap, least recently used first
const decoded = new Map(); // sheet -> ImageBitmap, likewise
let wanted = new Set(); // pictures
let cutting = false;

function use(cache, key) {
  const value = cache.get(key);
  cache.delete(key);
  cache.set(key, value);
  return value;
}

function keep(cache, key, bitmap, most) {
  cache.set(key, bitmap);
  if (cache.size <= most) return;
  const [oldest] = cache.keys();
  cache.get(oldest).close();
  cache.delete(oldest);
}

/** Cut the tiles of these pictures, and no longer those asked for before; `done` is called as they come. */
async function cut(pictures, done) {
  wanted = new Set(pictures);
  if (cutting) return;
  cutting = true;
  let shown = 0;
  while (wanted.size) {
    const [first] = wanted;
    const [sheet] = tileAt(first);
    if (!decoded.has(sheet)) keep(decoded, sheet, await createImageBitmap(sheetFile(sheet).blob), SHEETS_DECODED);
    const bitmap = use(decoded, sheet);
    for (const picture of wanted) {
      const [of, x, y] = tileAt(picture);
      if (of !== sheet) continue;
      keep(cutTiles, picture, await createImageBitmap(bitmap, x * tileSide, y * tileSide, tileSide, tileSide), TILES_CUT);
      wanted.delete(picture);
    }
    if (performance.now() > shown + 100 || !wanted.size) {
      shown = performance.now(); // not after each sheet: drawing takes as long as decoding
      done();
    }
  }
  cutting = false;
}
