// Behavior of the report pages: draws plots when they come into view, sorts and filters tables,
// copies commands, and shows the run of a cell or a point.
"use strict";

// ---------------------------------------------------------------- tables

// Sort key of a cell: its data-sort, or its text.
function sortKey(row, column) {
  const cell = row.cells[column];
  return cell.dataset.sort !== undefined ? cell.dataset.sort : cell.textContent.trim();
}

// Numbers are compared by value, other texts in natural order; empty cells always come last.
function compareKeys(a, b, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const x = Number(a), y = Number(b);
  const order = Number.isNaN(x) || Number.isNaN(y)
    ? a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" })
    : x - y;
  return direction * order;
}

function sortTable(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const ascending = heads[column].getAttribute("aria-sort") !== "ascending";
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [sortKey(row, column), row]);
  keyed.sort((a, b) => compareKeys(a[0], b[0], ascending ? 1 : -1));
  body.append(...keyed.map(([, row]) => row));
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sortTable(table, column));
  });
}

// Shows the rows that contain every word of the box, anywhere in their text.
function filterTable(box) {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...document.getElementById(box.dataset.filter).tBodies[0].rows];
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    if (!row.hidden) shown += 1;
  }
  const count = box.parentElement.querySelector(".count");
  count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
}

for (const box of document.querySelectorAll("input[data-filter]")) {
  box.addEventListener("input", () => filterTable(box));
}

// ---------------------------------------------------------------- commands

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers deny pages opened as files the clipboard API; execCommand still works there.
    const area = document.createElement("textarea");
    area.value = text;
    area.style.position = "fixed";
    area.style.opacity = "0";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  button.textContent = (await copy(button.dataset.copy)) ? "Copied" : "Failed";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});

// ---------------------------------------------------------------- runs of cells and points

const runsData = document.getElementById("runs");
const runs = runsData ? JSON.parse(runsData.textContent) : [];

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function describe(place) {
  const run = runs[place];
  const entry = element("div", undefined, "picked");
  const head = element("p");
  head.append(element("b", run.title), " ", element("span", run.status, "pill " + run.status.replace(" ", "-")));
  entry.append(head, element("p", run.lines.join(" · "), "small"));
  if (run.command) {
    const line = element("span", undefined, "command");
    const button = element("button", "Copy", "copy");
    button.type = "button";
    button.dataset.copy = run.command;
    line.append(element("code", run.command), button);
    entry.append(line);
  }
  const links = element("p", undefined, "small");
  if (run.link) {
    const page = element("a", "Run page");
    page.href = run.link;
    links.append(page, " · ");
  }
  const row = element("a", "Row in the table");
  row.href = "#run-" + place;
  row.addEventListener("click", () => showRow(place));
  links.append(row);
  entry.append(links);
  return entry;
}

// Clears the filter if it hides the row.
function showRow(place) {
  const row = document.getElementById("run-" + place);
  if (!row || !row.hidden) return;
  const box = document.querySelector(`input[data-filter="${row.closest("table").id}"]`);
  box.value = "";
  filterTable(box);
}

function pick(places) {
  let panel = document.getElementById("pick");
  if (!panel) {
    panel = element("aside");
    panel.id = "pick";
    panel.setAttribute("aria-label", "Selected run");
    panel.setAttribute("aria-live", "polite");
    document.body.append(panel);
  }
  const close = element("button", "Close", "close");
  close.type = "button";
  close.addEventListener("click", () => panel.remove());
  panel.replaceChildren(close, ...places.map(describe));
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.getElementById("pick")?.remove();
});

// ---------------------------------------------------------------- plots

const hovers = matchMedia("(hover: hover) and (min-width: 700px)").matches;

// Places of the runs that a plot event is about.
function placesOf(event) {
  const chosen = event.points[0].customdata;
  return runs.length && typeof chosen === "string" && chosen ? chosen.split(" ").map(Number) : [];
}

// The tooltip of a run beside the pointer, kept inside the window.
const tip = element("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);

function point(places, at) {
  const run = runs[places[0]];
  const more = places.length > 1 ? ` and ${places.length - 1} more` : "";
  tip.replaceChildren(element("b", run.title + more), ...run.lines.map((line) => element("div", line)));
  if (run.command) tip.append(element("code", run.command));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = at.clientX + 16 + width < innerWidth ? at.clientX + 16 : at.clientX - 16 - width;
  const top = at.clientY + 16 + height < innerHeight ? at.clientY + 16 : at.clientY - 16 - height;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

function draw(canvas) {
  if (canvas.dataset.drawn) return;
  canvas.dataset.drawn = "yes";
  const { data, layout } = JSON.parse(canvas.closest("figure").querySelector("script").textContent);
  layout.autosize = true;
  // On touch screens, dragging over a plot scrolls the page.
  layout.dragmode = hovers ? "zoom" : false;
  const still = layout.xaxis?.fixedrange;
  const options = { responsive: true, displaylogo: false,
    displayModeBar: hovers && !still ? "hover" : false,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
  Plotly.newPlot(canvas, data, layout, options).then(() => {
    canvas.on("plotly_click", (event) => {
      const places = placesOf(event);
      tip.hidden = true;
      if (places.length) pick(places);
    });
    canvas.on("plotly_hover", (event) => {
      const places = placesOf(event);
      if (hovers && places.length && event.event) point(places, event.event);
    });
    canvas.on("plotly_unhover", () => { tip.hidden = true; });
  });
}

const canvases = [...document.querySelectorAll(".canvas")];
if (window.IntersectionObserver) {
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        observer.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "800px" });
  canvases.forEach((canvas) => observer.observe(canvas));
} else {
  canvases.forEach(draw);
}
window.addEventListener("beforeprint", () => canvases.forEach(draw));
