"""Drafts of the next tokens from the text so far: what followed the same few tokens before
(Saxena 2023, prompt lookup decoding).

A draft is read in one pass over the weights, and the tokens that the model would have drawn anyway
are kept. The pass takes longer than that of a single token, so drafts have a budget. By the prices
below they waste the time of one failure, and 2% of that of the tokens drawn, at most.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

DRAFT = 3  # tokens; with the newest one, as many rows as a kernel multiplies at a time
NARROW_PRICE, WIDE_PRICE = 1.7, 2.7
"""The time of reading a draft as a multiple of a single token's.

Measured with SmolLM2 on 2 cores with AVX2, 2026-11-30: 1.3 to 1.7 with weights of up to 16 bits,
2.2 to 2.6 in float32.
"""
SHARE, MOST = 0.02, 4.0  # of the budget: for each token, and at most


class Lookup(NamedTuple):
    """The text of one row by slot of the cache, and a draft of how it goes on."""

    seen: Int[Array, " S"]
    """Tokens up to the newest; there is room for a draft and a token behind the last slot."""
    draft: Int[Array, " N"]
    known: Int[Array, ""]
    """How many tokens of the draft there are: 0 if the budget does not allow it."""
    budget: Float[Array, ""]
    """What drafts may waste from here on, as a multiple of the time of a token."""
    price: Float[Array, ""]
    """See `price_of`."""


def price_of(params: Any) -> float:
    """The time of reading a draft with these weights, as a multiple of a single token's."""
    largest = max(jax.tree.leaves(params), key=lambda x: x.size)
    return NARROW_PRICE if largest.dtype.itemsize < 4 else WIDE_PRICE


def start(
    ids: Int[Array, " P"],
    slot: Int[Array, ""],
    begin: Int[Array, ""],
    token: Int[Array, ""],
    slots: int,
    price: Any,
    budget: Any,
) -> Lookup:
    """The look-up after a prompt, ``ids[begin:slot]``, and a first token.

    ``budget`` is what an earlier look-up left, or ``price - 1``, which one failure wastes.
    """
    zero = jnp.int32(0)
    seen = jnp.zeros(slots + DRAFT + 1, jnp.int32)
    seen = lax.dynamic_update_slice(seen, ids.astype(jnp.int32), (zero,))
    draft = jnp.zeros(DRAFT, jnp.int32)
    empty = Lookup(seen, draft, zero, jnp.float32(budget), jnp.float32(price))
    return after(empty, token[None], jnp.int32(1), begin, slot - 1)


def after(
    old: Lookup,
    tokens: Int[Array, " T"],
    made: Int[Array, ""],
    begin: Int[Array, ""],
    slot: Int[Array, ""],
    tried: bool = False,
) -> Lookup:
    """The look-up after ``made`` of the tokens were drawn, the first in the slot after ``slot``;
    if the draft was ``tried``, all in one pass.
    """
    seen = lax.dynamic_update_slice(old.seen, tokens, (slot + 1,))
    budget = old.budget + SHARE * made.astype(jnp.float32)
    if tried:
        budget += made.astype(jnp.float32) - old.price
    budget = jnp.minimum(budget, MOST)
    draft, known = find(seen, begin, slot + made)
    known = jnp.where(budget < old.price - 1, 0, known)
    return Lookup(seen, draft, known, budget, old.price)


def find(
    seen: Int[Array, " S"], begin: Int[Array, ""], slot: Int[Array, ""]
) -> tuple[Int[Array, " N"], Int[Array, ""]]:
    """(the tokens that may follow ``seen[slot]``, how many of them are known).

    They are those after the last earlier place with the same three tokens, or else the same two.
    """
    place = jnp.arange(len(seen), dtype=jnp.int32)

    def same(back: int) -> Bool[Array, " S"]:
        return (jnp.roll(seen, back) == seen[slot - back]) & (place - back >= begin)

    two = same(0) & same(1) & (place < slot)
    rank = place + jnp.where(same(2), len(seen), 0).astype(jnp.int32)
    best = jnp.where(two, rank, -1).max()
    found = best % len(seen)
    known = jnp.where(best < 0, 0, jnp.minimum(slot - found, DRAFT)).astype(jnp.int32)
    return lax.dynamic_slice(seen, (found + 1,), (DRAFT,)), known
