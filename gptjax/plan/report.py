"""Format a plan as text."""

from gptjax.models.params import num_params
from gptjax.parallel.devices import NETWORK, Device
from gptjax.parallel.sharding import MESH_AXES
from gptjax.plan.collectives import Collective
from gptjax.plan.floor import DAY, sending_rate
from gptjax.plan.kernels import REACHED
from gptjax.plan.search import USABLE, Plan
from gptjax.plan.topology import Topology
from gptjax.train.metrics import human_bytes


def describe(plan: Plan, topology: Topology, chosen: list[str], backward: str) -> str:
    """The plan of a step as text."""
    model, shape, mesh = plan.work.model, plan.work.shape, plan.work.mesh
    each = (
        f" of {human_bytes(topology.device.memory)} each"
        if topology.device
        else " simulated on this machine"
    )
    lines = {
        "topology": [f"{topology.name}: {topology.size} x {topology.kind}{each}"],
        "mesh": [
            " x ".join(f"{axis} {n}" for axis, n in zip(MESH_AXES, mesh, strict=True)),
            *chosen,
        ],
        "model": [
            f"{num_params(model):,} parameters",
            model.dtype,
            f"attention {model.attention}",
            f"layers {model.layers}",
        ],
        "step": [
            f"{shape.tokens:,} tokens ({shape.accumulate} x {shape.batch_size} x {shape.seq_len})"
        ],
        "source": [f"memory and collectives {plan.source}"],
    }
    lines["model"] += [f"recompute {model.recompute}", f"backward {backward}"]
    text = [f"{name:<12} {', '.join(parts)}" for name, parts in lines.items()]
    return "\n".join(
        [*text, *_memory(plan), *_collectives(plan, topology.device), *_time(plan, topology.device)]
    )


def _memory(plan: Plan) -> list[str]:
    verdict = "fits" if plan.total <= plan.capacity else "DOES NOT FIT"
    usable = f"{human_bytes(plan.capacity)} usable ({USABLE:.0%} of its memory)"
    lines = [f"{'memory':<12} {human_bytes(plan.total)} a device, of {usable}: {verdict}"]
    lines += [f"  {name:<10} {human_bytes(size):>9}" for name, size in plan.memory.items()]
    at = next(i for i, name in enumerate(plan.memory, 1) if name == "temporaries")
    shapes = f", {human_bytes(plan.predicted)} by shapes" if plan.compiled else ""
    lines[at] += f"  activations saved for the backward {human_bytes(plan.saved)}{shapes}"
    if plan.largest is not None:
        data, fsdp, _ = plan.work.mesh
        tokens = plan.largest * data * fsdp * plan.work.shape.seq_len
        size = (
            f"data.batch_size {plan.largest * data * fsdp:,} ({plan.largest} a device, {tokens:,} "
            "tokens)"
        )
        lines.append(
            f"{'largest':<12} {size if plan.largest else 'not even one row per device fits'}, "
            f"{plan.searched}"
        )
    elif plan.searched:
        lines.append(f"{'largest':<12} {plan.searched}")
    return lines


def _collectives(plan: Plan, device: Device | None) -> list[str]:
    def at(c: Collective) -> str:
        return (
            f" at {sending_rate(plan.work.mesh, device, c.group) / 1e9:,.0f} GB/s" if device else ""
        ) + (f", overlapping {c.compute * 1e3:,.1f} ms of kernels" if plan.kernels else "")

    found = plan.collectives
    hidden = f", {plan.exposed * 1e3:,.2f} ms of it not hidden by kernels" if plan.kernels else ""
    lines = [
        f"{'sent':<12} {human_bytes(sum(c.sent for c in found))} by each device and step{hidden}"
    ]
    return lines + [
        f"  {c.kind:<18} {c.times:>8,.0f} among {c.group:<4} {human_bytes(c.sent):>9}{at(c)}"
        for c in found
    ]


