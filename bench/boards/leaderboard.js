// The page is a view of what its address says behind the #: board, metric, entry and run. Links change that, and
// the view follows, so that going back works and every view can be linked to.

const BOARDS = JSON.parse(document.getElementById("data").textContent);
const FIRST_ROWS = 200;

// --- Small pieces ---------------------------------------------------------------------------------------------

const whole = (value) => (value === null || value === undefined ? DASH : String(value).replace("-", MINUS));

function withInterval(estimate) {
  if (!estimate) return DASH;
  const [value, low, high] = estimate;
  return low === null ? number(value) : `${number(value)} [${number(low)} to ${number(high)}]`;
}

function address(fields) {
  const given = Object.entries(fields).filter(([, value]) => value !== null && value !== undefined);
  return "#" + new URLSearchParams(given).toString();
}

const link = (text, fields) => make("a", { href: address(fields), textContent: text });

// --- The standings of a board ---------------------------------------------------------------------------------

function standingRow(board, row) {
  const [entry, rank, best, worst, value, adjusted, adjustedRank, groups, runs, selections, seeds, forecast, forecastRank] = row;
  const [name, fields] = board.entries[entry];
  return {
    name, fields, rank, best, worst, value, adjusted, adjustedRank, groups, runs, selections, seeds, forecast, forecastRank,
  };
}

function rankText(row) {
  if (row.rank === null) return "not compared";
  return row.best === null || row.best === row.worst ? `${row.rank}` : `${row.rank} (${row.best}${DASH}${row.worst})`;
}

function movedRankCell(row, rank, at) {
  if (rank === null || rank === undefined) return DASH;
  const moved = row.rank === null ? 0 : row.rank - rank;
  if (!moved) return `${rank}`;
  const places = Math.abs(moved) === 1 ? "1 place" : `${Math.abs(moved)} places`;
  const mark = make("span", { className: "moved", textContent: ` ${moved > 0 ? "▲" : "▼"} ${Math.abs(moved)}` });
  mark.title = `${places} ${moved > 0 ? "better" : "worse"} at equal ${at}`;
  mark.setAttribute("aria-label", mark.title);
  mark.setAttribute("role", "img");
  return make("span", {}, `${rank}`, mark);
}

function standingColumns(title, where, adjusted, forecasts) {
  const byDifficulty = [
    {
      title: "at equal difficulty",
      value: (row) => (row.adjusted ? row.adjusted[0] : null),
      cell: (row) => withInterval(row.adjusted),
      downFirst: true,
    },
    { title: "rank there", value: (row) => row.adjustedRank, cell: (row) => movedRankCell(row, row.adjustedRank, "difficulty") },
  ];
  const byForecast = [
    {
      title: "at equal forecast",
      value: (row) => (row.forecast ? row.forecast[0] : null),
      cell: (row) => withInterval(row.forecast),
      downFirst: true,
      about: "difficulty by flip time, the forecast of updates",
    },
    { title: "rank by forecast", value: (row) => row.forecastRank, cell: (row) => movedRankCell(row, row.forecastRank, "forecast") },
  ];
  return [
    { title: "rank", value: (row) => row.rank, cell: rankText, about: "as measured, with the ranks it can have" },
    { title: "entry", value: (row) => row.name, cell: (row) => link(row.name, { ...where, entry: row.name }), words: true },
    { title, value: (row) => row.value[0], cell: (row) => withInterval(row.value), downFirst: true },
    ...(adjusted ? byDifficulty : []),
    ...(forecasts ? byForecast : []),
    { title: "not separable", value: (row) => row.groups || null, about: "entries that share a letter" },
    { title: "runs", value: (row) => row.runs, downFirst: true },
    { title: "selections", value: (row) => row.selections, downFirst: true },
    { title: "seeds", value: (row) => row.seeds, downFirst: true },
  ];
}

