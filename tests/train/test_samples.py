"""Samples on the way: the prompt goes on, the same way each time it is asked for after the same
step.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gptjax import tokenizers
from gptjax.config import TrainConfig
from gptjax.train.samples import sample_text
from tests.models import tiny

LETTERS = tokenizers.Characters("abcd")


def run(tokenizer, **options):
    """What `sample_text` reads of a run."""
    train = TrainConfig(
        **{"sample_tokens": 8, "sample_prompt": "ab", "sample_temperature": 1.0, "sample_top_k": 0}
        | options
    )
    cfg = SimpleNamespace(train=train)
    model = tiny.config(dtype="float32")
    return SimpleNamespace(
        cfg=cfg,
        model=model,
        corpus=SimpleNamespace(tokenizer=tokenizer),
        key=jax.random.key(0),
        mesh=None,
    )


@pytest.fixture(scope="module")
def params():
    return tiny.params(tiny.config(dtype="float32"), jnp.float32)


def test_the_prompt_goes_on_in_the_tokenizers_ids(params):
    """The model has more ids than the tokenizer, none of which could be decoded."""
    text = sample_text(run(LETTERS), params, 3)
    assert text.startswith("ab")
    assert len(text) == 2 + 8
    assert set(text) <= set("abcd")


def test_the_step_alone_decides_what_is_drawn(params):
    texts = [sample_text(run(LETTERS), params, step) for step in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_tokenizer_ids_are_shown(params):
    ids = [int(word) for word in sample_text(run(None), params, 3).split()]
    assert len(ids) == 8
    assert all(0 <= n < tiny.CONFIG.vocab_size for n in ids)


def test_at_temperature_0_the_likeliest_is_taken(params):
    cfg = tiny.config(dtype="float32")
    likes_c = tiny.unigram(cfg, [0.1, 0.2, 0.5, 0.1, 0.05, 0.05])
    assert sample_text(run(LETTERS, sample_temperature=0.0), likes_c, 1) == "ab" + 8 * "c"