def _time(plan: Plan, device: Device | None) -> list[str]:
    counted = (
        f"; XLA counts {plan.compiler_flops / 1e9:,.4g}, each loop once and no library kernels"
        if plan.compiler_flops
        else ""
    )
    lines = [f"{'products':<12} {plan.flops / 1e9:,.4g} GFLOP by each device and step{counted}"]
    if not plan.floor or not device:
        return [
            *lines,
            f"{'floor':<12} unknown: no data sheet gives this device's rate in "
            f"{plan.work.model.dtype}",
        ]
    floor, tokens = plan.floor, plan.work.shape.tokens
    parts = {
        "products": floor.products,
        "memory": floor.memory,
        **({"collectives": floor.collectives} if floor.collectives else {}),
        "update": floor.update,
    }
    lines.append(
        f"{'floor':<12} "
        + ", ".join(f"{name} {seconds * 1e3:,.1f} ms" for name, seconds in parts.items())
    )
    ways = {"full overlap": floor.overlapped}
    if floor.collectives:
        ways["no overlap"] = floor.exposed
    if plan.serial:
        ways["in turn"] = plan.serial
    for name, seconds in ways.items():
        line = f"{seconds * 1e3:,.1f} ms, {tokens / seconds:,.0f} tokens/s, "
        line += f"{_duration(plan.tokens / tokens * seconds)} for {plan.tokens:.3g} tokens"
        if floor.collectives and name != "in turn":
            line += f", scaling efficiency {floor.efficiency(seconds):.0%}"
        lines.append(f"  {name:<17} {line}")
    rates = (
        f"{device.flops / 1e12:,.4g} TFLOP/s in bfloat16, {device.bandwidth / 1e9:,.4g} GB/s of "
        "memory"
    )
    if any(sending_rate(plan.work.mesh, device, c.group) < device.link for c in plan.collectives):
        rates += f", {NETWORK / 1e9:,.0f} GB/s for each device between machines"
    explained = {
        "full overlap": "the slower of products and memory hides the other; the update follows",
        "in turn": _in_turn(plan),
    }
    if floor.collectives:
        rates += ", and all links sending at once at their maker's rates"
        explained |= {
            "full overlap": "the slowest of products, memory and collectives hides the other two; "
            "the update follows",
            "no overlap": "the slower of products and memory hides the other; the collectives "
            "follow, then the update",
            "efficiency": "the time without collectives divided by the time with them",
        }
    return [
        *lines,
        f"{'assuming':<12} {rates}",
        *(f"  {name:<17} {words}" for name, words in explained.items()),
    ]


def _duration(seconds: float) -> str:
    """In the largest of days, minutes and seconds of which there is at least a tenth."""
    for unit, length, digits in (("days", DAY, 2), ("minutes", 60, 1)):
        if seconds >= length / 10:
            return f"{seconds / length:,.{digits}f} {unit}"
    return f"{seconds:.2g} seconds"


def _in_turn(plan: Plan) -> str:
    reached = f"products at {REACHED:.0%} of that rate"
    sends = plan.floor and plan.floor.collectives
    if not plan.kernels:
        parts = "memory, collectives" if sends else "memory"
        return f"products, {parts} and update one after the other, {reached}"
    kernels = f"the compiled program's {plan.kernels:,} kernels one after the other, {reached}"
    if not sends:
        return kernels
    return f"{kernels}, and what the kernels that overlap them do not hide of the collectives"


def comparison(plans: dict[str, Plan]) -> str:
    """A table with a line for each attention implementation."""
    head = (
        f"{'attention':<14} {'memory':>9} {'temporaries':>11} {'TFLOP':>8} {'by XLA':>8} "
        f"{'sent':>9} {'floor ms':>9}"
    )
    lines = [head]
    for name, plan in plans.items():
        xla = f"{plan.compiler_flops / 1e12:.3f}" if plan.compiler_flops else "-"
        time = f"{plan.floor.overlapped * 1e3:,.1f}" if plan.floor else "-"
        sent = human_bytes(sum(c.sent for c in plan.collectives))
        cells = (
            f"{human_bytes(plan.total):>9} {human_bytes(plan.memory['temporaries']):>11} "
            f"{plan.flops / 1e12:>8.3f}"
        )
        lines.append(f"{name:<14} {cells} {xla:>8} {sent:>9} {time:>9}")
    return "\n".join(lines)
