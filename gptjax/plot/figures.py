"""What the notebooks show: source code, tokens, and pictures that come with a description in words.
Needs matplotlib.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FixedLocator, MaxNLocator

from gptjax.explore.lessons import source_of
from gptjax.tokenizers import Tokenizer
from gptjax.verify import Comparison, Row

# Okabe and Ito's palette, distinct for every kind of colour vision (jfly.uni-koeln.de/color)
COLOURS = BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
)
GREY, PALE = "#6B7280", "#EEF0F3"
WHITESPACE = str.maketrans(" \n\t", "␣↵→")


# Small type, thin frames, a white background
STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "image.cmap": "viridis",
}
COLUMNS = 88  # of source code, so that a notebook need not be scrolled sideways


class DescribedFigure:
    """A figure and its description, which stands in for it where it cannot be seen."""

    def __init__(self, figure: Figure, alt: str) -> None:
        """Render the figure."""
        self.figure, self.alt = figure, alt
        with io.BytesIO() as file, mpl.rc_context(STYLE):
            figure.savefig(file, format="png")
            self.png = base64.b64encode(file.getvalue()).decode()

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        data = {"image/png": self.png, "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


class SourceCode:
    """Source code without its docstrings, highlighted in a notebook and plain in a terminal."""

    def __init__(self, *functions: Callable[..., Any]) -> None:
        """Get the functions' source."""
        lines = "\n".join(map(source_of, functions)).splitlines()
        self.text = "\n".join(map(_folded, lines))

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return f"```python\n{self.text}\n```"


