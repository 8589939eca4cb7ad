import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import Sampler
from gptjax.generate import engine, generate, lookup
from gptjax.generate import session as session_module
from gptjax.generate.engine import Rules
from gptjax.generate.lookup import DRAFT, SHARE, find
from gptjax.generate.session import Session
from gptjax.models import transformer
from gptjax.models.decode import store_for_decoding
from tests.models import tiny

CFG = tiny.config(max_seq_len=64)
PARAMS = tiny.params(CFG)
KEY = jax.random.key(0)
GREEDY, DRAWN = Sampler(0), Sampler(0.7, 3)


def found(seen, begin):
    """The same by a loop over the places, the last first."""
    slot = len(seen) - 1
    for length in (3, 2):
        for place in range(slot - 1, -1, -1):
            first = place - length + 1
            if first >= begin and seen[first : place + 1] == seen[slot - length + 1 :]:
                return seen[place + 1 : slot + 1][:DRAFT]
    return []


@given(st.lists(st.integers(0, 2), min_size=4, max_size=24), st.integers(0, 3))
def test_a_draft_is_what_followed_the_same_tokens(seen, begin):
    padded = jnp.array(seen + [9] * (30 - len(seen)), jnp.int32)
    draft, known = find(padded, jnp.int32(begin), jnp.int32(len(seen) - 1))
    assert draft[: int(known)].tolist() == found(seen, begin)


def tried(made_by_a_draft, price, tokens=400):
    """How many tokens were drawn before each draft that was tried, and in all, if each draft makes so
    many; and the look-up at the end.
    """
    text = lookup.start(
        jnp.array([1, 2, 1, 2, 1], jnp.int32),
        jnp.int32(5),
        jnp.int32(0),
        jnp.int32(2),
        slots=600,
        price=price,
        budget=price - 1,
    )
    step = jax.jit(lookup.after, static_argnames="tried")
    slot, drawn, tries = 5, 1, []
    while drawn < tokens:
        reads_draft = bool(text.known > 0)
        made = made_by_a_draft if reads_draft else 1
        tries += [drawn] * reads_draft
        new = jnp.array([1 + (drawn + i) % 2 for i in range(DRAFT + 1)], jnp.int32)
        text = step(text, new, jnp.int32(made), jnp.int32(0), jnp.int32(slot), tried=reads_draft)
        slot, drawn = slot + made, drawn + made
    return tries, drawn, text


@pytest.mark.parametrize("price", [lookup.NARROW_PRICE, lookup.WIDE_PRICE])
def test_drafts_of_which_no_token_is_right_waste_little(price):
    """At any time no more than one failure does, and 2% of the time of the tokens drawn."""
    assert SHARE <= 0.02
    tries, drawn, _ = tried(1, price)
    assert len(tries) > 3
    for n, before in enumerate(tries, 1):
        assert n * (price - 1) <= price - 1 + SHARE * before + 1e-4
    # And not much less
    assert len(tries) * (price - 1) > SHARE * drawn - price


def test_drafts_that_pay_are_always_tried_and_leave_a_small_budget():
    tries, _, text = tried(DRAFT + 1, lookup.WIDE_PRICE)
    assert np.diff(tries).tolist() == [DRAFT + 1] * (len(tries) - 1)
    assert text.budget == lookup.MOST


def test_the_price_is_that_of_the_weights():
    assert lookup.price_of(PARAMS) == lookup.WIDE_PRICE
    cfg = CFG.resolve("cpu", 1)
    stored = store_for_decoding(PARAMS, cfg, "q8_0")
    assert lookup.price_of(stored) == lookup.NARROW_PRICE
    norms_in_16_bits = PARAMS._replace(lnfw=PARAMS.lnfw.astype(jnp.bfloat16))
    assert lookup.price_of(norms_in_16_bits) == lookup.WIDE_PRICE


