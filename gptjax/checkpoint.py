"""Checkpoints of a run: atomic, asynchronous, verified when read.

Orbax writes each to a temporary folder and renames it, so one cut off by a crash never counts. Each carries a checksum
of every array, taken on the device when it was saved: what is restored is what was saved, or it is not used.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from gptjax import distributed
from gptjax import mesh as meshes
from gptjax.durable import set_aside
from gptjax.errors import CheckpointError, GptjaxError
from gptjax.formats.lazy import collect
from gptjax.lost import tells_of_a_lost_process
from gptjax.models.config import DIMENSIONS, GPT2Config
from gptjax.models.params import Block, Params, param_shapes, stack, unstack
from gptjax.optim import Optimizer
from gptjax.steps import TrainState, init_state

PREFIX = "step"
CHUNK_BYTES = 1 << 22  # of an array: what is written, and read to verify it, at a time
NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", os.strerror(errno.EACCES), os.strerror(errno.EMFILE))


class Restored(NamedTuple):
    """A checkpoint read back."""

    state: TrainState
    step: int
    meta: dict[str, Any]


class CheckpointWriter:
    """Saves into one folder in the background and keeps the newest few."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Make the folder; leftovers of a crash in it are removed."""
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, step_prefix=PREFIX, step_format_fixed_length=8, cleanup_tmp_directories=True
        )
        with _write_errors(folder):
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: TrainState, cfg: GPT2Config, meta: dict[str, Any]) -> None:
        """Start saving the state after ``step`` steps; returns as soon as the state may change again.

        Args:
            step: steps done.
            state: parameters and optimizer state.
            cfg: the model, whose dimensions and layout are kept with it.
            meta: anything JSON that resuming needs.

        Raises:
            CheckpointError: this save was declined, or it, or an earlier one in the background, could not be written.

        """
        sums = [int(x) for x in jax.tree.leaves(_checksums(state))]
        content = {"model": dataclasses.asdict(cfg), "mu_dtype": state.mu_dtype, "checksums": sums, "meta": meta}
        with _write_errors(self.folder):
            arrays = ocp.args.StandardSave(state, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), state))
            saving = self._manager.save(step, args=ocp.args.Composite(state=arrays, info=ocp.args.JsonSave(content)))
        if not saving:
            raise CheckpointError(f"step {step} was not saved: {self.folder} holds a later checkpoint; choose another --name")

    def check(self) -> None:
        """Raise the `CheckpointError` of a save that failed in the background, if one did."""
        with _write_errors(self.folder):
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CheckpointError: it could not be written.

        """
        with _write_errors(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()


def restore_newest(folder: Path, cfg: GPT2Config, optimizer: Optimizer, mesh: Mesh | None = None) -> Restored | None:
    """The newest checkpoint in ``folder`` that reads back as it was saved, in the layout of ``cfg``; None if there is none.

    Whatever mesh it was saved from, it is read to lie over ``mesh``. A damaged one is renamed to ``damaged-...`` with a
    warning, and the one before it is tried: by all processes, if any of them finds it damaged.

    Raises:
        GptjaxError: the model's dimensions differ, or there are checkpoints but all are damaged.

    """
    names = ocp.path.step.standard_name_format(step_prefix=PREFIX, step_format_fixed_length=8)

    def listed() -> str:
        found = names.find_all(folder.absolute()) if folder.is_dir() else []
        return json.dumps([sorted((metadata.step for metadata in found), reverse=True), bool(list(folder.glob("damaged-*")))])

    steps, some_were_damaged = json.loads(distributed.agreed("checkpoints", listed))
    for step in steps:
        path = folder.absolute() / names.build_name(step)
        try:
            return _restore(path, step, cfg, optimizer, mesh)
        except GptjaxError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            if tells_of_a_lost_process(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            distributed.agreed(f"{path.name} set aside", lambda: str(set_aside(path)))  # noqa: B023
            if distributed.is_first():
                warnings.warn(f"checkpoint {path} is damaged and was set aside: {reason[:200]}", stacklevel=2)
    if steps or some_were_damaged:
        raise CheckpointError(f"no checkpoint in {folder} can be read; start afresh without --resume")
    return None


def open_newest(folder: Path) -> tuple[GPT2Config, Params]:
    """The model of the newest checkpoint in ``folder``, and its parameters: verified now, read when they are used.

    Nothing is renamed, nothing is skipped: this is to look at, or to convert.

    Raises:
        CheckpointError: there is none, or it is not as it was saved.

    """
    names = ocp.path.step.standard_name_format(step_prefix=PREFIX, step_format_fixed_length=8)
    found = sorted(metadata.step for metadata in names.find_all(folder.absolute())) if folder.is_dir() else []
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint")
    path = folder.absolute() / names.build_name(found[-1])
    with _read_errors(path):
        info = _reader().restore(path, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
        cfg = GPT2Config(**info["model"])
        unrolled = cfg.layers == "unroll"
        arrays = {}
        for name, shape in param_shapes(cfg)._asdict().items():
            layered = name in Block._fields
            for layer in range(cfg.num_layers) if layered and unrolled else [None]:
                arrays[name, layer] = array = _open_array(path, name, layer)
                if array.shape != (shape[1:] if layered and unrolled else shape):
                    raise ValueError(f"its {name} has the shape {array.shape}")
        for array, checksum in zip(arrays.values(), info["checksums"], strict=False):  # a state begins with its parameters
            if _checksum_of(array) != checksum:
                raise ValueError("its checksums do not match")

    def load(name: str, layer: int | None) -> np.ndarray:
        with _read_errors(path):
            array = arrays[name, layer] if (name, layer) in arrays else arrays[name, None][layer]
            found = np.empty((cfg.vocab_size, cfg.channels) if name == "wte" else array.shape, np.float32)
            for start, part in _row_by_row(array[: len(found)]):
                found[start : start + len(part)] = part
            return found

    return cfg, collect(cfg, load, lambda *place: np.dtype(np.float32))


def _reader() -> ocp.Checkpointer:
    """What reads a checkpoint without waiting for other processes, which may be doing something else, or fail to read it."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _open_array(path: Path, name: str, layer: int | None) -> Any:
    """One parameter of a checkpoint where Orbax keeps it: as zarr, in a database of the checkpoint's arrays."""
    key = f"params.{name}/" if layer is None else f"params.{name}.{layer}/"
    store = {"driver": "ocdbt", "base": f"file://{path / 'state'}/", "path": key}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()


