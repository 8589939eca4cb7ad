"""Prompts in, tokens out, a few at a time: prefill, then a compiled loop over a cache of keys and
values.

A sequence that outgrows the model's context goes on from its newer part: see `window_start`. What
is drawn for a row depends on its prompt, its seed and its index alone, not on the rows beside it or
on how many tokens are asked for at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ModelConfig, Sampler
from gptjax.errors import CheckpointError
from gptjax.generate import lookup, run_c
from gptjax.generate.lookup import DRAFT, Lookup
from gptjax.generate.sampling import choose
from gptjax.models.decode import CHUNK as PART
from gptjax.models.decode import decode, prefill
from gptjax.xla.products import accumulation_dtype

CHUNK = 32  # tokens between looks at what was drawn, unless told otherwise
# Prompts are padded to one of these, or a multiple of the last, so that few programs are compiled
SHORT_PROMPTS = (16, 32, 64, PART)
DEFAULT = Sampler()
SLOTS = 64  # the cache's length is a multiple of this, for the same reason


class Rules(NamedTuple):
    """What stays the same throughout: static, so that each has a program of its own."""

    cfg: ModelConfig
    """Resolved."""
    sampler: Sampler
    allowed: int
    """Ids below this are drawn: of a tokenizer smaller than the model's vocabulary."""
    ends: tuple[int, ...] = ()
    """The ids after any of which a sequence is done."""
    lookup: bool = True
    """A single row also tries tokens that followed the same ones before (`gptjax.generate.lookup`);
    it changes no token."""


class Decoding(NamedTuple):
    """Sequences that are being continued. The newest token of each has been drawn, and not yet been
    read.
    """

    cache: Any
    padding: Int[Array, " B"]
    slot: Int[Array, ""]
    """Where the newest tokens will be kept."""
    token: Int[Array, " B"]
    drawn: Int[Array, ""]
    """Tokens drawn so far."""
    done: Bool[Array, " B"]
    keys: Any
    """What each row draws with: keys (B,), or run.c's random numbers (B, n)."""
    lookup: Lookup | None
    """Of a single row, unless `Rules.lookup` is off."""


class Drawn(NamedTuple):
    """New tokens of each row: NumPy arrays (B, n), or of the device with room for more."""

    tokens: Any
    logprobs: Any
    """Natural logarithms of the probabilities that the model gave them, before temperature and
    filters.
    """


