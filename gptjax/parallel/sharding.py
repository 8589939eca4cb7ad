"""The sharding rules: one table, `RULES`, of which mesh axes shard each logical axis, and the
layouts that follow from it.

The mesh has three axes. ``data`` replicates the model and divides the batch's rows. ``fsdp``
divides the rows, too, and shards each parameter that has channels, with its gradient and moments,
along them; a layer's parameters are gathered while it is computed. ``tensor`` divides the work on
one token: the heads, the MLP's hidden units and the vocabulary.

The model's functions need no change. `on_mesh` traces one for a mesh, and XLA partitions it by the
layouts of its arguments and of the few values passed to `compute_layout` and `param_layout`.
Without a mesh both are the identity, and one device runs the same program as without this module.
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
    """The mesh axes that shard a logical axis."""

    compute: tuple[str, ...]
    """Those that shard it in computations."""
    param: tuple[str, ...]
    """Those that shard it in stored parameters, their gradients and moments."""


RULES: dict[str | None, Rule] = {
    None: Rule((), ()),
    "B": Rule(("data", "fsdp"), ("data",)),  # param: in the embedding, where fsdp shards channels
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
    """The sharding of a parameter with these logical axes."""
    return _spec([RULES[axis].param for axis in axes])


def compute_layout(x: Array, *axes: str | None) -> Array:
    """``x`` in the layout for computing with these logical axes; unchanged without a mesh."""
    return _constrain(x, [RULES[axis].compute for axis in axes])


def param_layout(x: Array, *axes: str | None) -> Array:
    """``x`` in the layout of a parameter with these logical axes; unchanged without a mesh."""
    return _constrain(x, [RULES[axis].param for axis in axes])


def sum_over_fsdp(terms: Array, *axes: str | None) -> Array:
    """Sum (n, ...), one term for each share of the rows, to one term for each shard over data.

    The sum is reduce-scattered over fsdp into `param_layout`. XLA would all-reduce it and then
    slice it.
    """
    compute, param = ([getattr(RULES[axis], place) for axis in axes] for place in Rule._fields)
    rows = RULES["B"]
    scattered = [(axis, i) for i, cut in enumerate(param) for axis in cut if axis in rows.compute]

    def add(terms: Array) -> Array:
        for axis, i in scattered:
            terms = lax.psum_scatter(terms, axis, scatter_dimension=i + 1, tiled=True)
        return terms

    layouts = _spec([rows.compute, *compute]), _spec([rows.param, *param])
    return jax.shard_map(add, in_specs=layouts[0], out_specs=layouts[1])(terms)


def num_shards(*axes: str) -> int:
    """The number of shards along these axes, by default all, of the mesh that the function is
    traced for; 1 without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes or MESH_AXES) if not mesh.empty else 1


def on_mesh(mesh: Mesh | None, f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` traced for a mesh; unchanged without one."""
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
