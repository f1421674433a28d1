// Tables are complete without this: it turns the headers of columns into buttons that sort.
for (const table of document.querySelectorAll(".se-fx table.sortable:not([data-ready])")) {
  table.dataset.ready = "";
  const [body] = table.tBodies;
  const headers = [...table.tHead.rows[0].cells];
  const number = (row, column) => Number(row.cells[column].dataset.key);
  const text = (row, column) => row.cells[column].textContent;
  headers.forEach((header, column) => {
    const isNumber = header.classList.contains("number");
    const compare = isNumber
      ? (a, b) => number(a, column) - number(b, column)
      : (a, b) => text(a, column).localeCompare(text(b, column), "en", { numeric: true });
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
    });
  });
}
