"""``python -m gptjax.verify`` as a user meets it."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.cli.options import parse
from gptjax.formats import llmc, safetensors
from gptjax.models import gpt2
from gptjax.ops import IGNORE_INDEX
from gptjax.parallel.sharding import num_shards
from gptjax.verify.ops import OpError
from tests.commands import expect_error
from tests.conftest import ROOT
from tests.models import tiny

command = importlib.import_module("gptjax.verify.__main__")
TINY = [
    "--config",
    str(ROOT / "configs" / "debug.yaml"),
    "--model.num_layers",
    "1",
    "--data.batch_size",
    "2",
    "--data.seq_len",
    "8",
]
TINY += ["--model.channels", "16", "--model.vocab_size", "100"]


@pytest.fixture(autouse=True)
def one_op(monkeypatch):
    """The ops are tested by themselves."""
    monkeypatch.setattr(command, "check_ops", lambda dtype: [OpError("an op", 0.0, 1.0, 0.0, 1.0)])


def plant(monkeypatch):
    right = gpt2.gelu_bwd

    def gelu_bwd(saved, dy):
        return right(saved, dy) * (1 + 1e-9)

    monkeypatch.setattr(gpt2, "gelu_bwd", jax.jit(gelu_bwd))


def test_everything_holds(capsys, tmp_path):
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert command.main([*TINY, "--layers", *files]) == 0
    out = capsys.readouterr().out
    assert out.count(" ok\n") == 21 + 2 + 20 + 1
    assert "fcw[0]" in out
    assert "a row has all layers" not in out
    assert "all 21 gradients agree with autodiff in float64" in out
    assert "took " in out.splitlines()[-3]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ok"]
    assert {"device", "versions", "XLA_FLAGS", "config", "took", "parameters"} <= set(
        report["environment"]
    )
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()


def test_a_wrong_backward_ends_with_1_and_is_named(monkeypatch, capsys, tmp_path):
    plant(monkeypatch)
    assert (
        command.main([*TINY, "--export", str(tmp_path / "out"), "--html", str(tmp_path / "r.html")])
        == 1
    )
    out, stages = capsys.readouterr()
    assert stages.splitlines() == [
        "checking   the gradient by hand",
        "checking   JAX's gradient in float64",
        "checking   the tolerances",
        "checking   Hessian-vector products",
        "checking   wrong: looking for the op",
        "checking   each op by itself",
    ]
    lines = out.splitlines()
    closing = next(line for line in lines if "GRADIENTS ARE WRONG" in line)
    assert (
        "first at layer 0, gelu (after fcw): gelu_bwd gives a wrong gradient (relative L2 error "
        "1.0e-09)" in closing
    )
    assert lines[-1] == "nothing was exported, as the gradient is wrong"
    assert not list((tmp_path / "out").iterdir())
    assert "outlined where wrong" in (tmp_path / "r.html").read_text()


ON_A_MESH = ["--mesh.data", "2", "--mesh.tensor", "2", "--optim.accumulate", "2"]


def test_the_sharded_accumulated_program_is_checked(capsys):
    assert command.main([*TINY, *ON_A_MESH]) == 0
    out = capsys.readouterr().out
    assert "4 devices: data 2 x fsdp 1 x tensor 2" in out
    assert "a row has all layers of a tensor" in out
    assert "2 micro-batches of 2 x 8 tokens" in out
    assert "all 21 gradients agree with autodiff in float64" in out


def test_an_error_only_on_the_mesh_exits_with_1_and_names_the_mesh(monkeypatch, capsys):
    right = gpt2.embedding_bwd

    def wrong(ids, dtable, dy):
        return right(ids, dtable, dy) if num_shards() == 1 else 2 * dtable - right(ids, dtable, dy)

    monkeypatch.setattr(gpt2, "embedding_bwd", wrong)
    assert command.main([*TINY, *ON_A_MESH]) == 1
    assert (
        "first at the program on the mesh: only it differs; on one device the gradient is "
        "right" in capsys.readouterr().out
    )


def test_a_mesh_that_does_not_divide_the_batch_is_refused(capsys):
    expect_error(
        command.main,
        [*TINY, "--mesh.data", "8"],
        "data.batch_size 2 is not divisible by mesh.data",
        capsys,
    )


def test_a_wrong_gradient_exits_with_1_even_if_the_report_fails(monkeypatch, capsys, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device", "r.html")

    monkeypatch.setattr(command, "write_report", full)
    monkeypatch.setattr(command, "check_ops", lambda dtype: [OpError("an op", 2.0, 1.0, 0.0, 1.0)])
    assert command.main([*TINY, "--html", str(tmp_path / "r.html")]) == 1
    assert "r.html cannot be written: No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(command, "check_ops", lambda dtype: [OpError("an op", 0.0, 1.0, 0.0, 1.0)])
    monkeypatch.setattr(command, "write_report", full)
    with pytest.raises(SystemExit) as stop:
        command.main([*TINY, "--html", str(tmp_path / "r.html")])
    assert stop.value.code == 2
    *stages, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("checking") for line in stages)
    assert "No space left on device" in error


def test_a_report_path_that_is_not_writable_fails_before_the_check(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command.os, "access", lambda path, mode: path != tmp_path)
    expect_error(
        command.main, [*TINY, "--json", str(tmp_path / "r.json")], "permission denied", capsys
    )


def made(*arguments):
    """The subject of these arguments, and what the command says of it."""
    cfg, _ = parse(command.VerifyConfig, "verify", "", [*TINY, *arguments])
    subject, _, facts = command.make_subject(cfg)
    return subject, facts


def test_some_random_targets_are_ignored_except_in_an_export():
    subject, facts = made("--data.seq_len", "64", "--model.dropout", "0.5")
    assert 0.05 < (subject.batch.targets == IGNORE_INDEX).mean() < 0.25
    assert "dropout 0.5" in facts["model"]
    subject, facts = made("--data.seq_len", "64", "--model.dropout", "0.5", "--export", "x")
    assert (subject.batch.targets >= 0).all()
    assert "dropout 0.0" in facts["model"]


def test_the_config_hash_ignores_how_the_report_is_shown():
    one, other, different = (
        made(*a)[1]["config"] for a in ([], ["--layers", "true", "--json", "x"], ["--seed", "1"])
    )
    assert one == other != different


def test_a_checkpoint_gives_the_dimensions(capsys, tmp_path):
    """A Llama, of which nothing else says so. With a configuration they have to be the same."""
    cfg = tiny.config(family="llama", num_layers=1, num_heads=4, num_kv_heads=2)
    path = tmp_path / "m.safetensors"
    safetensors.write_model(path, tiny.params(cfg), cfg, np.dtype(np.float32))
    model = ["--checkpoint", str(path)]
    assert command.main([*model, "--data.seq_len", "4", "--data.batch_size", "1"]) == 0
    out = capsys.readouterr().out
    assert "vocabulary 11" in out
    assert "all 12 gradients agree" in out
    expect_error(command.main, [*TINY, *model], "has model.family llama, not gpt2", capsys)


def test_parameters_that_are_not_finite_are_named(capsys, tmp_path):
    subject, _ = made()
    block = subject.params.blocks[0]
    broken = subject.params._replace(blocks=(block._replace(fcb=block.fcb.at[3].set(jnp.nan)),))
    llmc.write_model(tmp_path / "m.bin", broken, subject.cfg)
    expect_error(
        command.main,
        [*TINY, "--checkpoint", str(tmp_path / "m.bin")],
        "the llm.c model has numbers in fcb[0] that are not finite",
        capsys,
    )


def test_a_wrong_op_alone_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr(command, "check_ops", lambda dtype: [OpError("an op", 2.0, 1.0, 0.0, 1.0)])
    assert command.main(TINY) == 1
    assert "THE OP an op IS WRONG, though the gradients agree" in capsys.readouterr().out


def test_exported_files_are_a_reference(capsys, tmp_path):
    """What is written is read back and agrees, also by a model of scanned layers in another
    precision.
    """
    assert command.main([*TINY, "--export", str(tmp_path), "--model.max_seq_len", "12"]) == 0
    files = [
        "--checkpoint",
        str(tmp_path / "gpt2_124M.bin"),
        "--reference",
        str(tmp_path / "gpt2_124M_debug_state.bin"),
    ]
    same = [
        *TINY,
        "--model.max_seq_len",
        "12",
        "--dtype",
        "float32",
        "--model.layers",
        "scan",
        *files,
    ]
    assert command.main(same) == 0
    assert "agree with the file" in capsys.readouterr().out
    (tmp_path / "cut").write_bytes((tmp_path / "gpt2_124M_debug_state.bin").read_bytes()[:-4])
    expect_error(command.main, [*same[:-1], str(tmp_path / "cut")], "truncated", capsys)


def test_differences(capsys):
    assert command.main([*TINY, "--reference", "finite-difference"]) == 0
    assert "random direction 3" in capsys.readouterr().out


def test_explain(capsys):
    assert command.main([*TINY, "--explain"]) == 0
    assert "Higham and Mary" in capsys.readouterr().out


def test_a_batch_of_the_corpus(shared, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(
            (shared / "tinyshakespeare" / "tiny_shakespeare_val.bin").read_bytes()
        )
    arguments = [
        *TINY[:-2],
        "--model.vocab_size",
        "50257",
        "--batch",
        "corpus",
        "--data.dataset",
        str(folder),
    ]
    cfg, _ = parse(command.VerifyConfig, "verify", "", [*arguments, "--data.order", "sequential"])
    subject, _, facts = command.make_subject(cfg)
    assert subject.batch.inputs[0, 0, :6].tolist() == [50256, 5962, 22307, 25, 198, 8421]
    assert (subject.batch.targets[..., :-1] == subject.batch.inputs[..., 1:]).all()
    assert facts["batch"].startswith("2 x 8 tokens, the first of ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.chanels", "3"], "did you mean model.channels?"),
        (["--dtype", "float16"], "dtype"),
        (["--reference", "nothing"], "there is no file nothing"),
        (["--reference", str(ROOT / "README.md")], "give their file as --checkpoint"),
        (
            ["--reference", str(ROOT / "README.md"), "--checkpoint", "x"],
            "README.md is not an llm.c debug state",
        ),
        (
            ["--reference", "finite-difference", "--dtype", "bfloat16"],
            "needs dtype float64 or float32",
        ),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--checkpoint", ""], "holds no checkpoint"),
        (["--checkpoint", str(ROOT / "README.md")], "in an unknown format"),
        (["--json", "nowhere/r.json"], "there is no folder nowhere"),
        (["--html", str(ROOT)], "it is a folder"),
        (["--html", "r", "--json", "./r"], "json and html are both r: name two files"),
        (["--export", "/proc/nowhere"], "/proc/nowhere cannot be used"),
        (["--seed", "4294967296"], "seed must be a number of at most 4,294,967,295"),
        (["--export", str(ROOT / "README.md")], "is a file, not a folder"),
        (["--data.seq_len", "4000"], "data.seq_len 4000 does not fit"),
        (["--model.attention", "cudnn"], "needs an NVIDIA GPU"),
    ],
)
def test_bad_input(arguments, message, capsys):
    expect_error(command.main, [*TINY, *arguments], message, capsys)


def test_initial_parameters_are_exact_in_every_precision():
    cfg, _ = parse(command.VerifyConfig, "verify", "", TINY)
    subject, _, _ = command.make_subject(cfg)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(subject.params))
