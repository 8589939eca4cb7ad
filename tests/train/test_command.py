"""The command as a person runs it, on a tiny model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from gptjax.convert import __main__ as convert
from gptjax.datasets import find_corpus
from gptjax.formats.token_shards import write_shard
from gptjax.models import gpt2
from gptjax.train import __main__ as train
from gptjax.train import trainer
from gptjax.xla import native
from gptjax.xla.cache import enable_compilation_cache
from tests.conftest import ROOT

TINY = {
    "model": {
        "num_layers": 1,
        "num_heads": 2,
        "channels": 16,
        "vocab_size": 4096,
        "max_seq_len": 32,
        "dropout": 0.1,
    },
    "data": {"batch_size": 4, "seq_len": 16},
    "optim": {"learning_rate": 1e-2, "warmup_steps": 3},
    "train": {
        "steps": 20,
        "eval_every": 10,
        "eval_tokens": 64,
        "sample_tokens": 8,
        "checkpoint_every": 10,
    },
}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    find_corpus("pydoc", root)
    return root


@pytest.fixture
def command(tmp_path, data_root):
    """The arguments of a tiny run in a folder of its own."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    return [
        "--config",
        str(config),
        "--runs",
        str(tmp_path / "runs"),
        "--data.root",
        str(data_root),
    ]


def run(*args: str) -> int:
    """The command in this process, with JAX's default precision."""
    with jax.enable_x64(False):
        return train.main([*map(str, args)])


def start(*args: str) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "gptjax.train", *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def metrics_text(folder: Path) -> str:
    path = folder / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in metrics_text(folder).splitlines()]


def arrays(folder: Path, step: int):
    """All arrays of a checkpoint, as Orbax alone reads them."""
    path = folder / "checkpoints" / f"step_{step:08d}" / "state"
    with warnings.catch_warnings(), ocp.StandardCheckpointer() as reader:
        warnings.simplefilter("ignore")  # Orbax: no sharding given
        return jax.tree.leaves(reader.restore(path.absolute()))


def assert_same_run(one: Path, other: Path, step: int = 20) -> None:
    """Bit for bit: every loss and norm, and every parameter and moment at the end."""
    keys = "step", "loss", "grad_norm", "lr"
    assert [[r.get(k) for k in keys] for r in metrics(one)] == [
        [r.get(k) for k in keys] for r in metrics(other)
    ]
    mine, theirs = arrays(one, step), arrays(other, step)
    assert len(mine) > 40
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_from_start_to_end(command, tmp_path, capsys):
    assert run(*command, "--train.sample_every", "10") == 0
    folder = tmp_path / "runs" / "tiny"
    out = capsys.readouterr().out
    for word in (
        "device     cpu",
        "parameters",
        "training and",
        "GFLOP",
        "predicted",
        "tok/s",
        "val loss",
        "--- sample after step 10",
    ):
        assert word in out, word
    records = metrics(folder)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert all(set(r) >= {"step", "loss", "grad_norm", "lr", "ms", "tokens_per_s"} for r in records)
    assert [r["step"] for r in records if "val_loss" in r] == [10, 20]
    assert records[0]["loss"] == pytest.approx(np.log(4096), rel=0.05)
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    assert [round(r["lr"], 5) for r in records[:3]] == [0.00333, 0.00667, 0.01]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (resolved["model"]["dtype"], resolved["model"]["attention"]) == (
        "float32",
        "materialised",
    )
    assert resolved["train"]["steps"] == 20
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "tokenizer.json",
        "checkpoints",
        "lock",
    }
    assert run(*command, "--train.steps", "1") == 0
    # The first run is left alone
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"tiny", "tiny-2"}
    assert metrics(folder) == records
    assert (
        run("--config", folder / "config.yaml", "--runs", tmp_path / "again", "--train.steps", "1")
        == 0
    )
    assert metrics(tmp_path / "again" / "tiny")[0]["loss"] == records[0]["loss"]


