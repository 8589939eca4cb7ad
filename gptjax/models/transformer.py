"""The network for any family: the forward, and its hand-derived backward.

`loss` is the plain forward; differentiating it with JAX gives the reference. `loss_and_grad` is the
backward written out. `loss_manual` binds the two: ``jax.grad(loss_manual)`` runs the hand-written
backward, and no other `jax.grad` does.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.models.batch import Batch, Ids, checked_batch, checked_ids
from gptjax.models.chunks import join_chunks, row_chunks, sum_of_shares, total
from gptjax.models.family import RECOMPUTED, family_of
from gptjax.models.layers import classifier_fwd, dropout_bwd, dropout_fwd
from gptjax.models.params import head_of, is_weight, weight_table
from gptjax.ops import (
    IGNORE_INDEX,
    attention,
    attention_bwd,
    attention_fwd,
    cross_entropy_bwd,
    cross_entropy_fwd,
)
from gptjax.parallel.sharding import compute_layout, num_shards, param_layout
from gptjax.xla.backend import platform_name
from gptjax.xla.barrier import barrier, chunk_barrier
from gptjax.xla.products import contract

# --- One block, and the stack of blocks under each recompute setting ---


def training_block(
    attend: Any,
    w: Any,
    x: Float[Array, "B T C"],
    positions: Any,
    cfg: ModelConfig,
    key: Key[Array, ""] | None,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Any]:
    """The family's block, attending to its own sequence.

    ``attend`` is `attention_fwd` or `attention`; ``key`` turns dropout on.
    """
    att_key, key = (None, None) if key is None else jax.random.split(key)
    attend = partial(attend, cfg.attention, rate=cfg.dropout, key=att_key, segments=segments)
    return family_of(cfg).block_fwd(to_compute(w, cfg), x, positions, cfg, attend, key)


def blocks_fwd(
    blocks: Any,
    x: Float[Array, "B T C"],
    positions: Any,
    cfg: ModelConfig,
    keys: Key[Array, " L"] | None,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Any]:
    """All layers, first to last. Saved: per layer, what ``cfg.recompute`` does not recompute."""

    def body(x: Array, w_key: tuple[Any, Any]) -> tuple[Array, Any]:
        w, key = w_key
        y, saved = training_block(attention_fwd, w, x, positions, cfg, key, segments)
        if cfg.recompute == "block":
            return y, x
        return y, family_of(cfg).discard(saved) if cfg.recompute == "gelu" else saved

    return over_layers(body, x, (blocks, keys), cfg)


def blocks_bwd(
    blocks: Any,
    saved: Any,
    dx: Float[Array, "B T C"],
    positions: Any,
    cfg: ModelConfig,
    keys: Key[Array, " L"] | None,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Any]:
    """(dx, dblocks) of `blocks_fwd`, from the last layer to the first."""
    family = family_of(cfg)

    def body(dx: Array, w_key_saved: tuple[Any, Any, Any]) -> tuple[Array, Any]:
        w, key, saved = w_key_saved
        # Without this layout, a scan over layers may carry dx sharded along channels.
        dx = compute_layout(dx, "B", None, None)
        if cfg.recompute == "block":
            _, saved = training_block(
                attention_fwd, w, barrier(dx, saved), positions, cfg, key, segments
            )
        elif cfg.recompute == "gelu":
            saved = family.recompute(saved, dx, cfg)
        # Gather again instead of keeping the forward's gathered weights until now.
        if num_shards("fsdp") > 1:
            w = jax.tree.map(partial(barrier, dx), w)
        attend_bwd = partial(attention_bwd, cfg.attention, rate=cfg.dropout)
        dx, dw = family.block_bwd(to_compute(w, cfg), saved, dx, positions, cfg, attend_bwd)
        return dx, to_params(dw, w, cfg)

    return over_layers(body, dx, (blocks, keys, saved), cfg, reverse=True)


def over_layers(
    body: Any, carry: Any, xs: Any, cfg: ModelConfig, reverse: bool = False
) -> tuple[Any, Any]:
    """`jax.lax.scan` of ``body`` over the layers, or the same loop unrolled.

    Each entry of the tuple ``xs`` is None or holds one value per layer: stacked when scanned, in a
    sequence when unrolled.
    """
    if cfg.layers == "scan":
        return lax.scan(body, carry, xs, reverse=reverse)
    ys: list[Any] = [None] * cfg.num_layers
    for i in reversed(range(cfg.num_layers)) if reverse else range(cfg.num_layers):
        carry, ys[i] = body(carry, tuple(None if x is None else x[i] for x in xs))
    return carry, tuple(ys)


def to_compute(w: Any, cfg: ModelConfig) -> Any:
    """A block's weights for computing: on a mesh, gathered over fsdp, matrices in compute dtype."""
    if num_shards() == 1:
        return w
    table = weight_table(cfg, layered=False).blocks

    def gather(weight: Any, x: Array) -> Array:
        x = x.astype(cfg.compute_dtype) if weight.kind == "matrix" else x
        return compute_layout(x, *weight.axes)

    return jax.tree.map(gather, table, w, is_leaf=is_weight)


