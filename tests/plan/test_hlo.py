"""Instructions read from a program that XLA has just written."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.plan.hlo import Array, arrays, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[]", [Array("f32", ())]),
        ("bf16[16,1024]{1,0}", [Array("bf16", (16, 1024))]),
        ("(f32[8]{0}, s8[4194304]{0})", [Array("f32", (8,)), Array("s8", (4194304,))]),
        ("f8e4m3fn[2,3]{1,0}", [Array("f8e4m3fn", (2, 3))]),
    ],
)
def test_the_arrays_of_a_type(text, expected):
    assert arrays(text) == expected


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("bf16", 12), ("f64", 48), ("s4", 3), ("pred", 6), ("f8e5m2", 6)]
)
def test_bytes(dtype, nbytes):
    assert Array(dtype, (2, 3)).nbytes == nbytes


def test_a_program_of_this_machine():
    x = jnp.zeros((4, 8), jnp.float32)
    module = parse(jax.jit(lambda x: (x @ x.T).sum(0)).lower(x).compile().as_text())
    body = module.computations[module.entry]
    (argument,) = (i for i in body if i.opcode == "parameter")
    assert argument.results == [Array("f32", (4, 8))]
    (root,) = (i for i in body if i.is_root)
    assert root.results == [Array("f32", (4,))]
    names = {i.name for i in body}
    assert all(set(i.operands) <= names for i in body)
    assert any(i.opcode in ("dot", "fusion", "custom-call") for i in body)
