import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.quantized import OutIn
from gptjax.ops.stacks import InStack, alone, stack_of
from tests.compare import normal

LAYERS = OutIn(normal(0, 3, 4, 5))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_is_taken_out_of_its_stack(layer):
    taken = jax.jit(alone)(InStack(LAYERS, jnp.int32(layer)))
    assert isinstance(taken, OutIn)
    np.testing.assert_array_equal(taken.w, LAYERS.w[layer])


def test_one_layer_is_a_stack_of_one_and_stays_itself():
    one = OutIn(LAYERS.w[1])
    assert alone(one) is one
    stack, layer = stack_of(one)
    assert (stack.w.shape, int(layer)) == ((1, 4, 5), 0)
    np.testing.assert_array_equal(alone(stack_of(one)).w, one.w)
    there = InStack(LAYERS, jnp.int32(2))
    assert stack_of(there) is there
