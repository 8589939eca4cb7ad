"""Ops are found by name in a traced program: the verifier and profilers tell them apart by it."""

import jax
import pytest

from gptjax import ops

NAMES = [name for name in ops.__all__ if name.endswith(("_fwd", "_bwd")) or name == "attention"]


@pytest.mark.parametrize("name", NAMES)
def test_every_op_is_a_jitted_function(name):
    f = getattr(ops, name)
    assert f.__name__ == name
    assert isinstance(f, type(jax.jit(abs)))


def test_every_forward_has_a_backward():
    forwards, backwards = (
        {n.removesuffix(s) for n in NAMES if n.endswith(s)} for s in ("_fwd", "_bwd")
    )
    assert forwards == backwards
    assert len(forwards) == 10
