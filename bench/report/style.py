"""The style sheet of all pages: light or dark as the reader prefers, readable from a phone's width up.

A page on which the reader can choose sets data-theme to "light" or "dark" on the root element.
"""

# The colours are named as in bench.report.figures.CSS_NAMES; on a dark page they have the same hue and are lighter.
STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#ffffff, #15171b); --raised: light-dark(#f5f6f8, #1f2228);
  --ink: light-dark(#1b1d21, #e6e8ec); --muted: light-dark(#5c6068, #a4a9b3); --grid: light-dark(#d9dbe0, #363a42);
  --blue: light-dark(#0072b2, #56b4e9); --orange: light-dark(#e69f00, #f0b429);
  --green: light-dark(#009e73, #2fc49a); --vermillion: light-dark(#d55e00, #ff8a4c);
}
:root[data-theme="light"] { color-scheme: light; }
:root[data-theme="dark"] { color-scheme: dark; }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 60rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; margin: 1.2rem 0 .6rem; }
h2 {
  font-size: 1.3rem; line-height: 1.3; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--grid);
}
p, li { max-width: 46rem; }
li { margin-bottom: .5rem; }
a { color: var(--blue); }
nav ul {
  display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 0; padding: 0;
  list-style: none; font-size: .95rem;
}
nav li { margin: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 1rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.4rem 0; max-width: 40rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .4rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
.scroll:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; min-width: 100%; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; }
.numbers td, .numbers tbody th { white-space: nowrap; font-variant-numeric: tabular-nums; }
.texts { min-width: 42rem; }
.texts td:nth-child(2) { min-width: 20rem; }
.texts td:nth-child(n+3), .texts th { white-space: nowrap; font-variant-numeric: tabular-nums; }
.texts p { margin: 0; }
.texts .question { color: var(--muted); }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 30rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
  .texts { min-width: 34rem; }
  .texts td:nth-child(2) { min-width: 14rem; }
}
"""
