"""The kernels of a program compiled for a GPU: the least that each reads, writes and computes.

A GPU runs a program's kernels one after the other. Each takes at least as long as its bytes at the
memory's rate and its products at their attainable rate. Slices, gathers and in-place updates count
only the part that they touch. Launches, cache hits and library workspaces are not modelled.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from gptjax.parallel.devices import Device
from gptjax.plan.collectives import KINDS
from gptjax.plan.hlo import Instruction, Module, parse

# Fraction of the data sheet's FLOP/s that cuBLAS reaches in large bfloat16 products on an H100,
# limited by power
REACHED = 0.81
# Opcodes that move no bytes by themselves
FREE = {
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "tuple",
    "while",
}
# Opcodes that read their whole operands even if only part of the result is used
WHOLE = {
    "concatenate",
    "dot",
    "dynamic-update-slice",
    "gather",
    "pad",
    "reduce",
    "scatter",
    "tuple",
}
# Opcodes that read only the part of their first operand that ends up in the result
PART = {"dynamic-slice", "gather", "slice"}


class Kernel(NamedTuple):
    """One kernel, or the sum of several, over all its runs."""

    kind: str
    """Its kind of operation, or its library."""
    source: str
    """FILE:LINE in the package."""
    times: float
    """Runs in one step."""
    read: float
    """Bytes that all runs read."""
    written: float
    """Bytes that all runs write."""
    flops: float
    """FLOPs of matrix products and attention."""
    seconds: float = 0.0
    """Minimum time of all runs."""
    name: str = ""
    """Name of the instruction."""


def kernels(text: str, device: Device) -> list[Kernel]:
    """The kernels that a program runs, including repetitions in loops, without collectives."""
    module = parse(text)
    return [
        kernel._replace(seconds=least_seconds(kernel, device))
        for kernel in _of_computation(module, module.entry, 1.0)
    ]


def least_seconds(kernel: Kernel, device: Device) -> float:
    """The minimum time of all runs of a kernel."""
    moving = (kernel.read + kernel.written) / device.bandwidth
    return max(moving, kernel.flops / (REACHED * device.flops))


def summed(kernels: Iterable[Kernel], key: Callable[[Kernel], str]) -> dict[str, Kernel]:
    """The sum of the kernels for each key, slowest first."""
    groups: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[key(kernel)].append(kernel)
    totals = {
        name: total(group)._replace(kind=name, source=name, name="")
        for name, group in groups.items()
    }
    return dict(sorted(totals.items(), key=lambda item: -item[1].seconds))


def total(kernels: Sequence[Kernel]) -> Kernel:
    """The sum of the kernels, with the names of the first."""
    return kernels[0]._replace(
        times=sum(k.times for k in kernels),
        read=sum(k.read for k in kernels),
        written=sum(k.written for k in kernels),
        flops=sum(k.flops for k in kernels),
        seconds=sum(k.seconds for k in kernels),
    )


def _of_computation(module: Module, name: str, times: float) -> Iterator[Kernel]:
    types = {i.name: i for i in module.computations[name]}
    for i in module.computations[name]:
        if i.opcode in ("while", "call", "async-start"):
            turns = int(i.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            if called := i.attribute(r"(?:body|to_apply|calls)=%([\w.\-]+)"):
                yield from _of_computation(module, called, times * turns)
        elif i.opcode in FREE or i.opcode.endswith(("-done", "-update")) or _is_collective(i):
            continue
        else:
            kind, read, written, flops = _cost(module, i, types)
            yield Kernel(
                kind,
                module.source(i),
                times,
                times * read,
                times * written,
                times * flops,
                name=i.name,
            )


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _cost(
    module: Module, i: Instruction, types: dict[str, Instruction]
) -> tuple[str, float, float, float]:
    """(kind, bytes read, bytes written, FLOPs) of one run."""
    read = sum(types[name].nbytes for name in set(i.operands))
    if i.opcode == "fusion":
        return _fusion_cost(module.computations[i.attribute(r"calls=%([\w.\-]+)") or ""])
    target = i.attribute(r'custom_call_target="([^"]*)"')
    if target is None:
        return i.opcode, read, i.nbytes, _dot_flops(i, types)
    # A byte array among the results is a library's workspace
    written = sum(array.nbytes for array in i.results if array.dtype not in ("s8", "u8"))
    flops = 0.0
    if "matmul" in target or target == "__cublas$gemm":
        contracted = i.attribute(r'"lhs_contracting_dimensions":\["(\d+)"') or "0"
        inner = types[i.operands[0]].results[0].shape[int(contracted)]
        flops = 2.0 * i.results[0].size * inner
    elif "fmha" in target:
        batch, tokens, heads, channels = types[i.operands[0]].results[0].shape
        products = 5 if "Backward" in target else 2
        visible = 0.5 if '"CAUSAL"' in i.attributes else 1.0
        flops = visible * products * 2 * batch * heads * tokens**2 * channels
    return _library(target), read, written, flops


def _dot_flops(i: Instruction, types: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product; 0 for another instruction."""
    if i.opcode != "dot":
        return 0.0
    dims = i.attribute(r"lhs_contracting_dims=\{([\d,]+)\}") or ""
    left = types[i.operands[0]].results[0].shape
    return 2.0 * i.results[0].size * math.prod(left[int(n)] for n in dims.split(","))


def _library(target: str) -> str:
    names = {"__cublas": "cuBLAS product", "fmhaSoftmaxBackward": "cuDNN attention backward"}
    names |= {"fmhaSoftmax": "cuDNN attention"}
    return next((name for part, name in names.items() if part in target), target)


def _fusion_cost(body: list[Instruction]) -> tuple[str, float, float, float]:
    """(kind, bytes read, bytes written, FLOPs) of a fused computation.

    Going from the results back to the parameters, ``used[name]`` counts the elements of a value
    that later operations need.
    """
    types = {i.name: i for i in body}
    size = {i.name: sum(array.size for array in i.results) for i in body}
    used: dict[str, int] = defaultdict(int)
    flops = read = written = 0.0
    for i in reversed(body):
        here = size[i.name] if i.is_root else min(used[i.name], size[i.name])
        used[i.name] = here
        for position, operand in enumerate(i.operands if here else []):
            if position == 0 and i.opcode in PART:
                used[operand] += here
            elif position == 0 and i.opcode == "dynamic-update-slice":
                pass  # the rest stays in place
            elif position == 0 and i.opcode == "scatter":
                used[operand] += size[i.operands[2]]
            elif i.opcode in WHOLE:
                used[operand] += size[operand]
            else:
                used[operand] += min(size[operand], here)
        flops += _dot_flops(i, types)
        if i.opcode == "parameter" and here:
            read += i.nbytes * here / size[i.name]
        elif i.opcode in ("dynamic-update-slice", "scatter"):
            written += types[i.operands[1 if i.opcode == "dynamic-update-slice" else 2]].nbytes
    opcodes = {i.opcode for i in body}
    written = written or next(i.nbytes for i in body if i.is_root)
    kinds = {
        "product": flops > 0,
        "scatter": "scatter" in opcodes,
        "reduction": "reduce" in opcodes,
    }
    kind = next((name for name, is_so in kinds.items() if is_so), "elementwise")
    return kind, read, written, flops
