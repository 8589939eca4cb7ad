import pytest

from gptjax import tokenizers
from gptjax.config import Config, DataConfig, ModelConfig, TrainConfig
from gptjax.errors import ConfigError, DataError
from gptjax.generate.text import prompt_ids
from gptjax.train.setup import resolved, set_up
from gptjax.xla.backend import start_jax
from tests.models import tiny


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no such device")])
def test_a_platform_that_is_not_there(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr("jax.devices", fail)
    with pytest.raises(ConfigError, match="JAX cannot start: no such device; unset JAX_PLATFORMS"):
        start_jax(tiny.CONFIG.dtype)


def test_a_sample_always_has_an_id_to_start_from():
    byte, lines, words = tokenizers.byte(), tokenizers.Characters("\n!ab"), tokenizers.Characters("!ab")
    assert prompt_ids(None, "ab") == [0]
    assert [prompt_ids(t, "ab") for t in (byte, lines, words)] == [[97, 98], [2, 3], [1, 2]]
    assert [prompt_ids(t, "\n") for t in (byte, lines, words)] == [[10], [0], [0]]
    assert [prompt_ids(t, "") for t in (byte, lines, words)] == [[256], [0], [0]]


def test_a_prompt_that_the_vocabulary_lacks_is_an_error_before_training():
    with pytest.raises(DataError, match="'c' .* at position 2"):
        prompt_ids(tokenizers.Characters("!ab"), "abc")


@pytest.mark.parametrize(("given", "expected"), [(0, 257), (300, 300)])
def test_a_run_from_scratch_knows_its_tokenizers_ids_unless_it_says_how_many(given, expected, tmp_path):
    (tmp_path / "tale.txt").write_text("Once upon a time. " * 40)
    data = DataConfig(dataset=str(tmp_path / "tale.txt"), root=str(tmp_path), tokenizer="byte", batch_size=2, seq_len=8)
    model = ModelConfig(num_layers=1, num_heads=1, channels=8, vocab_size=given, max_seq_len=8)
    run = set_up(Config(model, data, train=TrainConfig(eval_tokens=16)))
    assert run.model.vocab_size == resolved(run)["model"]["vocab_size"] == expected
