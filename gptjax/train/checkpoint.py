"""Checkpoints of a run: atomic, asynchronous, verified when read.

Orbax writes each to a temporary folder and then renames it, and moves one that is no longer kept
before it is deleted, so a crash never leaves half a checkpoint under a final name. Each holds a
JSON document with a checksum of every array, taken on the device before saving, and the document's
own SHA-256. A checkpoint whose arrays do not match is not used. Damage to any other file in it
changes the arrays or raises an error, so the checksums cover it.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from gptjax.config import DIMENSIONS, ModelConfig
from gptjax.errors import CheckpointError, ConfigError, GptjaxError
from gptjax.files import set_aside
from gptjax.formats.lazy import collect
from gptjax.models.params import is_stacked, param_axes, rows, stack, unstack
from gptjax.parallel import mesh as meshes
from gptjax.parallel import processes
from gptjax.parallel.heartbeat import is_lost_process_error
from gptjax.train.optimizer import Optimizer
from gptjax.train.step import TrainState, init_state

PREFIX = "step"
REPLACED = "replaced"  # holds the checkpoints that are to be deleted
CHUNK_BYTES = 1 << 22  # of an array, written and verified at a time
NOT_DAMAGE = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    os.strerror(errno.EACCES),
    os.strerror(errno.EMFILE),
)
T = TypeVar("T")


class Restored(NamedTuple):
    """A checkpoint that was read and verified."""

    state: TrainState
    step: int
    meta: dict[str, Any]


class CheckpointWriter:
    """Saves into one folder in the background and keeps the newest few."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Make the folder, and remove unfinished checkpoints that a crash left in it."""
        self.folder = folder
        # Where one piece cannot be written, Orbax drops the others; the error says all there is.
        warnings.filterwarnings(
            "ignore", "coroutine '.*write_fragment' was never awaited", RuntimeWarning
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            step_prefix=PREFIX,
            step_format_fixed_length=8,
            cleanup_tmp_directories=True,
            todelete_subdir=REPLACED,
            # Skip the metadata of older checkpoints, so that a damaged one does not prevent saving
            lightweight_initialize=True,
        )
        with _write_errors(folder):
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._delete_replaced()

    def save(
        self,
        step: int,
        state: TrainState,
        cfg: ModelConfig,
        optimizer: Optimizer,
        meta: dict[str, Any],
    ) -> None:
        """Start saving the state after ``step`` steps; returns once the state may change again.

        Args:
            step: steps done.
            state: parameters and optimizer state.
            cfg: the model; its dimensions and layout are saved, too.
            optimizer: the optimizer that the state belongs to.
            meta: JSON data that resuming needs.

        Raises:
            CheckpointError: the folder holds a later checkpoint, or this one or an earlier one
                cannot be written.

        """
        content = {
            "step": step,
            "model": dataclasses.asdict(cfg),
            "optimizer": _kind(optimizer),
            "arrays": _sums(state),
            "meta": meta,
        }
        info = {"sha256": _digest(content), "content": content}
        with _write_errors(self.folder):
            in_chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
            arrays = ocp.args.StandardSave(state, jax.tree.map(lambda _: in_chunks, state))
            saving = self._manager.save(
                step, args=ocp.args.Composite(state=arrays, info=ocp.args.JsonSave(info))
            )
        if not saving:
            raise CheckpointError(
                f"step {step} was not saved: {self.folder} already holds a later checkpoint; "
                "choose another --name"
            )

    def check(self) -> None:
        """Raise a `CheckpointError` if a save failed in the background; delete what is replaced."""
        with _write_errors(self.folder):
            self._manager.check_for_errors()
        self._delete_replaced()

    def close(self) -> None:
        """Wait until every save is on disk.

        Raises:
            CheckpointError: one could not be written.

        """
        with _write_errors(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()
        self._delete_replaced()
        with contextlib.suppress(OSError):
            (self.folder / REPLACED).rmdir()

    def _delete_replaced(self) -> None:
        """Delete what Orbax has put aside; what cannot be deleted is tried again later."""
        for path in (self.folder / REPLACED).glob("*"):
            shutil.rmtree(path, ignore_errors=True)


def restore_newest(
    folder: Path, cfg: ModelConfig, optimizer: Optimizer, mesh: Mesh | None = None
) -> Restored | None:
    """Restore the newest intact checkpoint in ``folder``, in the layout of ``cfg``; None if there
    is no checkpoint.

    It is laid out over ``mesh``, whatever mesh it was saved from. A damaged one is renamed to
    ``damaged-...`` with a warning, and the one before it is tried; all processes do so if any of
    them finds it damaged.

    Raises:
        GptjaxError: the model's dimensions differ, or there are checkpoints but all are damaged.

    """
    found = _newest_intact(
        folder, lambda path, step: _restore(path, step, cfg, optimizer, mesh), processes.broadcast
    )
    return found and found._replace(state=_in_layout(found.state, cfg, optimizer, mesh))


def open_newest(folder: Path) -> tuple[ModelConfig, Any, dict[str, Any]]:
    """The newest intact checkpoint in ``folder``: its model, its parameters, which are verified now
    and read lazily, and its ``meta``.

    A damaged one is renamed to ``damaged-...`` with a warning, and the one before it is tried. The
    run may be training meanwhile; a checkpoint that it is still writing is left alone.

    Raises:
        CheckpointError: there is no checkpoint, or all are damaged.

    """
    found = _newest_intact(folder, _open, lambda name, decide: decide())
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint")
    return found


def _newest_intact(
    folder: Path, read: Callable[[Path, int], T], broadcast: Callable[[str, Callable[[], str]], str]
) -> T | None:
    """``read(path, step)`` of the newest checkpoint that it can read; None if there is no
    checkpoint.

    Any exception of ``read`` except `GptjaxError` means that the checkpoint is damaged.
    ``broadcast`` is `processes.broadcast` if all processes read the same checkpoint.
    """
    names = ocp.path.step.standard_name_format(step_prefix=PREFIX, step_format_fixed_length=8)
    tried: set[int] = set()

    def steps() -> set[int]:  # finished checkpoints only; one being written has another name
        return (
            {found.step for found in names.find_all(folder.absolute())} - tried
            if folder.is_dir()
            else set()
        )

    def newest() -> str:
        return json.dumps([max(steps(), default=None), bool(list(folder.glob("damaged-*")))])

    def put_aside() -> str:
        if not path.exists() or max(steps(), default=-1) > step:
            return ""  # a training run has meanwhile written a newer one and removed this one
        try:
            set_aside(path)
            return "was set aside"
        except OSError as failure:  # such as a read-only folder
            return f"is skipped (it cannot be renamed: {failure.strerror})"

    while True:
        step, some_were_damaged = json.loads(broadcast(f"checkpoint {len(tried)}", newest))
        if step is None:
            break
        path = folder.absolute() / names.build_name(step)
        try:
            return read(path, step)
        except GptjaxError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            if is_lost_process_error(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            tried.add(step)
            done = broadcast(f"{path.name} set aside", put_aside)
            if done and processes.is_first():
                warnings.warn(
                    f"checkpoint {path} is damaged and {done}: {reason[:200]}", stacklevel=3
                )
    if tried or some_were_damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: all are damaged; start afresh without --resume"
        )
    return None


class _Info(NamedTuple):
    """A checkpoint's JSON document, verified by its own checksum."""

    model: ModelConfig
    optimizer: dict[str, str | None]
    sums: dict[str, int]
    meta: dict[str, Any]


def _digest(content: Any) -> str:
    """SHA-256 of the content as canonical JSON."""
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _read_info(path: Path, step: int) -> _Info:
    """Read and verify a checkpoint's JSON document.

    Raises:
        CheckpointError: it is intact, but another version of gptjax wrote it.
        Exception: it is damaged.

    """
    found = _reader().restore(path, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
    of_another_version = CheckpointError(
        f"checkpoint {path} was written by another version of gptjax: use that version, or train "
        "afresh"
    )
    if "checksums" in found:
        raise of_another_version
    content = found["content"]
    if _digest(content) != found["sha256"]:
        raise ValueError("its JSON document does not match its checksum")
    try:
        of_step = content["step"]
        info = _Info(
            ModelConfig(**content["model"]),
            content["optimizer"],
            content["arrays"],
            content["meta"],
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise of_another_version from error
    if of_step != step:
        raise ValueError(f"it belongs to step {of_step}")
    return info


def _open(path: Path, step: int) -> tuple[ModelConfig, Any, dict[str, Any]]:
    """Open one checkpoint; see `open_newest`."""
    places: dict[
        tuple[str, int | None], tuple[Any, int, int, int]
    ] = {}  # (tensor, layer) -> array, first row, end row, checksum of the rows
    with _not_damage(path):
        info = _read_info(path, step)
        sums = {}
        for name, key, shape, rows in _saved_arrays(info.model):
            array, read = _open_array(path, key), 0
            if array.shape != shape or array.dtype.numpy_dtype != np.float32:
                raise ValueError(f"its {key} is {array.dtype.name} of the shape {array.shape}")
            sums[key] = 0
            for layer, (start, stop) in rows.items():
                places[name, layer] = array, start, stop, (checksum := _read(array, start, stop))
                sums[key], read = sums[key] + checksum, stop
            sums[key] = (sums[key] + _read(array, read, shape[0])) % 2**32
        if sums != {key: value for key, value in info.sums.items() if key.startswith("params.")}:
            raise ValueError("its checksums do not match")

    def load(name: str, layer: int | None) -> np.ndarray:
        array, start, stop, checksum = places[name, layer]
        found = np.empty((stop - start, *array.shape[1:]), np.float32)
        try:
            if _read(array, start, stop, found) != checksum:  # a removed file reads as zeros
                raise ValueError("its checksums no longer match")
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"checkpoint {path} changed while it was read ({reason[:200]}): if its run is "
                "training and has removed it for a newer one, try again"
            ) from error
        return found[0] if layer is not None and info.model.layers == "scan" else found

    return info.model, collect(info.model, load, lambda *place: np.dtype(np.float32)), info.meta


def _saved_arrays(
    cfg: ModelConfig,
) -> Iterator[tuple[str, str, tuple[int, ...], dict[int | None, tuple[int, int]]]]:
    """Each array of the parameters: (tensor, array name, shape, {layer: (first row, end row)}).

    The layer is None outside the blocks. The vocabulary's pad rows, which come last, belong to no
    layer.
    """
    for name, layered, weight, shape in rows(cfg):
        if not layered:
            yield (
                name,
                f"params.{name}",
                shape,
                {None: (0, cfg.vocab_size if weight.axes[0] == "Vp" else shape[0])},
            )
        elif cfg.layers == "scan":
            stacked = (cfg.num_layers, *shape)
            yield (
                name,
                f"params.blocks.{name}",
                stacked,
                {layer: (layer, layer + 1) for layer in range(cfg.num_layers)},
            )
        else:
            for layer in range(cfg.num_layers):
                yield name, f"params.blocks.{layer}.{name}", shape, {layer: (0, shape[0])}


def _reader() -> ocp.Checkpointer:
    """A reader that does not wait for other processes, which may be busy or fail to read."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _open_array(path: Path, key: str) -> Any:
    """Open one array of a checkpoint, which Orbax stores as zarr in an OCDBT database."""
    store = {"driver": "ocdbt", "base": f"file://{path / 'state'}/", "path": f"{key}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()


def _read(array: Any, start: int, stop: int, into: np.ndarray | None = None) -> int:
    """Read rows of an array, about `CHUNK_BYTES` at a time, into ``into`` if given; returns the
    rows' contribution to the array's checksum.
    """
    width, total = math.prod(array.shape[1:]), 0
    rows = max(1, CHUNK_BYTES // (4 * width))
    for first in range(start, stop, rows):
        part = array[first : min(first + rows, stop)].read().result()
        if into is not None:
            into[first - start : first - start + len(part)] = part
        words = np.ascontiguousarray(part).view(np.uint32).ravel()
        place = np.arange(words.size, dtype=np.uint32) + np.uint32(first * width % 2**32)
        total += int(_mixed(words, place).sum(dtype=np.uint32))
    return total % 2**32


def _on_device(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def _restore(
    path: Path, step: int, cfg: ModelConfig, optimizer: Optimizer, mesh: Mesh | None
) -> Restored:
    """Restore one checkpoint in the layout in which it was saved. If one process fails, all fail
    with the same error.
    """

    def read() -> tuple[TrainState, _Info]:
        if not path.is_dir() and not processes.is_first():
            raise CheckpointError(
                f"this process finds no {path}: --runs must be a folder that all processes share"
            )
        info = _read_info(path, step)
        as_saved = dataclasses.replace(cfg, layers=info.model.layers)
        shapes = jax.eval_shape(lambda key: init_state(key, as_saved, optimizer), jax.random.key(0))
        saved = {f"model.{name}": getattr(info.model, name) for name in DIMENSIONS} | info.optimizer
        now = {f"model.{name}": getattr(cfg, name) for name in DIMENSIONS} | _kind(optimizer)
        for name, value in saved.items():
            if value != now.get(name):
                raise CheckpointError(
                    f"{path} was trained with {name} {value}, not {now.get(name)}: set it to that "
                    "value"
                )
        # Adafactor factors the stack of layers, not each layer
        if info.model.layers != cfg.layers and optimizer.cfg.name == "adafactor":
            raise CheckpointError(
                f"{path} was trained with model.layers {info.model.layers}: set it to that value"
            )
        arrays = ocp.args.StandardRestore(
            meshes.abstract(mesh, param_axes(as_saved), shapes) if mesh else _on_device(shapes)
        )
        return _reader().restore(path, args=ocp.args.Composite(state=arrays)).state, info

    def check() -> None:
        if _sums(state) != info.sums:
            raise ValueError("its checksums do not match")

    state, info = processes.run_in_all(f"{path.name} read", _not_damage(path)(read))
    _not_damage(path)(check)()  # same result in every process
    return Restored(state, step, info.meta)


def _in_layout(
    state: TrainState, cfg: ModelConfig, optimizer: Optimizer, mesh: Mesh | None
) -> TrainState:
    """The state with parameters and optimizer state stacked, or not, as ``cfg.layers`` says."""
    if is_stacked(state.params.blocks) == (cfg.layers == "scan"):
        return state
    one = stack if cfg.layers == "scan" else partial(unstack, num_layers=cfg.num_layers)
    is_params = lambda tree: hasattr(tree, "blocks")  # noqa: E731

    def convert(state: Any) -> Any:
        return jax.tree.map(lambda x: one(x) if is_params(x) else x, state, is_leaf=is_params)

    shapes = jax.eval_shape(lambda key: init_state(key, cfg, optimizer), jax.random.key(0))
    return jax.jit(
        convert, out_shardings=meshes.shardings(mesh, param_axes(cfg), shapes) if mesh else None
    )(state)


@contextlib.contextmanager
def _not_damage(path: Path) -> Iterator[None]:
    """Turn failures of this machine, such as a lack of memory, into `CheckpointError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NOT_DAMAGE):
            raise CheckpointError(
                f"checkpoint {path} cannot be read: {str(error)[:200]}"
            ) from error
        raise


def _kind(optimizer: Optimizer) -> dict[str, str | None]:
    """The options that determine the optimizer state's structure."""
    return {"optim.name": optimizer.cfg.name, "optim.mu_dtype": optimizer.cfg.mu_dtype}


def _sums(tree: Any) -> dict[str, int]:
    """The checksum of each array under its name, as in ``params.blocks.0.NAME``."""
    found = jax.tree_util.tree_leaves_with_path(_checksums(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="."): int(x) for path, x in found}


@jax.jit
def _checksums(tree: Any) -> Any:
    """A 32-bit checksum of each array."""

    def checksum(x: Array) -> Array:
        words = lax.bitcast_convert_type(
            x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32
        ).astype(jnp.uint32)
        # Index into the flat array, computed without reshaping, which would gather a sharded one
        place = jnp.zeros(words.shape, jnp.uint32)
        for axis, size in enumerate(words.shape):
            place = place * size + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        return _mixed(words, place).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def _mixed(words: Any, place: Any) -> Any:
    """Words hashed with their positions (Wellons' lowbias32), to be summed.

    The hash is one-to-one, so the sum reveals every change of a single word. Of other changes, such
    as swapped words, it misses about 1 in 2^32.
    """
    x = words ^ (place * np.uint32(0x9E3779B9))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn Orbax's errors while writing into `CheckpointError` with the system's reason, extracted
    from their messages.

    The loss of another process is passed on to `gptjax.parallel.heartbeat.exit_together`.
    """
    try:
        yield
    except Exception as error:
        if is_lost_process_error(error):
            raise
        known = (
            os.strerror(code)
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
        )
        reason = next(
            (words for words in known if words in str(error)),
            str(error)[:300] or type(error).__name__,
        )
        raise CheckpointError(
            f"the checkpoint in {folder} cannot be written ({reason}): free space or choose "
            "another --runs folder; earlier checkpoints are untouched"
        ) from error
