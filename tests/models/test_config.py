import pytest

from gptjax.errors import ConfigError
from gptjax.models.config import GPT2Config
from tests.models import tiny


def test_preset_fills_what_is_not_given():
    cfg = GPT2Config(preset="350m", num_layers=3)
    assert (cfg.num_layers, cfg.num_heads, cfg.channels) == (3, 16, 1024)


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert tiny.config(vocab_size=vocab_size).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": None, "channels": 0}, "model.channels is missing"),
        ({"channels": 10, "num_heads": 4}, "model.channels 10 does not divide by model.num_heads 4"),
        ({"num_layers": -1}, "model.num_layers must be at least 1"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\)"),
    ],
)
def test_impossible_dimensions(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(**changes)


def resolved(platform, seq_len=1024, **changes):
    cfg = GPT2Config(preset="124m", max_seq_len=4096, **changes).resolve(platform, seq_len)
    return cfg.dtype, cfg.attention


def test_auto_picks_by_platform_and_length():
    assert resolved("cpu", 128) == ("float32", "materialised")
    assert resolved("cpu", 129) == ("float32", "blockwise")
    assert resolved("rocm", 256) == ("bfloat16", "materialised")
    assert resolved("tpu", 64) == ("bfloat16", "materialised")
    assert resolved("tpu", 128) == ("bfloat16", "splash")
    assert resolved("tpu", 1000) == ("bfloat16", "blockwise")
    assert resolved("cuda") == ("bfloat16", "cudnn")
    assert resolved("rocm", 4096) == ("bfloat16", "blockwise")


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"dtype": "float32"}, {"num_heads": 3}, {"num_heads": 256}])
def test_auto_avoids_cudnn_where_it_cannot_serve(changes):
    assert resolved("cuda", 4096, **changes)[1] == "blockwise"
    with pytest.raises(ConfigError, match="model.attention cudnn"):
        resolved("cuda", 4096, attention="cudnn", **changes)


@pytest.mark.parametrize(("changes", "seq_len"), [({"dropout": 0.1}, 1024), ({"dtype": "float64"}, 1024), ({}, 1023)])
def test_auto_avoids_splash_where_it_cannot_serve(changes, seq_len):
    assert resolved("tpu", seq_len, **changes)[1] == "blockwise"
    with pytest.raises(ConfigError, match="model.attention splash"):
        resolved("tpu", seq_len, attention="splash", **changes)
    with pytest.raises(ConfigError, match="needs a TPU, not cuda"):
        resolved("cuda", attention="splash")


def test_explicit_choices_stay():
    assert resolved("cuda", 64, dtype="float32", attention="materialised") == ("float32", "materialised")
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, not cpu"):
        resolved("cpu", attention="cudnn")


def test_sequence_longer_than_the_model():
    with pytest.raises(ConfigError, match="data.seq_len 5000 does not fit model.max_seq_len 4096"):
        resolved("cpu", 5000)
