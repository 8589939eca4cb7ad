"""Random bits and normal numbers equal to `jax.random`'s, in one pass that the compiler can fuse.

On CPU, JAX runs the 20 rounds of its generator as a loop over whole arrays, which makes drawing the
weights of 124M take twice as long. The generator is Threefry-2x32 (Salmon et al. 2011, Parallel
random numbers: as easy as 1, 2, 3) with an element's index as its counter, so each device draws
only its own part.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key, UInt32

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = 0x1BD11BDA


def random_bits(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """32 random bits for each element, equal to `jax.random.bits`, which is used for keys of other
    generators.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32" or math.prod(shape) >= 2**32:
        return jax.random.bits(key, shape, jnp.uint32)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    counter = sum(
        (
            lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
            for axis, stride in enumerate(strides)
        ),
        jnp.zeros(shape, jnp.uint32),
    )
    first, second = _threefry(jax.random.key_data(key), jnp.zeros(shape, jnp.uint32), counter)
    return first ^ second


def normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Standard normal numbers, equal to `jax.random.normal`, which is used for other dtypes than
    float32.
    """
    if dtype != jnp.float32:
        return jax.random.normal(key, shape, dtype)
    # The smallest argument with a finite inverse error function
    above = np.nextafter(np.float32(-1), np.float32(0))
    one_to_two = lax.bitcast_convert_type(
        random_bits(key, shape) >> np.uint32(9) | np.uint32(0x3F800000), jnp.float32
    )
    uniform = jnp.maximum(above, (one_to_two - 1) * (np.float32(1) - above) + above)
    return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


def bernoulli(key: Key[Array, ""], p: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """True with probability ``p``, rounded to 32 bits."""
    return random_bits(key, shape) < np.uint32(min(round(p * 2**32), 2**32 - 1))


def _threefry(
    key: UInt32[Array, "2"], x: UInt32[Array, "*shape"], y: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """The 20 rounds of Threefry-2x32, with a key injection after every fourth."""
    parts = key[0], key[1], key[0] ^ key[1] ^ np.uint32(PARITY)
    x, y = x + parts[0], y + parts[1]
    for n in range(1, 6):
        for rotation in ROTATIONS[(n - 1) % 2]:
            x = x + y
            y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
        x, y = x + parts[n % 3], y + parts[(n + 1) % 3] + np.uint32(n)
    return x, y
