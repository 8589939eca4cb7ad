"""Tensors that stay in their file until they are used: what every model file is read into, and written from."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gptjax.models.config import GPT2Config
from gptjax.models.params import Block, Params, param_shapes


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor of a file; ``np.asarray`` reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """In the file."""
    load: Callable[[], np.ndarray]
    """Reads it, of `shape`."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Numpy's protocol."""
        return np.asarray(self.load(), dtype)


def tensor_names(cfg: GPT2Config) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """Name, layer (None outside the blocks) and shape of each tensor of a model, without the vocabulary's pad rows."""
    for name, shape in param_shapes(cfg)._asdict().items():
        if name in Block._fields:
            yield from ((name, layer, shape[1:]) for layer in range(cfg.num_layers))
        else:
            yield name, None, (cfg.vocab_size, cfg.channels) if name == "wte" else shape


def collect(
    cfg: GPT2Config, load: Callable[[str, int | None], np.ndarray], dtype_of: Callable[[str, int | None], np.dtype]
) -> Params:
    """`LazyTensor`s in the unrolled layout, read by ``load(name, layer)``."""
    found: dict[str, Any] = {name: [] for name in Block._fields}
    for name, layer, shape in tensor_names(cfg):
        tensor = LazyTensor(shape, dtype_of(name, layer), lambda name=name, layer=layer: load(name, layer))  # type: ignore[misc]
        if layer is None:
            found[name] = tensor
        else:
            found[name].append(tensor)
    return Params(**{name: tuple(tensor) if isinstance(tensor, list) else tensor for name, tensor in found.items()})


def tensor_of(params: Params, name: str, layer: int | None, cfg: GPT2Config) -> np.ndarray:
    """One tensor, read; the vocabulary's pad rows, which parameters in use have, left out."""
    tensor = getattr(params, name)
    array = np.asarray(tensor if layer is None else tensor[layer])
    return array[: cfg.vocab_size] if name == "wte" else array


def num_bytes(cfg: GPT2Config, itemsize: int) -> int:
    """Of all tensors, without padding."""
    return itemsize * sum(math.prod(shape) for _, _, shape in tensor_names(cfg))
