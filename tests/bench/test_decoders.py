"""Decoding of a checkpoint by us and by other programs."""

import importlib
import importlib.util
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.bench import ceiling, decoders
from gptjax.bench.decoders import Task
from gptjax.formats import gguf
from gptjax.models.params import num_padded_params
from tests.commands import expect_error
from tests.models import tiny

command = importlib.import_module("gptjax.bench.__main__")
CFG = tiny.config(
    family="llama", num_layers=1, channels=32, vocab_size=40, max_seq_len=512, dtype="float32"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    gguf.write_model(path, tiny.params(CFG, jnp.float32), CFG)
    return str(path)


class Here:
    """`decoders.Process` without a process."""

    def __init__(self, work, said):
        self.name, self.runs = work.name, 0
        self.figures = {"prompt_s": 2.0, "decode_s": 3.0, "peak_bytes": 5, "bytes_per_token": 7}
        if self.name.startswith("gptjax"):
            out = io.StringIO()
            decoders.serve(work, ["\n"], out)
            self.figures = json.loads(out.getvalue())

    def run(self):
        """Once more, longer each time."""
        self.runs += 1
        return self.figures | {"decode_s": self.figures["decode_s"] * self.runs}

    def close(self):
        """It was run as often as asked."""
        assert self.runs == 4  # one before those that count


def test_the_rows_of_all_contenders(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoders, "Process", Here)
    monkeypatch.setattr(decoders, "converted", lambda checkpoint, peer, folder: checkpoint)
    monkeypatch.setattr(decoders, "OURS", ("q4_1", "float32"))
    monkeypatch.setattr(decoders, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(decoders, "NEW_TOKENS", 4)
    monkeypatch.setattr(ceiling, "STREAM_BYTES", 4_000_000)
    file = tmp_path / "r.json"
    arguments = ["--what", "decode", "--checkpoint", checkpoint, "--rounds", "3"]
    asked = ["--peer", "llama.cpp,ctranslate2", "--json", str(file)]
    assert command.main([*arguments, *asked]) == 0
    record = json.loads(file.read_text())
    ours = [f"gptjax {how}" for how in ("q4_1", "float32")]
    assert list(record["rows"]) == [*ours, "llama.cpp", "ctranslate2"]
    for row in record["rows"].values():
        assert {"tokens_per_s", "prompt_tokens_per_s", "peak_bytes"} <= set(row)
    theirs = record["rows"]["llama.cpp"]
    assert theirs["tokens_per_s"] == pytest.approx(3 / 9)  # the median of 6, 9 and 12 seconds
    assert (theirs["prompt_tokens_per_s"], theirs["peak_bytes"]) == (4, 5)
    assert theirs["of_reading"] == pytest.approx(7 * 3 / 9 / record["reading"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].rstrip() for line in lines[2:]] == [
        *(*ours, "llama.cpp", "ctranslate2"),
        *("memory", f"wrote {file}"[:24].rstrip()),
    ]
    assert record["rows"]["gptjax float32"]["bytes_per_token"] == 4 * num_padded_params(CFG)
    # 20 bytes for 32 weights; vectors remain
    vectors = 4 * (2 * CFG.num_layers + 1) * CFG.channels
    matrices = num_padded_params(CFG) - vectors // 4
    assert record["rows"]["gptjax q4_1"]["bytes_per_token"] == matrices * 20 / 32 + vectors


def test_a_peer_that_is_not_installed(checkpoint, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(decoders.ConfigError, match="peer llama.cpp needs xllamacpp: pip install"):
        decoders.converted(checkpoint, "llama.cpp", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x"], "checkpoint goes with --what decode"),
        (
            ["--model.preset", "124m", "--peer", "llama.cpp"],
            "peer llama.cpp is not known without checkpoint: choose torch",
        ),
        (
            ["--what", "decode", "--checkpoint", "x", "--peer", "torch"],
            "peer torch is not known with checkpoint: choose llama.cpp or ctranslate2 or",
        ),
        (["--what", "decode", "--checkpoint", "x"], "x does not exist"),
    ],
)
def test_bad_input(arguments, message, capsys):
    expect_error(command.main, arguments, message, capsys)


def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "SERVE", "import sys; sys.exit('no such model')")
    with (tmp_path / "said").open("w+") as said:
        process = decoders.Process(Task("gptjax q8_0", "x", [1], 2), said)
        with pytest.raises(decoders.ConfigError, match="gptjax q8_0 has failed: no such model"):
            process.run()
        process.close()


@pytest.mark.parametrize("name", ["gptjax q8_0", "ctranslate2", "transformers"])
def test_each_contender_in_its_process(name, checkpoint, tmp_path):
    """But llama.cpp, which reads no model without a vocabulary."""
    package = decoders.PACKAGES.get(name, "jax")
    pytest.importorskip(package)
    model = checkpoint
    if name in decoders.PACKAGES:
        model = decoders.converted(checkpoint, name, str(tmp_path))
    prompt = np.arange(1, 17).tolist()
    with (tmp_path / "said").open("w+") as said:
        process = decoders.Process(Task(name, model, prompt, 8), said)
        found = process.run()
        process.close()
    assert set(found) == {"prompt_s", "decode_s", "peak_bytes", "bytes_per_token"}
    assert min(found.values()) > 0
