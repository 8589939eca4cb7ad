"""Generate tokens from prompts, a few at a time: prefill, then a compiled loop over a key-value
cache.

A sequence that outgrows the model's context continues from its last part; see `window_start`. A
row's tokens depend only on its prompt, its seed and its index, not on other rows or on the number
of tokens drawn at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ModelConfig, Sampler
from gptjax.errors import CheckpointError
from gptjax.generate import lookup, run_c
from gptjax.generate.lookup import DRAFT, Lookup
from gptjax.generate.sampling import choose
from gptjax.models.decode import PART, decode, extend, prefill
from gptjax.xla.lasting_jit import LastingJit
from gptjax.xla.products import accumulation_dtype

CHUNK = 32  # default number of tokens drawn before they are returned
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
    lookup: bool = False
    """A single row also tries tokens that followed the same ones before (`gptjax.generate.lookup`),
    which changes no token."""


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
    lookup: Lookup | None = None
    """Of a single row, if the rules ask for it."""


class Drawn(NamedTuple):
    """New tokens of each row: NumPy arrays (B, n), or of the device with room for more."""

    tokens: Any
    logprobs: Any
    """Natural logarithms of the probabilities that the model gave them, before temperature and
    filters.
    """


def window_start(length: int, context: int) -> int:
    """The start of the part of a sequence that the model sees: 0 while it fits the context.

    Beyond that, the model sees at least half a context of the last tokens. The start advances by
    half a context whenever the sequence would not fit, and the part is read again, since GPT-2's
    positions are absolute.
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
    """Continue each prompt by ``new_tokens``, a few at a time; a finished row repeats its end, and
    the iterator ends when all rows are finished.

    Args:
        params: parameters, or those stored for decoding, see `gptjax.convert.weights`.
        prompts: ids of any length, at least one each.
        rules: see `Rules`.
        key: the key of all draws; for run.c's sampling the seed, an int, to which each row adds its
            index.
        new_tokens: the most tokens to draw.
        chunk: the most tokens to draw at a time, up to `CHUNK`; correct drafts may add to them.
        fetch: copies an array to the host, also from several processes.
        first: index of the first row, if there are more rows than fit at once.

    Raises:
        ValueError: there is no prompt, or an empty one.
        CheckpointError: the model's probabilities are not finite.

    """
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("each prompt needs at least one id")
    context = rules.cfg.max_seq_len
    keys = row_keys(rules.sampler, key, range(first, first + len(prompts)), new_tokens)
    rows = [np.asarray(prompt).tolist() for prompt in prompts]
    done = np.zeros(len(rows), bool)
    state, starts, drawn = None, [0] * len(rows), 0
    budget = np.asarray(lookup.price_of(params) - 1, np.float32)
    while drawn < new_tokens and not done.all():
        left = new_tokens - drawn
        readable = (
            context + 1 - max(len(row) - start for row, start in zip(rows, starts, strict=True))
        )
        if state and readable > 0:
            most = min(left, readable)
            state, tokens, logprobs = advance(params, state, min(most, chunk), most, rules=rules)
        else:
            starts = [window_start(len(row), context) for row in rows]
            windows = [row[start:] for row, start in zip(rows, starts, strict=True)]
            if state and state.lookup:
                budget = fetch(state.lookup.budget)
            state, tokens, logprobs = begin(
                params, *_padded(windows, rules, left), rules, keys, drawn, done, budget
            )
        made = int(fetch(state.drawn)) - drawn
        new = finite(fetch(tokens)[:, :made], fetch(logprobs)[:, :made])
        done = fetch(state.done)
        drawn += made
        for row, ids in zip(rows, new.tokens.tolist(), strict=True):
            row.extend(ids)
        yield new


def finite(tokens: np.ndarray, logprobs: np.ndarray) -> Drawn:
    """What was drawn from sound probabilities.

    Raises:
        CheckpointError: they are not finite.

    """
    if not np.isfinite(logprobs).all():
        raise CheckpointError(
            "the model gives probabilities that are not finite: it is damaged, or its training "
            "diverged"
        )
    return Drawn(tokens, logprobs)


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


