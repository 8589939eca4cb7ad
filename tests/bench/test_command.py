"""``python -m gptjax.bench`` as a user meets it."""

import dataclasses
import importlib.util
import json
import os
import re
import sys

import jax
import pytest

from gptjax.bench import ceiling, data, steps, timing
from tests.commands import expect_error
from tests.conftest import ROOT

command = importlib.import_module("gptjax.bench.__main__")
TINY = [
    "--config",
    str(ROOT / "configs" / "debug.yaml"),
    "--model.num_layers",
    "1",
    "--model.vocab_size",
    "4096",
    "--data.batch_size",
    "2",
    "--data.seq_len",
    "8",
    "--rounds",
    "2",
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Next to no rounds, and little memory to stream."""
    monkeypatch.setattr(timing, "WARMUP", 1)
    monkeypatch.setattr(ceiling, "ROUNDS", 1)
    monkeypatch.setattr(ceiling, "STREAM_BYTES", 4_000_000)


@pytest.fixture
def as_a_process(monkeypatch):
    """What the command sets for its process, given back."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    platforms = jax.config.jax_platforms
    yield
    jax.config.update("jax_platforms", platforms)


def rows(out):
    """Names of the lines below the heads."""
    return [re.split(r"  +", line)[0] for line in out.splitlines()]


def test_the_configured_step_alone(capsys, tmp_path):
    assert command.main([*TINY, "--json", str(tmp_path / "r.json"), "--profile"]) == 0
    out = capsys.readouterr().out
    assert rows(out)[2:5] == ["manual, unroll", "floor", "op"]
    record = json.loads((tmp_path / "r.json").read_text())
    (row,) = record["rows"]
    assert {
        "compile_s",
        "temporary_bytes",
        "total_bytes",
        "ms",
        "spread",
        "tokens_per_s",
        "of_floor",
        "ratio",
    } <= set(row)
    assert row["tokens_per_s"] == pytest.approx(16 / row["ms"] * 1e3)
    assert row["of_floor"] == pytest.approx(row["ms"] / record["floor_ms"])
    assert row["ratio"] == 1
    assert sum(op["kernels"] for op in record["profile"]) > 50


def test_every_other_way_to_compute_it(capsys):
    assert command.main([*TINY, "--compare"]) == 0
    assert rows(capsys.readouterr().out)[2:-1] == [
        "manual, unroll",
        "manual, scan",
        "autodiff, unroll",
        "autodiff, scan",
        "recompute gelu",
        "recompute block",
        "attention blockwise",
    ]


def test_what_is_configured_comes_first_and_is_not_repeated():
    model = command.parse(command.BenchConfig, "bench", "", TINY)[0].model.resolve("cpu", 8)
    scanned = dataclasses.replace(model, layers="scan", recompute="block", attention="blockwise")
    names = [name for name, _, _ in steps.variants(scanned, "autodiff")]
    assert names[:4] == ["autodiff, scan", "autodiff, unroll", "manual, scan", "manual, unroll"]
    assert names[4:] == [
        "recompute none",
        "recompute gelu",
        "attention materialised",
        "attention cudnn",
        "attention splash",
    ]


def test_the_operations_of_a_step_for_hardware_that_is_not_here(as_a_process, capsys, tmp_path):
    assert (
        command.main(
            [*TINY, "--what", "program", "--platform", "cuda", "--json", str(tmp_path / "r.json")]
        )
        == 0
    )
    note, *lines = capsys.readouterr().out.splitlines()
    assert note.startswith("lowered only, as compiling for h100:1 needs jax-cuda12-plugin")
    assert lines[0].startswith(
        "lowered for cuda, bfloat16, attention cudnn, layers unroll, 16 tokens"
    )
    record = json.loads((tmp_path / "r.json").read_text())
    ours, autodiff = (record[way]["dot_general"] for way in ("manual", "autodiff"))
    (line,) = (line.split() for line in lines if line.startswith("dot_general"))
    assert line[1::2] == [str(ours["times"]), str(autodiff["times"])]
    assert float(line[2]) == pytest.approx(ours["nbytes"] / 1e9, abs=0.005)


@pytest.mark.parametrize("option", [["--what", "decode"], ["--decode", "true"]])
def test_decoding(option, capsys, monkeypatch):
    monkeypatch.setattr(steps, "NEW_TOKENS", 4)
    assert command.main([*TINY, *option]) == 0
    assert rows(capsys.readouterr().out)[2:] == [
        "greedy",
        "top 50, top p 0.95",
        "greedy, bfloat16",
        "greedy, q8_0",
        "greedy, q4_0",
        "greedy, q4_1",
        "floor",
    ]


def test_the_peer(capsys, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(steps, "NEW_TOKENS", 4)
    import torch

    # A minute, and a compiler that may not be there
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr(command.torch_peer, "NEW_TOKENS", 4)
    assert command.main([*TINY, "--peer", "torch"]) == 0
    assert rows(capsys.readouterr().out)[2:-1] == [
        "manual, unroll",
        "torch eager, float32",
        "torch eager, bfloat16",
        "torch compile, float32",
        "torch compile, bfloat16",
    ]
    assert command.main([*TINY, "--what", "decode", "--peer", "torch"]) == 0
    assert rows(capsys.readouterr().out)[-3:-1] == [
        "transformers, float32",
        "transformers, bfloat16",
    ]


def test_without_the_peer(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    expect_error(
        command.main,
        [*TINY, "--peer", "torch"],
        "peer torch needs torch: pip install 'gptjax[parity]'",
        capsys,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "nowhere/r.json"], "there is no folder"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--what", "decode", "--model.max_seq_len", "20"], "needs model.max_seq_len 272"),
        (["--platform", "cuda"], "platform goes with --what program"),
        (["--hlo", "folder"], "hlo goes with --what program"),
        (["--comparison", "true"], "did you mean compare?"),
        (["--data.seq_len", "4000"], "data.seq_len 4000 does not fit"),
    ],
)
def test_bad_input(arguments, message, capsys):
    expect_error(command.main, [*TINY, *arguments], message, capsys)


def test_bench_of_the_data_prints_a_row_for_each_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "BATCHES", 5)
    (tmp_path / "tale.txt").write_text(
        "It was the best of times, it was the worst of times. " * 1000
    )
    own = [
        "--data.dataset",
        str(tmp_path / "tale.txt"),
        "--data.root",
        str(tmp_path / "data"),
        "--data.tokenizer",
        "bpe:270",
    ]
    assert command.main([*TINY, *own, "--what", "data"]) == 0
    names = [re.split(r"  +", line)[0] for line in capsys.readouterr().out.splitlines()]
    ours = [
        "text to tokens",
        "ours",
        "tiktoken alone",
        "in one go",
        "tokens to batches",
        "cold",
        "warm",
        "random crops",
    ]
    ours += ["the training step", "manual, unroll"]
    assert names[1:] == ours


