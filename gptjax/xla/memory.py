"""Memory for weights, which decoding reads from end to end for every token."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

ALIGNMENT = 64  # bytes; what begins elsewhere JAX's CPU backend copies
PAGE, CHUNK = 1 << 21, 1 << 25  # bytes


class LargePages:
    """Arrays side by side, which the system can map in pages of 2 MB.

    Weights are then read faster, as the processor looks up fewer addresses. NumPy asks the system
    for such pages where an array has 4 MB or more; XLA does not ask.
    """

    def __init__(self) -> None:
        """Take no memory yet."""
        self._left = np.empty(0, np.uint8)

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An array that `jax.device_put` takes over on CPU without a copy."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > self._left.size:
            chunk = np.empty(max(CHUNK, size) + PAGE, np.uint8)
            self._left = chunk[-chunk.ctypes.data % PAGE :]
        taken, self._left = np.split(self._left, [-(-size // ALIGNMENT) * ALIGNMENT])
        return taken[:size].view(dtype).reshape(shape)

    def on_device(self, x: Array | np.ndarray) -> Array:
        """A JAX array as it is; a copy of another on the device, here if that is the CPU."""
        if isinstance(x, Array) or jax.default_backend() != "cpu":
            return jax.device_put(x)
        copy = self.empty(x.shape, x.dtype)
        copy[...] = x
        return jax.device_put(copy)
