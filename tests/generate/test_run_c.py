"""run.c's sampler, against its loops in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.config import Sampler
from gptjax.formats import llama2c
from gptjax.generate import Rules, generate, run_c
from gptjax.generate import __main__ as command
from tests.commands import expect_error
from tests.models import tiny
from tests.tokenizers.test_llama2c import TOKENIZER

CFG = tiny.config(
    family="llama",
    num_heads=4,
    num_kv_heads=2,
    channels=16,
    vocab_size=TOKENIZER.vocab_size,
    dtype="float32",
)


def sampled(coin, logits, sampler):
    """sample(), sample_mult() and sample_topp() of run.c, in float64."""
    x = np.asarray(logits, np.float64) / sampler.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    ids = np.arange(len(p))
    if 0 < sampler.top_p < 1:
        kept = ids[p >= min((1 - sampler.top_p) / (len(p) - 1), p.max())]
        ids = kept[np.argsort(-p[kept], kind="stable")]
        total, last = 0.0, len(ids) - 1
        for i, token in enumerate(ids):
            total += p[token]
            if total > sampler.top_p:
                last = i
                break
        ids = ids[: last + 1]
        coin = coin * total
    sums = np.cumsum(p[ids])
    margin = np.abs(sums - coin).min()
    return next((i for i, s in zip(ids, sums, strict=True) if coin < s), ids[-1]), margin


def test_the_random_numbers_are_xorshift64_star():
    """From state 1: one round by hand."""
    state = 1
    state ^= state >> 12
    state ^= (state << 25) % 2**64
    state ^= state >> 27
    first = ((state * 0x2545F4914F6CDD1D) % 2**64 >> 32 >> 8) / 2**24
    assert run_c.coins(1, 3)[0] == np.float32(first)
    found = run_c.coins(133742, 4000)
    assert found.dtype == np.float32
    assert 0 <= found.min() < found.max() < 1
    assert abs(found.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(found[:10], run_c.coins(133742, 10))
    with pytest.raises(ValueError, match="other than 0"):
        run_c.coins(0, 1)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([2, 7, 40]),
)
@settings(max_examples=20)
def test_it_draws_as_run_c_does(seed, temperature, top_p, size):
    random = np.random.default_rng(seed)
    logits = (3 * random.standard_normal((8, size))).astype(np.float32)
    coins = random.random(8).astype(np.float32)
    sampler = Sampler(temperature, 0, top_p, draw="run.c")
    found = np.asarray(run_c.choose(jnp.asarray(coins), jnp.asarray(logits), sampler))
    for token, coin, row in zip(found, coins, logits, strict=True):
        expected, margin = sampled(coin, row, sampler)
        assert token == expected or margin < 1e-5


def test_extreme_coins_and_ties():
    sampler = Sampler(1.0, 0, 0.5, draw="run.c")
    rows = jnp.zeros((2, 4), jnp.float32)
    found = run_c.choose(jnp.array([0.0, 1 - 2**-24], jnp.float32), rows, sampler)
    assert found.tolist() == [0, 2]  # 0.25 and 0.5 are not above 0.5
    whole = Sampler(1.0, 0, 1.0, draw="run.c")
    assert run_c.choose(jnp.array([0.0, 1 - 2**-24], jnp.float32), rows, whole).tolist() == [0, 3]
    best = Sampler(0, draw="run.c")
    assert run_c.choose(jnp.zeros(1), jnp.array([[0.0, 2.0, 2.0]]), best).tolist() == [1]
    assert run_c.choose(jnp.zeros(1), jnp.zeros((1, 1)), sampler).tolist() == [0]


def test_a_row_has_the_numbers_of_its_own_seed():
    params = tiny.params(CFG, jnp.float32)
    rules = Rules(CFG, Sampler(1.0, 0, 0.9, draw="run.c"), CFG.vocab_size)

    def tokens(prompts, seed, count, **how):
        return np.concatenate(
            [new.tokens for new in generate(params, prompts, rules, seed, count, **how)], axis=1
        )

    several = tokens([[1], [1], [1]], 5, 12)
    assert len({tuple(row) for row in several.tolist()}) == 3
    for row in range(3):
        np.testing.assert_array_equal(several[row], tokens([[1]], 5 + row, 12, chunk=2)[0])
        np.testing.assert_array_equal(several[row], tokens([[1]], 5, 12, first=row)[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama2c.write_model(folder / "model.bin", tiny.params(CFG, jnp.float32), CFG)
    TOKENIZER.save(folder / "tokenizer.json")
    return ["--checkpoint", str(folder / "model.bin"), "--tokenizer", str(folder)]


def test_the_command(model, capsys):
    given = [*model, "--draw", "run.c", "--max_new_tokens", "12", "--ignore_end", "--prompt", "ab"]
    for arguments in ([*given, "--seed", "3"], [*given, "--seed", "3", "--num_samples", "2"]):
        assert command.main(arguments) == 0
    first, several = capsys.readouterr().out.split("--- 1 of 2 ---\n")
    assert first.startswith("ab")
    assert several.startswith(first)
    expect_error(command.main, given, "seed must not be 0 with draw run.c", capsys)


def test_prompts_begin_with_begin_of_text_and_it_ends_a_text(model, capsys, monkeypatch):
    seen = []
    unchanged = command.continued

    def spy(params, samples, rules, *rest):
        seen.append(([sample.prompt for sample in samples], rules.ends))
        yield from unchanged(params, samples, rules, *rest)

    monkeypatch.setattr(command, "continued", spy)
    command.main([*model, "--max_new_tokens", "1", "--prompt", "ab", ""])
    command.main([*model, "--max_new_tokens", "1", "--ignore_end"])
    assert seen == [
        ([[1, *TOKENIZER.encode("ab")], [1]], (2, 1)),
        ([[1]], ()),
    ]


STORIES = ["--max_new_tokens", "200", "--checkpoint"]


def told(shared, capsys, *arguments):
    folder = shared / "llama2c"
    given = [str(folder / "stories260K.bin"), "--tokenizer", str(folder / "tok512.bin"), *arguments]
    assert command.main([*STORIES, *given]) == 0
    return capsys.readouterr().out


def test_stories260k_tells_llama2_cs_story(shared, capsys):
    """llama2.c's test.c: 200 steps, greedy, from BOS."""
    import hashlib

    story = told(shared, capsys, "--temperature", "0").removesuffix("\n").encode()
    assert len(story) == 464
    assert hashlib.md5(story).hexdigest() == "16274658e722e6d5f0effe0dd7a16084"


def test_stories260k_tells_run_cs_story_for_a_seed(shared, capsys):
    how = ["--temperature", "1", "--top_p", "0.9", "--seed", "133742", "--draw", "run.c"]
    assert told(shared, capsys, *how).startswith(
        "Once upon a time, there was a little boy named Timmy. Timmy loved to play with his toys "
        "and eat sandwiches."
    )


def test_the_tokenizer_may_not_have_more_ids_than_the_model(shared, capsys):
    folder = shared / "llama2c"
    given = [str(folder / "stories260K.bin"), "--tokenizer", str(folder / "tokenizer.bin")]
    expect_error(command.main, [*STORIES, *given], "has 32000 ids, but", capsys)


def test_the_real_vocabulary(shared):
    found = tokenizers.find(shared / "llama2c" / "tok512.bin")
    text = "Once upon a time, there was a little girl named Lily."
    assert found.decode([1, *found.encode(text)]) == text