def to_params(dw: Any, w: Any, cfg: ModelConfig) -> Any:
    """A block's gradient in its weights' dtype and, on a mesh, their layout, scattered over
    fsdp.
    """
    dw = jax.tree.map(lambda dw, w: dw.astype(w.dtype), dw, w)
    if num_shards() == 1:
        return dw
    table = weight_table(cfg, layered=False).blocks

    def scatter(weight: Any, x: Array) -> Array:
        if weight.kind != "matrix":
            return param_layout(x, *weight.axes)
        # Flat, because XLA's TPU compiler does not make a reduce-scatter of a sum with more axes.
        inputs, outputs = weight.axes[0], weight.axes[weight.inputs]
        flat = x.reshape(math.prod(x.shape[: weight.inputs]), -1)
        return param_layout(flat, inputs, outputs).reshape(x.shape)

    return jax.tree.map(scatter, table, dw, is_leaf=is_weight)


# --- The network ---


def resolved(cfg: ModelConfig, batch: Batch) -> ModelConfig:
    """The configuration with every ``auto`` resolved, here and for this batch's length."""
    if "auto" not in (cfg.dtype, cfg.attention):
        return cfg
    return cfg.resolve(platform_name(), batch.inputs.shape[1], batch.segments is not None)


def split_key(key: Key[Array, ""] | None, cfg: ModelConfig) -> tuple[Any, Any]:
    """Dropout keys of the embedding and of each layer, or None without dropout."""
    if key is None or not (cfg.dropout or cfg.dropout_mlp):
        return None, None
    key, block_key = jax.random.split(key)
    return key, jax.random.split(block_key, cfg.num_layers)


def embed_fwd(
    params: Any, inputs: Int[Array, "B T"], positions: Int[Array, "*B T"], cfg: ModelConfig
) -> Array:
    """The family's embedding.

    On a mesh, each device looks up its share of the channels for the rows of all fsdp devices, in
    the compute dtype; an all-to-all then exchanges rows and channels. By default XLA keeps the
    activations sharded along channels, which sends up to 3.5 times as many bytes.
    """
    x = family_of(cfg).embed_fwd(params, param_layout(inputs, "B", None), positions, cfg)
    return compute_layout(param_layout(x, "B", None, "C"), "B", None, None)


def embed_bwd(
    params: Any,
    inputs: Int[Array, "B T"],
    positions: Int[Array, "*B T"],
    dhead: Float[Array, "*N Vp C"],
    dx: Float[Array, "B T C"],
    cfg: ModelConfig,
) -> dict[str, Array]:
    """Gradients of the family's tables by name; `embed_fwd`'s layouts in reverse.

    On a mesh ``dhead`` has a term for each shard over data. The shard's rows add to it, so that the
    sum over data is one for both uses of a tied table.
    """
    dx = param_layout(compute_layout(dx, "B", None, None), "B", None, "C")
    inputs = param_layout(inputs, "B", None)
    tables = family_of(cfg).embed_bwd
    if dhead.ndim == 2:
        return tables(params, inputs, positions, dhead, dx)
    split = lambda rows: rows.reshape(len(dhead), -1, *rows.shape[1:])  # noqa: E731
    packed = positions.ndim == 2
    terms = jax.vmap(tables, (None, 0, 0 if packed else None, 0, 0))(
        params, split(inputs), split(positions) if packed else positions, dhead, split(dx)
    )
    return {name: shards.sum(0) for name, shards in terms.items()}


