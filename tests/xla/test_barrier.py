import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import on_mesh
from gptjax.xla.barrier import barrier, barrier_except_tpu, cpu_barrier
from tests.compare import normal


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wait", [barrier, barrier_except_tpu, cpu_barrier])
def test_the_value_and_its_dtype_stay(wait, dtype):
    x = normal(0, 3, 4).astype(dtype)
    first = 1e30 * normal(1, 2), (normal(2, 1, 1, 1), normal(3)), normal(4, 0, 3), jnp.zeros((2, 2))
    y = jax.jit(wait)(first, x)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y, np.float64), np.asarray(x, np.float64))


@pytest.mark.parametrize(("again", "times"), [(lambda dy, x: x, 1), (barrier, 2)])
def test_what_is_computed_again_is_not_taken_from_before(again, times):
    def twice(x, dy):
        return jnp.tanh(x).sum(), (jnp.tanh(again(dy, x)) * dy).sum()

    x = normal(0, 8, 8)
    assert jax.jit(twice).lower(x, x).compile().as_text().count(" tanh(") == times


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_zeros_are_added_on_cpu_alone(platform):
    """Elsewhere a barrier is JAX's; on TPU two of the three are none."""
    x = normal(0, 8, 8)
    texts = [
        jax.export.export(jax.jit(f), platforms=[platform])(x, x).mlir_module()
        for f in (barrier, barrier_except_tpu, cpu_barrier)
    ]
    assert ["stablehlo.add" in text for text in texts] == [platform == "cpu"] * 3
    jaxs = ["optimization_barrier" in text for text in texts]
    assert jaxs == [platform != "cpu", platform == "cuda", False]


def test_between_two_devices_a_barrier_sends_nothing():
    """It is JAX's there, on CPU too."""
    x = normal(0, 8, 8)
    text = jax.jit(on_mesh(make_mesh(MeshConfig(data=2), {}, 2), barrier)).lower(x, x).as_text()
    assert "optimization_barrier" in text
    assert "stablehlo.add" not in text
