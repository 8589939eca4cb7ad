"""Parameters from wherever they are kept: a run of ours, or a file of another program."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.checkpoint import DIMENSIONS, newest_params
from gptjax.errors import CheckpointError, FormatError
from gptjax.formats import llmc
from gptjax.models.config import GPT2Config
from gptjax.models.params import Params, stack, unstack


def load_weights(path: Path, cfg: GPT2Config | None = None) -> tuple[GPT2Config, Params]:
    """Parameters in float32, in the layout of the configuration that comes with them.

    Args:
        path: folder of a run or of its checkpoints, of which the newest counts, or an llm.c model file.
        cfg: how to compute; its dimensions must be those of the parameters. None takes them from there.

    Returns:
        ``cfg``, or a configuration of the parameters' dimensions, and the parameters.

    Raises:
        CheckpointError: there is nothing of the kind, or its dimensions are not those of ``cfg``.
        FormatError: a damaged or unknown file.

    """
    if path.is_dir():
        found, params = newest_params(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    elif path.is_file():
        if not llmc.is_model(path):
            raise FormatError(f"{path} is in no format that is known here: a run's folder or an llm.c model .bin is expected")
        found, params = llmc.read_model(path)
        found = dataclasses.replace(found, layers="scan")
    else:
        raise CheckpointError(f"{path} does not exist: name the folder of a run or an llm.c model .bin")
    for name in DIMENSIONS if cfg else ():
        if getattr(found, name) != getattr(cfg, name):
            raise CheckpointError(
                f"{path} has model.{name} {getattr(found, name)}, not {getattr(cfg, name)}: give it that value"
            )
    cfg = cfg or found
    return cfg, _in_layout(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), found.layers, cfg.layers)


def _in_layout(params: Params, layers: str, wanted: str) -> Any:
    if layers == wanted:
        return params
    return unstack(params) if wanted == "unroll" else stack(params)
