"""GPT-2's 16 tensors: one table that drives shapes, initialisation, weight decay, counting and checkpoint validation.

Names and order are llm.c's. Linear weights are stored (in, out), as Hugging Face stores GPT-2.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from gptjax.models.config import GPT2Config
from gptjax.ops.random import normal

INIT_STD = 0.02
MATRICES = ("qkvw", "attprojw", "fcw", "fcprojw")  # of a block


class Params(NamedTuple):
    """All weights, or anything shaped like them (gradients, moments, a decay mask).

    A block's tensor is either one array stacked over the layers, (L, ...), for scanned layers, or a tuple of L arrays,
    for unrolled ones: `stack` and `unstack` convert. ``tensor[l]`` is layer l's in both.
    """

    wte: Any
    wpe: Any
    ln1w: Any
    ln1b: Any
    qkvw: Any
    qkvb: Any
    attprojw: Any
    attprojb: Any
    ln2w: Any
    ln2b: Any
    fcw: Any
    fcb: Any
    fcprojw: Any
    fcprojb: Any
    lnfw: Any
    lnfb: Any


class Block(NamedTuple):
    """One layer's weights, or their gradients."""

    ln1w: Any
    ln1b: Any
    qkvw: Any
    qkvb: Any
    attprojw: Any
    attprojb: Any
    ln2w: Any
    ln2b: Any
    fcw: Any
    fcb: Any
    fcprojw: Any
    fcprojb: Any


class Weight(NamedTuple):
    """One row of the table: the axes by name (see `axis_sizes`) and the initial distribution."""

    axes: tuple[str, ...]
    init: Literal["normal", "residual", "zeros", "ones"]


WEIGHTS = Params(
    wte=Weight(("Vp", "C"), "normal"),
    wpe=Weight(("Tmax", "C"), "normal"),
    ln1w=Weight(("L", "C"), "ones"),
    ln1b=Weight(("L", "C"), "zeros"),
    qkvw=Weight(("L", "CQ", "3C"), "normal"),
    qkvb=Weight(("L", "3C"), "zeros"),
    attprojw=Weight(("L", "HD", "C"), "residual"),
    attprojb=Weight(("L", "C"), "zeros"),
    ln2w=Weight(("L", "C"), "ones"),
    ln2b=Weight(("L", "C"), "zeros"),
    fcw=Weight(("L", "C", "F"), "normal"),
    fcb=Weight(("L", "F"), "zeros"),
    fcprojw=Weight(("L", "F", "C"), "residual"),
    fcprojb=Weight(("L", "C"), "zeros"),
    lnfw=Weight(("C",), "ones"),
    lnfb=Weight(("C",), "zeros"),
)


def axis_sizes(cfg: GPT2Config) -> dict[str, int]:
    """The size of each axis name in `WEIGHTS`."""
    C = cfg.channels
    return {
        "Vp": cfg.padded_vocab_size,
        "Tmax": cfg.max_seq_len,
        "L": cfg.num_layers,
        "C": C,
        "CQ": C,
        "HD": C,
        "3C": 3 * C,
        "F": 4 * C,
    }


def param_shapes(cfg: GPT2Config) -> Params:
    """The stacked shape of each tensor."""
    sizes = axis_sizes(cfg)
    return Params(*(tuple(sizes[axis] for axis in weight.axes) for weight in WEIGHTS))


def init_params(key: Key[Array, ""], cfg: GPT2Config, dtype: Any = jnp.float32) -> Params:
    """GPT-2's initialisation (Radford et al. 2019, section 2.3), in the layout that ``cfg.layers`` runs on.

    Weights and embeddings are N(0, 0.02^2), those of the two projections into the residual stream divided by
    sqrt(2 L); biases 0; LayerNorm gains 1. The vocabulary's pad rows are 0. The values do not depend on the layout.
    """

    def draw(index: int, weight: Weight, shape: tuple[int, ...]) -> Array:
        if weight.init in ("zeros", "ones"):
            return jnp.full(shape, float(weight.init == "ones"), dtype)
        std = INIT_STD / (math.sqrt(2 * cfg.num_layers) if weight.init == "residual" else 1)
        return std * normal(jax.random.fold_in(key, index), shape, dtype)

    params = Params(*(draw(i, *row) for i, row in enumerate(zip(WEIGHTS, param_shapes(cfg), strict=True))))
    params = params._replace(wte=params.wte.at[cfg.vocab_size :].set(0))
    return params if cfg.layers == "scan" else unstack(params)


def decay_mask(params: Params) -> Params:
    """True for each tensor that weight decay applies to: a layer's 2-D ones and the embeddings, as in llm.c and nanoGPT."""
    decays = (len([axis for axis in weight.axes if axis != "L"]) >= 2 for weight in WEIGHTS)
    return Params(*(jax.tree.map(lambda _, d=d: d, tensor) for d, tensor in zip(decays, params, strict=True)))


def num_params(cfg: GPT2Config) -> int:
    """Parameters that a token can use: everything but the vocabulary's pad rows."""
    return sum(map(math.prod, param_shapes(cfg))) - (cfg.padded_vocab_size - cfg.vocab_size) * cfg.channels


def num_matrix_params(cfg: GPT2Config) -> int:
    """Parameters that a token is multiplied with: of the blocks' matrices and the classifier, its padding included."""
    shapes = param_shapes(cfg)
    return math.prod(shapes.wte) + sum(math.prod(getattr(shapes, name)) for name in MATRICES)


def flops_per_token(cfg: GPT2Config, seq_len: int) -> int:
    """FLOPs of forward and backward a token: 6 N + 12 L C T (llm.c's and PaLM's convention; N includes padding)."""
    return 6 * sum(map(math.prod, param_shapes(cfg))) + 12 * cfg.num_layers * cfg.channels * seq_len


def split_layers(params: Params) -> Any:
    """The blocks' tensors, layer by layer: L `Block`s from unrolled tensors, one stacked `Block` from stacked ones."""
    blocks = Block(*(getattr(params, name) for name in Block._fields))
    return [Block(*tensors) for tensors in zip(*blocks, strict=True)] if isinstance(blocks.ln1w, tuple) else blocks


def join_layers(blocks: Any) -> Block:
    """`split_layers` undone: one `Block` whose tensors hold all layers."""
    return blocks if isinstance(blocks, Block) else Block(*zip(*blocks, strict=True))


def stack(params: Params) -> Params:
    """Block tensors as (L, ...) arrays: the layout for scanned layers and for files."""
    return params._replace(**{n: jnp.stack(t) for n, t in params._asdict().items() if isinstance(t, tuple)})


def unstack(params: Params) -> Params:
    """Block tensors as tuples of L arrays: the layout for unrolled layers, where no gradient is copied into a stack."""
    return params._replace(**{n: tuple(t) for n, t in params._asdict().items() if n in Block._fields})
