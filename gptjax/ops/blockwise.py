"""Blockwise attention with an online softmax, as XLA loops.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691). No (T, T) array ever exists:
memory is linear in T, and blocks above the diagonal are skipped.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, Shaped

from gptjax.ops.dropout import dropout_bwd, dropout_fwd
from gptjax.ops.heads import heads_of_rows, rows_of_groups
from gptjax.xla.products import accumulation_dtype

BLOCK = 128  # most positions of queries, and of keys, in a block

Heads = Float[Array, "B T H D"]
KeyHeads = Float[Array, "B T K D"]
Blocks = Float[Array, "N B K R D"]  # N blocks of R rows, G for each position
KeyBlocks = Float[Array, "N B K S D"]


class BlockwiseSaved(NamedTuple):
    """What `blockwise_bwd` needs, in O(T) memory.

    The backward recomputes the probabilities from q, k and each row's lse.
    """

    q: Blocks
    k: KeyBlocks
    v: KeyBlocks
    o: Heads
    lse: Float[Array, "N B K R"]
    key: Key[Array, ""] | None
    segments: Int[Array, "N B S"] | None


def blockwise_fwd(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    segments: Int[Array, "B T"] | None = None,
    block_size: int | None = None,
) -> tuple[Heads, BlockwiseSaved]:
    """``o = dropout(softmax(q k^T / sqrt(D))) v``, causal, by blocks of queries and of keys.

    Online softmax: with running maximum m, sum z and unnormalised output a, the next block of
    scores s gives

        m' = max(m, max s)
        z' = z e^(m - m') + sum e^(s - m')
        a' = a e^(m - m') + dropout(e^(s - m')) v

    and at the end o = a / z, lse = m + log z. Dropout affects only a, since it acts on normalised
    probabilities.

    Derivation of the backward: with p = e^(s - lse) and r = dropout(p) as in the materialised form,

        dv = r^T do,   dp = (do v^T) through dropout,   ds = p (dp - delta)
        dq = ds k / sqrt(D),   dk = ds^T q / sqrt(D)

    where delta = sum_s dp p = sum_s dr r = do . o: one number per row replaces a sum over all keys.
    The G query heads that share a head of keys and values are rows, as in the materialised form.
    """
    (_, T, H, _), K, acc = q.shape, k.shape[2], accumulation_dtype(q)
    blocks = -(-T // (block_size or BLOCK))
    # Blocks of equal length need little padding.
    length = -(-T // blocks)
    q_blocks = _to_blocks(rows_of_groups(q, K), length * (H // K))
    k_blocks, v_blocks = _to_blocks(k, length), _to_blocks(v, length)
    segment_blocks = None
    if segments is not None:
        segment_blocks = _to_blocks(segments[..., None, None], length)[..., 0, :, 0]
    N, shape = len(q_blocks), q_blocks.shape[1:]
    numbers = jnp.arange(N, dtype=jnp.int32)

    def query_block(_: None, i_row: tuple[Any, ...]) -> tuple[None, tuple[Array, Array]]:
        i, qi, si = i_row

        def key_block(
            carry: tuple[Array, Array, Array], j_row: tuple[Any, ...]
        ) -> tuple[Any, None]:
            j, kj, vj, sj = j_row

            def visit(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                m, z, a = carry
                s = _scores(qi, kj, i, j, si, sj)
                m_new = jnp.maximum(m, s.max(-1))
                shrink = jnp.exp(m - m_new)
                p = jnp.exp(s - m_new[..., None])
                r, _ = dropout_fwd(p, rate, _block_key(key, i, j, N))
                av = jnp.einsum(
                    "bkrs,bksd->bkrd", r.astype(vj.dtype), vj, preferred_element_type=acc
                )
                return m_new, z * shrink + p.sum(-1), a * shrink[..., None] + av

            return lax.cond(j <= i, visit, lambda carry: carry, carry), None

        empty = (
            # Finite, because all scores of a row may be -inf in the first blocks, and inf - inf is
            # NaN.
            jnp.full(shape[:-1], jnp.finfo(acc).min, acc),
            jnp.zeros(shape[:-1], acc),
            jnp.zeros(shape, acc),
        )
        (m, z, a), _ = lax.scan(key_block, empty, (numbers, k_blocks, v_blocks, segment_blocks))
        return None, ((a / z[..., None]).astype(qi.dtype), m + jnp.log(z))

    _, (o, lse) = lax.scan(query_block, None, (numbers, q_blocks, segment_blocks))
    o = heads_of_rows(_from_blocks(o, T * (H // K)), H)
    return o, BlockwiseSaved(q_blocks, k_blocks, v_blocks, o, lse, key, segment_blocks)


def blockwise_bwd(
    saved: BlockwiseSaved, do: Heads, rate: float = 0.0
) -> tuple[Heads, KeyHeads, KeyHeads]:
    """(dq, dk, dv) of `blockwise_fwd`, looping over blocks of keys and, within, of queries."""
    q, k, v, o, lse, key, segments = saved
    (N, _, K, R, D), (_, T, H, _), acc = q.shape, do.shape, lse.dtype
    scale = 1 / math.sqrt(D)
    numbers = jnp.arange(N, dtype=jnp.int32)
    delta = (do.astype(acc) * o.astype(acc)).sum(-1, keepdims=True)
    dob, delta = (_to_blocks(rows_of_groups(x, K), R) for x in (do, delta))
    delta = delta[..., 0]

    def key_block(dq: Array, j_row: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
        j, kj, vj, sj = j_row

        def query_block(
            carry: tuple[Array, Array, Array], i_row: tuple[Any, ...]
        ) -> tuple[Any, None]:
            i, qi, doi, lsei, deltai, si = i_row

            def visit(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq, dkj, dvj = carry
                p = jnp.exp(_scores(qi, kj, i, j, si, sj) - lsei[..., None])
                r, keep = dropout_fwd(p, rate, _block_key(key, i, j, N))
                dr = jnp.einsum("bkrd,bksd->bkrs", doi, vj, preferred_element_type=acc)
                dp = dropout_bwd(keep, rate, dr)
                ds = (p * (dp - deltai[..., None]) * scale).astype(qi.dtype)
                dvj += jnp.einsum(
                    "bkrs,bkrd->bksd", r.astype(doi.dtype), doi, preferred_element_type=acc
                )
                dkj += jnp.einsum("bkrs,bkrd->bksd", ds, qi, preferred_element_type=acc)
                dq = dq.at[i].add(jnp.einsum("bkrs,bksd->bkrd", ds, kj, preferred_element_type=acc))
                return dq, dkj, dvj

            return lax.cond(j <= i, visit, lambda carry: carry, carry), None

        zeros = jnp.zeros(kj.shape, acc)
        (dq, dkj, dvj), _ = lax.scan(
            query_block, (dq, zeros, zeros), (numbers, q, dob, lse, delta, segments)
        )
        return dq, (dkj, dvj)

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros(q.shape, acc), (numbers, k, v, segments))
    dq = _from_blocks(dq.astype(do.dtype), T * (H // K))
    dk, dv = (_from_blocks(x.astype(do.dtype), T) for x in (dk, dv))
    return heads_of_rows(dq, H), dk, dv


def _scores(
    qi: Array, kj: Array, i: Array, j: Array, si: Array | None, sj: Array | None
) -> Float[Array, "B K R S"]:
    """Scaled scores of query block i against key block j; -inf for keys that come after the query
    or belong to another segment.
    """
    s = jnp.einsum(
        "bkrd,bksd->bkrs", qi, kj, preferred_element_type=accumulation_dtype(qi)
    ) / math.sqrt(qi.shape[-1])
    G = qi.shape[2] // kj.shape[2]
    query = i * kj.shape[2] + lax.broadcasted_iota(jnp.int32, s.shape, 2) // G
    column = j * kj.shape[2] + lax.broadcasted_iota(jnp.int32, s.shape, 3)
    visible = column <= query
    if si is not None and sj is not None:
        own = jnp.repeat(si, G, axis=1)[:, :, None] == sj[:, None, :]
        visible &= jnp.broadcast_to(own[:, None], s.shape)
    return jnp.where(visible, s, -jnp.inf)


def _block_key(key: Key[Array, ""] | None, i: Array, j: Array, N: int) -> Key[Array, ""] | None:
    """The dropout key of a pair of blocks, from which the backward redraws the mask."""
    return None if key is None else jax.random.fold_in(key, i * N + j)


def _to_blocks(x: Shaped[Array, "B T K D"], R: int) -> Shaped[Array, "N B K R D"]:
    """Cut the rows into N blocks of R, padding the last one with zeros.

    The causal mask hides the padding from all real rows.
    """
    B, T, K, D = x.shape
    N = -(-T // R)
    x = jnp.pad(x, ((0, 0), (0, N * R - T), (0, 0), (0, 0)))
    return x.reshape(B, N, R, K, D).transpose(1, 0, 3, 2, 4)


def _from_blocks(x: Shaped[Array, "N B K R D"], T: int) -> Shaped[Array, "B T K D"]:
    """Undo `_to_blocks`."""
    N, B, K, R, D = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, N * R, K, D)[:, :T]