def positions_of(
    inputs: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None
) -> Int[Array, "*B T"]:
    """Positions 0, 1, 2... of the tokens, (T); with segments (B, T), from 0 in each segment."""
    place = jnp.arange(inputs.shape[1], dtype=jnp.int32)
    if segments is None:
        return place
    place = jnp.broadcast_to(place, segments.shape)
    starts = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return place - lax.cummax(jnp.where(starts, place, 0), axis=1)


def hidden(
    params: Any,
    inputs: Ids,
    cfg: ModelConfig,
    key: Key[Array, ""] | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> Array:
    """(B, T) ids -> (B, T, C) output of the final norm: the plain forward up to the classifier."""
    inputs = checked_ids("inputs", inputs, cfg)
    family, positions = family_of(cfg), positions_of(inputs, segments)
    key, keys = split_key(key, cfg)
    x = embed_fwd(params, inputs, positions, cfg)
    x, _ = dropout_fwd(x, cfg.dropout, key)

    def body(x: Array, w_key: tuple[Any, Any]) -> tuple[Array, None]:
        w, key = w_key
        return training_block(attention, w, x, positions, cfg, key, segments)[0], None

    if cfg.recompute == "block":
        body = jax.checkpoint(body)
    elif cfg.recompute == "gelu":
        body = jax.checkpoint(
            body, policy=jax.checkpoint_policies.save_anything_except_these_names(RECOMPUTED)
        )
    x, _ = over_layers(body, x, (params.blocks, keys), cfg)
    return family.norm_fwd(params, x, cfg)[0]


def logits(params: Any, inputs: Ids, cfg: ModelConfig) -> Float[Array, "B T V"]:
    """(B, T) ids -> (B, T, V) scores of the next token, without dropout."""
    cfg = resolved(cfg, Batch(inputs, None))
    head = head_of(params, cfg)
    return hidden(params, inputs, cfg) @ head[: cfg.vocab_size].T.astype(cfg.compute_dtype)


def loss(
    params: Any,
    batch: Batch,
    cfg: ModelConfig,
    key: Key[Array, ""] | None = None,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy of the targets in nats: the plain forward, free of custom derivatives.

    Args:
        params: in the layout of ``cfg.layers``.
        batch: ids below ``cfg.vocab_size``, at most ``cfg.max_seq_len`` long.
        cfg: static under jit; what is ``auto`` in it is resolved here.
        key: turns dropout on.
        count: divides the summed loss instead of this batch's number of targets; see
            `gptjax.ops.target_weights`.

    Raises:
        ValueError: `checked_batch` rejects the batch, for example because a sequence is too long.

    """
    batch = checked_batch(batch, cfg)
    cfg = resolved(cfg, batch)
    x = hidden(params, batch.inputs, cfg, key, batch.segments)
    w = gathered_head(head_of(params, cfg), x)

    def chunk_loss(x: Array, targets: Array, weights: Array) -> Array:
        return cross_entropy_fwd(contract("nc,vc->nv", x, w), targets, weights, cfg.vocab_size)[0]

    chunks = row_chunks(x, batch.targets, batch.mask, cfg, count)
    if len(chunks) > 1:
        chunk_loss = jax.checkpoint(chunk_loss)
    losses = [chunk_loss(*chunk) for chunk in chunks]
    return sum(losses[1:], losses[0])


def loss_and_grad(
    params: Any,
    batch: Batch,
    cfg: ModelConfig,
    key: Key[Array, ""] | None = None,
    count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Any]:
    """`loss` and its gradient by the hand-derived backward; arguments as in `loss`."""
    batch = checked_batch(batch, cfg)
    cfg = resolved(cfg, batch)
    family, positions = family_of(cfg), positions_of(batch.inputs, batch.segments)
    key, keys = split_key(key, cfg)

    x = embed_fwd(params, batch.inputs, positions, cfg)
    x, drop = dropout_fwd(x, cfg.dropout, key)
    x, saved = blocks_fwd(params.blocks, x, positions, cfg, keys, batch.segments)
    h, norm = family.norm_fwd(params, x, cfg)

    value, dh, dhead = classifier_and_grad(head_of(params, cfg), h, batch, cfg, count)

    dx, dnorm = family.norm_bwd(params, norm, dh)
    dx, dblocks = blocks_bwd(params.blocks, saved, dx, positions, cfg, keys, batch.segments)
    dx = dropout_bwd(drop, cfg.dropout, dx)
    dembed = embed_bwd(params, batch.inputs, positions, dhead, dx, cfg)
    grads = family.Params(**dembed, **dnorm, blocks=dblocks)
    return value, jax.tree.map(lambda g, w: g.astype(w.dtype), grads, params)


def gathered_head(head: Float[Array, "Vp C"], h: Array) -> Float[Array, "Vp C"]:
    """The classifier's matrix in h's dtype, gathered over fsdp in that dtype."""
    return compute_layout(param_layout(head.astype(h.dtype), "Vp", "C"), "Vp", "C")


def classifier_and_grad(
    head: Float[Array, "Vp C"], h: Float[Array, "B T C"], batch: Batch, cfg: ModelConfig, count: Any
) -> tuple[Float[Array, ""], Float[Array, "B T C"], Float[Array, "*N Vp C"]]:
    """(loss, dh, dhead) of the classifier ``scores = h head^T`` and the cross-entropy; dhead as in
    `gptjax.models.chunks.total`.

    The backward of a chunk of rows directly follows its forward, so only one chunk's scores are in
    memory at a time.
    """
    value: list[Array] = []
    dh: list[Array] = []
    dhead: Any = None
    w = gathered_head(head, h)
    for x, targets, weights in row_chunks(h, batch.targets, batch.mask, cfg, count):
        scores = contract("nc,vc->nv", chunk_barrier((dh[-1], dhead), x) if dh else x, w)
        nll, saved = cross_entropy_fwd(scores, targets, weights, cfg.vocab_size)
        dscores = cross_entropy_bwd(saved, cfg.vocab_size)
        dh.append(contract("nv,vc->nc", dscores, w))
        dw = sum_of_shares(
            lambda dscores, x: jnp.einsum(
                "nv,nc->vc", dscores, x, preferred_element_type=head.dtype
            ),
            dscores,
            x,
        )
        dhead = dw if dhead is None else dhead + dw
        value.append(nll)
    return sum(value[1:], value[0]), join_chunks(dh, h), total(dhead)


def token_losses(params: Any, batch: Batch, cfg: ModelConfig) -> Float[Array, "B T"]:
    """-log p of each target in nats, without dropout; 0 at `IGNORE_INDEX`. Their mean is `loss`.

    The mask is ignored. The scores of only one sequence are in memory at a time. Arguments as in
    `loss`; parameters may be stored for decoding.
    """
    batch = checked_batch(batch, cfg)
    cfg = resolved(cfg, batch)
    x = hidden(params, batch.inputs, cfg, segments=batch.segments)

    def one_token(scores: Array, target: Array) -> Array:
        return cross_entropy_fwd(
            scores[None], target[None], jnp.ones(1, scores.dtype), cfg.vocab_size
        )[0]

    def one_sequence(x_targets: tuple[Array, Array]) -> Array:
        x, targets = x_targets
        losses = jax.vmap(one_token)(classifier_fwd(x, head_of(params, cfg)), targets)
        return jnp.where(targets == IGNORE_INDEX, jnp.zeros((), losses.dtype), losses)

    return lax.map(one_sequence, (x, batch.targets))


# --- The binding ---


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def loss_manual(
    params: Any,
    batch: Batch,
    cfg: ModelConfig,
    key: Key[Array, ""] | None = None,
    count: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """`loss`, whose derivative under `jax.grad` is `loss_and_grad`'s."""
    return loss(params, batch, cfg, key, count)


loss_manual.defvjp(
    lambda params, batch, cfg, key=None, count=None: loss_and_grad(params, batch, cfg, key, count),
    lambda cfg, grads, dloss: (
        jax.tree.map(lambda g: g * dloss.astype(g.dtype), grads),
        None,
        None,
        None,
    ),
)