function showBoard(section, number, board, metric) {
  const place = section.querySelector(".place");
  if (!place) return;
  const choice = section.querySelector(".metric"), filter = section.querySelector(".filter");
  const count = section.querySelector(".count");
  section.querySelector(".controls").hidden = false;
  if (!choice.options.length) {
    choice.append(...board.metrics.map(([name, title, , up]) => make("option", { value: name, textContent: `${title} ${up ? "↑" : "↓"}` })));
    choice.addEventListener("change", () => {
      location.hash = address({ board: number, metric: choice.value });
    });
  }
  choice.value = board.metrics[metric][0];
  choice.title = board.metrics[metric][2];
  const rows = board.standings[metric].map((row) => standingRow(board, row));
  const where = { board: number, metric: board.metrics[metric][0] };
  const adjusted = rows.some((row) => row.adjusted), forecasts = rows.some((row) => row.forecast);
  const table = sortable("Standings", standingColumns(board.metrics[metric][1], where, adjusted, forecasts), rows, { by: 0 });
  place.replaceChildren(table.node);
  section.querySelector(".sentences").replaceChildren(...board.sentences[metric].map((text) => make("p", { textContent: text })));

  function narrow() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) => [row.name, ...Object.entries(row.fields).flat()].join(" ").toLowerCase();
    const kept = rows.filter((row) => words.every((word) => text(row).includes(word)));
    table.replace(kept);
    count.value = `${kept.length} of ${rows.length} entries`;
  }
  filter.oninput = narrow;
  narrow();
}

// --- From an entry to its runs, from a run to its samples -----------------------------------------------------

function runRow(board, row) {
  const [hash, entry, selection, seed, status, reason, values, updates, seconds, until, origin, answers] = row;
  const [name, level, difficulty, samples, flipTime] = board.selections[selection];
  return {
    hash, entry: board.entries[entry][0], selection: name, level, difficulty, flipTime, samples, seed, status, reason,
    values, updates, seconds, until, origin, answers,
  };
}

function statusCell(row) {
  if (row.status === "finished") return "finished";
  return make("span", { className: "failed", textContent: `✗ ${row.status}: ${row.reason || "no reason given"}` });
}

function showEntry(detail, where, board, metric, name) {
  const rows = board.runs.map((row) => runRow(board, row)).filter((row) => row.entry === name);
  const shown = board.metrics.map((found, place) => [found, place]).sort(([, a], [, b]) => (b === metric) - (a === metric));
  const columns = [
    { title: "run", value: (row) => row.hash, cell: (row) => link(row.hash, { ...where, entry: name, run: row.hash }) },
    { title: "selection", value: (row) => row.selection, words: true },
    { title: "mean log MRD", value: (row) => row.difficulty, cell: (row) => number(row.difficulty), about: "of the selection; low is hard to forget" },
    ...(rows.some((row) => row.flipTime !== undefined) ? [
      { title: "mean log flip time", value: (row) => row.flipTime, cell: (row) => number(row.flipTime), about: "of the selection, in updates; high is hard to forget" },
    ] : []),
    { title: "seed", value: (row) => row.seed },
    { title: "status", value: (row) => row.status, cell: statusCell, words: true },
    ...shown.map(([[, title], place]) => ({
      title, value: (row) => row.values[place], cell: (row) => number(row.values[place]), downFirst: true,
    })),
    { title: "updates", value: (row) => row.updates, cell: (row) => whole(row.updates), downFirst: true },
    { title: "seconds", value: (row) => row.seconds, cell: (row) => number(row.seconds, 1), downFirst: true },
  ];
  const settings = Object.entries((board.entries.find(([each]) => each === name) || [name, {}])[1]);
  const about = make("dl", {}, ...settings.flatMap(([key, value]) => [make("dt", { textContent: key }), make("dd", { textContent: value })]));
  open(detail, name, [
    link(`Back to ${board.name}`, where), about,
    rows.length ? sortable(`${rows.length} runs`, columns, rows, { by: 1, limit: FIRST_ROWS }).node : make("p", { textContent: "There is no such entry." }),
  ]);
}

