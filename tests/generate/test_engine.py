import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import Sampler
from gptjax.errors import CheckpointError
from gptjax.generate import engine
from gptjax.generate.engine import Rules, generate, sample, window_start
from gptjax.models import transformer
from gptjax.models.decode import prefill, store_for_decoding
from tests.models import tiny

CFG = tiny.CONFIG
CONTEXT = CFG.max_seq_len  # 12
KEY = jax.random.key(0)
GREEDY, DRAWN = Sampler(0), Sampler(1.0, 0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], [3] * CONTEXT]


@functools.cache
def params(layers: str):
    return tiny.params(tiny.config(layers=layers))


@functools.cache
def uncached(layers: str):
    cfg = tiny.config(layers=layers)
    return jax.jit(lambda ids: transformer.logits(params(layers), ids, cfg))


def next_logits(ids: list[int], layers: str = "unroll") -> np.ndarray:
    """What comes after ids, by the model without a cache; padding on the right changes nothing to
    the left of it.
    """
    seen = ids[window_start(len(ids), CONTEXT) :]
    padded = jnp.array([seen + [0] * (CONTEXT - len(seen))])
    return np.asarray(uncached(layers)(padded))[0, len(seen) - 1]


def tokens(prompts, rules, new_tokens, key=KEY, chunk=engine.CHUNK, layers="unroll"):
    made = list(generate(params(layers), prompts, rules, key, new_tokens, chunk))
    return tuple(np.concatenate(x, axis=1) for x in zip(*made, strict=True))


@pytest.mark.parametrize(
    ("layers", "chunk"), [("unroll", engine.CHUNK), ("unroll", 1), ("scan", 5)]
)
def test_greedy_is_the_best_of_the_uncached_model_at_every_step(layers, chunk):
    """Prompts of 1, 3, 12 and 17 ids in one batch, in a context of 12, continued far past it."""
    ids, logprobs = tokens(
        PROMPTS, Rules(tiny.config(layers=layers), GREEDY, 11), 30, chunk=chunk, layers=layers
    )
    for prompt, row, row_logprobs in zip(PROMPTS, ids.tolist(), logprobs.tolist(), strict=True):
        before = list(prompt)
        for token, logprob in zip(row, row_logprobs, strict=True):
            logits = next_logits(before, layers)
            assert token == logits.argmax()
            # Kept in float32
            np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[token], rtol=1e-5)
            before.append(token)


def test_stored_weights_give_the_same_tokens():
    rules = Rules(CFG, GREEDY, 11)
    made = list(generate(store_for_decoding(params("unroll"), CFG), PROMPTS, rules, KEY, 20))
    np.testing.assert_array_equal(
        np.concatenate([new.tokens for new in made], 1), tokens(PROMPTS, rules, 20)[0]
    )


