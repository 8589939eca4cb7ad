"""Lazily read tensors, the form in which models are imported and exported."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from gptjax.config import Architecture
from gptjax.models.family import Weight, family_of
from gptjax.models.params import is_stacked, rows


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor of a file; ``np.asarray`` reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Dtype in the file."""
    load: Callable[[], np.ndarray]
    """Reads the tensor, with shape `shape`."""
    blocks: Callable[[], Any] | None = None
    """Reads the quantized blocks in the file; None if there are none that decoding can use."""
    block_type: str = ""
    """GGML's name of the type of its blocks, as in ``Q4_1``, also if decoding cannot use them."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """NumPy's protocol."""
        return np.asarray(self.load(), dtype)


def tensor_names(cfg: Architecture) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """Name, layer (None outside the blocks) and shape, without pad rows, of each parameter."""
    for name, layered, weight, shape in rows(cfg):
        shape = unpadded_shape(weight, shape, cfg)
        yield from (
            (name, layer, shape) for layer in (range(cfg.num_layers) if layered else [None])
        )


def unpadded_shape(weight: Weight, shape: tuple[int, ...], cfg: Architecture) -> tuple[int, ...]:
    """A parameter's shape without the vocabulary's pad rows."""
    return (cfg.vocab_size, *shape[1:]) if weight.axes[0] == "Vp" else shape


def collect(
    cfg: Architecture,
    load: Callable[[str, int | None], np.ndarray],
    dtype_of: Callable[[str, int | None], np.dtype],
) -> Any:
    """The family's parameters as `LazyTensor`s, unrolled.

    Args:
        cfg: the model.
        load: ``load(name, layer)`` reads a parameter in the shape of `tensor_names`.
        dtype_of: ``dtype_of(name, layer)`` is its dtype in the file.

    """
    outside: dict[str, LazyTensor] = {}
    layers: list[dict[str, LazyTensor]] = [{} for _ in range(cfg.num_layers)]
    for name, layer, shape in tensor_names(cfg):
        found = outside if layer is None else layers[layer]
        found[name] = LazyTensor(shape, dtype_of(name, layer), partial(load, name, layer))
    family = family_of(cfg)
    return family.Params(**outside, blocks=tuple(family.Block(**layer) for layer in layers))


def stack_lazily(params: Any) -> Any:
    """Turn unrolled `LazyTensor`s into stacked ones, (L, ...), read layer by layer."""

    def stacked(*layers: LazyTensor) -> LazyTensor:
        shape, dtype = (
            (len(layers), *layers[0].shape),
            np.result_type(*(layer.dtype for layer in layers)),
        )

        def load() -> np.ndarray:
            array = np.empty(shape, dtype)
            for i, layer in enumerate(layers):
                array[i] = layer
            return array

        return LazyTensor(shape, dtype, load)

    return params._replace(blocks=jax.tree.map(stacked, *params.blocks))


def tensor_of(params: Any, name: str, layer: int | None, cfg: Architecture) -> np.ndarray:
    """Read one parameter in the shape of `tensor_names`, without pad rows.

    Args:
        params: in either layout, of arrays or `LazyTensor`s.
        name: the parameter's.
        layer: its layer; None outside the blocks.
        cfg: the model.

    """
    if layer is None:
        array = np.asarray(getattr(params, name))
    elif is_stacked(params.blocks):
        array = np.asarray(getattr(params.blocks, name)[layer])
    else:
        array = np.asarray(getattr(params.blocks[layer], name))
    padded = layer is None and any(
        row[:2] == (name, False) and row[2].axes[0] == "Vp" for row in rows(cfg)
    )
    return array[: cfg.vocab_size] if padded else array


def pad_vocab(array: np.ndarray, weight: Weight, cfg: Architecture) -> np.ndarray:
    """Pad a parameter that has one row per id with zero rows, up to the padded vocabulary."""
    if weight.axes[0] != "Vp":
        return array
    return np.pad(array, [(0, cfg.padded_vocab_size - len(array)), *[(0, 0)] * (array.ndim - 1)])