def _folded(line: str) -> str:
    """A line of code, in two after a comma if it is longer than `COLUMNS`."""
    at = line.rfind(", ", 0, COLUMNS) + 1
    if len(line) <= COLUMNS or not at:
        return line
    indent = len(line) - len(line.lstrip()) + 4
    return line[:at] + "\n" + _folded(" " * indent + line[at + 1 :])


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each id, for an axis: blanks and line ends are made visible, and bytes that are
    not a character are hexadecimal.
    """

    def piece(token: int) -> str:
        raw = tokenizer.decode_bytes([token])
        try:
            text = raw.decode().translate(WHITESPACE)
        except UnicodeDecodeError:
            text = raw.hex(" ")
        return text if text.isprintable() else raw.hex(" ")

    return [piece(int(token)) for token in ids]


def heat_map(
    ax: Axes,
    values: Any,
    label: str,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    log: bool = False,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    texts: Sequence[Sequence[str]] = (),
    bar: bool = True,
) -> None:
    """Draw a matrix as a heat map, in viridis or, if ``diverging``, from purple over white at 0 to
    orange.

    Args:
        ax: axes to draw on.
        values: (R, C); entries that are not finite, or with ``log`` not above 0, are grey.
        label: the quantity with its unit, for the colour bar.
        rows: names of the rows.
        columns: names of the columns.
        log: use a logarithmic colour scale.
        diverging: use a colour scale symmetric about 0.
        limits: limits of the colour scale; by default those of the values.
        texts: (R, C), written into the cells.
        bar: draw a colour bar.

    """
    values = np.ma.masked_invalid(np.asarray(values, np.float64))
    values = np.ma.masked_less_equal(values, 0) if log else values
    extent = float(abs(values).max())
    low, high = limits or (
        (-extent, extent) if diverging else (float(values.min()), float(values.max()))
    )
    norm = LogNorm(low, high) if log else Normalize(low, high)
    cmap = mpl.colormaps["PuOr_r" if diverging else "viridis"].with_extremes(bad=PALE)
    image = ax.imshow(values, norm=norm, cmap=cmap, aspect="auto", interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for names, axis in ((rows, ax.yaxis), (columns, ax.xaxis)):
        if len(names):
            axis.set_ticks(range(len(names)), names)
        # Axes shared with named ones keep their ticks
        elif not isinstance(axis.get_major_locator(), FixedLocator):
            axis.set_major_locator(MaxNLocator(integer=True))
    colours = cmap(norm(values))
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            red, green, blue, _ = colours[i, j]
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            ax.text(j, i, text, ha="center", va="center", color=ink, fontsize=7)
    if bar and ax.figure is not None:
        ax.figure.colorbar(image, ax=ax, label=label, pad=0.02)


def by_layer(
    found: Comparison, value: Callable[[Row], float]
) -> tuple[np.ndarray, list[str], list[str]]:
    """Arrange a number for each tensor of a gradient by layer.

    Args:
        found: a comparison of two gradients in the unrolled layout.
        value: maps a row to the number.

    Returns:
        (tensors, 2 + L) values, then the names of the rows and of the columns. Tensors that a
        family lists before its blocks are in the first column, those after in the last; other
        entries are NaN.

    """
    names = list(dict.fromkeys(row.tensor for row in found.rows))
    layers = 1 + max(row.layer or 0 for row in found.rows)
    values = np.full((len(names), layers + 2), np.nan)
    first = next((i for i, row in enumerate(found.rows) if row.layer is not None), len(found.rows))
    for i, row in enumerate(found.rows):
        outside = 0 if i < first else layers + 1
        values[names.index(row.tensor), outside if row.layer is None else 1 + row.layer] = value(
            row
        )
    return values, names, ["embed", *map(str, range(layers)), "final"]


def lines(
    series: Mapping[str, Any],
    alt: str,
    *,
    log: str = "",
    size: tuple[float, float] = (7, 3.2),
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    marks: Mapping[str, float] | None = None,
    **axes: Any,
) -> DescribedFigure:
    """Draw curves.

    Args:
        series: (x, y) of each curve by its name.
        alt: description of the picture.
        log: the axes with a logarithmic scale: "", "x", "y" or "xy".
        size: width and height in inches.
        styles: matplotlib's properties of a curve by its name.
        marks: heights of dotted horizontal lines by their names.
        axes: what `Axes.set` takes: title, xlabel, ylabel, xlim, ylim.

    """
    with mpl.rc_context(STYLE):
        fig = Figure(size, layout="constrained")
        ax = fig.subplots()
        for name, height in (marks or {}).items():
            ax.axhline(height, color=GREY, lw=0.8, ls=":")
            ax.annotate(
                name,
                (1, height),
                xycoords=("axes fraction", "data"),
                color=GREY,
                ha="right",
                va="bottom",
                fontsize=8,
            )
        for name, (x, y) in series.items():
            style = (styles or {}).get(name, {})
            ax.plot(np.asarray(x), np.asarray(y), label=name, **style)
        ax.set(**axes)
        for axis in log:
            ax.set(**{f"{axis}scale": "log"})
        if len(series) > 1:
            ax.legend()
        return DescribedFigure(fig, alt)


def bars(
    layers: Mapping[str, Any],
    alt: str,
    *,
    names: Sequence[str] = (),
    level: float | None = None,
    size: tuple[float, float] = (8, 2.4),
    colours: Any = None,
    **axes: Any,
) -> DescribedFigure:
    """Draw bars, stacked where there are several layers.

    Args:
        layers: the heights of the bars of each layer by its name.
        alt: description of the picture.
        names: names of the bars; by default they are numbered.
        level: height of a dotted horizontal line.
        size: width and height in inches.
        colours: one colour for each bar.
        axes: what `Axes.set` takes.

    """
    with mpl.rc_context(STYLE):
        fig = Figure(size, layout="constrained")
        ax = fig.subplots()
        bottom: Any = 0
        for name, heights in layers.items():
            heights, at = np.asarray(heights), np.arange(len(heights))
            ax.bar(at, heights, bottom=bottom, label=name, color=colours, width=0.8)
            bottom = bottom + heights
        if level is not None:
            ax.axhline(level, color="black", lw=0.8, ls=":")
        if len(names):
            ax.set_xticks(range(len(names)), names)
        ax.margins(x=0.01)
        ax.set(**axes)
        if len(layers) > 1:
            ax.legend()
        return DescribedFigure(fig, alt)


def maps(
    panels: Mapping[str, Any],
    alt: str,
    label: str,
    *,
    across: int = 4,
    size: tuple[float, float] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    **options: Any,
) -> DescribedFigure:
    """Draw heat maps with one scale, side by side.

    Args:
        panels: (R, C) values of each heat map by its title.
        alt: description of the picture.
        label: the quantity with its unit, for the colour bar.
        across: how many fit side by side.
        size: width and height in inches.
        xlabel: what the columns are.
        ylabel: what the rows are.
        rows: names of the rows.
        columns: names of the columns.
        limits: limits of the colour scale; by default those of all the values.
        options: log, diverging and texts of `heat_map`.

    """
    values = {title: np.asarray(panel, np.float64) for title, panel in panels.items()}
    if limits is None and not options.get("log"):
        finite = np.concatenate([v[np.isfinite(v)] for v in values.values()])
        extent = float(abs(finite).max())
        limits = (
            (-extent, extent)
            if options.get("diverging")
            else (float(finite.min()), float(finite.max()))
        )
    down, across = -(-len(values) // across), min(across, len(values))
    with mpl.rc_context(STYLE):
        fig = Figure(size or (min(9.0, 1.0 + 2.8 * across), 2.9 * down), layout="constrained")
        grid = fig.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for ax, (title, panel) in zip(grid.flat, values.items(), strict=False):
            heat_map(
                ax, panel, label, rows=rows, columns=columns, limits=limits, bar=False, **options
            )
            ax.set(title=title)
        for ax in grid.flat[len(values) :]:
            ax.set_visible(False)
        fig.colorbar(grid.flat[0].images[0], ax=grid, label=label, pad=0.02)
        fig.supxlabel(xlabel, fontsize=9)
        fig.supylabel(ylabel, fontsize=9)
        return DescribedFigure(fig, alt)


def links(
    weights: Any, tokens: Sequence[str], alt: str, *, title: str, least: float
) -> DescribedFigure:
    """Draw a line from each token that looks, above, to each that it looks at, below.

    Args:
        weights: (T, T) attention probabilities; the higher, the darker the line.
        tokens: text of the T tokens.
        alt: description of the picture.
        title: title of the picture.
        least: probabilities up to this are left out.

    """
    weights = np.asarray(weights)
    with mpl.rc_context(STYLE):
        fig = Figure((9, 1.8), layout="constrained")
        ax = fig.subplots()
        for t, s in np.argwhere(weights > least):
            ax.plot([s, t], [0, 1], color=BLUE, alpha=float(weights[t, s]), lw=2)
        for position, token in enumerate(tokens):
            for y, side in ((1.08, "bottom"), (-0.08, "top")):
                ax.text(position, y, token, ha="center", va=side, fontsize=9)
        ax.set(title=title, ylim=(-0.3, 1.3))
        ax.axis("off")
        return DescribedFigure(fig, alt)


# GPT-2's block: each op of the two branches with its weights, its result and the result's shape
BRANCHES = (
    (
        ("layernorm", "ln1w ln1b", "h1", "B T C"),
        ("linear", "qw kw vw qb kb vb", "q k v", "B T H D"),
        ("attention", "", "o", "B T H D"),
        ("linear", "attprojw attprojb", "a", "B T C"),
    ),
    (
        ("layernorm", "ln2w ln2b", "h2", "B T C"),
        ("linear", "fcw fcb", "f", "B T F"),
        ("GELU", "", "g", "B T F"),
        ("linear", "fcprojw fcprojb", "m", "B T C"),
    ),
)
# Boxes: position of the first, distance, size
FIRST, STEP, WIDTH, HEIGHT = 1.75, 2.15, 1.2, 0.62
# Distances: between branches, from a branch to its return, from an arrow to its gradient's
ROW, DOWN, ASIDE = 2.3, 0.95, 0.17


def block_diagram(backward: bool = False) -> DescribedFigure:
    """Draw a block of GPT-2: the residual stream on the left, and the two branches with the result
    and shape of each op.

    ``backward`` adds the gradients, which run against the forward's arrows and add up where it
    branches.
    """
    fig = Figure((9.2, 4.1), layout="constrained")
    ax = fig.subplots()
    ax.set(xlim=(-0.9, 10.0), ylim=(-4.0, 0.85))
    ax.axis("off")

    def arrow(*points: tuple[float, float], colour: str = BLUE) -> None:
        ax.plot(*zip(*points, strict=True), color=colour, lw=1.4)
        style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", points[-1], points[-2], arrowprops=style)

    def plus(x: float, y: float, colour: str) -> None:
        ax.text(
            x,
            y,
            "+",
            color=colour,
            ha="center",
            va="center",
            fontsize=11,
            zorder=3,
            bbox=circle(colour),
        )

    def circle(colour: str) -> dict[str, Any]:
        return {
            "boxstyle": "circle,pad=0.08",
            "facecolor": "white",
            "edgecolor": colour,
            "linewidth": 1.4,
        }

    def label(x: float, y: float, name: str, shape: str = "") -> None:
        ax.text(x, y + 0.08, name, color=BLUE, ha="center", va="bottom", fontsize=9, style="italic")
        ax.text(x, y + 0.34, shape, color=GREY, ha="center", va="bottom", fontsize=7)
        if backward:
            ax.text(
                x,
                y - ASIDE - 0.1,
                d(name),
                color=VERMILLION,
                ha="center",
                va="top",
                fontsize=9,
                style="italic",
            )

    def d(name: str) -> str:
        return " ".join(f"d{part}" for part in name.split())

    aside = -2 * ASIDE
    bottom = -ROW - DOWN
    arrow((0, 0.8), (0, bottom - 0.7))
    if backward:
        arrow((aside, bottom - 0.7), (aside, 0.8), colour=VERMILLION)
    for y in (0.62, bottom - 0.6):
        ax.text(0.12, y, "x", color=BLUE, fontsize=9, style="italic")
        ax.text(0.32, y + 0.01, "B T C", color=GREY, fontsize=7)
        ax.text(
            aside - 0.12,
            y,
            "dx" if backward else "",
            color=VERMILLION,
            ha="right",
            fontsize=9,
            style="italic",
        )
    for i, branch in enumerate(BRANCHES):
        y, back = -ROW * i, -ROW * i - DOWN
        lefts = [FIRST + STEP * j - WIDTH / 2 for j in range(len(branch))]
        ends = [left + WIDTH for left in lefts]
        turn = ends[-1] + 0.95
        for j, (op, weights, name, shape) in enumerate(branch):
            box = FancyBboxPatch(
                (lefts[j], y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08"
            )
            box.set(facecolor=PALE, edgecolor=GREY)
            ax.add_patch(box)
            ax.text(
                lefts[j] + WIDTH / 2,
                y + (0.1 if weights else 0),
                op,
                ha="center",
                va="center",
                fontsize=9,
            )
            ax.text(
                lefts[j] + WIDTH / 2,
                y - 0.14,
                weights,
                ha="center",
                va="center",
                fontsize=6.5,
                color=GREY,
            )
            following = lefts[j + 1] if j + 1 < len(branch) else turn
            label((ends[j] + following) / 2, y, name, shape)
        arrow((0, y), (lefts[0], y))
        label(lefts[0] / 2, y, "x")
        for end, left in zip(ends, lefts[1:], strict=False):
            arrow((end, y), (left, y))
        arrow((ends[-1], y), (turn, y), (turn, back), (0.12, back))
        plus(0, back, BLUE)
        if backward:
            corners = (turn + ASIDE, back - ASIDE), (turn + ASIDE, y - ASIDE)
            arrow((aside, back - ASIDE), *corners, (ends[-1], y - ASIDE), colour=VERMILLION)
            for end, left in zip(ends, lefts[1:], strict=False):
                arrow((left, y - ASIDE), (end, y - ASIDE), colour=VERMILLION)
            arrow((lefts[0], y - ASIDE), (aside + 0.12, y - ASIDE), colour=VERMILLION)
            plus(aside, y - ASIDE, VERMILLION)
    branches = "; ".join(
        ", then ".join(
            f"{op} ({weights}) gives {name}" if weights else f"{op} gives {name}"
            for op, weights, name, _ in branch
        )
        for branch in BRANCHES
    )
    alt = f"A block of GPT-2. Two branches read the stream x and add to it. {branches}."
    against = " Gradients run against each arrow, and add up where the forward branched."
    return DescribedFigure(fig, alt + against if backward else alt)
