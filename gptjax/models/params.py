"""Parameters from a family's weight table: shapes, initial values, decay, counts, layer layout."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from gptjax.config import Architecture
from gptjax.errors import ConfigError
from gptjax.models.family import Weight, check_options, family_of
from gptjax.xla.random import normal

INIT_STD = 0.02


def is_weight(x: Any) -> bool:
    """True if x is a row of a weight table, a leaf for `jax.tree.map`."""
    return isinstance(x, Weight)


def weight_table(cfg: Architecture, layered: bool = True) -> Any:
    """The family's table of `Weight`.

    Args:
        cfg: the model.
        layered: prepend L to the blocks' axes, as in stacked parameters, instead of returning
            those of a single layer.

    Raises:
        ConfigError: the vocabulary size is not known yet, or an option does not apply to the
            family.

    """
    if not cfg.vocab_size:
        raise ConfigError(
            "model.vocab_size is not known yet: give it, "
            "or take the tokenizer's with ModelConfig.with_vocabulary"
        )
    check_options(cfg)
    table = family_of(cfg).weights(cfg)
    if not layered:
        return table
    stacked = jax.tree.map(
        lambda w: w._replace(axes=("L", *w.axes)), table.blocks, is_leaf=is_weight
    )
    return table._replace(blocks=stacked)


def param_axes(cfg: Any) -> Any:
    """The logical axes of each tensor, in the layout of ``cfg.layers``."""
    table = weight_table(cfg, layered=cfg.layers == "scan")
    axes = jax.tree.map(lambda w: w.axes, table, is_leaf=is_weight)
    return axes if cfg.layers == "scan" else axes._replace(blocks=(axes.blocks,) * cfg.num_layers)


def param_shapes(cfg: Architecture, layered: bool = True) -> Any:
    """The shape of each tensor, in the structure of `weight_table`."""
    sizes = cfg.axis_sizes
    return jax.tree.map(
        lambda w: tuple(sizes[axis] for axis in w.axes),
        weight_table(cfg, layered),
        is_leaf=is_weight,
    )


def rows(cfg: Architecture) -> list[tuple[str, bool, Weight, tuple[int, ...]]]:
    """(name, whether each layer has one, `Weight`, shape in one layer) of each tensor, in order."""
    table, shapes = weight_table(cfg, layered=False), param_shapes(cfg, layered=False)
    found = []
    for name, weight, shape in zip(table._fields, table, shapes, strict=True):
        if name == "blocks":
            found += [
                (n, True, *row) for n, *row in zip(weight._fields, weight, shape, strict=True)
            ]
        elif weight is not None:
            found.append((name, False, weight, shape))
    return found


def init_params(key: Key[Array, ""], cfg: Any, dtype: Any = jnp.float32) -> Any:
    """Initial parameters (Radford et al. 2019, section 2.3), in the layout of ``cfg.layers``.

    Weights and embeddings are N(0, 0.02^2); projections into the residual stream are divided by
    sqrt(2 L). Biases are 0, gains 1, and the vocabulary's pad rows 0. The values do not depend on
    the layout.
    """
    table: Any = weight_table(cfg)
    structure: Any = jax.tree.structure(table, is_leaf=is_weight)
    weights, shapes = (
        jax.tree.leaves(table, is_leaf=is_weight),
        structure.flatten_up_to(param_shapes(cfg)),
    )

    def draw(index: int, weight: Weight, shape: tuple[int, ...]) -> Array:
        if weight.init in ("zeros", "ones"):
            return jnp.full(shape, float(weight.init == "ones"), dtype)
        std = INIT_STD / (math.sqrt(2 * cfg.num_layers) if weight.init == "residual" else 1)
        x = std * normal(jax.random.fold_in(key, index), shape, dtype)
        return x.at[cfg.vocab_size :].set(0) if weight.axes[0] == "Vp" else x

    params = structure.unflatten(
        [draw(i, *row) for i, row in enumerate(zip(weights, shapes, strict=True))]
    )
    return params if cfg.layers == "scan" else unstack(params, cfg.num_layers)


def decay_mask(params: Any, cfg: Architecture) -> Any:
    """True for tensors with weight decay: matrices and tables, as in llm.c and nanoGPT."""
    return per_tensor(lambda weight: weight.kind != "vector", params, cfg)


def per_tensor(f: Any, params: Any, cfg: Architecture) -> Any:
    """``f(weight)`` for each tensor, in the structure of ``params`` (stacked layers or not)."""
    table = weight_table(cfg, layered=False)
    values = jax.tree.map(f, table, is_leaf=is_weight)
    return (
        values
        if is_stacked(params.blocks)
        else values._replace(blocks=(values.blocks,) * cfg.num_layers)
    )


def num_params(cfg: Architecture) -> int:
    """The number of parameters, without the vocabulary's pad rows."""
    return num_padded_params(cfg) - sum(
        (cfg.padded_vocab_size - cfg.vocab_size) * math.prod(shape[1:])
        for _, _, weight, shape in rows(cfg)
        if weight.axes[0] == "Vp"
    )


