"""A text that is continued repeatedly, such as a conversation, without reading it again."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gptjax.generate import lookup
from gptjax.generate.engine import (
    CHUNK,
    Decoding,
    Drawn,
    Rules,
    advance,
    draw_next,
    finite,
    row_keys,
)
from gptjax.models.decode import empty_cache, extend, with_slots
from gptjax.xla.lasting_jit import LastingJit

# Tokens are read in blocks of these sizes, so that few programs are compiled
LARGE_BLOCK, SMALL_BLOCK = 256, 32
LEAST_SLOTS = 1024  # slots of a new cache, which doubles when it is full


class Session:
    """The keys and values of the text read so far.

    Texts are continued as if read from the start, but a prefix that is in the cache is not read
    again.
    """

    def __init__(self, params: Any, rules: Rules) -> None:
        """Start with an empty cache; see `gptjax.generate.engine.generate` for the arguments."""
        self.params, self.rules = params, rules
        self.ids: list[int] = []
        """The ids whose keys and values are in the cache, one for each slot."""
        self._cache: Any = None
        self._budget = np.asarray(lookup.price_of(params) - 1, np.float32)  # of drafts

    def continued(
        self, ids: Sequence[int], key: Any, new_tokens: int, chunk: int = CHUNK
    ) -> Iterator[Drawn]:
        """Continue a text, a few tokens at a time, until one of the rules' ends is drawn, the
        context is full or there are ``new_tokens``.

        Args:
            ids: the text, with at least one id and at most the model's context.
            key: gives the same tokens as for the first row of `gptjax.generate.engine.generate`.
            new_tokens: the most tokens to draw.
            chunk: the most tokens to draw at a time, up to `CHUNK`.

        Raises:
            ValueError: there is no id, or too many.
            CheckpointError: the model's probabilities are not finite.

        """
        context = self.rules.cfg.max_seq_len
        if not 1 <= len(ids) <= context:
            raise ValueError(f"from 1 to {context} ids can be continued, not {len(ids)}")
        new_tokens = min(new_tokens, context + 1 - len(ids))
        keys = row_keys(self.rules.sampler, key, range(1), new_tokens)
        # Read the last id at least, since the logits after it are not in the cache
        self.ids = self.ids[: _common(self.ids, ids[:-1])]
        self._provide(len(ids) + new_tokens + SMALL_BLOCK)
        for block in _blocks(ids[len(self.ids) :]):
            padded: Any = np.zeros(
                (1, LARGE_BLOCK if len(block) > SMALL_BLOCK else SMALL_BLOCK), np.int32
            )
            padded[0, : len(block)] = block
            state, tokens, logprobs = _read(
                self.params, self._cache, padded, len(block), len(self.ids), keys, rules=self.rules
            )
            self._cache = state.cache
            self.ids += block
        new, drawn = finite(np.asarray(tokens), np.asarray(logprobs)), 1
        if self.rules.lookup:
            slots = jax.tree.leaves(self._cache)[0].shape[-2]
            text = np.zeros(slots, np.int32)
            text[: len(self.ids)] = self.ids
            known = len(self.ids), 0, new.tokens[0, 0]
            price = lookup.price_of(self.params)
            state = state._replace(lookup=_start_lookup(text, *known, slots, price, self._budget))
        yield new
        while drawn < new_tokens and not state.done.all():
            most = new_tokens - drawn
            state, tokens, logprobs = advance(
                self.params, state, min(chunk, most), most, rules=self.rules
            )
            self._cache = state.cache
            if state.lookup:
                self._budget = np.asarray(state.lookup.budget)
            made = int(state.drawn) - drawn  # fewer where an end has come
            last, drawn = new.tokens[:, -1:], drawn + made
            new = finite(np.asarray(tokens)[:, :made], np.asarray(logprobs)[:, :made])
            self.ids += [*last[0].tolist(), *new.tokens[0, :-1].tolist()]  # the newest is not read
            yield new

    def _provide(self, slots: int) -> None:
        """Make the cache at least so long."""
        # An exception may have come between a program's taking it over and its returning it
        lost = self._cache is None or any(x.is_deleted() for x in jax.tree.leaves(self._cache))
        if lost:
            self.ids = []
        size = LEAST_SLOTS
        while size < slots:
            size *= 2
        size = min(size, self.rules.cfg.max_seq_len + 1 + SMALL_BLOCK)
        if lost:
            self._cache = empty_cache(self.params, self.rules.cfg, 1, size)
        else:
            self._cache = with_slots(self._cache, size)


_start_lookup = jax.jit(lookup.start, static_argnames="slots")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _blocks(ids: Sequence[int]) -> Iterator[list[int]]:
    """Whole large blocks, then small ones, of which the last may be shorter."""
    large = len(ids) // LARGE_BLOCK * LARGE_BLOCK
    for start in range(0, large, LARGE_BLOCK):
        yield list(ids[start : start + LARGE_BLOCK])
    for start in range(large, len(ids), SMALL_BLOCK):
        yield list(ids[start : start + SMALL_BLOCK])


@partial(LastingJit, static="rules", donate="cache")
def _read(
    params: Any,
    cache: Any,
    tokens: Int[Array, "1 P"],
    count: Any,
    slot: Any,
    keys: Any,
    *,
    rules: Rules,
) -> tuple[Decoding, Array, Array]:
    """Read the first ``count`` tokens, and draw one."""
    padding, slot = jnp.zeros(1, jnp.int32), jnp.int32(slot)
    logits, cache = extend(
        params, tokens, padding, cache, slot, rules.cfg, only=jnp.int32(count - 1)
    )
    token, logprob, done = draw_next(logits[:, 0], rules, keys, 0, jnp.zeros(1, bool))
    state = Decoding(cache, padding, slot + count, token, jnp.int32(1), done, keys)
    return state, token[:, None], logprob[:, None]