def test_twenty_steps_equal_ten_then_kill_9_then_ten(command, tmp_path):
    assert run(*command, "--name", "straight") == 0
    # Time to be killed in
    slow = [*command, "--name", "killed", "--train.eval_every", "1", "--train.eval_tokens", "6000"]
    process = start(*slow)
    folder = tmp_path / "runs" / "killed"
    _wait_for((folder / "checkpoints" / "step_00000010").exists, process)
    process.kill()
    process.communicate()
    assert len(metrics_text(folder).splitlines()) < 20
    assert run(*command, "--name", "killed", "--resume", "auto") == 0
    assert_same_run(tmp_path / "runs" / "straight", folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(command, tmp_path, number):
    assert run(*command, "--name", "straight") == 0
    args = [*command, "--name", "stopped"]
    # Time to be stopped in
    process = start(*args, "--train.eval_every", "1", "--train.eval_tokens", "6000")
    folder = tmp_path / "runs" / "stopped"
    _wait_for(lambda: metrics_text(folder).count("\n") > 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == ""
    done = metrics(folder)[-1]["step"]
    assert done < 20
    assert f"stopped by {number.name} after step {done}, saved in {folder}; continue with\n" in out
    python, *resume = out.splitlines()[-1].split()
    assert [python, *resume[:2]] == ["python", "-m", "gptjax.train"]
    assert run(*resume[2:]) == 0  # with its own config
    assert_same_run(tmp_path / "runs" / "straight", folder)


def _wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_resume_survives_a_damaged_and_a_partial_checkpoint(command, tmp_path):
    assert run(*command) == 0
    folder = tmp_path / "runs" / "tiny"
    expected = metrics(folder)
    newest = folder / "checkpoints" / "step_00000020"
    largest = max(newest.rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    (folder / "checkpoints" / "step_00000030.orbax-checkpoint-tmp").mkdir()
    with pytest.warns(UserWarning, match="step_00000020 is damaged and was set aside"):
        assert run(*command, "--resume", "auto") == 0
    assert (folder / "checkpoints" / "damaged-step_00000020").exists()
    assert [(r["step"], r["loss"]) for r in metrics(folder)] == [
        (r["step"], r["loss"]) for r in expected
    ]


def test_only_the_newest_checkpoints_are_kept(command, tmp_path):
    assert (
        run(
            *command,
            "--train.checkpoint_every",
            "4",
            "--train.keep_checkpoints",
            "2",
            "--train.eval_every",
            "0",
        )
        == 0
    )
    names = sorted(p.name for p in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir())
    assert names == ["step_00000016", "step_00000020"]


def test_resume_under_another_layout_and_with_more_steps(command, tmp_path, capsys):
    options = ["--optim.schedule", "constant", "--train.eval_every", "0", "--model.dropout", "0"]
    assert run(*command, *options, "--name", "straight", "--train.steps", "14") == 0
    assert run(*command, *options, "--name", "again", "--train.steps", "10") == 0
    assert (
        run(
            *command,
            *options,
            "--name",
            "again",
            "--train.steps",
            "14",
            "--resume",
            "auto",
            "--model.layers",
            "scan",
        )
        == 0
    )
    losses = [
        [r["loss"] for r in metrics(tmp_path / "runs" / name)] for name in ("straight", "again")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert (
        run(
            *command,
            *options,
            "--name",
            "again",
            "--train.steps",
            "14",
            "--resume",
            "auto",
        )
        == 0
    )
    assert "nothing to do: 14 of 14 steps are done" in capsys.readouterr().out


def test_muon_trains_on_a_mesh_and_resumes(command, tmp_path, capsys):
    """On 4 of the simulated devices."""
    options = [
        "--optim.name",
        "muon",
        "--optim.schedule",
        "constant",
        "--mesh.data",
        "2",
        "--mesh.tensor",
        "2",
    ]
    assert run(*command, *options, "--name", "straight") == 0
    assert "data 2 x fsdp 1 x tensor 2" in capsys.readouterr().out
    assert run(*command, *options, "--name", "resumed", "--train.steps", "10") == 0
    assert run(*command, *options, "--name", "resumed", "--resume", "auto") == 0
    assert "resumed" in capsys.readouterr().out
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "resumed")
    assert (
        metrics(tmp_path / "runs" / "resumed")[-1]["loss"]
        < metrics(tmp_path / "runs" / "straight")[0]["loss"] - 0.3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model.channels", "32"], "was trained with model.channels 16, not 32"),
        (["--data.seq_len", "8"], "was trained with data.seq_len 16, not 8"),
        (["--seed", "1"], "was trained with seed 0, not 1"),
        (["--optim.name", "muon"], "was trained with optim.name adamw, not muon"),
        (
            [],
            "was trained with train.steps 2, not 20: set it to that value, or change the schedule",
        ),
        (["--optim.beta2", "0.5"], "was trained with optim.beta2 0.95, not 0.5"),
    ],
)
def test_resume_refuses_another_model_or_order(command, capsys, changes, message):
    assert run(*command, "--train.steps", "2", "--train.eval_every", "0") == 0
    assert_refused([*command, *changes, "--resume", "auto"], message, capsys, begins=False)


def test_divergence_skips_the_updates_then_stops(command, tmp_path, capsys):
    wild = [
        "--optim.learning_rate",
        "1e30",
        "--optim.grad_clip",
        "0",
        "--optim.weight_decay",
        "0",
        "--train.checkpoint_every",
        "1",
    ]
    assert (
        run(*command, *wild, "--train.max_nonfinite", "3", "--optim.schedule", "constant")
        == train.FAILED
    )
    records = metrics(tmp_path / "runs" / "tiny")
    assert [r.get("skipped", False) for r in records[-4:]] == [False, True, True, True]
    assert records[-1]["loss"] is None
    captured = capsys.readouterr()
    assert "not finite: update skipped" in captured.out
    assert "3 losses or gradients in a row were not finite" in captured.err
    assert "there is no checkpoint yet" in captured.err
    # None of such parameters
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())


def test_divergence_leaves_the_last_good_checkpoint(command, tmp_path, capsys):
    """Ten good steps, then a learning rate that blows the parameters up: going on is still possible
    from step 10.
    """
    assert run(*command, "--train.steps", "10") == 0
    folder = tmp_path / "runs" / "tiny"
    good = arrays(folder, 10)
    wild = [
        "--optim.learning_rate",
        "1e30",
        "--optim.schedule",
        "constant",
        "--optim.warmup_steps",
        "0",
        "--reschedule",
    ]
    assert run(*command, *wild, "--resume", "auto", "--train.checkpoint_every", "1") == train.FAILED
    assert "the last good checkpoint is after step 10" in capsys.readouterr().err
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000010"]
    for a, b in zip(good, arrays(folder, 10), strict=True):
        np.testing.assert_array_equal(a, b)
    assert run(*command, "--resume", "auto", "--reschedule") == 0
    assert all(r["loss"] is not None for r in metrics(folder))


def test_what_has_no_checkpoint_is_not_called_saved(command, capsys, monkeypatch):
    """Where the parameters are no good in the end; a checkpoint from before is named."""
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda loss, params, batches: float("nan"))
    assert run(*command, "--train.steps", "3") == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"ended after step 3 without saving it; in \S+/tiny there is no checkpoint", last
    )
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    assert run(*command, "--train.steps", "3", "--resume", "auto") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("saved in ")
    monkeypatch.setattr(trainer, "evaluate", lambda loss, params, batches: float("nan"))
    assert run(*command, "--train.steps", "5", "--resume", "auto", "--reschedule") == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith("/tiny the newest checkpoint is after step 3")
    )


