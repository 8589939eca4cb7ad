"""Drafts of the next tokens from the text so far: what followed the same few tokens before
(Saxena 2023, prompt lookup decoding).

A draft costs one pass over the weights, as a single token does, and the tokens that the model would
have drawn anyway are kept. After drafts of which no token was right there is a pause, twice as long
each time.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

DRAFT = 3  # tokens; with the newest one, as many rows as a kernel multiplies at a time
MOST_FAILURES = 6  # that lengthen the pause: up to 2^6 tokens


class Lookup(NamedTuple):
    """The text of one row by slot of the cache, and a draft of how it goes on."""

    seen: Int[Array, " S"]
    """Tokens up to the newest; there is room for a draft and a token behind the last slot."""
    draft: Int[Array, " N"]
    known: Int[Array, ""]
    """How many tokens of the draft there are: 0 in a pause."""
    failures: Int[Array, ""]
    """Drafts in a row of which no token was right."""
    pause: Int[Array, ""]
    """Tokens until the next draft."""


def start(
    ids: Int[Array, " P"],
    slot: Int[Array, ""],
    begin: Int[Array, ""],
    token: Int[Array, ""],
    slots: int,
) -> Lookup:
    """The look-up after a prompt, ``ids[begin:slot]``, and a first token."""
    zero = jnp.int32(0)
    seen = jnp.zeros(slots + DRAFT + 1, jnp.int32)
    seen = lax.dynamic_update_slice(seen, ids.astype(jnp.int32), (zero,))
    empty = Lookup(seen, jnp.zeros(DRAFT, jnp.int32), zero, zero, zero)
    return after(empty, token[None], jnp.int32(1), begin, slot - 1)


def after(
    old: Lookup,
    tokens: Int[Array, " T"],
    made: Int[Array, ""],
    begin: Int[Array, ""],
    slot: Int[Array, ""],
    right: Int[Array, ""] | None = None,
) -> Lookup:
    """The look-up after ``made`` of the tokens were drawn, the first in the slot after ``slot``.

    ``right`` is how many tokens of the draft were right, if it was tried.
    """
    seen = lax.dynamic_update_slice(old.seen, tokens, (slot + 1,))
    failures, pause = old.failures, jnp.maximum(old.pause - 1, 0)
    if right is not None:
        failures = jnp.where(right > 0, 0, jnp.minimum(failures + 1, MOST_FAILURES))
        pause = jnp.where(right > 0, 0, jnp.left_shift(1, failures)).astype(jnp.int32)
    draft, known = find(seen, begin, slot + made)
    return Lookup(seen, draft, jnp.where(pause > 0, 0, known), failures, pause)


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
