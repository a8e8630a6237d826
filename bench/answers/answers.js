// The page shows the rows of its table that the controls choose, some at a time. Pieces of an answer are [kind, text]:
// -1 is not said any more, 0 is as it was, 1 is new.

const DATA = JSON.parse(document.getElementById("data").textContent);
const FIRST_ROWS = 50;
const find = (id) => document.getElementById(id);
const real = (value) => (value === "inf" ? Infinity : value);

const ROWS = DATA.rows.map(([set, id, question, truth, mrd, forecast, changed, answers]) => ({
  set, id, question, truth, mrd: real(mrd), forecast: real(forecast), changed: Boolean(changed),
  answers: answers.map((answer) => answer && { pieces: answer[0], rouge: answer[1], ma: answer[2], until: answer[3] }),
}));
const place = (role) => DATA.models.findIndex(([each]) => each === role);
const BEFORE = place("before"), AFTER = place("after");

const has = (value) => ROWS.some((row) => value(row) !== null && value(row) !== undefined);
const of = (position, metric) => (row) => (row.answers[position] ? row.answers[position][metric] : null);
const remembered = (row) => {
  const rouge = of(AFTER, "rouge")(row);
  return rouge === null ? null : rouge >= DATA.remembered;
};
const change = (row) => {
  const [before, after] = [of(BEFORE, "rouge")(row), of(AFTER, "rouge")(row)];
  return before === null || before === undefined || after === null ? null : before - after;
};
const amount = (value, digits) => (value === Infinity ? "∞" : number(value, digits));

// --- Cells ----------------------------------------------------------------------------------------------------

// A text keeps to its own direction of writing.
const text = (className, ...children) => make("p", { className, dir: "auto" }, ...children);

function asked(row) {
  return make("div", {},
    text("question", row.question === null ? "question not known" : row.question),
    text("said", row.truth === null ? "no truth known" : row.truth));
}

function answered(row, position) {
  const answer = row.answers[position];
  if (!answer) return "not asked";
  const marked = answer.pieces.map(([kind, words]) => (kind === 0 ? words : make(kind < 0 ? "del" : "ins", { textContent: words })));
  const facts = [
    ["ROUGE-L", answer.rouge === null ? null : number(answer.rouge, 2)], ["MA", answer.ma === null ? null : number(answer.ma, 2)],
    ["forgotten after", answer.until === null ? null : `${answer.until} ${answer.until === 1 ? "update" : "updates"}`],
  ];
  const known = facts.filter(([, value]) => value !== null).map((fact) => fact.join(" "));
  return make("div", {}, text("said", ...marked), make("p", { className: "facts", textContent: known.join(", ") }));
}

function sample(row) {
  const state = remembered(row);
  return make("div", {}, make("div", { className: "id", textContent: row.id }), make("div", { className: "facts", textContent: row.set }),
    state === null ? null : make("div", { className: state ? "kept" : "gone", textContent: state ? "remembered" : "forgotten" }));
}

// --- The table and its controls -------------------------------------------------------------------------------

const COLUMNS = [
  { title: "sample", value: (row) => row.id, cell: sample },
  ...(has((row) => row.mrd) ? [{ title: "MRD", value: (row) => row.mrd, cell: (row) => amount(row.mrd, 5), about: "low is hard to forget" }] : []),
  ...(has((row) => row.forecast) ? [{
    title: "forecast", value: (row) => row.forecast, cell: (row) => amount(row.forecast, 1), downFirst: true,
    about: `${DATA.forecast}: updates until it is forgotten`,
  }] : []),
  { title: "question and truth", value: (row) => row.question, cell: asked, words: true },
  ...DATA.models.map(([, name], position) => ({
    title: name, value: of(position, "rouge"), cell: (row) => answered(row, position), words: true, downFirst: true, about: "sorts by ROUGE-L",
  })),
];
const ORDERS = [
  { title: "order of the data", column: null },
  { title: "sample", column: COLUMNS[0] },
  ...COLUMNS.filter((column) => ["MRD", "forecast"].includes(column.title)).map((column) => ({ title: column.title, column })),
  ...(has(change) ? [{ title: "ROUGE-L lost", column: { value: change, downFirst: true } }] : []),
  ...DATA.models.flatMap(([, name], position) => [
    { title: `ROUGE-L of ${name}`, column: COLUMNS[COLUMNS.length - DATA.models.length + position] },
    ...(has(of(position, "ma")) ? [{ title: `MA of ${name}`, column: { value: of(position, "ma"), downFirst: true } }] : []),
  ]),
];
const STATES = [
  ["all", () => true],
  ["remembered", (row) => remembered(row) === true],
  ["forgotten", (row) => remembered(row) === false],
  ["changed", (row) => row.changed],
  ["unchanged", (row) => !row.changed],
];

function start() {
  const set = find("set"), state = find("state"), order = find("order"), direction = find("direction"), filter = find("filter");
  const option = (title, value) => make("option", { textContent: title, value });
  set.append(option("all", ""), ...[...new Set(ROWS.map((row) => row.set))].map((name) => option(name, `=${name}`)));
  state.append(...STATES.map(([name], position) => option(name, position)));
  order.append(...ORDERS.map(({ title }, position) => option(title, position)));

  // Headings order the table as well: the controls say what holds.
  function ordered(column, descending) {
    const position = ORDERS.findIndex((each) => each.column === column);
    order.selectedIndex = position;  // none for the question
    direction.textContent = descending ? "highest first" : "lowest first";
    direction.disabled = column === null;
    direction.onclick = () => table.order(column, !descending);
  }
  const table = sortable("Answers", COLUMNS, ROWS, { limit: FIRST_ROWS, step: FIRST_ROWS, onOrder: ordered });
  table.node.querySelector("table").classList.add("answers");
  ordered(null, false);
  order.addEventListener("change", () => {
    const { column } = ORDERS[order.selectedIndex];
    table.order(column, Boolean(column && column.downFirst));
  });

  const words = new Map();
  const wordsOf = (row) => {
    if (!words.has(row)) {
      const said = row.answers.flatMap((answer) => (answer ? answer.pieces.filter(([kind]) => kind >= 0).map(([, piece]) => piece).join("") : []));
      words.set(row, [row.id, row.question, row.truth, ...said].filter(Boolean).join("\n").toLowerCase());
    }
    return words.get(row);
  };
  function narrow() {
    const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean), [, inState] = STATES[state.selectedIndex];
    const kept = ROWS.filter((row) => (!set.value || set.value === `=${row.set}`) && inState(row) && wanted.every((word) => wordsOf(row).includes(word)));
    table.replace(kept);
    find("count").value = `${kept.length} of ${ROWS.length} samples`;
  }
  for (const control of [set, state]) control.addEventListener("change", narrow);
  filter.addEventListener("input", narrow);
  find("marks").addEventListener("change", (event) => document.body.classList.toggle("unmarked", !event.target.checked));
  find("place").replaceChildren(table.node);
  document.querySelector(".controls").hidden = false;
  narrow();
}

chooseTheme();
start();
