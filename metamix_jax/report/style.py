"""The style sheet of report.html: light, fluid, printable and readable without colour."""

from metamix_jax.report.markup import Markup

# Lines of the search's candidates: dash patterns, and colours that also differ in lightness.
_LINES = (
    ("#1b4f8f", "none"), ("#c2570c", "6 3"), ("#0f766e", "2 2"), ("#7e22ce", "8 2 2 2"),
    ("#a16207", "4 4"), ("#be123c", "1 3"), ("#334155", "10 3"), ("#15803d", "6 2 1 2"),
    ("#000000", "3 1"),
)  # fmt: skip

# The same in report.html and bits.png.
ACT_COLOUR, WEIGHT_COLOUR, SHARE_COLOUR = "#1b4f8f", "#d9822b", "#6b6b6b"

_RULES = """
:root { color-scheme: light; }
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 70rem; padding: 1.25rem clamp(0.9rem, 3vw, 2rem) 3rem;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  color: #1c1c1c; background: #fff; overflow-wrap: anywhere;
  print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 0.5rem; }
h2 {
  font-size: 1.25rem; margin: 2.5rem 0 0.75rem; padding-top: 0.5rem; border-top: 1px solid #bbb;
}
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
p { margin: 0 0 0.75rem; max-width: 48rem; }
a { color: #1b4f8f; }
.lead { font-size: 1.1rem; max-width: none; }
.note, caption, figcaption { color: #505050; font-size: 0.875rem; }
nav ul, .legend {
  list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1.1rem;
  font-size: 0.9rem;
}
.halves {
  display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
}
dl { margin: 0 0 0.75rem; }
dl > div {
  display: grid; grid-template-columns: minmax(7rem, 38%) 1fr; gap: 0.75rem;
  padding: 0.2rem 0; border-bottom: 1px solid #e4e4e4;
}
section > dl { max-width: 34rem; }
dt { color: #505050; }
dd { margin: 0; font-weight: 500; }
.scroll {
  overflow-x: auto; max-width: 100%; margin: 0 0 0.75rem;
  /* A shadow at each side where there is more to see. */
  background:
    linear-gradient(to right, #fff 40%, #fff0) 0 0 / 2.5rem 100% no-repeat local,
    linear-gradient(to left, #fff 40%, #fff0) 100% 0 / 2.5rem 100% no-repeat local,
    linear-gradient(to right, #0003, #0000) 0 0 / 0.6rem 100% no-repeat scroll,
    linear-gradient(to left, #0003, #0000) 100% 0 / 0.6rem 100% no-repeat scroll;
}
.scroll:focus-visible { outline: 2px solid #1b4f8f; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 0.4rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
thead th { border-bottom: 2px solid #777; vertical-align: bottom; }
tfoot th, tfoot td { border-top: 2px solid #777; font-weight: 600; }
tbody th { font-weight: 500; }
tr > :first-child { padding-left: 0; }
.text { text-align: left; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; overflow-wrap: normal; }
thead span { display: block; white-space: nowrap; }
.scroll .text { overflow-wrap: break-word; max-width: 24rem; }
.bits { table-layout: fixed; width: 100%; }
.bits th { text-align: left; }
.bits thead th { overflow-wrap: normal; }
.bits th:first-child { width: 34%; }
.bits th, .bits td { padding: 0.1rem 0.5rem 0.1rem 0; vertical-align: middle; }
.bits em { color: #505050; font-size: 0.8rem; }
.bits .fixed { background: #f1f1f1; }
.cell { display: flex; align-items: center; gap: 0.4rem; }
.cell span { flex: 0 0 auto; text-align: right; min-width: 1em; white-space: nowrap; }
td:last-child > .cell span { min-width: 2.3em; }
.bar { flex: 1 1 0; min-width: 0; width: 100%; height: 1.1rem; }
.weight { stroke: #5c3205; stroke-width: 1px; }
.empty { fill: #e6e6e6; }
figure { margin: 0 0 1rem; }
img { max-width: 100%; height: auto; display: block; }
details { border: 1px solid #bbb; border-radius: 4px; padding: 0.5rem 0.75rem; margin: 0.75rem 0; }
summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: 0.6rem; }
.legend { margin-bottom: 0.75rem; }
.legend svg { width: 36px; height: 10px; margin-right: 0.4rem; }
.multiples {
  display: grid; gap: 0.9rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
}
.multiples figure { margin: 0; }
.multiples svg { width: 100%; height: auto; display: block; }
.multiples figcaption { line-height: 1.3; font-size: 0.8rem; }
.multiples strong { display: block; }
.frame { fill: #fff; stroke: #bbb; }
.half { stroke: #ddd; }
polyline, .legend path { fill: none; stroke-width: 1.4; }
.winner { stroke-width: 3; }
.multiples text { font-size: 11px; fill: #505050; }
@media (max-width: 40rem) {
  .wide { display: none; }
  body { font-size: 0.95rem; }
  table { font-size: 0.8rem; }
  .bits th:first-child { width: 32%; }
  .bits thead th { font-size: 0.72rem; }
  .bits td { padding-right: 0.3rem; }
  .cell { gap: 0.25rem; }
  th, td { padding: 0.25rem 0.25rem; }
  thead span { white-space: normal; }
  .scroll table { font-size: 0.75rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  tr, figure, dl > div { break-inside: avoid; }
  h2 { break-after: avoid; }
  /* A heading repeats on every page, a total does not. */
  thead { display: table-header-group; }
  tfoot { display: table-row-group; }
  .scroll { overflow: visible; background: none; }
  details { border: 0; padding: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

STYLE = Markup(
    _RULES
    + f".act {{ fill: {ACT_COLOUR}; }}\n.weight {{ fill: {WEIGHT_COLOUR}; }}\n"
    + f".share {{ fill: {SHARE_COLOUR}; }}\n"
    + "".join(
        f".line{i} {{ stroke: {colour}; stroke-dasharray: {dashes}; }}\n"
        for i, (colour, dashes) in enumerate(_LINES)
    )
)
