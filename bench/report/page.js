"use strict";
// What the scripts of all pages have in common; theirs follow below. Texts are only ever set as text.

const MINUS = "\u2212", DASH = "\u2013";

// --- Small pieces ---------------------------------------------------------------------------------------------

function make(tag, fields = {}, ...children) {
  const node = Object.assign(document.createElement(tag), fields);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return DASH;
  const small = value !== 0 && Math.abs(value) < 10 ** -digits;
  return (small ? value.toExponential(2) : value.toFixed(digits)).replaceAll("-", MINUS);
}

// --- Tables that can be sorted --------------------------------------------------------------------------------

// A column has a title, a value to sort by, what a cell shows (the value, by default), and whether it is of words. Rows
// are shown up to the limit, and then so many more at a time as `step` says. `onOrder` hears of every new order.
function sortable(caption, columns, rows, options = {}) {
  const { by = null, descending = false, limit = Infinity, step = Infinity, onOrder = () => {} } = options;
  const state = { column: by === null ? null : columns[by], descending, limit };
  const head = make("tr"), body = make("tbody"), more = make("button", { type: "button", className: "more" });
  const buttons = columns.map((column) => {
    const button = make("button", { type: "button", textContent: column.title });
    if (column.about) button.title = column.about;
    button.addEventListener("click", () => {
      order(column, state.column === column ? !state.descending : Boolean(column.downFirst));
    });
    head.append(make("th", { scope: "col" }, button));
    return button;
  });
  more.addEventListener("click", () => {
    state.limit += step;
    fill();
  });

  // By a column, or by anything else that has a value; null is the order in which the rows came.
  function order(column, fromHighest) {
    Object.assign(state, { column, descending: fromHighest, limit });
    fill();
    onOrder(column, fromHighest);
  }

  function fill() {
    const ordered = state.column === null ? rows : sorted(rows, state.column.value, state.descending);
    body.replaceChildren(...ordered.slice(0, state.limit).map((row) => {
      const cells = columns.map((column) => {
        const shown = column.cell ? column.cell(row) : column.value(row);
        return make("td", { className: column.words ? "words" : "" }, shown === null || shown === undefined ? DASH : shown);
      });
      return make("tr", {}, ...cells);
    }));
    buttons.forEach((button, place) => {
      const direction = state.column === columns[place] ? (state.descending ? "descending" : "ascending") : "none";
      button.parentElement.setAttribute("aria-sort", direction);
    });
    more.hidden = rows.length <= state.limit;
    more.textContent = step === Infinity ? `Show all ${rows.length}` : `Show ${Math.min(step, rows.length - state.limit)} more of ${rows.length}`;
  }

  function replace(others) {
    rows = others;
    state.limit = limit;
    fill();
  }

  const table = make("table", { className: "numbers" }, make("caption", { textContent: caption }), make("thead", {}, head), body);
  const scroll = make("div", { className: "scroll", tabIndex: 0 }, table);
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", caption);
  fill();
  return { node: make("div", {}, scroll, more), replace, order };
}

// Rows without a value come last, whichever way round; equal ones stay as they were.
function sorted(rows, value, descending) {
  const absent = (found) => found === null || found === undefined;
  return [...rows].sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (absent(a) || absent(b)) return absent(a) - absent(b);
    const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return descending ? -order : order;
  });
}

// --- Light and dark --------------------------------------------------------------------------------------------

function chooseTheme() {
  const button = document.getElementById("theme"), themes = ["auto", "light", "dark"];
  let now = "auto";
  try {
    now = localStorage.getItem("theme") || "auto";
  } catch {
    // A page from a file may have no storage: it follows the system then.
  }
  const apply = () => {
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    button.textContent = `Theme: ${now}`;
  };
  button.addEventListener("click", () => {
    now = themes[(themes.indexOf(now) + 1) % themes.length];
    try {
      localStorage.setItem("theme", now);
    } catch {
      // It holds until the page is closed.
    }
    apply();
  });
  button.hidden = false;
  apply();
}

