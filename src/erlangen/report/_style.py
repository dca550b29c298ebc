"""The style sheet of a report."""

CSS = """\
:root {
  --paper: #ffffff; --ink: #1d2126; --soft: #5b636d; --line: #dfe3e8; --wash: #f4f6f8;
  --accent: #0b5c8f; --stress: #e8f2f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e4e7ea; --soft: #a0a8b1; --line: #343a41; --wash: #1d2126;
    --accent: #7cc0ea; --stress: #17303f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 1.25rem; letter-spacing: -0.015em; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 3rem 0 0.75rem; letter-spacing: -0.01em; }
h1, h2 { text-wrap: balance; }
p { margin: 0 0 1rem; overflow-wrap: break-word; }
a { color: var(--accent); }
code {
  font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--wash); border: 1px solid var(--line); border-radius: 4px; padding: 0.05em 0.3em;
  overflow-wrap: break-word;
}
.short { white-space: nowrap; }
.summary { border-left: 4px solid var(--accent); background: var(--wash); padding: 1rem 1.25rem; }
.summary { border-radius: 0 8px 8px 0; }
.summary p:last-child { margin-bottom: 0; }
nav { margin-top: 1.5rem; font-size: 0.95rem; }
nav ol { margin: 0; padding-left: 1.4rem; color: var(--soft); }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { scroll-margin-top: 1rem; }
figure { margin: 1.75rem 0; }
figcaption, .note { color: var(--soft); font-size: 0.92rem; line-height: 1.5; }
figcaption b { color: var(--ink); }
.table figcaption { margin-bottom: 0.5rem; }
.plot figcaption { margin-top: 0.6rem; }
.note { margin: 0.5rem 0 0; }
.card { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: 0.75rem; text-align: center; }
.card svg { display: block; margin: 0 auto; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; line-height: 1.4; }
th, td { padding: 0.5rem 0.75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--wash); vertical-align: bottom; font-weight: 600; }
tbody th { font-weight: 400; min-width: 7rem; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead .number { white-space: normal; }
.stressed > * { background: var(--stress); font-weight: 600; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h2 { margin-top: 2.25rem; }
  .card { padding: 0.4rem; }
  th, td { padding: 0.45rem 0.55rem; }
}
@media print {
  :root {
    --paper: #ffffff; --ink: #000000; --soft: #333333; --line: #bbbbbb; --wash: #ffffff;
    --accent: #000000; --stress: #eeeeee;
  }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { break-after: avoid; margin-top: 1.5rem; }
  .plot, tr, .summary { break-inside: avoid; }
  .table figcaption { break-after: avoid; }
  .scroll { overflow: visible; border-radius: 0; }
  table { font-size: 9pt; }
  .card { padding: 0; border: 0; }
  .card svg { max-width: 12.5cm; }
}
"""