def test_a_checkpoint_that_is_declined_is_an_error(command, capsys, monkeypatch):
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda self, step, **kwargs: False)
    assert_refused([*command, "--train.steps", "2"], "step 2 was not saved", capsys)
    assert "saved in" not in capsys.readouterr().out


@pytest.mark.parametrize("native_code", [True, False])
def test_float64_trains_and_resumes(command, tmp_path, capsys, in_cpp, native_code):
    """Wherever the update is made; what is kept is float32, so the run goes on in float32, too."""
    if native_code and not native.available("adamw"):
        pytest.skip("there is no C++ compiler")
    in_cpp(native_code)
    wide = [
        *command,
        "--model.dtype",
        "float64",
        "--optim.schedule",
        "constant",
        "--train.eval_every",
        "0",
    ]
    with jax.enable_x64(True):
        assert train.main([*wide, "--name", "straight", "--train.steps", "6"]) == 0
        assert ("AdamW in C++" in capsys.readouterr().out) == native_code
        assert train.main([*wide, "--name", "resumed", "--train.steps", "3"]) == 0
        assert (
            train.main([*wide, "--name", "resumed", "--train.steps", "6", "--resume", "auto"]) == 0
        )
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "resumed", 6)
    narrow = ["float32" if option == "float64" else option for option in wide]
    assert run(*narrow, "--name", "resumed", "--train.steps", "8", "--resume", "auto") == 0