def test_the_budget_lasts_over_answers_and_windows(monkeypatch):
    """It falls with each draft that fails, and is never given anew."""
    monkeypatch.setattr(lookup, "price_of", lambda params: 1.7)
    monkeypatch.setattr(lookup, "SHARE", 1e-4)
    cfg = tiny.config(num_layers=1, max_seq_len=64)  # another program than those without changes
    params, rules = tiny.params(cfg), Rules(cfg, Sampler(5.0, 0), 11, lookup=True)
    prompt, failures = [1, 2, 1, 2, 1, 2, 1], []
    advance = engine.advance

    def noting(params, state, *args, **rules):
        before = float(state.lookup.budget)
        state, *drawn = advance(params, state, *args, **rules)
        failures.append(before - float(state.lookup.budget) > 0.5)
        return state, *drawn

    monkeypatch.setattr(engine, "advance", noting)
    list(generate(params, [prompt], rules, KEY, 200, 8))  # six windows
    assert 1 <= sum(failures) <= 2
    failures.clear()
    session = Session(params, rules)
    monkeypatch.setattr(session_module, "advance", noting)
    for i in range(6):
        list(session.continued(prompt, jax.random.key(i), 20, 8))
    assert 1 <= sum(failures) <= 2


def drawn(prompts, rules, chunk, new_tokens=90, key=KEY):
    made = list(generate(PARAMS, prompts, rules, key, new_tokens, chunk))
    tokens, logprobs = (np.concatenate(x, axis=1) for x in zip(*made, strict=True))
    return tokens, logprobs, [new.tokens.shape[1] for new in made]


@pytest.mark.parametrize("chunk", [1, 5, 32])
@pytest.mark.parametrize("sampler", [GREEDY, DRAWN, Sampler(0.9, 0, 0.9, draw="run.c")])
def test_looking_up_changes_no_token(sampler, chunk):
    """Past the context, too, and up to an end."""
    key = 7 if sampler.draw == "run.c" else KEY
    prompt = [[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]]
    plain = Rules(CFG, sampler, 11)
    ids, logprobs, sizes = drawn(prompt, plain, chunk, key=key)
    assert max(sizes) <= chunk
    same, same_logprobs, sizes = drawn(prompt, plain._replace(lookup=True), chunk, key=key)
    np.testing.assert_array_equal(same, ids)
    np.testing.assert_allclose(same_logprobs, logprobs, atol=1e-5)
    if sampler.temperature == 0 and chunk == 1:
        assert max(sizes) > chunk  # greedy text repeats itself
    end = (int(ids[0, 40]),)
    until = ids[0].tolist().index(end[0]) + 1
    ended, _, _ = drawn(prompt, plain._replace(lookup=True, ends=end), chunk, key=key)
    np.testing.assert_array_equal(ended[0, :until], ids[0, :until])
    assert ended.shape[1] == until


def test_several_rows_are_not_looked_up():
    rows = [[1, 2, 1, 2, 1], [3, 4, 3, 4, 3]]
    _, _, sizes = drawn(rows, Rules(CFG, GREEDY, 11, lookup=True), 1, 12)
    assert set(sizes) == {1}


def test_tokens_of_a_draft_are_drawn_from_the_models_distribution():
    """Pairs of them, by chi-square; most drafts are wrong."""
    prompt, N = [1, 2, 1, 2, 1, 2], 5000
    cfg = tiny.config(num_layers=1, max_seq_len=64)
    params = tiny.params(cfg)
    rules, none = Rules(cfg, Sampler(1.0, 0), 11), jnp.zeros(1, bool)
    ids, padding = jnp.array([prompt[:-1]], jnp.int32), jnp.zeros(1, jnp.int32)

    def pair(key):
        state, *_ = engine.begin(params, ids, padding, 64, rules, key[None], 0, none, 1.0)
        token = jnp.array(prompt[-1:], jnp.int32)
        text = lookup.start(ids[0], state.slot, padding[0], token[0], 64, price=1.0, budget=0.0)
        state = state._replace(token=token, lookup=text)
        _, tokens, _ = engine.advance.function(params, state, 2, 2, rules=rules)
        return 11 * tokens[0, 0] + tokens[0, 1]

    found = np.bincount(jax.jit(jax.vmap(pair))(jax.random.split(KEY, N)), minlength=121)
    texts = jnp.array([[*prompt, token] for token in range(11)])
    p = jax.nn.softmax(transformer.logits(params, texts, cfg)[:, -2:, :11])
    expected = N * np.asarray(p[0, 0][:, None] * p[:, 1]).ravel()
    assert expected.min() > 5
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 173  # the 99.9th percentile of 120 degrees of freedom
