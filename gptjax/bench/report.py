"""Print what the benchmarks measured and counted."""

import operator
from collections.abc import Callable
from typing import Any

from gptjax.bench.ceiling import Ceiling
from gptjax.bench.profile import OpTime, TracedKernel
from gptjax.bench.timing import Timing
from gptjax.plan.kernels import Kernel, summed
from gptjax.train.metrics import human_bytes

OPS = 12  # listed in a profile
KERNELS = 25  # kinds or source lines of kernels that are listed


def print_timings(
    timings: list[Timing], tokens: int, best: Ceiling, floor: float, ideal: float | None
) -> dict[str, Any]:
    """Print a row for each contender, and the floor; returns these figures.

    Args:
        timings: of all contenders; the first is the reference for ``ratio``.
        tokens: in one run.
        best: the rates of the floor.
        floor: least possible seconds for one run.
        ideal: as for `figures`.

    """
    rows = [figures(timing, timings[0], tokens, floor, ideal) for timing in timings]
    print(table(rows))
    rate = (
        f"{best.flops / 1e9:,.0f} GFLOP/s, {best.bandwidth / 1e9:,.1f} GB/s, "
        f"{best.reading / 1e9:,.1f} GB/s where only read"
    )
    print(f"{'floor':<24} {floor * 1e3:.1f} ms at {rate}")
    return {"floor_ms": floor * 1e3} | best._asdict() | {"rows": rows}


def figures(
    timing: Timing, first: Timing, tokens: int, floor: float | None, ideal: float | None
) -> dict[str, Any]:
    """One row's numbers.

    Args:
        timing: of this row.
        first: of the first row, the reference for ``ratio``.
        tokens: in one run.
        floor: least possible seconds for one run, for ``of_floor``; None to leave that out.
        ideal: seconds of one run at the device's peak, for ``mfu``; None if that is unknown.

    """
    row = {"name": timing.contender.name} | timing.contender.facts
    row |= {
        "ms": timing.median * 1e3,
        "spread": timing.spread,
        "tokens_per_s": tokens / timing.median,
    }
    if floor is not None:
        row["of_floor"] = timing.median / floor
    if ideal is not None:
        row["mfu"] = ideal / timing.median
    return row | {"ratio": timing.median / first.median}


def table(rows: list[dict[str, Any]], ratio: str = ".2f") -> str:
    """Format the rows as a table, without columns that are empty in every row."""
    columns = {
        "": ("name", 24, str),
        "compile s": ("compile_s", 9, "{:.1f}".format),
        "temporaries": ("temporary_bytes", 11, human_bytes),
        "in all": ("total_bytes", 9, human_bytes),
        "programs": ("programs", 8, str),
        "kernels": ("kernels", 7, "{:,.0f}".format),
        "launches": ("launches", 8, "{:,.0f}".format),
        "GB": ("nbytes", 7, lambda n: f"{n / 1e9:.2f}"),
        "TFLOP": ("flops", 6, lambda n: f"{n / 1e12:.2f}"),
        "least ms": ("least_ms", 8, "{:.2f}".format),
        "traced ms": ("traced_ms", 9, "{:.2f}".format),
        "ms": ("ms", 9, "{:.1f}".format),
        "spread": ("spread", 6, "{:.0%}".format),
        "tokens/s": ("tokens_per_s", 9, "{:,.0f}".format),
        "prompt/s": ("prompt_tokens_per_s", 9, "{:,.0f}".format),
        "bytes each": ("bytes_per_token", 10, human_bytes),
        "of reading": ("of_reading", 10, "{:.0%}".format),
        "peak": ("peak_bytes", 9, human_bytes),
        "MFU": ("mfu", 6, "{:.1%}".format),
        "/ floor": ("of_floor", 7, "{:.2f}".format),
        "ratio": ("ratio", 5, f"{{:{ratio}}}".format),
    }
    shown = {
        head: column for head, column in columns.items() if any(column[0] in row for row in rows)
    }

    def line(cells: list[str]) -> str:
        widths = [width for _, width, _ in shown.values()]
        return " ".join(
            [
                f"{cells[0]:<{widths[0]}}",
                *(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True)),
            ]
        )

    def cell(row: dict[str, Any], key: str, form: Any) -> str:
        return form(row[key]) if key in row else "-"

    body = [line([cell(row, key, form) for key, _, form in shown.values()]) for row in rows]
    return "\n".join([line(list(shown)), *body])


