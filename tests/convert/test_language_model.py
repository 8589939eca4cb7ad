"""A model as a library's user has it: text in; text, losses and gradients out."""

import dataclasses
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax import tokenizers
from gptjax.convert.weights import tokenizer_beside
from gptjax.errors import ConfigError, DataError
from gptjax.formats import llmc
from tests.models import tiny

CFG = tiny.config(dtype="float32", vocab_size=262)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.bin"
    llmc.write_model(path, tiny.params(CFG, jnp.float32), CFG)
    return str(path)


@pytest.fixture(scope="module")
def model(file):
    return gptjax.load(file, "byte")


def test_the_five_lines_of_the_help_run(file, monkeypatch, tmp_path, capsys):
    lines = textwrap.dedent(gptjax.__doc__.split("\n\n")[1])
    assert lines.count("\n") == 4
    load = gptjax.load
    with monkeypatch.context() as patch:
        patch.setattr(gptjax, "load", lambda where: load(file, "byte"))
        names: dict = {}
        # The model reads 12 tokens
        exec(lines.replace("The quick brown fox", "The fox"), names)
    text, loss = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert text.startswith("The ")
    assert float(loss) > 0
    assert names["grads"].wte.shape == names["model"].params.wte.shape


def test_loss_and_gradient_are_those_of_the_text(model):
    ids = tokenizers.byte().encode("the cat")
    row = np.array([ids], np.int32)
    batch = gptjax.Batch(row[:, :-1], row[:, 1:])
    assert model.loss("the cat") == pytest.approx(float(gptjax.loss(model.params, batch, CFG)))
    grads, expected = model.grad("the cat"), jax.grad(gptjax.loss)(model.params, batch, CFG)
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_it_generates_as_the_seed_and_the_options_say(model):
    one, same, other = (model.generate("ab", 8, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert one.startswith("ab")
    stopped = model.generate("ab", 8, seed=1, stop=[one[3]])
    assert one.startswith(stopped)
    assert one[3] not in stopped[2:]


@pytest.mark.parametrize(("text", "count"), [("a", 1), ("a" * 14, 14)])
def test_a_text_that_does_not_fit_is_refused(model, text, count):
    with pytest.raises(DataError, match=f"has {count} tokens, and it takes from 2 to 13"):
        model.loss(text)


def test_a_model_needs_a_tokenizer_that_fits(file, tmp_path):
    with pytest.raises(ConfigError, match="has no tokenizer: name one"):
        gptjax.load(file)
    small = dataclasses.replace(CFG, vocab_size=11)
    llmc.write_model(tmp_path / "small.bin", tiny.params(small, jnp.float32), small)
    with pytest.raises(ConfigError, match="byte has 257 ids, but .* only 11"):
        gptjax.load(str(tmp_path / "small.bin"), "byte")


def test_another_tokenizer_than_the_models_own_is_refused(tmp_path):
    written = tmp_path / "own.bin"
    llmc.write_model(written, tiny.params(CFG, jnp.float32), CFG)
    tokenizers.byte().save(tokenizer_beside(written))
    assert gptjax.load(str(written)).tokenizer.same_as(tokenizers.byte())
    other = tmp_path / tokenizers.FILE
    tokenizers.train_characters(["abc"]).save(other)
    with pytest.raises(ConfigError, match="own tokenizer, byte of 257 ids, and .* is another"):
        gptjax.load(str(written), str(other))


def test_it_prints_in_a_line(model):
    assert repr(model) == "<gpt2, 3,952 parameters, 2 layers, 257 ids>"
