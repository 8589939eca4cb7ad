"""A small model, on trial in the tests of this folder."""

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import MeshConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.verify.model import Subject
from tests.models import tiny


def subject(
    A: int = 1, mesh: MeshConfig | None = None, B: int = 2, packed: bool = False, **changes: Any
) -> Subject:
    """`Subject` of A micro-batches and a model with ``changes`` of the tiny configuration;
    parameters in float32. ``packed`` sequences hold two documents each.
    """
    cfg = tiny.config(**changes)
    key = jax.random.key(3) if cfg.dropout or cfg.dropout_mlp else None
    batch = jax.tree.map(
        lambda *parts: jnp.stack(parts), *(tiny.batch(cfg, B, seed=a) for a in range(A))
    )
    if packed:
        T = batch.inputs.shape[-1]
        places = jnp.broadcast_to(jnp.arange(T), batch.inputs.shape)
        lengths = 1 + jnp.arange(B)[:, None] % (T - 1)
        batch = batch._replace(segments=(places >= lengths).astype(jnp.int32))
    devices = make_mesh(mesh, cfg.axis_sizes, B) if mesh else None
    return Subject(cfg, tiny.params(cfg, jnp.float32), batch, key, devices)
