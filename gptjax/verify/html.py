"""The report as a self-contained web page: tables, a heat map by tensor and layer, the
environment.
"""

import math
from html import escape

from gptjax.verify.ops import ops_cells
from gptjax.verify.proof import RELAXED, Report
from gptjax.verify.rows import Comparison, Row, cells

# Viridis, from small to large errors; readable with colour blindness
SCALE = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --quiet: #59636e; --line: #d1d9e0; --good: #1a7f37;
  --bad: #cf222e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --text: #e6edf3; --quiet: #9198a1; --line: #3d444d; --good: #3fb950; --bad: #ff7b72; }
}
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { color: var(--quiet); margin: .25rem 0 .75rem; }
.verdict { font-size: 1.1rem; font-weight: 600; }
.good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font: 13px/1.4 ui-monospace, monospace; font-variant-numeric: tabular-nums;
  margin-bottom: .5rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.heat td { border: 1px solid var(--back); padding: .25rem .35rem; text-align: center; }
.heat td.bad { outline: 3px solid var(--bad); outline-offset: -3px; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.legend { display: flex; align-items: center; gap: .6rem; color: var(--quiet); font-size: 13px; margin: .5rem 0; }
.ramp { width: 12rem; height: .8rem; border-radius: 3px; }
"""


def as_html(report: Report) -> str:
    """The page."""
    verdict = "good" if report else "bad"
    sections = [
        "<h1>gptjax: is the hand-written gradient right?</h1><div class='verdict "
        f"{verdict}'>{escape(report.closing)}</div>",
        _section(
            "Gradient by tensor",
            f"Against {report.reference}; all layers of a tensor together.",
            _rows(report.gradient.tensors),
        ),
    ]
    if report.relaxed:
        sections.append(f"<p>{escape(RELAXED)}.</p>")
    if any(row.layer is not None for row in report.gradient.rows):
        sections.append(
            _section(
                "Gradient by tensor and layer",
                "log10 of the relative L2 error.",
                _heat_map(report.gradient),
            )
        )
    if report.forward is not None:
        sections.append(_section("Forward", "Loss and logits.", _rows(report.forward.rows)))
    if report.curvature is not None:
        text = "Forward over the hand-written reverse, along a random vector."
        sections.append(_section("Hessian-vector product", text, _rows(report.curvature.tensors)))
    if report.ops:
        sections.append(
            _section(
                "Ops",
                "Each by itself at a small shape, worst argument.",
                _table(ops_cells(report.ops)),
            )
        )
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in report.environment.items()
    )
    sections.append(f"<h2>Environment</h2><dl>{facts}</dl>")
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>gptjax "
        "verify</title>"
    )
    head += f"<style>{STYLE}</style>"
    return (
        f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(sections)}</body></html>"
    )


def _section(title: str, text: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(text)}</p><div class='scroll'>{body}</div>"


def _rows(rows: tuple[Row, ...]) -> str:
    return _table(cells(rows))


def _table(lines: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in line)}</tr>" for line in lines[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    kind = {"ok": " class='good'", "WRONG": " class='bad'"}.get(text, "")
    return f"<td{kind}>{escape(text)}</td>"


def _heat_map(found: Comparison) -> str:
    """A row for each layer, a column for each tensor; tensors outside the layers in a table of
    their own.
    """
    by_place = {(row.tensor, row.layer): row for row in found.rows}
    tensors = list(dict.fromkeys(row.tensor for row in found.rows if row.layer is not None))
    single = [row for row in found.rows if row.layer is None]
    low = math.floor(
        math.log10(
            min(
                (row.relative_l2 for row in found.rows if 0 < row.relative_l2 < math.inf),
                default=1e-16,
            )
        )
    )
    high = max(math.ceil(math.log10(max(row.tolerance for row in found.rows))), low + 1)
    lines = []
    for layer in sorted({row.layer for row in found.rows if row.layer is not None}):
        fields = "".join(_colour(by_place.get((tensor, layer)), low, high) for tensor in tensors)
        lines.append(f"<tr><th>{layer}</th>{fields}</tr>")
    head = "".join(f"<th>{escape(tensor)}</th>" for tensor in tensors)
    grid = f"<table class='heat'><thead><tr><th>layer</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    colours = ", ".join(f"rgb{colour}" for colour in SCALE)
    ramp = f"<div class='ramp' style='background: linear-gradient(to right, {colours})'></div>"
    legend = (
        f"<div class='legend'>{low}{ramp}{high}, where the tolerance ends; outlined where "
        "wrong</div>"
    )
    if single:
        names = "".join(f"<th>{escape(row.tensor)}</th>" for row in single)
        values = "".join(_colour(row, low, high) for row in single)
        grid += f"<table class='heat'><thead><tr><th>outside</th>{names}</tr></thead>"
        grid += f"<tbody><tr><th></th>{values}</tr></tbody></table>"
    return legend + grid


def _colour(row: Row | None, low: int, high: int) -> str:
    if row is None:
        return "<td></td>"
    error = row.relative_l2
    text = (
        f"{math.log10(error):.1f}"
        if 0 < error < math.inf
        else "exact"
        if error == 0
        else str(error)
    )
    part = (
        min(max((math.log10(error) - low) / (high - low), 0.0), 1.0)
        if 0 < error < math.inf
        else float(error != 0)
    )
    at = part * (len(SCALE) - 1)
    i = min(int(at), len(SCALE) - 2)
    red, green, blue = (
        round(a + (at - i) * (b - a)) for a, b in zip(SCALE[i], SCALE[i + 1], strict=True)
    )
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#fff"
    kind = "" if row.ok else " class='bad'"
    title = f"{row.tensor}[{row.layer}]: {error:.2e}, tolerance {row.tolerance:.1e}"
    return (
        f"<td{kind} style='background: rgb({red}, {green}, {blue}); color: {ink}' "
        f"title='{escape(title)}'>{text}</td>"
    )
