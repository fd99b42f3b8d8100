"use strict";
// Sorting, filtering and the large view. Without this script the table and its links still work.
const body = document.querySelector("tbody");
const rows = [...body.rows];
const collator = new Intl.Collator("en", { numeric: true });
const shownCount = document.getElementById("shown");
const search = document.getElementById("search");
const buttons = [...document.querySelectorAll("button[data-only]")];
const heads = [...document.querySelectorAll("th button")];
const more = document.getElementById("more");
// A browser takes many seconds to lay out ten thousand rows, so they are shown in portions; sorting and searching see them all.
const portion = Number(more.dataset.portion);
let limit = portion;
let only = "";

function value(row, column) {
  const text = row.cells[column].firstChild ? row.cells[column].firstChild.textContent.trim() : "";
  const number = Number(text.replaceAll(",", ""));
  return text === "" || text === "–" ? null : Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

function sort(head) {
  const down = head.parentNode.ariaSort === "ascending";
  heads.forEach((other) => { other.parentNode.ariaSort = "none"; });
  head.parentNode.ariaSort = down ? "descending" : "ascending";
  const column = head.parentNode.cellIndex;
  const keyed = rows.map((row, place) => ({ row, place, key: value(row, column) }));
  keyed.sort((a, b) => {
    // What is unknown stays at the end, whichever way the table is sorted.
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.place - b.place;
    return (down ? -1 : 1) * compare(a.key, b.key) || a.place - b.place;
  });
  body.append(...keyed.map((item) => item.row));
  update();
}

function update() {
  const wanted = search.value.trim().toLowerCase();
  let count = 0;
  for (const row of [...body.rows]) {
    const fits = (!only || row.classList.contains(only)) && row.textContent.toLowerCase().includes(wanted);
    count += fits;
    row.hidden = !fits || count > limit;
  }
  shownCount.textContent = Math.min(count, limit).toLocaleString("en") + " of " + count.toLocaleString("en");
  more.hidden = count <= limit;
}

const view = document.getElementById("view");
let current = null;

function show(row) {
  current = row;
  view.querySelector("h2").textContent = row.querySelector("th").firstChild.textContent;
  for (const kind of ["overlay", "sheet"]) {
    const link = row.querySelector("a." + kind);
    const image = view.querySelector("img." + kind);
    image.hidden = !link;
    if (link) image.src = link.href;
  }
  if (!view.open) view.showModal();
}

function step(forward) {
  let row = current;
  do row = forward ? row.nextElementSibling : row.previousElementSibling;
  while (row && (row.hidden || !row.querySelector("a.overlay, a.sheet")));
  if (row) show(row);
}

heads.forEach((head) => head.addEventListener("click", () => sort(head)));
search.addEventListener("input", update);
more.addEventListener("click", () => { limit += portion; update(); });
buttons.forEach((button) => button.addEventListener("click", () => {
  only = button.dataset.only;
  buttons.forEach((other) => { other.ariaPressed = String(other === button); });
  update();
}));
body.addEventListener("click", (event) => {
  const link = event.target.closest("a.overlay, a.sheet");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(link.closest("tr"));
});
view.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button && button.dataset.step) step(button.dataset.step === "next");
  else if (button || event.target === view) view.close();
});
view.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight" || event.key === "ArrowLeft") step(event.key === "ArrowRight");
});
