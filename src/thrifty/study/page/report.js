"use strict";

// Tables: a header's button sorts by its column, and again the other way. Cells without a value stay last.
function sortBy(table, column, ascending) {
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows];
  const numeric = rows.every((row) => value(row) === "" || !Number.isNaN(Number(value(row))));
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
    return ascending ? order : -order;
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortBy(table, column, ascending);
    });
  });
}

// Plots: colours of text and lines follow the page's scheme.
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const [text, line, page] = ["--text", "--line", "--page"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line };
  return {
    ...layout,
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, family: getComputedStyle(document.body).fontFamily, size: 12 },
    hoverlabel: { bgcolor: page, bordercolor: line, font: { color: text } },
  };
}

// On a touch screen a finger on a plot scrolls the page; elsewhere dragging zooms and a double click goes back.
const dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";
const config = { responsive: true, displayModeBar: false };
const figures = JSON.parse(document.getElementById("figures").textContent);

function draw() {
  for (const [name, figure] of Object.entries(figures)) {
    Plotly.react(name, figure.data, themed({ ...figure.layout, dragmode }), config);
  }
}

draw();
dark.addEventListener("change", draw);