def window_start(length: int, context: int) -> int:
    """Where the part of a sequence begins that the model sees: 0 until it is longer than the
    context.

    From then on, the last tokens, at least half a context of them: the start moves on by half a
    context whenever the sequence would not fit, and the part is read anew, since GPT-2's positions
    are absolute.
    """
    half = max(1, context // 2)
    return max(0, -(-(length - context) // half)) * half


def generate(
    params: Any,
    prompts: Sequence[Sequence[int]],
    rules: Rules,
    key: Any,
    new_tokens: int,
    chunk: int = CHUNK,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
    first: int = 0,
) -> Iterator[Drawn]:
    """Continue each prompt by ``new_tokens``, a few at a time; a row that is done repeats its end,
    and when all are, it ends.

    Args:
        params: parameters, or what `gptjax.models.decode.store_for_decoding` makes of them.
        prompts: ids, at least one each, of any length.
        rules: see there.
        key: the same one gives the same tokens; of run.c's draws the seed, an int, to which a row
            adds its index.
        new_tokens: how many, at most.
        chunk: so many at a time, up to `CHUNK`, and those of a draft that were right.
        fetch: brings an array from the devices, where several processes have them.
        first: index of the first row, among more than fit at once.

    Raises:
        ValueError: there is no prompt, or an empty one.
        CheckpointError: the model's probabilities are not finite.

    """
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("each prompt needs at least one id")
    context = rules.cfg.max_seq_len
    keys = _keys(rules.sampler, key, range(first, first + len(prompts)), new_tokens)
    rows = [np.asarray(prompt).tolist() for prompt in prompts]
    done = np.zeros(len(rows), bool)
    state, starts, drawn = None, [0] * len(rows), 0
    while drawn < new_tokens and not done.all():
        left = new_tokens - drawn
        readable = (
            context + 1 - max(len(row) - start for row, start in zip(rows, starts, strict=True))
        )
        made: Any = 1
        if state and readable > 0:
            most = min(left, readable)
            state, tokens, logprobs, made = _advance(params, state, rules, min(most, chunk), most)
        else:
            starts = [window_start(len(row), context) for row in rows]
            windows = [row[start:] for row, start in zip(rows, starts, strict=True)]
            state, tokens, logprobs = _start(
                params, *_padded(windows, rules, left), rules, keys, drawn, done
            )
        made = int(fetch(made))
        new = Drawn(fetch(tokens)[:, :made], fetch(logprobs)[:, :made])
        if not np.isfinite(new.logprobs).all():
            raise CheckpointError(
                "the model gives probabilities that are not finite: it is damaged, or its "
                "training diverged"
            )
        done = fetch(state.done)
        drawn += made
        for row, ids in zip(rows, new.tokens.tolist(), strict=True):
            row.extend(ids)
        yield new


def sample(
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: Key[Array, ""],
    *,
    cfg: ModelConfig,
    new_tokens: int,
    sampler: Sampler = DEFAULT,
    allowed: int | None = None,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
) -> np.ndarray:
    """Continue each prompt by ``new_tokens`` ids below ``allowed``, by default all: (B,
    new_tokens). See `generate`.
    """
    rules = Rules(cfg, sampler, allowed or cfg.vocab_size)
    return np.concatenate(
        [new.tokens for new in generate(params, prompts, rules, key, new_tokens, fetch=fetch)],
        axis=1,
    )


def _keys(sampler: Sampler, key: Any, rows: range, new_tokens: int) -> Array:
    """What the rows draw with; see `Decoding`."""
    if sampler.draw == "run.c":
        return jnp.asarray(np.stack([run_c.coins(key + row, new_tokens) for row in rows]))
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(rows))


def _padded(
    windows: list[list[int]], rules: Rules, new_tokens: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids padded on the left, the padding of each row, slots of the cache), of few different
    sizes.
    """
    longest = max(map(len, windows))
    size = next((n for n in SHORT_PROMPTS if n >= longest), -(-longest // PART) * PART)
    padding = np.array([size - len(window) for window in windows], np.int32)
    ids = np.array([[0] * (size - len(window)) + window for window in windows], np.int32)
    reads = min(new_tokens, rules.cfg.max_seq_len + 1 - longest) + DRAFT
    return ids, padding, -(-(size + reads) // SLOTS) * SLOTS


@partial(jax.jit, static_argnames=("slots", "rules"))
def _start(
    params: Any,
    ids: Array,
    padding: Array,
    slots: int,
    rules: Rules,
    keys: Any,
    drawn: Any,
    done: Any,
) -> tuple[Decoding, Array, Array]:
    """Read the prompts and draw one token a row."""
    logits, cache = prefill(params, ids, padding, slots, rules.cfg)
    token, logprob, done = _next(logits, rules, keys, drawn, done)
    single = len(ids) == 1 and rules.lookup
    text = lookup.start(ids[0], padding[0], token[0], slots) if single else None
    state = Decoding(
        cache, padding, jnp.int32(ids.shape[1]), token, jnp.int32(drawn + 1), done, keys, text
    )
    return state, token[:, None], logprob[:, None]


@partial(jax.jit, static_argnames="rules", donate_argnames="state")
def _advance(
    params: Any, state: Decoding, rules: Rules, count: Any, most: Any
) -> tuple[Decoding, Array, Array, Array]:
    """``count`` times: read the newest token of each row, and draw the next; it stops when all rows
    are done. A draft may make that up to ``most``.

    Returns:
        The state, and tokens and log-probabilities of which the last number says how many are made.

    """
    B = state.token.shape[0]
    room = (
        jnp.zeros((B, CHUNK + DRAFT), jnp.int32),
        jnp.zeros((B, CHUNK + DRAFT), jnp.float32),
    )

    def more(carry: Any) -> Array:
        i, state, _ = carry
        return (i < count) & ~state.done.all()

    def has_draft(carry: Any) -> Array:
        i, state, _ = carry
        return (state.lookup.known > 0) & (most - i > 1)

    def step(carry: Any) -> Any:
        """A token of each row."""
        i, state, room = carry
        logits, cache = decode(
            params, state.token[:, None], state.padding, state.cache, state.slot, rules.cfg
        )
        token, logprob, done = _next(logits[:, 0], rules, state.keys, state.drawn, state.done)
        room = tuple(r.at[:, i].set(x) for r, x in zip(room, (token, logprob), strict=True))
        text = state.lookup and lookup.after(
            state.lookup, token, jnp.int32(1), state.padding[0], state.slot
        )
        new = state._replace(
            cache=cache,
            slot=state.slot + 1,
            token=token,
            drawn=state.drawn + 1,
            done=done,
            lookup=text,
        )
        return i + 1, new, room

    def try_draft(carry: Any) -> Any:
        """The tokens of a draft up to the first that would not have been drawn, and that one."""
        i, state, room = carry
        drafted = state.lookup.draft
        read = jnp.concatenate([state.token, drafted])
        logits, cache = decode(
            params, read[None], state.padding, state.cache, state.slot, rules.cfg
        )
        order = jnp.arange(len(read), dtype=jnp.int32)
        each = jnp.zeros(len(read), bool)
        token, logprob, ends = _next(
            logits[0], rules, state.keys[each.astype(jnp.int32)], state.drawn + order, each
        )
        hits = (token[:-1] == drafted) & (order[:-1] < state.lookup.known) & ~ends[:-1]
        right = jnp.cumprod(hits.astype(jnp.int32)).sum(dtype=jnp.int32)
        made = jnp.minimum(right + 1, most - i)
        room = tuple(
            jax.lax.dynamic_update_slice(r, x[None], (jnp.int32(0), i))
            for r, x in zip(room, (token, logprob), strict=True)
        )
        new = state._replace(
            cache=cache,
            slot=state.slot + made,
            token=token[made - 1][None],
            drawn=state.drawn + made,
            done=ends[made - 1][None],
            lookup=lookup.after(state.lookup, token, made, state.padding[0], state.slot, right),
        )
        return i + made, new, room

    def either(carry: Any) -> Any:
        # Two loops, not a condition: XLA updates a loop's cache in place
        carry = jax.lax.while_loop(lambda c: more(c) & ~has_draft(c), step, carry)
        return jax.lax.while_loop(lambda c: more(c) & has_draft(c), try_draft, carry)

    body = either if state.lookup else step
    made, state, (tokens, logprobs) = jax.lax.while_loop(more, body, (jnp.int32(0), state, room))
    return state, tokens, logprobs, made


def _next(
    logits: Float[Array, "B V"], rules: Rules, keys: Any, drawn: Any, done: Array
) -> tuple[Array, Array, Array]:
    """(token, its log-probability, whether the row is done) of each row.

    ``drawn`` is how many tokens were drawn before, of all rows or of each.
    """
    drawn = jnp.broadcast_to(drawn, done.shape)
    logits = logits[:, : rules.allowed].astype(accumulation_dtype(logits))
    if rules.sampler.draw == "run.c":
        coins = jnp.take_along_axis(keys, drawn[:, None], 1)[:, 0]
        token = run_c.choose(coins, logits, rules.sampler)
    else:
        token_keys = jax.vmap(jax.random.fold_in)(keys, drawn)
        token = choose(token_keys, logits, rules.sampler)
    logprob = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, -1)
    logprob = logprob.astype(jnp.float32)
    if not rules.ends:
        return token, logprob, done
    token = jnp.where(done, rules.ends[0], token)
    return token, jnp.where(done, 0, logprob), done | jnp.isin(token, jnp.array(rules.ends))