def num_padded_params(cfg: Architecture) -> int:
    """The number of parameters, including the vocabulary's pad rows."""
    return sum(
        math.prod(shape) * (cfg.num_layers if layered else 1) for _, layered, _, shape in rows(cfg)
    )


def num_block_params(cfg: Architecture) -> int:
    """The number of parameters in the matrices of all blocks."""
    return cfg.num_layers * sum(
        math.prod(shape)
        for _, layered, weight, shape in rows(cfg)
        if layered and weight.kind == "matrix"
    )


def num_matrix_params(cfg: Architecture) -> int:
    """The number of parameters in the blocks' matrices and the padded classifier."""
    return num_block_params(cfg) + cfg.padded_vocab_size * cfg.channels


def num_untied_params(cfg: Architecture) -> int:
    """The number of parameters in a padded embedding that is not the classifier, too.

    A lookup reads a row of it for each token, and multiplies none.
    """
    head = family_of(cfg).head_name(cfg)
    return sum(
        math.prod(shape)
        for name, _, weight, shape in rows(cfg)
        if weight.axes[0] == "Vp" and name != head
    )


def flops_per_token(cfg: Architecture, seq_len: int) -> int:
    """FLOPs of forward and backward per token: 6 N + 12 L C T.

    This is llm.c's and PaLM's convention; N includes padding, and leaves an untied embedding out.
    """
    multiplied = num_padded_params(cfg) - num_untied_params(cfg)
    return 6 * multiplied + 12 * cfg.num_layers * cfg.channels * seq_len


def head_of(params: Any, cfg: Architecture) -> Any:
    """The classifier's matrix, (Vp, C)."""
    return getattr(params, family_of(cfg).head_name(cfg))


def tensor_at(path: Any) -> tuple[str, int | None]:
    """(name, layer) of the tensor at a `jax.tree_util` path.

    The layer is None outside the blocks and for stacked layers.
    """
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    layers = [key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)]
    return names[-1], layers[-1] if layers else None


def is_stacked(blocks: Any) -> bool:
    """True if the layers are stacked in the arrays of a single block."""
    return hasattr(blocks, "_fields")


def stack(params: Any) -> Any:
    """Stack the blocks into (L, ...) arrays, the layout for scanned layers."""
    if is_stacked(params.blocks):
        return params
    return params._replace(blocks=jax.tree.map(lambda *layers: jnp.stack(layers), *params.blocks))


def unstack(params: Any, num_layers: int | None = None) -> Any:
    """Split the blocks into a tuple of L, the layout for unrolled layers.

    It saves copying each layer's gradient into a stack.
    """
    if not is_stacked(params.blocks):
        return params
    L = num_layers or len(jax.tree.leaves(params.blocks)[0])
    return params._replace(
        blocks=tuple(jax.tree.map(lambda x, i=i: x[i], params.blocks) for i in range(L))
    )
