"""The one table of which mesh axis cuts which axis of an array, `RULES`, and the layouts that
follow from it.

The mesh has three axes. ``data`` copies the model and shares out the batch's rows. ``fsdp`` shares
out the rows too, and cuts each parameter that has channels, with its gradient and moments, along
them: a layer's are gathered while it is computed. ``tensor`` cuts the work on one token: the heads,
the MLP's hidden units and the vocabulary.

The functions of the model stay as they are: `on_mesh` traces one for a mesh, and XLA splits it by
the layouts of its arguments and of the few values that `compute_layout` and `param_layout` name.
Without a mesh both are the identity: one device runs the program that it would run if this module
did not exist.
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


class Rule(NamedTuple):
    """The mesh axes that cut a logical axis."""

    compute: tuple[str, ...]
    """Where it is computed with."""
    param: tuple[str, ...]
    """Where a parameter, its gradient and its moments are kept."""


RULES: dict[str | None, Rule] = {
    None: Rule((), ()),
    "B": Rule(("data", "fsdp"), ("data",)),  # param: in the embedding, whose channels fsdp cuts
    "C": Rule((), ("fsdp",)),
    "H": Rule(("tensor",), ("tensor",)),
    "K": Rule(("tensor",), ("tensor",)),
    "D": Rule((), ()),
    "F": Rule(("tensor",), ("tensor",)),
    "Vp": Rule(("tensor",), ("tensor",)),
    "L": Rule((), ()),
    "T": Rule((), ()),
}


def param_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """How a parameter with these logical axes is cut."""
    return _spec([RULES[axis].param for axis in axes])


def compute_layout(x: Array, *axes: str | None) -> Array:
    """x, cut as `RULES` say for computing with these logical axes; x itself without a mesh."""
    return _constrain(x, [RULES[axis].compute for axis in axes])


def param_layout(x: Array, *axes: str | None) -> Array:
    """x, cut as `RULES` say for a parameter with these logical axes; x itself without a mesh."""
    return _constrain(x, [RULES[axis].param for axis in axes])


def sum_to_param_layout(terms: Array, *axes: str | None) -> Array:
    """(n, ...), a term for each share of the rows -> their sum, in `param_layout`.

    It is scattered over the mesh axes that cut it, and only the parts are summed over the others.
    Left to XLA, all of it would be summed over all devices, and then cut.
    """
    compute, param = ([getattr(RULES[axis], place) for axis in axes] for place in Rule._fields)
    shares = RULES["B"].compute
    scattered = [(axis, i) for i, cut in enumerate(param) for axis in cut if axis in shares]

    def add(terms: Array) -> Array:
        x = terms[0]
        for axis, i in scattered:
            x = lax.psum_scatter(x, axis, scatter_dimension=i, tiled=True)
        return lax.psum(x, [axis for axis in shares if axis not in dict(scattered)])

    return jax.shard_map(add, in_specs=_spec([shares, *compute]), out_specs=_spec(param))(terms)


def num_shards(*axes: str) -> int:
    """How many parts these mesh axes, or all of them, make in the mesh that is traced for; 1
    without one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes or MESH_AXES) if not mesh.empty else 1


def on_mesh(mesh: Mesh | None, f: Callable[..., Any]) -> Callable[..., Any]:
    """f, to be traced for a mesh; f itself without one."""
    if mesh is None:
        return f

    @wraps(f)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    return traced


def _constrain(x: Array, cuts: list[tuple[str, ...]]) -> Array:
    if num_shards() == 1:
        return x
    return lax.with_sharding_constraint(x, _spec(cuts))


def _spec(cuts: list[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(cut or None for cut in cuts))