def row_keys(sampler: Sampler, key: Any, rows: range, new_tokens: int) -> Array:
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
    reads = min(new_tokens, rules.cfg.max_seq_len + 1 - longest) + DRAFT * rules.lookup
    return ids, padding, -(-(size + reads) // SLOTS) * SLOTS


@partial(jax.jit, static_argnames=("slots", "rules"))
def begin(
    params: Any,
    ids: Array,
    padding: Array,
    slots: int,
    rules: Rules,
    keys: Any,
    drawn: Any,
    done: Any,
    budget: Any,
) -> tuple[Decoding, Array, Array]:
    """Read the prompts and draw one token a row; ``budget`` is that of drafts."""
    logits, cache = prefill(params, ids, padding, slots, rules.cfg)
    token, logprob, done = draw_next(logits, rules, keys, drawn, done)
    slot = jnp.int32(ids.shape[1])
    text = None
    if rules.lookup and len(ids) == 1:
        price = lookup.price_of(params)
        text = lookup.start(ids[0], slot, padding[0], token[0], slots, price, budget)
    state = Decoding(cache, padding, slot, token, jnp.int32(drawn + 1), done, keys, text)
    return state, token[:, None], logprob[:, None]


@partial(LastingJit, static="rules", donate="state")
def advance(
    params: Any, state: Decoding, count: Any, most: Any, *, rules: Rules
) -> tuple[Decoding, Array, Array]:
    """Read the newest token of each row and draw the next, until ``count`` are drawn, or all rows
    are done. Correct drafts may make that up to ``most``.

    Returns:
        The state, whose ``drawn`` says how many of the tokens and log-probabilities are valid.

    """
    B, before = state.token.shape[0], state.drawn
    found = (
        jnp.zeros((B, CHUNK + DRAFT), jnp.int32),
        jnp.zeros((B, CHUNK + DRAFT), jnp.float32),
    )

    def more(carry: Any) -> Array:
        state, _ = carry
        return (state.drawn - before < count) & ~state.done.all()

    def has_draft(carry: Any) -> Array:
        state, _ = carry
        return (state.lookup.known > 0) & (most - (state.drawn - before) > 1)

    def put(found: Any, state: Decoding, new: Any) -> Any:
        at = jnp.int32(0), state.drawn - before
        return tuple(lax.dynamic_update_slice(f, x, at) for f, x in zip(found, new, strict=True))

    def step(carry: Any) -> Any:
        """A token of each row."""
        state, found = carry
        logits, cache = decode(
            params, state.token, state.padding, state.cache, state.slot, rules.cfg
        )
        token, logprob, done = draw_next(logits, rules, state.keys, state.drawn, state.done)
        found = put(found, state, (token[:, None], logprob[:, None]))
        text, one = state.lookup, jnp.int32(1)
        if text:
            text = lookup.after(text, token, one, state.padding[0], state.slot)
        slot, drawn = state.slot + 1, state.drawn + 1
        return Decoding(cache, state.padding, slot, token, drawn, done, state.keys, text), found

    def try_draft(carry: Any) -> Any:
        """The tokens of a draft up to the first that would not have been drawn, and that one."""
        state, found = carry
        draft = state.lookup.draft
        read = jnp.concatenate([state.token, draft])[None]
        logits, cache = extend(params, read, state.padding, state.cache, state.slot, rules.cfg)
        n = jnp.arange(read.shape[1], dtype=jnp.int32)
        keys, done = state.keys[jnp.zeros_like(n)], jnp.zeros(n.shape, bool)
        token, logprob, done = draw_next(logits[0], rules, keys, state.drawn + n, done)
        hits = (token[:-1] == draft) & (n[:-1] < state.lookup.known) & ~done[:-1]
        right = jnp.cumprod(hits.astype(jnp.int32)).sum(dtype=jnp.int32)
        made = jnp.minimum(right + 1, most - (state.drawn - before))
        found = put(found, state, (token[None], logprob[None]))
        text = lookup.after(state.lookup, token, made, state.padding[0], state.slot, tried=True)
        slot, drawn = state.slot + made, state.drawn + made
        last = (token[made - 1][None], drawn, done[made - 1][None])
        return Decoding(cache, state.padding, slot, *last, state.keys, text), found

    def steps_and_drafts(carry: Any) -> Any:
        # Two loops, not a condition: XLA updates a loop's cache in place
        carry = lax.while_loop(lambda c: more(c) & ~has_draft(c), step, carry)
        return lax.while_loop(lambda c: more(c) & has_draft(c), try_draft, carry)

    body = steps_and_drafts if state.lookup else step
    state, (tokens, logprobs) = lax.while_loop(more, body, (state, found))
    return state, tokens, logprobs


def draw_next(
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
