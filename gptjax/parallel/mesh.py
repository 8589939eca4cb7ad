"""The mesh of devices, and arrays laid out over it by the rules of `gptjax.parallel.sharding`."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config import MeshConfig
from gptjax.errors import ConfigError
from gptjax.parallel.sharding import MESH_AXES, RULES, param_spec

OPTIONS = {  # the option that sets the size of each sharded axis
    "B": "data.batch_size",
    "C": "model.channels",
    "H": "model.num_heads",
    "K": "model.num_kv_heads",
    "F": "model.hidden",
    "Vp": "model.vocab_size, padded to",
}
LISTED = 4  # valid meshes named in the error about an invalid one


def make_mesh(
    cfg: MeshConfig, sizes: dict[str, int], batch_size: int, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """The mesh, or None for one device.

    Args:
        cfg: the mesh's shape.
        sizes: sizes of the model's logical axes, which must divide evenly.
        batch_size: rows of a micro-batch over all devices.
        devices: the devices; all of JAX's by default. A single process may leave some idle.

    Raises:
        ConfigError: there are too few devices, or an axis does not divide evenly; the message lists
            valid meshes.

    """
    devices = jax.devices() if devices is None else devices
    processes = len({device.process_index for device in devices})
    shape = mesh_shape(cfg, sizes, batch_size, len(devices), processes)
    if len(devices) == 1 or (shape == (1, 1, 1) and processes == 1):
        return None
    used = list(devices)[: math.prod(shape)]
    if used[0].platform == "tpu":  # neighbours in the mesh are neighbours in the machine
        grid = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
    else:
        grid = np.array(used, dtype=object).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_shape(
    cfg: MeshConfig, sizes: dict[str, int], batch_size: int, devices: int, processes: int = 1
) -> tuple[int, ...]:
    """(data, fsdp, tensor) of the mesh that `make_mesh` makes of this number of devices, with the
    same errors.
    """
    shape = _resolve(cfg.shape, devices)
    obstacle = _miscounted(cfg.shape, shape, devices, processes) or _uneven(
        shape, sizes, batch_size
    )
    if obstacle:
        raise ConfigError(
            f"{obstacle}: {_alternatives(cfg.shape, sizes, batch_size, devices, processes)}"
        )
    return shape


def describe_mesh(mesh: Mesh) -> str:
    """``8 devices: data 2 x fsdp 2 x tensor 2``."""
    return f"{mesh.size} devices: " + " x ".join(
        f"{axis} {size}" for axis, size in mesh.shape.items()
    )


def _resolve(shape: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """The shape with -1 replaced by the number of remaining devices, at least 1."""
    known = math.prod(size for size in shape if size != -1)
    return tuple(max(devices // known, 1) if size == -1 else size for size in shape)


def _miscounted(
    asked: tuple[int, ...], shape: tuple[int, ...], devices: int, processes: int
) -> str | None:
    """Why the mesh does not fit the number of devices; None if it does."""
    named = "the mesh " + " x ".join(
        f"{axis} {size}" for axis, size in zip(MESH_AXES, asked, strict=True)
    )
    there_are = f"there {'is 1 device' if devices == 1 else f'are {devices} devices'}"
    count = math.prod(shape)
    if -1 in asked and count != devices:
        return f"{named} leaves no whole number of devices for -1, as {there_are}"
    if count > devices:
        return f"{named} takes {count} devices, but {there_are}"
    if count < devices and processes > 1:
        return (
            f"{named} takes {count} devices, but {there_are} in {processes} processes, which must "
            "all take part"
        )
    return None


def _uneven(shape: tuple[int, ...], sizes: dict[str, int], batch_size: int) -> str | None:
    """The axis that is not divisible by its mesh axes, as text; None if all are."""
    mesh = dict(zip(MESH_AXES, shape, strict=True))
    for axis, rule in RULES.items():
        for cut in rule:
            parts = math.prod(mesh[name] for name in cut)
            size = batch_size if axis == "B" else sizes.get(str(axis), parts)
            if size % parts:
                what = OPTIONS[str(axis)]
                names = " x ".join(f"mesh.{name}" for name in cut)
                return f"{what} {size} is not divisible by {names} = {parts}"
    return None


def _alternatives(
    asked: tuple[int, ...], sizes: dict[str, int], batch_size: int, devices: int, processes: int
) -> str:
    """The valid meshes of all devices as text, those most similar to the requested one first."""
    each = devices // processes  # must hold whole rows, or parts of the same rows: `row_share`

    def of(rows: int) -> list[tuple[int, ...]]:
        return [
            shape
            for shape in itertools.product(_divisors(devices), repeat=len(MESH_AXES))
            if math.prod(shape) == devices
            and (each % shape[-1] == 0 or shape[-1] % each == 0)
            and not _uneven(shape, sizes, rows)
        ]

    def unlike(shape: tuple[int, ...]) -> tuple[float, int]:
        ratios = [size / wanted for size, wanted in zip(shape, asked, strict=True) if wanted != -1]
        return round(sum(abs(math.log(ratio)) for ratio in ratios), 6), shape[-1]

    whole = -(-batch_size // devices) * devices
    shapes = of(batch_size)
    axes = f"({', '.join(MESH_AXES)})"
    head = (
        f"for {devices} devices, {axes} can be"
        if devices > 1
        else f"for 1 device, {axes} can only be"
    )
    if not shapes:
        shapes = of(whole)
        head = (
            f"no mesh takes all {devices} devices with data.batch_size {batch_size}, but with "
            f"{whole}, {axes} can be"
        )
    shown = [f"({', '.join(map(str, shape))})" for shape in sorted(shapes, key=unlike)[:LISTED]]
    more = ", or others" if len(shapes) > LISTED else ""
    return f"{head} {' or '.join(filter(None, [', '.join(shown[:-1]), shown[-1]]))}{more}"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def param_shardings(mesh: Mesh, axes: Any) -> Any:
    """The layout of each parameter.

    Args:
        mesh: the mesh.
        axes: the tree of logical axes, from `gptjax.models.params.param_axes`.

    """
    return jax.tree.map(lambda axes: NamedSharding(mesh, param_spec(axes)), axes, is_leaf=_is_axes)


def shardings(mesh: Mesh, axes: Any, tree: Any) -> Any:
    """The layout of a tree: arrays shaped like a parameter are sharded like it, all others
    replicated.

    Optimizer states contain trees with the parameters' structure, in which leaves may be missing
    or, as in Adafactor, smaller.
    """

    def layout(axes: tuple[str, ...], x: Any) -> NamedSharding:
        sizes = [math.prod(mesh.shape[name] for name in RULES[axis].param) for axis in axes]
        cut = len(axes) == x.ndim and not any(
            n % size for n, size in zip(x.shape, sizes, strict=True)
        )
        return NamedSharding(mesh, param_spec(axes)) if cut else replicated(mesh)

    def layouts(x: Any) -> Any:
        if not is_params(x):
            return replicated(mesh)
        return jax.tree.map(
            lambda axes, leaf: jax.tree.map(partial(layout, axes), leaf), axes, x, is_leaf=_is_axes
        )

    def is_params(x: Any) -> bool:
        return isinstance(x, type(axes))

    return jax.tree.map(layouts, tree, is_leaf=is_params)


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(isinstance(axis, str) for axis in x)


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """The layout of tokens (..., B, T), sharded by rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * (ndim - 2), RULES["B"].compute, None))


