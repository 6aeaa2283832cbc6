// Thumbnails: tiles of sprite sheets. A sheet is decoded when one of its tiles is on the screen, and few are kept decoded,
// because 60 sheets of 2048 x 2048 pixels would take a gigabyte.

const { tile: tileSize, columns: tileColumns, per_sheet: perSheet } = meta.sheets;
const SHEETS_DECODED = 8;
const sheetFiles = new Map(); // sheet -> Blob of its JPEG
const decoded = new Map(); // sheet -> ImageBitmap, least recently used first
const wanted = new Map(); // sheet -> requests, in the order they came
let decoding = false;

/** Paint a picture's tile on a canvas: now if its sheet is decoded, or later, if it is still `needed` then. */
function paintTile(canvas, picture, needed = () => canvas.isConnected, painted = () => {}) {
  const sheet = Math.floor(picture / perSheet);
  const request = { canvas, picture, needed, painted };
  canvas.width = canvas.height = tileSize;
  if (decoded.has(sheet)) return void drawTile(request, useSheet(sheet));
  wanted.set(sheet, [...(wanted.get(sheet) ?? []), request]);
  if (!decoding) decodeWanted();
}

function drawTile({ canvas, picture, painted }, bitmap) {
  const i = picture % perSheet;
  const [x, y] = [(i % tileColumns) * tileSize, Math.floor(i / tileColumns) * tileSize];
  canvas.getContext("2d").drawImage(bitmap, x, y, tileSize, tileSize, 0, 0, tileSize, tileSize);
  painted();
}

function useSheet(sheet) {
  const bitmap = decoded.get(sheet);
  decoded.delete(sheet);
  decoded.set(sheet, bitmap);
  return bitmap;
}

async function decodeWanted() {
  decoding = true;
  await new Promise(requestAnimationFrame); // canvases made just now are in the page by then
  while (wanted.size) {
    const [sheet] = wanted.keys();
    if (!wanted.get(sheet).some((request) => request.needed())) {
      wanted.delete(sheet);
      continue;
    }
    if (!sheetFiles.has(sheet)) sheetFiles.set(sheet, new Blob([takeBytes(byId(`sheet-${sheet}`))]));
    const bitmap = await createImageBitmap(sheetFiles.get(sheet));
    decoded.set(sheet, bitmap);
    const requests = wanted.get(sheet);
    wanted.delete(sheet);
    for (const request of requests) if (request.needed()) drawTile(request, bitmap);
    if (decoded.size > SHEETS_DECODED) {
      const [oldest] = decoded.keys();
      decoded.get(oldest).close();
      decoded.delete(oldest);
    }
  }
  decoding = false;
}

/** A thumbnail, without a button around it. */
function tile(picture) {
  const canvas = h("canvas", { "data-picture": picture, "aria-hidden": "true" });
  paintTile(canvas, picture);
  return canvas;
}

/** A thumbnail that opens its picture. */
function thumbnail(picture, attributes = {}) {
  const title = labels ? `${names[picture]}\n${labelOf(picture)}` : names[picture];
  return h("button", { type: "button", class: "thumb", "data-picture": picture, "aria-label": names[picture], title, ...attributes }, tile(picture));
}
