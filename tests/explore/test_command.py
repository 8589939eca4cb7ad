import json
import re

import jax
import jax.numpy as jnp
import pytest

from gptjax.explore import __main__ as command
from gptjax.formats import safetensors
from gptjax.models.params import init_params
from tests.commands import expect_error
from tests.models import tiny


@pytest.fixture
def checkpoint(tmp_path):
    """A model for bytes, without a tokenizer."""
    cfg = tiny.config(vocab_size=257, dtype="float32", num_layers=1, max_seq_len=12)
    path = tmp_path / "model.safetensors"
    params = init_params(jax.random.key(0), cfg)
    safetensors.write_model(path, params, cfg, jnp.float32.dtype)
    return path


def data_of(path):
    (content,) = re.findall(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(content)


def test_it_writes_a_page(checkpoint, tmp_path, capsys):
    out = tmp_path / "page.html"
    args = ["--checkpoint", str(checkpoint), "--data.tokenizer", "byte", "--text", "abcab"]
    assert command.main([*args, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {out}, ")
    assert re.search(r"15 ops, \d\d errors planted", said)
    data = data_of(out)
    assert data["tokens"] == list("abcab")
    assert len(data["token_losses"]) == 4
    assert data["facts"]["Weights"] == "model.safetensors"
    assert "GPT-2\N{RIGHT SINGLE QUOTATION MARK}s backward pass" in out.read_text("utf-8")


@pytest.fixture
def quick(monkeypatch):
    """Show next to nothing of the model."""

    def scene(cfg, params, batch):
        found = {"loss": 1.0, "tensors": [{"error": -15}], "nodes": [], "faults": []}
        return found | {
            "cfg": [cfg.dtype, cfg.layers, cfg.num_layers],
            "ids": batch.inputs.tolist(),
        }

    monkeypatch.setattr(command, "scene", scene)


def test_a_configuration_gives_a_model_with_random_weights(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("some text of my own " * 99)
    args = ["--data.dataset", "my.txt", "--data.tokenizer", "byte", "--text", "x" * 99]
    assert command.main(args) == 0
    data = data_of(tmp_path / "page.html")
    assert data["cfg"] == ["float64", "unroll", 2]
    assert data["facts"]["Weights"] == "random"
    assert len(data["tokens"]) == command.MOST_TOKENS + 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", ""], "text '' has 0 tokens: give one of at least 2"),
        (["--text", "a"], "text 'a' has 1 tokens: give one of at least 2"),
        (["--out", "."], ". cannot be written: it is a folder"),
        (["--out", "nowhere/page.html"], "cannot be written: there is no folder nowhere"),
        (["--checkpoint", "nothing"], "nothing does not exist"),
    ],
)
def test_bad_input_is_one_sentence(args, message, quick, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--checkpoint", str(checkpoint), "--data.tokenizer", "byte", *args]
    expect_error(command.main, given, message, capsys)
    assert not (tmp_path / "page.html").exists()


def test_a_checkpoint_without_a_tokenizer_asks_for_one(quick, checkpoint, capsys):
    expect_error(
        command.main,
        ["--checkpoint", str(checkpoint)],
        "has no tokenizer: give --data.tokenizer gpt2, byte or a tokenizer file",
        capsys,
    )


def test_a_tokenizer_of_another_model_is_refused(quick, tmp_path, capsys):
    cfg = tiny.config(vocab_size=50, dtype="float32", num_layers=1)
    path = tmp_path / "model.safetensors"
    safetensors.write_model(path, init_params(jax.random.key(0), cfg), cfg, jnp.float32.dtype)
    args = ["--checkpoint", str(path), "--data.tokenizer", "byte", "--text", "abc"]
    expect_error(command.main, args, "has the id 99, but the model's vocabulary is 50", capsys)