HLO = [*TINY, "--what", "program", "--hlo"]


def test_the_compiled_programs_of_a_step(as_a_process, tmp_path, capsys):
    """For this machine's CPU: a file for each program of both steps, with the matrix products in
    the gradients.
    """
    folder, record = tmp_path / "new" / "hlo", tmp_path / "r.json"
    folder.mkdir(parents=True)
    (folder / "manual-update-rest.txt").write_text("of another step")
    assert command.main([*HLO, str(folder), "--platform", "cpu", "--json", str(record)]) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert {"manual-gradient.txt", "autodiff-gradient.txt"} <= set(names)
    assert {name.split("-", 1)[1] for name in names} <= {
        "gradient.txt",
        "update.txt",
        "update-params.txt",
        "update-rest.txt",
    }
    assert (
        sorted(json.loads(record.read_text()))
        == names
        == sorted(rows(capsys.readouterr().out)[2:-1])
    )
    for name in names:
        text = (folder / name).read_text()
        assert text.startswith("HloModule")
        assert "is_scheduled=true" in text.splitlines()[0]
        assert (" dot(" in text) == ("gradient" in name)


@pytest.mark.parametrize(
    ("platform", "plugin", "message"),
    [
        (
            "cuda",
            "jax_cuda12_plugin",
            "compiling for h100:1 needs jax-cuda12-plugin: pip install 'gptjax[cuda-aot]'\n",
        ),
        ("tpu", "libtpu", "compiling for v5e:1x1 needs libtpu: pip install 'gptjax[tpu]'\n"),
        ("rocm", None, "hlo cannot compile for platform rocm, only for cpu, cuda, tpu\n"),
    ],
)
def test_a_compiler_that_is_not_there(platform, plugin, message, as_a_process, tmp_path, capsys):
    """Nothing is written before it is found."""
    if plugin and importlib.util.find_spec(plugin):
        pytest.skip(f"{plugin} is installed")
    expect_error(
        command.main, [*HLO, str(tmp_path / "hlo"), "--platform", platform], message, capsys
    )
    assert not (tmp_path / "hlo").exists()


def test_a_folder_that_cannot_be_made(as_a_process, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    expect_error(
        command.main,
        [*HLO, str(tmp_path / "file"), "--platform", "cpu"],
        f"{tmp_path / 'file'}",
        capsys,
    )