def profile_table(times: list[OpTime]) -> str:
    """Format the `OPS` slowest ops, and the sum of the rest."""
    total = sum(time.seconds for time in times)
    top, rest = times[:OPS], times[OPS:]
    if rest:
        top = [
            *top,
            OpTime(f"{len(rest)} more", sum(t.seconds for t in rest), sum(t.kernels for t in rest)),
        ]
    lines = [f"{'op':<44} {'ms':>9} {'share':>6} {'kernels':>7}"]
    lines += [
        f"{t.op[:44]:<44} {t.seconds * 1e3:>9.1f} {t.seconds / total:>6.1%} {t.kernels:>7,}"
        for t in top
    ]
    return "\n".join(lines)


def print_kernels(found: dict[str, list[Kernel]], tokens: float) -> dict[str, Any]:
    """Print the sums of kernels by kind and by source line, for each backward; returns them.

    Args:
        found: the kernels of a step by backward.
        tokens: of a step on one device.

    """
    columns = f"{'runs':>6} {'GB read':>7} {'written':>7} {'TFLOP':>6} {'ms':>6}"
    record: dict[str, Any] = {}
    for title in ("kind", "source"):
        sums = {
            way: summed(ran, operator.attrgetter(title))
            | {"in all": summed(ran, lambda _: "in all")["in all"]}
            for way, ran in found.items()
        }
        print(f"{'kernels by ' + title:<28}" + "".join(f" | {way:<36}" for way in sums))
        print(f"{'':<28}" + f" | {columns}" * len(sums))
        names = sorted(
            set().union(*sums.values()),
            key=lambda name: -max(ks[name].seconds for ks in sums.values() if name in ks),
        )
        for name in names[:KERNELS]:
            cells = (_cells(ks[name]) if name in ks else f"{'':<36}" for ks in sums.values())
            print(f"{name:<28}" + "".join(f" | {cell}" for cell in cells))
        record[title] = {
            way: {name: kernel._asdict() for name, kernel in ks.items()} for way, ks in sums.items()
        }
    for way, ran in found.items():
        print(f"{way}: at best {tokens / sum(k.seconds for k in ran):,.0f} tokens/s a device")
    return record


def _cells(kernel: Kernel) -> str:
    gigabytes = f"{kernel.read / 1e9:>7.2f} {kernel.written / 1e9:>7.2f}"
    times = f"{kernel.flops / 1e12:>6.2f} {kernel.seconds * 1e3:>6.2f}"
    return f"{kernel.times:>6,.0f} {gigabytes} {times}"


def print_traced(title: str, found: list[TracedKernel]) -> dict[str, Any]:
    """Print what kernels take at least and what they took, by kind and for the source lines that
    took most; returns these figures and those of each instruction.
    """
    record: dict[str, Any] = {}
    for key in ("kind", "source"):
        rows = traced_rows(found, operator.attrgetter(key))
        print(f"{title}, kernels by {key}")
        print(table(rows if key == "kind" else rows[: OPS + 1]))
        record[key] = rows
    record["instructions"] = [
        one.counted._asdict() | {"launches": one.launches, "traced": one.seconds} for one in found
    ]
    return record


def traced_rows(found: list[TracedKernel], key: Callable[[Kernel], str]) -> list[dict[str, Any]]:
    """A row for all kernels, then one for each key, slowest first. ``ratio`` is the time taken over
    the least time. Instructions that the trace lacks have a row of their own.
    """
    groups: dict[str, list[TracedKernel]] = {"in all": found}
    for one in found:
        name = key(one.counted) if one.launches else "not in the trace"
        groups.setdefault(name, []).append(one)
    rows = []
    for name, group in groups.items():
        least = sum(one.counted.seconds for one in group) * 1e3
        took = sum(one.seconds for one in group) * 1e3
        row: dict[str, Any] = {"name": name, "kernels": sum(one.counted.times for one in group)}
        row |= {"launches": sum(one.launches for one in group), "least_ms": least}
        row["traced_ms"] = took
        rows.append(row | ({"ratio": took / least} if took and least else {}))
    return rows[:1] + sorted(rows[1:], key=lambda row: -row["traced_ms"])
