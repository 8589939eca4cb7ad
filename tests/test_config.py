import ast
from pathlib import Path

import pytest

from gptjax import config
from gptjax.config import Architecture, ModelConfig
from gptjax.errors import ConfigError
from gptjax.models.params import param_shapes
from tests.models import tiny


def test_preset_fills_what_is_not_given():
    cfg = ModelConfig(preset="350m", num_layers=3)
    assert (cfg.num_layers, cfg.num_heads, cfg.channels) == (3, 16, 1024)


def test_the_vocabulary_is_the_tokenizers_unless_it_is_given():
    cfg = ModelConfig(preset="124m")
    assert (cfg.vocab_size, cfg.with_vocabulary(65).vocab_size) == (0, 65)
    assert tiny.config(vocab_size=11).with_vocabulary(65).vocab_size == 11
    assert "Vp" not in cfg.axis_sizes
    with pytest.raises(ConfigError, match="model.vocab_size is not known yet"):
        param_shapes(cfg)
    for architecture in (
        lambda: cfg.architecture,
        lambda: Architecture(num_layers=1, num_heads=1, channels=8, vocab_size=0),
    ):
        with pytest.raises(ConfigError, match="model.vocab_size must be at least 1, not 0"):
            architecture()


def test_it_imports_nothing_of_the_package_but_errors():
    imported = {
        node.module
        for node in ast.walk(ast.parse(Path(config.__file__).read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert {name for name in imported if name.startswith("gptjax")} == {"gptjax.errors"}


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)]
)
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert tiny.config(vocab_size=vocab_size).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": None, "channels": 0}, "model.channels is missing"),
        (
            {"channels": 10, "num_heads": 4},
            "model.channels 10 is not divisible by model.num_heads 4",
        ),
        ({"num_layers": -1}, "model.num_layers must be at least 1"),
        ({"dropout": 1.0}, r"model.dropout must be in \[0, 1\)"),
        ({"dropout_mlp": -0.1}, r"model.dropout_mlp must be in \[0, 1\)"),
        ({"vocab_size": -1}, "model.vocab_size must be at least 0, not -1"),
        ({"loss_chunks": 0}, "model.loss_chunks must be auto or at least 1"),
    ],
)
def test_impossible_dimensions(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(**changes)


def resolved(platform, seq_len=1024, **changes):
    cfg = ModelConfig(preset="124m", max_seq_len=4096, **changes).resolve(platform, seq_len)
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


@pytest.mark.parametrize(
    "changes", [{"dropout": 0.1}, {"dtype": "float32"}, {"num_heads": 3}, {"num_heads": 256}]
)
def test_auto_avoids_cudnn_where_it_cannot_serve(changes):
    assert resolved("cuda", 4096, **changes)[1] == "blockwise"
    with pytest.raises(ConfigError, match="model.attention cudnn"):
        resolved("cuda", 4096, attention="cudnn", **changes)


@pytest.mark.parametrize(
    ("changes", "seq_len"), [({"dropout": 0.1}, 1024), ({"dtype": "float64"}, 1024), ({}, 1023)]
)
def test_auto_avoids_splash_where_it_cannot_serve(changes, seq_len):
    assert resolved("tpu", seq_len, **changes)[1] == "blockwise"
    with pytest.raises(ConfigError, match="model.attention splash"):
        resolved("tpu", seq_len, attention="splash", **changes)
    with pytest.raises(ConfigError, match="needs a TPU, not cuda"):
        resolved("cuda", attention="splash")


def test_explicit_choices_stay():
    assert resolved("cuda", 64, dtype="float32", attention="materialised") == (
        "float32",
        "materialised",
    )
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, not cpu"):
        resolved("cpu", attention="cudnn")


def test_sequence_longer_than_the_model():
    with pytest.raises(ConfigError, match="data.seq_len 5000 does not fit model.max_seq_len 4096"):
        resolved("cpu", 5000)


def test_weights_do_not_depend_on_the_computation_options():
    cfg = tiny.config(dropout=0.5, dtype="bfloat16", layers="scan")
    assert cfg.architecture == tiny.CONFIG.architecture
    assert isinstance(cfg.architecture, Architecture)
    assert not hasattr(cfg.architecture, "dtype")


def test_the_sizes_of_the_axes_are_those_of_the_legend():
    sizes = tiny.config(channels=24, num_heads=3, hidden=7).axis_sizes
    assert sizes == {"L": 2, "C": 24, "H": 3, "K": 3, "D": 8, "F": 7, "Vp": 128, "T": 12}
    assert tiny.CONFIG.hidden == 4 * tiny.CONFIG.channels
