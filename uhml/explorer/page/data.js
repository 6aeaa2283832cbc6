// What the page carries: meta, arrays, and small helpers to build elements out of them.

let markReady;
window.uhml = { ready: new Promise((resolve) => (markReady = resolve)) }; // main.js adds the rest

const byId = (id) => document.getElementById(id);
const meta = JSON.parse(byId("meta").textContent);
const { names, labels, super_labels: superLabels, steps } = meta;
const n = names.length;
const present = steps.length - 1; // the last saved clustering is the present one

/** Bytes of a base64 data element. The element is emptied: its text would double the page's memory. */
function takeBytes(element) {
  const text = atob(element.textContent);
  element.textContent = "";
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const arrayTypes = { float32: Float32Array, int32: Int32Array };

/** All arrays of the page by name, as {data, columns}. */
async function readArrays() {
  const read = async (element) => {
    const stream = new Blob([takeBytes(element)]).stream().pipeThrough(new DecompressionStream("gzip"));
    const data = new arrayTypes[element.dataset.dtype](await new Response(stream).arrayBuffer());
    const columns = Number(element.dataset.shape.split(",")[1] ?? 1);
    return [element.id.slice("array-".length), { data, columns }];
  };
  return Object.fromEntries(await Promise.all(Array.from(document.querySelectorAll("[id^='array-']"), read)));
}

const arrays = await readArrays();

/** Row i of a 2-d array, without the -1 that fill it up. */
function row(name, i) {
  const { data, columns } = arrays[name];
  return Array.from(data.subarray(i * columns, (i + 1) * columns)).filter((value) => value >= 0);
}

const place = (picture) => [arrays.disk.data[2 * picture], arrays.disk.data[2 * picture + 1]];

/** An element. Children are elements or text; nothing here ever parses markup, so names are harmless. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  fill(element, ...children);
  return element;
}

/** Give an element these children; null is none. */
function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null));
}

const count = (number) => number.toLocaleString("en");
const pictures = (number) => `${count(number)} ${number === 1 ? "picture" : "pictures"}`;
// Rounded, but only what is whole is 100 %.
const percent = (share) => (share < 0.01 ? "<1 %" : `${share < 1 ? Math.min(99, Math.round(100 * share)) : 100} %`);
const fileName = (picture) => names[picture].slice(names[picture].lastIndexOf("/") + 1) || names[picture];
const folder = (picture) => names[picture].slice(0, names[picture].lastIndexOf("/") + 1);
const say = (text) => (byId("live").textContent = text);