def abstract(mesh: Mesh | None, axes: Any, tree: Any) -> Any:
    """Shapes of a tree in the layout of `shardings`, to lower a function without allocating."""
    if mesh is None:
        return tree
    layout = shardings(mesh, axes, tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, layout
    )


def row_share(mesh: Mesh | None, batch_size: int) -> tuple[int, int]:
    """(i, n): this process reads the i-th of n equal shares of a batch's rows. Processes that hold
    the same rows read the same share.

    Raises:
        ConfigError: processes would hold unequal or overlapping rows.

    """
    if mesh is None:
        return 0, 1
    rows: dict[int, set[int]] = {}
    places: dict[Any, Any] = dict(row_sharding(mesh, 2).devices_indices_map((batch_size, 1)))
    for device, (where, _) in places.items():
        rows.setdefault(device.process_index, set()).update(range(batch_size)[where])
    groups = sorted({tuple(sorted(held)) for held in rows.values()})
    if (
        sorted(row for group in groups for row in group) != list(range(batch_size))
        or len({*map(len, groups)}) > 1
    ):
        raise ConfigError(
            f"data.batch_size {batch_size} does not divide evenly among {len(rows)} processes on "
            "this mesh: make mesh.tensor a divisor or a multiple of the devices of one process"
        )
    return groups.index(tuple(sorted(rows[jax.process_index()]))), len(groups)


def place_rows(mesh: Mesh | None, batch: Any, shares: int = 1) -> Any:
    """Lay tokens out over the mesh: this process's (..., B / shares, T) become (..., B, T). Without
    a mesh they stay as they are.

    Args:
        mesh: the mesh of all processes.
        batch: a tree of NumPy arrays with this process's rows.
        shares: the n of `row_share`; 1 if each process has all rows.

    """
    if mesh is None:
        return batch

    def place(x: Any) -> jax.Array:
        shape = (*x.shape[:-2], x.shape[-2] * shares, x.shape[-1])
        sharding = row_sharding(mesh, x.ndim)
        places: dict[Any, Any] = dict(sharding.addressable_devices_indices_map(shape))
        starts = {index[-2].indices(shape[-2])[0] for index in places.values()}
        first = {start: i for i, start in enumerate(sorted(starts))}

        def part(index: Any) -> Any:
            start, stop, _ = index[-2].indices(shape[-2])
            at = first[start] * (stop - start) if shares > 1 else start
            return x[..., at : at + stop - start, :]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


def place(array: Any, sharding: Any) -> jax.Array:
    """Lay out an array that every process has, in float32; None puts it on the default device."""
    if sharding is None:
        return jax.numpy.asarray(array, jax.numpy.float32)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.asarray(array[index], np.float32)
    )


def whole(mesh: Mesh | None, x: Any) -> Any:
    """Replicate small arrays on every device, so that any process can read them."""
    return x if mesh is None else jax.jit(lambda x: x, out_shardings=replicated(mesh))(x)
