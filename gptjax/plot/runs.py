"""Draw the metrics of one or several runs as one picture."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from gptjax.config import Horizontal
from gptjax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008), without yellow, which is too light on white. From
# the eighth run on, the colours repeat with other dashes.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
DASHES: tuple[Any, ...] = "-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5))
FAINT_RUNS = 6  # at most; the measured values of more runs would hide the running means
WIDTH, HEIGHT, DPI = 13.0, 7.5, 130  # inches, inches, dots an inch
NAME_LENGTH = 60
LONG_RUN = 10 * 3600  # seconds, from which on time is in hours
LOSS = "cross-entropy (nats per token)"


class Panel(NamedTuple):
    """One quantity of the records and how to draw it."""

    key: str
    title: str
    unit: str
    row: int
    smooth: bool = False
    points: bool = False
    scale: Literal["linear", "auto", "log"] = "linear"


PANELS = (
    Panel("loss", "Training loss", LOSS, 0, smooth=True, scale="auto"),
    Panel("val_loss", "Validation loss", LOSS, 0, points=True, scale="auto"),
    Panel("lr", "Learning rate", "learning rate", 1),
    Panel("grad_norm", "Gradient norm", "L2 norm before clipping", 1, smooth=True, scale="auto"),
    Panel("tokens_per_s", "Throughput", "tokens per second", 1, smooth=True),
    Panel(
        "gradient_error", "Gradient checks", "worst relative L2 error", 1, points=True, scale="log"
    ),
)


class RunRecords(NamedTuple):
    """A run to draw: its name in the legend, and its records by step."""

    name: str
    records: list[dict[str, Any]]

    def column(self, key: str) -> np.ndarray:
        """The values of the records that have ``key``; NaN for one that is not finite in
        float32.
        """
        values = np.array(
            [math.nan if r[key] is None else r[key] for r in self.records if key in r], np.float64
        )
        return np.where(np.abs(values) > np.finfo(np.float32).max, math.nan, values)

    def horizontal(self, x: Horizontal, key: str) -> np.ndarray:
        """The horizontal coordinates of those records: steps, tokens, or seconds of training
        without validations and samples.
        """
        if x == "steps":
            every = self.column("step")
        elif x == "tokens":
            timed = self.column("tokens_per_s") * self.column("ms")
            tokens = np.median(timed[np.isfinite(timed)]) / 1e3 if np.isfinite(timed).any() else 0
            every = self.column("step") * round(tokens)
        else:
            every = np.nancumsum(self.column("ms")) / 1e3
        return every[[key in r for r in self.records]]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values in a window of steps around each; NaN if there are none.

    Near the start, where a loss falls fastest, the window shrinks to stay centred; at the end it is
    cut off.
    """
    here, last = np.arange(values.size), values.size - 1
    half = np.minimum(window // 2, here)
    bounds = np.stack([here - half, np.minimum(here + half, last) + 1], 1).ravel()
    finite = np.isfinite(values)
    padded = (
        np.append(np.where(finite, values, 0.0), 0.0),
        np.append(finite, False).astype(np.float64),
    )
    # Each window is summed by itself, which avoids cancellation
    total, count = (np.add.reduceat(part, bounds)[::2] for part in padded)
    return np.divide(total, count, out=np.full(values.size, np.nan), where=count > 0)


def draw(
    runs: Sequence[RunRecords], x: Horizontal = "steps", smooth: int | None = None
) -> "Figure":
    """Draw runs with one panel for each quantity that any of them has.

    Args:
        runs: at least one.
        x: the quantity of the horizontal axes.
        smooth: steps in a running mean; by default a 25th of the longest run.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: the records lack everything to draw, or what ``x`` needs.

    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ConfigError(f"drawing needs {error.name}: pip install 'gptjax[plot]'") from error
    for run in runs:
        if x != "steps" and not all("ms" in r and "tokens_per_s" in r for r in run.records):
            raise DataError(f"the records of {run.name} lack step times, which --x {x} needs")
    rows = [
        [p for p in PANELS if p.row == row and any(p.key in r for run in runs for r in run.records)]
        for row in (0, 1)
    ]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError(
            f"{runs[0].name} has nothing to draw: no loss, learning rate or gradient norm"
        )
    # Odd, to be symmetric
    window = (smooth or min(max(len(run.records) for run in runs) // 25, 1000)) | 1
    styles = [
        (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i in range(len(runs))
    ]

    labels = [_shortened(run.name) for run in runs]
    columns = max(1, min(len(runs), int(WIDTH / (0.7 + 0.08 * max(map(len, labels))))))
    legend_height = 0.21 * math.ceil(len(runs) / columns) if len(runs) > 1 else 0
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches
    figure = Figure(
        (WIDTH, HEIGHT * len(rows) / 2 + legend_height), dpi=DPI, layout=layout, facecolor="white"
    )
    parts = figure.subfigures(len(rows), squeeze=False)[:, 0]
    unit, size = _time_unit(runs) if x == "time" else (x, 1.0)
    end = max(run.horizontal(x, "step")[-1] for run in runs) / size
    for part, row in zip(parts, rows, strict=True):
        for axes, panel in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
            axes.set_xlim(0, end * 1.02)
            for run, style in zip(runs, styles, strict=True):
                _draw_run(
                    axes,
                    panel,
                    run,
                    run.horizontal(x, panel.key) / size,
                    style,
                    window,
                    faint=len(runs) <= FAINT_RUNS,
                )
            _dress(axes, panel, runs, unit, window)
    if len(runs) == 1:
        figure.suptitle(labels[0], fontsize=14, fontweight="bold", parse_math=False)
    else:
        handles = [
            Line2D([], [], color=colour, linestyle=dash, linewidth=2) for colour, dash in styles
        ]
        legend = figure.legend(
            handles, ["run"] * len(runs), loc="outside lower center", ncols=columns, frameon=False
        )
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set(text=label, fontsize=9, parse_math=False)  # even one like _a or $b$
    return figure


def _draw_run(
    axes: "Axes",
    panel: Panel,
    run: RunRecords,
    where: np.ndarray,
    style: tuple[str, Any],
    window: int,
    faint: bool,
) -> None:
    values, (colour, dash) = run.column(panel.key), style
    shown: dict[str, Any] = {
        "color": colour,
        "linestyle": dash,
        "linewidth": 1.6,
        "solid_capstyle": "round",
    }
    if panel.points or values.size <= 2:
        shown |= {"marker": "o", "markersize": 3.5}
    if panel.smooth and window > 1:
        if faint:
            # Behind all running means
            axes.plot(where, values, color=colour, linewidth=0.7, alpha=0.3, zorder=1.5)
        values_shown = running_mean(values, window)
    else:
        values_shown = values
    axes.plot(where, values_shown, **shown)
    bad = where[~np.isfinite(values)]
    if bad.size:
        heights = np.full(bad.size, 0.03)  # of the panel's
        axes.plot(
            bad,
            heights,
            "x",
            color=colour,
            markersize=6,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _dress(axes: "Axes", panel: Panel, runs: Sequence[RunRecords], unit: str, window: int) -> None:
    """Set title, labels, scale, ticks and grid."""
    from matplotlib.ticker import (
        EngFormatter,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
    )

    columns = [run.column(panel.key) for run in runs]
    finite = [column[np.isfinite(column)] for column in columns]
    notes = [f"mean of {window} steps"] * (panel.smooth and window > 1)
    notes += ["\N{MULTIPLICATION SIGN} not finite"] * (
        sum(map(len, finite)) < sum(map(len, columns))
    )
    plain = FuncFormatter(lambda value, _: _compact(value))
    finite = [column for column in finite if column.size]
    if not finite:
        axes.set_yticks([])
    elif panel.key == "tokens_per_s":
        # An outlier would compress the other steps
        axes.set_ylim(0, 1.2 * max(np.percentile(column, 99) for column in finite))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif panel.scale == "linear":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(plain)
    else:
        low, high = min(column.min() for column in finite), max(column.max() for column in finite)
        # So would a loss that diverges; guessing, where it starts, bounds the interesting range
        ceiling = 2 * max(column[0] for column in finite)
        if panel.unit == LOSS and high > ceiling:
            high = ceiling
            axes.set_ylim(low - 0.05 * (high - low) if high < 10 * low else low, high)
            notes.append("cut off above")
        if low > 0 and (panel.scale == "log" or high > 10 * low):
            axes.set_yscale("log")
            if high < 1e3 * low:
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(plain)
                axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_title(", ".join(notes), loc="right", fontsize=8, color="#666666")
    axes.set_xlabel(unit, fontsize=9)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=unit in ("steps", "tokens")))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, color="#999999")


def _time_unit(runs: Sequence[RunRecords]) -> tuple[str, float]:
    longest = max(run.horizontal("time", "step")[-1] for run in runs)
    name, size = ("hours", 3600.0) if longest >= LONG_RUN else ("minutes", 60.0)
    return f"training time ({name})", size


def _compact(value: float) -> str:
    """Format a number as 0.25 or 1.5e-3, without leading zeros in the exponent."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _shortened(name: str) -> str:
    kept = NAME_LENGTH // 2
    return (
        name
        if len(name) <= NAME_LENGTH
        else f"{name[: kept - 1]}\N{HORIZONTAL ELLIPSIS}{name[-kept:]}"
    )
