import jax
import jax.numpy as jnp
import pytest

from gptjax.bench.profile import profile, summed


def event(op, dur, **changes):
    return {"ph": "X", "name": "k", "dur": dur, "args": {"hlo_op": op}} | changes


def test_kernels_add_up_by_op_without_their_numbers():
    events = [
        event("dot.12", 30.0),
        event("dot.7.clone", 10.0),
        event("fusion", 5.0),
        event("dot.12", 20.0),
    ]
    found = summed(
        [*events, {"ph": "M", "name": "process_name"}, {"ph": "X", "dur": 9.0, "name": "python"}], 2
    )
    assert [(t.op, t.kernels) for t in found] == [("dot", 2), ("fusion", 0)]
    assert [t.seconds for t in found] == pytest.approx([30e-6, 2.5e-6])


def test_a_matrix_product_takes_the_time():
    x = jnp.ones((600, 600), jnp.float32)
    f = jax.jit(lambda x: jnp.sin((x @ x @ x)[:8]))
    jax.block_until_ready(f(x))
    found = profile(lambda: jax.block_until_ready(f(x)))
    assert found[0].seconds > 0
    assert "sin" not in found[0].op  # whatever this backend calls its products
    assert any("sin" in t.op for t in found)
