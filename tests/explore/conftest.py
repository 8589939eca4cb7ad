"""Small models on a short text, and all that the page shows of them, computed once."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from gptjax.config import ModelConfig
from gptjax.explore.scene import scene
from gptjax.models.batch import Batch
from tests.models import tiny


class Shown(NamedTuple):
    """What the page is made of."""

    cfg: ModelConfig
    params: Any
    batch: Batch
    scene: dict[str, Any]
    """With what the command adds."""


@pytest.fixture(scope="package")
def shown() -> Shown:
    """The page of a tiny GPT-2."""
    return page_of(tiny.config())


@pytest.fixture(scope="package")
def llama() -> Shown:
    """The page of a tiny Llama, with grouped heads and a classifier of its own."""
    return page_of(tiny.config(family="llama", num_heads=4, num_kv_heads=2, tied=False))


def page_of(cfg: ModelConfig) -> Shown:
    """Everything that the page of a model is made of."""
    params, batch = tiny.params(cfg), small_batch()
    data = scene(cfg, params, batch)
    tokens = [f"<{i}>" for i in [*batch.inputs[0].tolist(), int(batch.targets[0, -1])]]
    return Shown(
        cfg,
        params,
        batch,
        data | {"tokens": tokens, "facts": {"Model": "tiny"}, "made": "by a test"},
    )


def small_batch() -> Batch:
    """One sequence in which an id comes twice, for what is summed over both."""
    ids = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)
    return Batch(ids[:, :-1], ids[:, 1:])
