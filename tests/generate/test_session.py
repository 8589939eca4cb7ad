import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import Sampler
from gptjax.errors import CheckpointError
from gptjax.generate import session as module
from gptjax.generate.engine import Rules, generate
from gptjax.generate.session import Session
from gptjax.models import transformer
from gptjax.models.decode import extend
from tests.models import tiny

CFG = tiny.config(family="llama", num_heads=4, num_kv_heads=2, max_seq_len=40)
GREEDY = Rules(CFG, Sampler(0), 11, lookup=True)
DRAWN = Rules(CFG, Sampler(1.0, 0), 11)
KEY = jax.random.key(0)


@functools.cache
def params():
    return tiny.params(CFG)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 and 4 tokens, in a cache of 16 slots at first."""
    monkeypatch.setattr(module, "LARGE_BLOCK", 8)
    monkeypatch.setattr(module, "SMALL_BLOCK", 4)
    monkeypatch.setattr(module, "LEAST_SLOTS", 16)


def made(session, ids, new_tokens, key=KEY, chunk=5):
    new = list(session.continued(ids, key, new_tokens, chunk))
    return tuple(np.concatenate(x, axis=1)[0] for x in zip(*new, strict=True))


def expected(rules, ids, new_tokens, key=KEY):
    new = list(generate(params(), [ids], rules, key, new_tokens))
    return tuple(np.concatenate(x, axis=1)[0] for x in zip(*new, strict=True))


@pytest.mark.parametrize("rules", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_turns_are_continued_as_texts_read_anew(rules):
    """Three turns, of which the last is not what the others went on with."""
    session, text = Session(params(), rules), [1, 2, 3]
    for turn, more in enumerate(([4, 5], [6] * 9, [7, 8, 9])):
        text = [*text[: 6 if turn == 2 else None], *more]
        key = jax.random.fold_in(KEY, turn)
        tokens, logprobs = made(session, text, 7, key)
        for found, known in zip((tokens, logprobs), expected(rules, text, 7, key), strict=True):
            np.testing.assert_allclose(found, known, rtol=1e-5)
        assert session.ids == [*text, *tokens[:-1].tolist()]
        text += tokens.tolist()


def test_only_new_tokens_are_read(monkeypatch):
    read = []

    def spy(params, cache, tokens, count, slot, *rest, **rules):
        read.append((slot, tokens.shape[1], tokens[0, :count].tolist()))
        return inner(params, cache, tokens, count, slot, *rest, **rules)

    inner = module._read
    monkeypatch.setattr(module, "_read", spy)
    session = Session(params(), GREEDY)
    tokens, _ = made(session, [1] * 13, 3)
    assert read == [(0, 8, [1] * 8), (8, 4, [1] * 4), (12, 4, [1])]
    read.clear()
    made(session, [1] * 13 + tokens.tolist() + [2, 3], 3)
    assert read == [(15, 4, [tokens[2], 2, 3])]  # the newest had been drawn and not been read


@settings(max_examples=4)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=2, max_size=4))
def test_the_kept_cache_is_that_of_reading_anew(cuts):
    """Whatever is read after whatever: the logits of the next token, to 1e-12."""
    session, text = Session(params(), GREEDY), []
    for seed, (kept, more) in enumerate(cuts):
        text = text[:kept] + np.random.default_rng(seed).integers(0, 11, more).tolist()
        made(session, text, 3)
        assert session.ids[: len(text)] == text
        known = len(session.ids) - 1
        logits, _ = jax.jit(extend, static_argnames="cfg")(
            params(),
            np.array([session.ids[-1:]], np.int32),
            np.zeros(1, np.int32),
            session._cache,
            np.int32(known),
            cfg=CFG,
        )
        anew = transformer.logits(params(), np.array([session.ids], np.int32), CFG)
        np.testing.assert_allclose(logits[0, 0], anew[0, -1], rtol=1e-12, atol=1e-14)


def test_it_ends_with_the_context():
    tokens, _ = made(Session(params(), GREEDY), [1] * 37, 9)
    assert len(tokens) == 4
    assert len(made(Session(params(), GREEDY), [1] * 40, 9)[0]) == 1


def test_it_ends_with_an_end():
    free, _ = made(Session(params(), DRAWN), [1, 2], 20)
    end = int(free[3])
    session = Session(params(), DRAWN._replace(ends=(end, 99)))
    tokens, _ = made(session, [1, 2], 20)
    first = free.tolist().index(end)
    assert tokens.tolist() == free[: first + 1].tolist()
    assert session.ids == [1, 2, *free[:first].tolist()]


def test_an_exception_in_between_costs_no_more_than_reading_anew(monkeypatch):
    session = Session(params(), GREEDY)
    made(session, [1, 2, 3], 4)
    advance = module.advance

    def interrupted(*args, **rules):
        advance(*args, **rules)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(session, [1, 2, 3, 4], 4)
    monkeypatch.setattr(module, "advance", advance)
    tokens, _ = made(session, [1, 2, 3, 4, 5], 4)
    assert tokens.tolist() == expected(GREEDY, [1, 2, 3, 4, 5], 4)[0].tolist()


def test_an_answer_that_is_left_is_kept_as_far_as_it_came():
    session = Session(params(), GREEDY)
    answer = session.continued([1, 2], KEY, 20, 1)
    tokens = [token for _ in range(5) for token in next(answer).tokens[0].tolist()]
    answer.close()
    assert session.ids == [1, 2, *tokens[:-1]]


@pytest.mark.parametrize("ids", [[], [1] * 41])
def test_texts_that_cannot_be_continued(ids):
    with pytest.raises(ValueError, match=f"from 1 to 40 ids can be continued, not {len(ids)}"):
        next(Session(params(), GREEDY).continued(ids, KEY, 1))


def test_a_model_that_diverged_is_refused():
    broken = params()._replace(final_norm=np.full(CFG.channels, np.nan))
    with pytest.raises(CheckpointError, match="probabilities that are not finite"):
        next(Session(broken, GREEDY).continued([1], KEY, 1))
