"""Checkpoints of a run: atomic, asynchronous, verified when read.

Orbax writes each to a temporary folder and renames it, so one cut off by a crash never counts. Each carries a checksum
of every array, taken on the device when it was saved: what is restored is what was saved, or it is not used.
"""

import contextlib
import dataclasses
import errno
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from jaxtyping import Array

from gptjax.errors import CheckpointError
from gptjax.formats.lazy import collect
from gptjax.models.config import DIMENSIONS, GPT2Config
from gptjax.models.params import Params, stack, unstack
from gptjax.optim import Optimizer
from gptjax.steps import TrainState, init_state

PREFIX = "step"
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
            CheckpointError: this save, or an earlier one in the background, could not be written.

        """
        sums = [int(x) for x in jax.tree.leaves(_checksums(state))]
        content = {"model": dataclasses.asdict(cfg), "checksums": sums, "meta": meta}
        with _write_errors(self.folder):
            arrays = ocp.args.StandardSave(state)
            self._manager.save(step, args=ocp.args.Composite(state=arrays, info=ocp.args.JsonSave(content)))

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


def restore_newest(folder: Path, cfg: GPT2Config, optimizer: Optimizer) -> Restored | None:
    """The newest checkpoint in ``folder`` that reads back as it was saved, in the layout of ``cfg``; None if there is none.

    A damaged one is renamed to ``damaged-...`` with a warning, and the one before it is tried.

    Raises:
        CheckpointError: the model's dimensions differ, or there are checkpoints but all are damaged.

    """
    names = ocp.path.step.standard_name_format(step_prefix=PREFIX, step_format_fixed_length=8)
    steps = sorted((metadata.step for metadata in names.find_all(folder.absolute())), reverse=True) if folder.is_dir() else []
    for step in steps:
        path = folder.absolute() / names.build_name(step)
        try:
            return _restore(path, step, cfg, optimizer)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            if any(sign in str(error) for sign in NOT_DAMAGE):
                raise CheckpointError(f"checkpoint {path} cannot be read: {str(error)[:200]}") from error
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            path.rename(path.with_name(f"damaged-{path.name}"))
            warnings.warn(f"checkpoint {path} is damaged and was set aside: {reason[:200]}", stacklevel=2)
    if steps or list(folder.glob("damaged-*")):
        raise CheckpointError(f"no checkpoint in {folder} can be read; start afresh without --resume")
    return None


def open_newest(folder: Path) -> tuple[GPT2Config, Params]:
    """The model of the newest checkpoint in ``folder``, and its parameters, each read and verified when it is used.

    Nothing is renamed, nothing is skipped: this is to look at, or to convert.

    Raises:
        CheckpointError: there is none, or (also later, from a tensor) it is not as it was saved.

    """
    names = ocp.path.step.standard_name_format(step_prefix=PREFIX, step_format_fixed_length=8)
    found = sorted(metadata.step for metadata in names.find_all(folder.absolute())) if folder.is_dir() else []
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint")
    path = folder.absolute() / names.build_name(found[-1])
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    with _read_errors(path):
        info = checkpointer.restore(path, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
        cfg = GPT2Config(**info["model"])
        tree = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
    nothing = jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
    parts = [(name, i) for name, tensor in tree["params"].items() for i in range(len(tensor) if _in_layers(tensor) else 1)]
    order = sorted(parts, key=lambda part: (Params._fields.index(part[0]), part[1]))  # as the checksums were taken

    @functools.lru_cache(1)
    def leaf(name: str, index: int) -> np.ndarray:
        with _read_errors(path):
            wanted = {**nothing, "params": {**nothing["params"]}}
            among = tree["params"][name]
            wanted["params"][name] = (
                [0 if i == index else ocp.PLACEHOLDER for i in range(len(among))] if _in_layers(among) else 0
            )
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=wanted, restore_args=how))
            restored = checkpointer.restore(path, args=args).state["params"][name]
            array: np.ndarray = restored[index] if _in_layers(among) else restored
            if int(_checksums(array)) != info["checksums"][order.index((name, index))]:
                raise ValueError("its checksums do not match")
        return array

    def load(name: str, layer: int | None) -> np.ndarray:
        if layer is None:
            return leaf(name, 0)[: cfg.vocab_size] if name == "wte" else leaf(name, 0)
        return leaf(name, layer) if _in_layers(tree["params"][name]) else leaf(name, 0)[layer]

    return cfg, collect(cfg, load)


def _in_layers(tensor: Any) -> bool:
    return isinstance(tensor, list | tuple)


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn whatever Orbax and TensorStore raise for a damaged file into `CheckpointError`."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason[:200]}") from error


def _on_device(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def _restore(path: Path, step: int, cfg: GPT2Config, optimizer: Optimizer) -> Restored:
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    info = checkpointer.restore(path, args=ocp.args.Composite(info=ocp.args.JsonRestore())).info
    saved = info["model"]
    for name in DIMENSIONS:
        if saved[name] != getattr(cfg, name):
            raise CheckpointError(
                f"{path} was trained with model.{name} {saved[name]}, not {getattr(cfg, name)}: give it that value"
            )
    as_saved = dataclasses.replace(cfg, layers=saved["layers"])
    abstract = _on_device(jax.eval_shape(lambda key: init_state(key, as_saved, optimizer), jax.random.key(0)))
    arrays = ocp.args.StandardRestore(abstract)
    state = checkpointer.restore(path, args=ocp.args.Composite(state=arrays)).state
    if [int(x) for x in jax.tree.leaves(_checksums(state))] != info["checksums"]:
        raise ValueError("its checksums do not match")
    if saved["layers"] != cfg.layers:
        state = jax.jit(lambda s: _each_params(stack if cfg.layers == "scan" else unstack, s))(state)
    return Restored(state, step, info["meta"])


def _each_params(f: Any, tree: Any) -> Any:
    is_params = lambda x: isinstance(x, Params)  # noqa: E731
    return jax.tree.map(lambda x: f(x) if is_params(x) else x, tree, is_leaf=is_params)


@jax.jit
def _checksums(tree: Any) -> Any:
    """A 32-bit sum of each array's words, each times an odd number that depends on its place: no flipped bit escapes."""

    def checksum(x: Array) -> Array:
        words = lax.bitcast_convert_type(x, jnp.uint32).ravel()
        return (words * (2 * lax.iota(jnp.uint32, words.size) + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn what Orbax raises while writing into `CheckpointError`; the system's own words for it are deep in its message."""
    try:
        yield
    except Exception as error:
        known = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES))
        reason = next((words for words in known if words in str(error)), str(error)[:300] or type(error).__name__)
        raise CheckpointError(
            f"the checkpoint in {folder} cannot be written ({reason}): free space or choose another --runs folder; "
            "earlier checkpoints are untouched"
        ) from error
