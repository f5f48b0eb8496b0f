"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.sort;
      const order = (a, b) => {
        const [x, y] = [Number(key(a)), Number(key(b))];
        if (Number.isNaN(x) || Number.isNaN(y)) return key(a).localeCompare(key(b));
        return x - y;
      };
      const unknown = (row) => Number(key(row) === "nan");
      const body = table.tBodies[0];
      const rows = [...body.rows].sort(
        (a, b) => unknown(a) - unknown(b) || (down ? order(b, a) : order(a, b)),
      );
      body.append(...rows);
    });
  });
}
for (const figure of document.querySelectorAll("figure")) {
  const told = figure.querySelector(".told");
  for (const mark of figure.querySelectorAll(".mark")) {
    const tell = () => { told.textContent = mark.querySelector("title").textContent; };
    mark.addEventListener("pointerenter", tell);
    mark.addEventListener("click", tell);
  }
}
const seconds = Number(document.body.dataset.reload);
if (seconds) setTimeout(() => location.reload(), 1000 * seconds);
