// Search by file name, as you type.

const RESULTS = 40;
const lowerNames = names.map((name) => name.toLowerCase());
const searchBox = byId("search");
const resultList = byId("results");
let selected = -1;

function find(text) {
  const found = [];
  for (let picture = 0; picture < n && found.length < RESULTS; picture++) {
    if (lowerNames[picture].includes(text)) found.push(picture);
  }
  return found;
}

function result(picture, text, i) {
  const name = names[picture];
  const at = lowerNames[picture].indexOf(text);
  const end = at + text.length;
  return h("li", { role: "option", id: `result-${i}`, "data-picture": picture, "aria-selected": "false" },
    tile(picture),
    h("span", { class: "name" }, name.slice(0, at), h("mark", {}, name.slice(at, end)), name.slice(end)));
}

function showResults() {
  const text = searchBox.value.trim().toLowerCase();
  const found = text ? find(text) : [];
  selected = -1;
  resultList.replaceChildren(...found.map((picture, i) => result(picture, text, i)));
  if (text && !found.length) resultList.append(h("li", { class: "none" }, "No picture has this in its name"));
  resultList.hidden = !text;
  searchBox.setAttribute("aria-expanded", String(!resultList.hidden));
  searchBox.removeAttribute("aria-activedescendant");
}

function closeResults() {
  resultList.hidden = true;
  searchBox.setAttribute("aria-expanded", "false");
}

function select(to) {
  const options = resultList.querySelectorAll("[role=option]");
  if (!options.length) return;
  options[selected]?.setAttribute("aria-selected", "false");
  selected = (to + options.length) % options.length;
  options[selected].setAttribute("aria-selected", "true");
  options[selected].scrollIntoView({ block: "nearest" });
  searchBox.setAttribute("aria-activedescendant", options[selected].id);
}

function choose(option) {
  closeResults();
  openPicture(Number(option.dataset.picture), searchBox);
}

searchBox.addEventListener("input", showResults);
searchBox.addEventListener("blur", closeResults);
searchBox.addEventListener("keydown", (event) => {
  const options = resultList.querySelectorAll("[role=option]");
  if (resultList.hidden && event.key === "ArrowDown") showResults();
  else if (event.key === "ArrowDown") select(selected + 1);
  else if (event.key === "ArrowUp") select(selected < 0 ? -1 : selected - 1);
  else if (event.key === "Enter" && !resultList.hidden && options.length) choose(options[Math.max(0, selected)]);
  else if (event.key === "Escape" && !resultList.hidden) {
    closeResults();
    event.stopPropagation();
  } else return;
  event.preventDefault();
});
resultList.addEventListener("pointerdown", (event) => event.preventDefault()); // the box keeps the focus, and the list stays
resultList.addEventListener("click", (event) => {
  const option = event.target.closest("[role=option]");
  if (option) choose(option);
});