def test_the_same_key_gives_the_same_text_and_another_another():
    rules = Rules(CFG, DRAWN, 11)
    one, same, other = (tokens(PROMPTS, rules, 12, jax.random.key(s))[0] for s in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any(1).all()


def test_a_row_depends_on_its_prompt_and_index_alone():
    """Neither its neighbours, which slide at other times, nor the chunk size matter."""
    rules = Rules(CFG, DRAWN, 11)
    together, _ = tokens(PROMPTS, rules, 30)
    np.testing.assert_array_equal(tokens(PROMPTS, rules, 30, chunk=1)[0], together)
    for rows in (1, 3):
        np.testing.assert_array_equal(tokens(PROMPTS[:rows], rules, 30)[0], together[:rows])


def test_samples_of_one_prompt_differ():
    ids, _ = tokens([[1, 2]] * 6, Rules(CFG, DRAWN, 11), 8)
    assert len({tuple(row) for row in ids.tolist()}) > 3


def test_ids_beyond_the_tokenizer_are_not_drawn():
    ids, logprobs = tokens(PROMPTS, Rules(CFG, DRAWN, 3), 30)
    assert set(ids.ravel().tolist()) == {0, 1, 2}
    np.testing.assert_allclose(
        logprobs[1, 0], jax.nn.log_softmax(next_logits([4])[:3])[ids[1, 0]], rtol=1e-5
    )


def test_an_ended_row_repeats_end_of_text_until_all_have_ended():
    free, _ = tokens(PROMPTS, Rules(CFG, DRAWN, 11), 30)
    end = int(free[0, 4])
    ids, logprobs = tokens(PROMPTS, Rules(CFG, DRAWN, 11, (end,)), 30)
    firsts = [row.index(end) if end in row else 30 for row in free.tolist()]
    assert len(set(firsts)) > 1
    for row, row_logprobs, known, first in zip(ids, logprobs, free, firsts, strict=True):
        np.testing.assert_array_equal(row[: first + 1], known[: len(row)][: first + 1])
        assert (row[first + 1 :] == end).all()
        assert (row_logprobs[first + 1 :] == 0).all()
    alone = list(generate(params("unroll"), PROMPTS[:1], Rules(CFG, DRAWN, 11, (end,)), KEY, 30, 2))
    assert sum(new.tokens.shape[1] for new in alone) <= firsts[0] + 2


def test_sample_is_all_of_it_at_once():
    ids = sample(
        params("unroll"),
        jnp.array([[1, 2], [3, 4]]),
        KEY,
        cfg=CFG,
        new_tokens=20,
        sampler=DRAWN,
        allowed=5,
    )
    np.testing.assert_array_equal(ids, tokens([[1, 2], [3, 4]], Rules(CFG, DRAWN, 5), 20)[0])


@given(st.integers(0, 200), st.integers(1, 30))
def test_the_window_holds_at_least_half_a_context_and_at_most_one(length, context):
    start = window_start(length, context)
    assert length - start <= context
    assert start == 0 if length <= context else length - start > context - max(1, context // 2)
    assert start <= window_start(length + 1, context)


@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4]], [[1, 2, 3]]])
def test_a_cache_is_changed_in_place(prompts):
    """A copy of it for each token would cost more than all products in a long context. Of a single
    row drafts are tried, too.
    """
    rules, B = Rules(CFG, GREEDY, 11, lookup=True), len(prompts)
    stored = store_for_decoding(params("unroll"), CFG)
    ids, padding, slots = engine._padded(prompts, rules, 40)
    state, _, _ = engine.begin(
        stored, ids, padding, slots, rules, jax.random.split(KEY, B), 0, np.zeros(B, bool), 1.0
    )
    engine.advance.programs.clear()
    engine.advance(stored, state, 8, 8, rules=rules)
    (program,) = (program.as_text() for program in engine.advance.programs.values())
    cache = f"f64[{B},{CFG.num_heads},{slots},{CFG.channels // CFG.num_heads}]"
    assert cache in program
    assert not re.findall(re.escape(cache) + r"\S* copy\(", program)


def test_prompts_of_similar_length_share_a_program():
    rules = Rules(CFG, Sampler(0.7, 3), 11)
    tokens([[1, 2]], rules, 9)
    known = engine.begin._cache_size(), len(engine.advance.programs)
    tokens([[1, 2, 3, 4]], rules, 7)
    assert (engine.begin._cache_size(), len(engine.advance.programs)) == known


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_a_prompt_without_ids(prompts):
    with pytest.raises(ValueError, match="at least one id"):
        next(generate(params("unroll"), prompts, Rules(CFG, GREEDY, 11), KEY, 3))


def test_rows_that_are_made_apart_are_the_same():
    rules = Rules(CFG, DRAWN, 11)
    together, _ = tokens(PROMPTS, rules, 9)
    apart = list(generate(params("unroll"), PROMPTS[2:], rules, KEY, 9, first=2))
    np.testing.assert_array_equal(np.concatenate([new.tokens for new in apart], 1), together[2:])


def test_a_model_that_diverged_is_refused():
    broken = params("unroll")._replace(lnfb=jnp.full(CFG.channels, jnp.nan))
    with pytest.raises(CheckpointError, match="probabilities that are not finite"):
        next(generate(broken, PROMPTS, Rules(CFG, GREEDY, 11), KEY, 3))


def test_prefill_does_not_look_at_the_padding():
    short = jnp.array([[7, 7, 1, 2]], jnp.int32), jnp.array([2], jnp.int32)
    other = jnp.array([[0, 3, 1, 2]], jnp.int32), jnp.array([2], jnp.int32)
    one, two = (prefill(params("unroll"), *x, 8, CFG)[0] for x in (short, other))
    np.testing.assert_array_equal(one, two)
