import jax
import jax.numpy as jnp
import numpy as np

from gptjax.xla.memory import ALIGNMENT, CHUNK, LargePages


def test_arrays_lie_apart_and_jax_takes_them_over():
    """Of sizes that end anywhere, one of them larger than a chunk."""
    pages, made = LargePages(), []
    for seed, (shape, dtype) in enumerate(
        [((3, 5), np.uint8), ((7,), np.float16), ((CHUNK // 4 + 1,), np.float32), ((0,), np.int8)]
    ):
        array = pages.empty(shape, dtype)
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.ctypes.data % ALIGNMENT == 0
        array[...] = seed
        made.append((array, jax.device_put(array)))
    for seed, (array, on_device) in enumerate(made):
        assert (array == seed).all()
        if jax.default_backend() == "cpu" and array.size:
            assert on_device.unsafe_buffer_pointer() == array.ctypes.data


def test_what_is_on_the_device_stays_and_other_arrays_are_copied():
    pages, x = LargePages(), np.arange(100, dtype=np.float32)
    copy = pages.on_device(x)
    x[:] = 0
    np.testing.assert_array_equal(copy, np.arange(100))
    there = jnp.ones(3)
    assert pages.on_device(there) is there
