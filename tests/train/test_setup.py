import pytest

from gptjax import tokenizers
from gptjax.errors import ConfigError, DataError
from gptjax.generate.stream import prompt_ids
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