def _row_by_row(array: Any) -> Iterator[tuple[int, np.ndarray]]:
    """A stored array in parts of about `CHUNK_BYTES`, each with the number of its first row."""
    rows = max(1, CHUNK_BYTES // (4 * math.prod(array.shape[1:])))
    for start in range(0, array.shape[0], rows):
        yield start, array[start : min(start + rows, array.shape[0])].read().result()


def _checksum_of(array: Any) -> int:
    """What `_checksums` says of a stored array."""
    total = done = 0
    for _, part in _row_by_row(array):
        words = part.view(np.uint32).ravel()
        odd = 2 * np.arange(done, done + words.size, dtype=np.uint32) + 1
        total += int((words * odd).sum(dtype=np.uint32))
        done += words.size
    return total % 2**32


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn whatever Orbax and TensorStore raise for a damaged file into `CheckpointError`."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason[:200]}") from error


def _on_device(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def _restore(path: Path, step: int, cfg: GPT2Config, optimizer: Optimizer, mesh: Mesh | None) -> Restored:
    """One checkpoint; if any process cannot read its part of it, none has it."""
    checkpointer = _reader()

    def read() -> tuple[TrainState, Any, Any]:
        if not path.is_dir():
            raise CheckpointError(f"there is no {path} here: --runs must be a folder that all processes share")
        info = checkpointer.restore(path, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
        as_saved = dataclasses.replace(cfg, layers=info["model"]["layers"])
        shapes = jax.eval_shape(lambda key: init_state(key, as_saved, optimizer), jax.random.key(0))
        saved = {f"model.{name}": info["model"][name] for name in DIMENSIONS} | {"optim.mu_dtype": info.get("mu_dtype")}
        now = {f"model.{name}": getattr(cfg, name) for name in DIMENSIONS} | {"optim.mu_dtype": shapes.mu_dtype}
        for name, value in saved.items():
            if value != now[name]:
                raise CheckpointError(f"{path} was trained with {name} {value}, not {now[name]}: give it that value")
        arrays = ocp.args.StandardRestore(meshes.abstract(mesh, as_saved, shapes) if mesh else _on_device(shapes))
        return checkpointer.restore(path, args=ocp.args.Composite(state=arrays)).state, shapes, info

    def check() -> None:
        if [int(x) for x in jax.tree.leaves(_checksums(state))] != info["checksums"]:
            raise ValueError("its checksums do not match")

    state, shapes, info = distributed.together(f"{path.name} read", _not_damage(path)(read))
    _not_damage(path)(check)()  # with the others; the sums are the same in all
    if info["model"]["layers"] != cfg.layers:
        convert = lambda s: _each_params(stack if cfg.layers == "scan" else unstack, s)  # noqa: E731
        state = jax.jit(convert, out_shardings=meshes.shardings(mesh, cfg, shapes) if mesh else None)(state)
    return Restored(state, step, info["meta"])


@contextlib.contextmanager
def _not_damage(path: Path) -> Iterator[None]:
    """Turn what is the fault of this machine, or of its memory, into `CheckpointError`."""
    try:
        yield
    except Exception as error:
        if any(sign in str(error) for sign in NOT_DAMAGE):
            raise CheckpointError(f"checkpoint {path} cannot be read: {str(error)[:200]}") from error
        raise


def _each_params(f: Any, tree: Any) -> Any:
    is_params = lambda x: isinstance(x, Params)  # noqa: E731
    return jax.tree.map(lambda x: f(x) if is_params(x) else x, tree, is_leaf=is_params)


@jax.jit
def _checksums(tree: Any) -> Any:
    """A 32-bit sum of each array's words, each times an odd number that depends on its place: no flipped bit escapes."""

    def checksum(x: Array) -> Array:
        words = lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32).astype(jnp.uint32)
        place = jnp.zeros(words.shape, jnp.uint32)  # in the flat array, which would bring a cut one together
        for axis, size in enumerate(words.shape):
            place = place * size + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        return (words * (2 * place + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn what Orbax raises while writing into `CheckpointError`; the system's own words for it are deep in its message.

    A process that is lost meanwhile is no fault of the disk: that goes on to `gptjax.lost.ending_together`.
    """
    try:
        yield
    except Exception as error:
        if tells_of_a_lost_process(error):
            raise
        known = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES))
        reason = next((words for words in known if words in str(error)), str(error)[:300] or type(error).__name__)
        raise CheckpointError(
            f"the checkpoint in {folder} cannot be written ({reason}): free space or choose another --runs folder; "
            "earlier checkpoints are untouched"
        ) from error