function showRun(detail, where, board, name) {
  const found = board.runs.find((row) => row[0] === name);
  if (!found) {
    open(detail, `Run ${name}`, [link(`Back to ${board.name}`, where), make("p", { textContent: "There is no such run." })]);
    return;
  }
  const run = runRow(board, found);
  const facts = [
    ["entry", run.entry], ["selection", run.level ? `${run.selection} (${run.level})` : run.selection], ["seed", whole(run.seed)],
    ["status", run.status], ...(run.reason ? [["reason", run.reason]] : []), ["spec", run.hash],
    ...board.metrics.map(([, title], place) => [title, number(run.values[place], 4)]),
    ["updates", whole(run.updates)], ["seconds", number(run.seconds, 1)], ...board.origins[run.origin],
  ];
  const samples = run.samples.map((place, position) => {
    const [id, prompt, completion, mrd, tokens] = board.samples[place];
    return { id, prompt, completion, mrd, tokens, until: run.until ? run.until[position] : null };
  });
  const columns = [
    { title: "sample", value: (row) => row.id, words: true },
    { title: "MRD", value: (row) => row.mrd, cell: (row) => number(row.mrd, 5), about: "low is hard to forget" },
    { title: "tokens", value: (row) => row.tokens, cell: (row) => whole(row.tokens), downFirst: true },
    { title: "updates until forgotten", value: (row) => row.until, cell: (row) => whole(row.until), downFirst: true },
    {
      title: "text", value: (row) => row.completion, words: true,
      cell: (row) => (row.completion === null ? "not stored" : make("div", {},
        make("p", { className: "question", textContent: row.prompt }), make("p", { className: "completion", textContent: row.completion }))),
    },
  ];
  const table = sortable(`${samples.length} samples, hardest first`, columns, samples, { by: 1, limit: FIRST_ROWS }).node;
  table.querySelector("table").classList.add("texts");
  open(detail, `Run ${name}`, [
    link(`Back to the runs of ${run.entry}`, { ...where, entry: run.entry }),
    run.answers ? make("p", {}, make("a", { href: run.answers, textContent: "Answers before and after, side by side" })) : null,
    make("dl", {}, ...facts.flatMap(([key, value]) => [make("dt", { textContent: key }), make("dd", { textContent: value })])),
    table,
  ]);
}

function open(detail, title, children) {
  detail.replaceChildren(make("h2", { tabIndex: -1, textContent: title }), ...children.filter((child) => child !== null));
}

// --- The view ------------------------------------------------------------------------------------------------

let before = null;

function show() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const detail = document.getElementById("detail"), sections = [...document.querySelectorAll("section.board")];
  const number = Math.min(Math.max(Number.parseInt(asked.get("board") || "0", 10) || 0, 0), BOARDS.length - 1);
  const board = BOARDS[number];
  if (!board) return;
  const metric = Math.max(board.metrics.findIndex(([name]) => name === asked.get("metric")), 0);
  const where = { board: number, metric: board.metrics.length ? board.metrics[metric][0] : null };
  const inDetail = asked.has("entry") || asked.has("run");
  sections.forEach((section, place) => {
    section.hidden = inDetail || place !== number;
  });
  detail.hidden = !inDetail;
  document.querySelectorAll("#boards a").forEach((each, place) => {
    each.setAttribute("aria-current", String(place === number));
  });
  if (asked.has("run")) showRun(detail, where, board, asked.get("run"));
  else if (asked.has("entry")) showEntry(detail, where, board, metric, asked.get("entry"));
  else showBoard(sections[number], number, board, metric);
  // Not on opening the page, nor when only the metric has changed: the reader is where they were.
  const view = `${number} ${asked.get("entry")} ${asked.get("run")}`;
  if (before !== null && before !== view) {
    const heading = (inDetail ? detail : sections[number]).querySelector("h2");
    heading.focus();
    heading.scrollIntoView();
  }
  before = view;
}

chooseTheme();
window.addEventListener("hashchange", show);
show();