# Other places to log to


def test_tensorboard_gets_each_step_once_and_the_samples(command, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = [
        *command,
        "--log.tensorboard",
        "true",
        "--resume",
        "auto",
        "--train.checkpoint_every",
        "4",
        "--train.eval_every",
        "0",
    ]
    assert run(*args, "--train.steps", "6", "--optim.schedule", "constant") == 0
    folder = tmp_path / "runs" / "tiny"
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    assert run(*args, "--train.steps", "8", "--optim.schedule", "constant") == 0
    read = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    loss = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert loss == [(r["step"], pytest.approx(r["loss"])) for r in metrics(folder)]
    assert len(loss) == 8
    assert [event.step for event in read.Tensors("sample")] == [6, 8]
    assert "num_layers: 1" in read.Tensors("config")[-1].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_logger_is_told_before_anything_is_made(
    command, tmp_path, capsys, monkeypatch, package
):
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(
        [*command, f"--log.{package}", "true"],
        f"log.{package} needs {package}: pip install",
        capsys,
    )
    assert not (tmp_path / "runs").exists()


# The gradient checked while training


def test_live_checks_log_the_worst_error(command, tmp_path, capsys):
    assert (
        run(*command, "--train.steps", "5", "--train.verify_every", "2", "--train.log_every", "5")
        == 0
    )
    errors = {
        r["step"]: r["gradient_error"]
        for r in metrics(tmp_path / "runs" / "tiny")
        if "gradient_error" in r
    }
    assert list(errors) == [2, 4]
    assert all(1e-9 < error < 1e-5 for error in errors.values())
    assert capsys.readouterr().out.count("| gradient error ") == 2


def test_a_run_with_checks_is_the_run_without(command, tmp_path):
    assert run(*command, "--name", "straight") == 0
    assert run(*command, "--name", "checked", "--train.verify_every", "10") == 0
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "checked")


def test_a_wrong_gradient_stops_the_run_with_its_report_saved(
    command, tmp_path, capsys, monkeypatch
):
    right = gpt2.gelu_bwd

    def gelu_bwd(saved, dy):
        return right(saved, dy) * 1.01

    monkeypatch.setattr(gpt2, "gelu_bwd", jax.jit(gelu_bwd))
    assert run(*command, "--train.verify_every", "4") == train.FAILED
    error = capsys.readouterr().err
    assert error.startswith("python -m gptjax.train: error: step 4: ")
    assert "first at layer 0, gelu (after fcw): gelu_bwd gives a wrong gradient" in error
    folder = tmp_path / "runs" / "tiny"
    assert [r["step"] for r in metrics(folder)] == [1, 2, 3]
    assert json.loads((folder / "verify-step-4.json").read_text())["ok"] is False
    assert "gelu_bwd" in (folder / "verify-step-4.html").read_text()
    # To look into it with
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000003"]


