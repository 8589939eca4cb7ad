"""The mesh of devices, and which of its axes cuts which axis of an array: the one table of that, `RULES`.

The mesh has three axes. ``data`` copies the model and shares out the batch's rows. ``fsdp`` shares out the rows too, and cuts
every weight, with its gradient and moments, along one axis: a layer's are gathered when it needs them, and no longer.
``tensor`` cuts the work on one token: the heads, the MLP's hidden units and the vocabulary.

The functions of the model stay as they are: `within` traces one for a mesh, and XLA splits it by the layouts of its arguments
and of the few values that `as_used` and `as_kept` name. Without a mesh both are the identity: one device runs the program that
it would run if this module did not exist.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

MESH_AXES = ("data", "fsdp", "tensor")
Axes = tuple[str | None, ...]
UNCUT: Axes = (None, None)


class Rule(NamedTuple):
    """The mesh axes that cut a logical axis: where it is computed with, and where a weight is kept."""

    used: tuple[str, ...]
    kept: tuple[str, ...]


RULES: dict[str | None, Rule] = {
    None: Rule((), ()),
    "B": Rule(("data", "fsdp"), ("data",)),  # kept: beside channels that are cut as a weight's
    "C": Rule((), ("fsdp",)),
    "H": Rule(("tensor",), ("tensor",)),
    "HD": Rule(("tensor",), ("tensor",)),  # heads' channels, side by side
    "F": Rule(("tensor",), ("tensor",)),
    "Vp": Rule(("tensor",), ("tensor",)),
    "CQ": Rule((), ("fsdp", "tensor")),  # the channels that q, k and v come from,
    "L": Rule((), ()),
    "Tmax": Rule((), ()),
    "3C": Rule((), ()),  # because a cut of the three side by side would not fall on heads: see `by_heads`
}


def kept(axes: Axes) -> PartitionSpec:
    """How a weight with these logical axes is cut; one that has no channels, a bias, is cut by fsdp along its last axis."""
    cuts = [RULES[axis].kept for axis in axes]
    if not any("fsdp" in cut for cut in cuts):
        cuts[-1] = (*cuts[-1], "fsdp")
    return _spec(cuts)


def as_used(x: Array, *axes: str | None) -> Array:
    """x, cut as `RULES` say for computing with these logical axes; x itself without a mesh."""
    return _constrain(x, [RULES[axis].used for axis in axes])


def as_kept(x: Array, *axes: str | None) -> Array:
    """x, cut as `RULES` say for keeping it, say the gradient of a weight; x itself without a mesh."""
    return _constrain(x, [RULES[axis].kept for axis in axes])


def sum_as_kept(terms: Array, *axes: str | None) -> Array:
    """(n, ...), a term of each share of the rows -> their sum, cut as `RULES` say for keeping it.

    It is scattered over the mesh axes that cut it, and over the others only the parts are summed. Left to XLA, all of it would
    be summed over all devices, and then cut.
    """
    used, kept = ([getattr(RULES[axis], place) for axis in axes] for place in Rule._fields)
    shares = RULES["B"].used
    scattered = [(axis, i) for i, cut in enumerate(kept) for axis in cut if axis in shares]

    def add(terms: Array) -> Array:
        x = terms[0]
        for axis, i in scattered:
            x = lax.psum_scatter(x, axis, scatter_dimension=i, tiled=True)
        return lax.psum(x, [axis for axis in shares if axis not in dict(scattered)])

    return jax.shard_map(add, in_specs=_spec([shares, *used]), out_specs=_spec(kept))(terms)


def _constrain(x: Array, cuts: list[tuple[str, ...]]) -> Array:
    if parts() == 1:
        return x
    return lax.with_sharding_constraint(x, _spec(cuts))


def _spec(cuts: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(cut or None for cut in cuts))


def parts(*axes: str) -> int:
    """Into how many parts these mesh axes, or all of them, cut in the mesh that is traced for; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes or MESH_AXES) if not mesh.empty else 1


def within(mesh: Mesh | None, f: Callable[..., Any]) -> Callable[..., Any]:
    """f, to be traced for a mesh; f itself without one."""
    if mesh is None:
        return f

    @wraps(f)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    return traced
