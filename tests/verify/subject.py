"""A small model, on trial in the tests of this folder."""

import jax
import jax.numpy as jnp

from gptjax.verify.model import Subject
from tests.models import tiny


def subject(**changes):
    """`Subject` of a model with ``changes`` of the tiny configuration; parameters in float32."""
    cfg = tiny.config(**changes)
    key = jax.random.key(3) if cfg.dropout else None
    return Subject(cfg, tiny.params(cfg, jnp.float32), tiny.batch(cfg), key)
