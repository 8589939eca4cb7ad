"""The collectives of a compiled program, parsed from its HLO text."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gptjax.errors import FormatError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{s}{n}": n for s in "su" for n in (4, 8, 16, 32, 64)
}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALL = re.compile(rf"^(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLERS = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
)
_CALLED = re.compile(rf"({'|'.join(_CALLERS)})=\{{?([^,}}]*(?:, ?%[^,}}]*)*)")


class Collective(NamedTuple):
    """A collective, or the sum of several of one kind and group size, over all runs of a step."""

    kind: str
    group: int
    """Devices that take part in each."""
    times: float
    """Runs in one step."""
    sent: float
    """Bytes that each device sends in a ring: all but its own part in a gather or scatter, twice
    that in an all-reduce.
    """
    compute: float = 0.0
    """Seconds of the kernels between start and done, which overlap the transfer; 0 if unknown."""


def collectives(text: str, seconds: Mapping[str, float] | None = None) -> list[Collective]:
    """The collectives that a program runs, one by one, including repetitions in loops; ``seconds``
    maps the name of each kernel to its seconds.

    A loop's trip count is the one that XLA states, or else follows from its condition. On a TPU an
    asynchronous collective appears in several fusions on one channel, some of them in loops. It
    counts as often as the fusion that runs least often, which starts or ends it.
    """
    computations, entry = _parse(text)
    runs: dict[str, float] = defaultdict(float)
    _visit(computations, entry, 1, runs)
    channels: dict[tuple[str, ...], tuple[Collective, float]] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            if (found := _collective(line, name)) and runs[name]:
                spread = re.search(r"channel_id=(\d+),.*async_collective_fusion_config", line)
                key = (found.kind, spread[1]) if spread else (name, str(number))
                found = found._replace(compute=_compute(lines, number, seconds or {}))
                if key not in channels or runs[name] < channels[key][1]:
                    channels[key] = found, runs[name]
    return [
        Collective(found.kind, found.group, turns, found.sent * turns, found.compute * turns)
        for found, turns in channels.values()
    ]


def summed(collectives: Iterable[Collective]) -> list[Collective]:
    """The sum for each kind and group size, largest first, without those that send nothing."""
    totals: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0, 0])
    for c in collectives:
        for i, number in enumerate(c[2:]):
            totals[c.kind, c.group][i] += number
    found = [Collective(*key, *total) for key, total in totals.items() if total[1]]
    return sorted(found, key=lambda c: -c.sent)


def bytes_sent(kind: str, nbytes: float, group: int) -> float:
    """Bytes that each of ``group`` devices sends in a ring to gather, scatter, all-reduce or
    exchange ``nbytes``.
    """
    if kind == "collective-permute":
        return nbytes
    return (2 if kind == "all-reduce" else 1) * nbytes * (group - 1) / group


def _parse(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line.strip())
    return computations, entry


def _visit(
    computations: dict[str, list[str]], name: str, times: float, runs: dict[str, float]
) -> None:
    """Add ``times`` to the runs of a computation and, with their trip counts, of those it calls."""
    runs[name] += times
    for line in computations.get(name, []):
        if "=%" not in line and "={" not in line:
            continue
        called = {kind: re.findall(r"%([\w.\-]+)", names) for kind, names in _CALLED.findall(line)}
        turns = (
            _turns(line, computations, called["condition"][0], called["body"][0])
            if "body" in called
            else 1
        )
        for kind, names in called.items():
            for callee in names if kind != "condition" else ():
                _visit(computations, callee, times * turns, runs)


def _turns(line: str, computations: dict[str, list[str]], condition: str, body: str) -> int:
    """A loop's trip count: XLA's, or the constant in the condition divided by the increment."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    constants = [
        int(n)
        for line in computations.get(condition, [])
        for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", line)
    ]
    return -(-max(constants, default=1) // _step(computations, condition, body))


def _step(computations: dict[str, list[str]], condition: str, body: str) -> int:
    """The increment of the loop counter; more than 1 if XLA has unrolled the loop."""
    compared = [
        re.search(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", line)
        for line in computations.get(condition, [])
    ]
    index = next((int(found[1]) for found in compared if found), None)
    lines = dict(
        re.findall(
            r"^(?:ROOT )?%([\w.\-]+) = (.*)$", "\n".join(computations.get(body, [])), re.MULTILINE
        )
    )
    root = next(
        (line for line in reversed(computations.get(body, [])) if line.startswith("ROOT")), ""
    )
    results = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2].partition(")")[0])
    added = re.search(
        r" add\(([^)]*)\)",
        lines.get(results[index], "") if index is not None and index < len(results) else "",
    )
    for name in re.findall(r"%([\w.\-]+)", added[1] if added else ""):
        if constant := re.search(r" constant\((\d+)\)", lines.get(name, "")):
            return int(constant[1])
    return 1


def _collective(line: str, computation: str) -> Collective | None:
    call = _CALL.match(line)
    if not call:
        return None
    shapes, kind, start = call.groups()
    sizes = [
        _nbytes(*shape)
        for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
        if shape != ("u32", "")
    ]
    # A start returns operands, then results: ((a, b), (A, B)), or (a, A) for one of each. An
    # all-reduce returns results only.
    if start and (kind in ("all-gather", "reduce-scatter", "collective-permute") or "((" in shapes):
        half = len(sizes) // 2
        sizes = [max(sum(sizes[:half]), sum(sizes[half:]))]  # the larger side is the whole array
    group = 2 if kind == "collective-permute" else _group(line)
    nbytes = sum(sizes) * (group if kind == "reduce-scatter" and not start else 1)
    # XLA's name for it on TPU
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, group, 1, bytes_sent(kind, nbytes, group))


def _compute(lines: list[str], number: int, seconds: Mapping[str, float]) -> float:
    """Seconds of the kernels between the start of the collective in this line and its done."""
    call = re.match(r"(?:ROOT )?%?([\w.\-]+) = .*-start\(", lines[number])
    total = 0.0
    for line in lines[number + 1 :] if call and seconds else []:
        name = re.match(r"(?:ROOT )?%?([\w.\-]+) = ", line)
        if call and re.search(rf"-done\([^)]*%{re.escape(call[1])}[),]", line):
            break
        total += seconds.get(name[1], 0.0) if name else 0.0
    return total


def _nbytes(dtype: str, dimensions: str) -> float:
    bits = SIZES.get(dtype, 8)  # the many 8-bit floats
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits / 8


def _group(line: str) -> int:
    """The number of devices in a group, in any of HLO's three notations."""
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? ?\{([^}]*)\}", line
    ):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if "replica_groups=" in line:
        raise FormatError(
            "this XLA lists the devices of a collective in an unknown notation: "
            f"{line.strip()[:200]}"
        )
    return 1