# Bad input: one sentence, status 2, no traceback


def assert_refused(args: list[str], message: str, capsys, begins: bool = True) -> None:
    """In one line; ``begins`` is false if nothing of a run may be printed before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert begins or not out
    assert err.count("\n") == 1
    assert err.startswith("python -m gptjax.train: error: ")
    assert message in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.chanels", "3"], "unknown option model.chanels: did you mean model.channels?"),
        (["--data.batch_size", "many"], "data.batch_size: Expected an int. Got value: many"),
        (["--train.backward", "magic"], "train.backward"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["--model.channels", "30", "--model.num_heads", "4"],
            "model.channels 30 is not divisible by model.num_heads 4",
        ),
        (["--data.seq_len", "33"], "data.seq_len 33 does not fit model.max_seq_len 32"),
        (["--data.dataset", "nowhere"], "data.dataset nowhere is neither a file or folder"),
        (["--data.batch_size", "100000"], "but one step takes 100000: lower data.batch_size"),
        (["--model.vocab_size", "256"], "has 4096 ids, but model.vocab_size is 256"),
        (["--model.attention", "cudnn"], "model.attention cudnn needs an NVIDIA GPU"),
        (["--train.steps", "0"], "train.steps must be at least 1"),
        (["--name", "a/b"], "name must be a folder name"),
        (["--resume", ""], "resume is empty"),
        (["--seed", "-1"], "seed must be from 0 to 4294967295"),
        (["--optim.eps", "0"], "optim.eps must be above 0"),
        (["--resume", "nowhere"], "--resume nowhere: there is no such run"),
        (["--resume", "configs"], "--resume configs is not the folder of a run"),
        (["--runs", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_bad_options_end_in_one_sentence(command, capsys, args, message):
    assert_refused([*command, *args], message, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {preset: 124m}", "unknown option modle"),
        (
            "model: {preset: 124m, chanels: 4}",
            "bad.yaml: unknown option model.chanels: did you mean model.channels?",
        ),
        ("model: {preset: 124m, channels: many}", "bad.yaml: model.channels: Expected an int"),
        ("model: {preset: [", "parsing"),
        ("model: {preset: 3m}", "preset"),
        ("{}", "model"),
    ],
)
def test_bad_config_files_end_in_one_sentence(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert_refused(["--config", str(tmp_path / "bad.yaml")], message, capsys)


def test_a_start_that_is_interrupted_says_that_no_step_was_done(monkeypatch, command, capsys):
    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert run(*command) == 130
    assert capsys.readouterr().err.endswith("error: interrupted before the first step\n")


def test_a_run_given_by_its_name_alone_is_not_resumed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert_refused(["--resume", "mine"], "there is no such run; did you mean runs/mine?", capsys)


def test_bad_shards_end_in_one_sentence(command, tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train.bin", np.full(5000, 5000))
    write_shard(folder / "val.bin", np.arange(100))
    (folder / "tokenizer.json").write_bytes(
        next(Path(command[-1]).glob("*/tokenizer.json")).read_bytes()
    )
    args = [*command, "--data.dataset", str(folder)]
    assert_refused(args, "train.bin holds token id 5000 near position", capsys)
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-3])
    assert_refused(args, "val.bin is truncated", capsys)
    (folder / "val.bin").unlink()
    assert_refused(args, "has no val*.bin", capsys)


def test_a_disk_that_fills_up_ends_in_one_sentence(command, tmp_path):
    """A limit on file sizes stands in for the disk: the checkpoint of step 20 cannot be written."""
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
    script += "from gptjax.train.__main__ import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", script, *command, "--model.channels", "64"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert "checkpoints cannot be written (File too large): free space" in result.stderr


def test_the_next_start_finds_what_this_one_compiled(command, tmp_path):
    """Where an entry is damaged it compiles, without a warning, and the start after it finds what
    that one compiled.
    """
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("JAX_COMPILATION_CACHE_DIR", "PYTHONWARNINGS")
    }
    few = "--train.steps=1", "--train.eval_every=0", "--train.sample_tokens=0"
    environment |= {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",
    }

    def hits() -> set[str]:
        result = subprocess.run(
            [sys.executable, "-m", "gptjax.train", *command, *few],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
            env=environment,
        )
        assert "Error reading" not in result.stderr
        return set(re.findall(r"Persistent compilation cache hit for '(\w+)'", result.stderr))

    assert not hits()
    assert hits() >= {"jit_gradient"}
    (folder,) = (tmp_path / "cache" / "gptjax").iterdir()
    for entry in folder.glob("jit_*-cache"):
        entry.write_bytes(entry.read_bytes()[:-100])
    assert not hits()
    assert hits() >= {"jit_gradient"}


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("place", ["/dev/null", ""])
def test_without_a_place_for_compiled_programs_none_is_kept(monkeypatch, place):
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setattr(Path, "home", no_home)
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help_all"])
    text = capsys.readouterr().out
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert len(options) > 35
    for line in (
        "--optim.learning_rate",
        "Peak learning rate",
        "Attention implementation; auto picks by platform",
        "--resume",
    ):
        assert line in text


def test_print_config_is_a_config_file(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*command, "--optim.beta2", "0.5", "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["optim"]["beta2"] == 0.5
    (tmp_path / "printed.yaml").write_text(printed)
    assert run("--config", tmp_path / "printed.yaml", "--train.steps", "1") == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(path), "--print_config"])
    assert stop.value.code == 0


def test_init_starts_from_weights_wherever_they_come_from(command, tmp_path, capsys):
    """A run's weights, through a Hugging Face folder: the loss before the first step is the other
    run's last.
    """
    run(*command, "--train.steps", 10)
    assert convert.main([str(tmp_path / "runs" / "tiny"), str(tmp_path / "hf")]) == 0
    last = metrics(tmp_path / "runs" / "tiny")[-1]["val_loss"]
    capsys.readouterr()
    run(*command, "--init", tmp_path / "hf", "--train.steps", 1, "--name", "second")
    assert f"{tmp_path / 'hf'}, val loss {last:.4f}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run(*command, "--init", tmp_path / "hf", "--model.num_layers", 2)
    assert stop.value.code == 2
    assert "has model.num_layers 1, not 2: set it to that value" in capsys.readouterr().err
    for other in ("byte", "bpe:4096"):
        refused = [*command, "--init", tmp_path / "hf", "--data.tokenizer", other]
        message = f"ids, and data.tokenizer {other} is another: leave it out"
        assert_refused(refused, message, capsys)


def test_your_own_text_by_characters(command, tmp_path, capsys):
    (tmp_path / "tale.txt").write_text(
        "It was the best of times, it was the worst of times.\n" * 100
    )
    own = [*command, "--data.dataset", tmp_path / "tale.txt", "--data.tokenizer", "char"]
    assert run(*own, "--train.steps", 2, "--train.sample_prompt", "It was") == 0
    sample = capsys.readouterr().out.split("--- sample after step 2 ---\n")[1].split("\n---")[0]
    assert sample.startswith("It was")
    assert set(sample) <= set("It was the best of times, it was the worst of times.\n")
    with pytest.raises(SystemExit) as stop:
        run(*own, "--train.sample_prompt", "Quixote")
    assert stop.value.code == 2
    assert (
        "the character 'Q' (U+0051) at position 0 of the text is not among the 17"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "runs" / "tiny-2").exists()
