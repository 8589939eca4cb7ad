"""Blockwise attention with an online softmax, as XLA loops.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691). No (T, T) array ever exists:
memory is linear in T, and blocks above the diagonal are skipped.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from gptjax.ops.dropout import dropout_bwd, dropout_fwd
from gptjax.xla.products import accumulation_dtype

BLOCK = 128  # at most so many rows of queries, and of keys, in a block

Heads = Float[Array, "B T H D"]
Blocks = Float[Array, "N B H R D"]  # T cut into N blocks of R rows


class BlockwiseSaved(NamedTuple):
    """What `blockwise_bwd` needs, in O(T) memory.

    The backward recomputes the probabilities from q, k and each row's lse.
    """

    q: Blocks
    k: Blocks
    v: Blocks
    o: Heads
    lse: Float[Array, "N B H R"]
    key: Key[Array, ""] | None


def blockwise_fwd(
    q: Heads,
    k: Heads,
    v: Heads,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
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

    where delta = sum_s dp p = sum_s dr r = do . o: one number a row replaces a sum over all keys.
    """
    T, D = q.shape[1], q.shape[3]
    acc = accumulation_dtype(q)
    blocks = -(-T // (block_size or BLOCK))
    # Blocks of equal length need little padding.
    q_blocks, k_blocks, v_blocks = (_to_blocks(x, -(-T // blocks)) for x in (q, k, v))
    N, B, H, R, _ = q_blocks.shape

    def query_block(_: None, i_qi: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        i, qi = i_qi

        def key_block(
            carry: tuple[Array, Array, Array], j_kv: tuple[Array, Array, Array]
        ) -> tuple[Any, None]:
            j, kj, vj = j_kv

            def visit(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                m, z, a = carry
                s = _scores(qi, kj, i, j)
                m_new = jnp.maximum(m, s.max(-1))
                shrink = jnp.exp(m - m_new)
                p = jnp.exp(s - m_new[..., None])
                r, _ = dropout_fwd(p, rate, _block_key(key, i, j, N))
                av = jnp.einsum(
                    "bhrs,bhsd->bhrd", r.astype(vj.dtype), vj, preferred_element_type=acc
                )
                return m_new, z * shrink + p.sum(-1), a * shrink[..., None] + av

            return lax.cond(j <= i, visit, lambda carry: carry, carry), None

        empty = (
            jnp.full((B, H, R), -jnp.inf, acc),
            jnp.zeros((B, H, R), acc),
            jnp.zeros((B, H, R, D), acc),
        )
        (m, z, a), _ = lax.scan(
            key_block, empty, (jnp.arange(N, dtype=jnp.int32), k_blocks, v_blocks)
        )
        return None, ((a / z[..., None]).astype(qi.dtype), m + jnp.log(z))

    _, (o, lse) = lax.scan(query_block, None, (jnp.arange(N, dtype=jnp.int32), q_blocks))
    o = _from_blocks(o, T)
    return o, BlockwiseSaved(q_blocks, k_blocks, v_blocks, o, lse, key)


def blockwise_bwd(
    saved: BlockwiseSaved, do: Heads, rate: float = 0.0
) -> tuple[Heads, Heads, Heads]:
    """(dq, dk, dv) of `blockwise_fwd`, looping over blocks of keys and, within, of queries."""
    q, k, v, o, lse, key = saved
    N, acc, scale = q.shape[0], lse.dtype, 1 / math.sqrt(q.shape[4])
    dob = _to_blocks(do, q.shape[3])
    delta = _to_blocks((do.astype(acc) * o.astype(acc)).sum(-1, keepdims=True), q.shape[3])[..., 0]

    def key_block(dq: Array, j_kv: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        j, kj, vj = j_kv

        def query_block(
            carry: tuple[Array, Array, Array], i_row: tuple[Array, ...]
        ) -> tuple[Any, None]:
            i, qi, doi, lsei, deltai = i_row

            def visit(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq, dkj, dvj = carry
                p = jnp.exp(_scores(qi, kj, i, j) - lsei[..., None])
                r, keep = dropout_fwd(p, rate, _block_key(key, i, j, N))
                dr = jnp.einsum("bhrd,bhsd->bhrs", doi, vj, preferred_element_type=acc)
                dp = dropout_bwd(keep, rate, dr)
                ds = (p * (dp - deltai[..., None]) * scale).astype(qi.dtype)
                dvj += jnp.einsum(
                    "bhrs,bhrd->bhsd", r.astype(doi.dtype), doi, preferred_element_type=acc
                )
                dkj += jnp.einsum("bhrs,bhrd->bhsd", ds, qi, preferred_element_type=acc)
                dq = dq.at[i].add(jnp.einsum("bhrs,bhsd->bhrd", ds, kj, preferred_element_type=acc))
                return dq, dkj, dvj

            return lax.cond(j <= i, visit, lambda carry: carry, carry), None

        zeros = jnp.zeros(kj.shape, acc)
        (dq, dkj, dvj), _ = lax.scan(
            query_block, (dq, zeros, zeros), (jnp.arange(N, dtype=jnp.int32), q, dob, lse, delta)
        )
        return dq, (dkj, dvj)

    dq, (dk, dv) = lax.scan(
        key_block, jnp.zeros(q.shape, acc), (jnp.arange(N, dtype=jnp.int32), k, v)
    )
    dq, dk, dv = (_from_blocks(x.astype(do.dtype), do.shape[1]) for x in (dq, dk, dv))
    return dq, dk, dv


def _scores(qi: Array, kj: Array, i: Array, j: Array) -> Float[Array, "B H R S"]:
    """Scaled scores of query block i against key block j, -inf for keys after the query."""
    s = jnp.einsum(
        "bhrd,bhsd->bhrs", qi, kj, preferred_element_type=accumulation_dtype(qi)
    ) / math.sqrt(qi.shape[3])
    row = i * qi.shape[2] + lax.broadcasted_iota(jnp.int32, s.shape, 2)
    column = j * kj.shape[2] + lax.broadcasted_iota(jnp.int32, s.shape, 3)
    return jnp.where(column <= row, s, -jnp.inf)


def _block_key(key: Key[Array, ""] | None, i: Array, j: Array, N: int) -> Key[Array, ""] | None:
    """The dropout key of a pair of blocks, from which the backward redraws the mask."""
    return None if key is None else jax.random.fold_in(key, i * N + j)


def _to_blocks(x: Heads, R: int) -> Blocks:
    """(B, T, H, D) -> (N, B, H, R, D), zero rows filling the last block.

    Causality hides these rows from the real ones.
    """
    B, T, H, D = x.shape
    N = -(-T // R)
    x = jnp.pad(x, ((0, 0), (0, N * R - T), (0, 0), (0, 0)))
    return x.reshape(B, N, R, H, D).transpose(1, 0, 3, 2, 4)


def _from_blocks(x: Blocks, T: int) -> Heads:
    """(N, B, H, R, D) -> (B, T, H, D)."""
    N, B, H, R, D = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, N * R, H, D)[:, :T]
