"""What the plan says to run, as training reads it."""

import importlib
import shlex
from pathlib import Path

import pytest

from gptjax.cli.options import parse
from gptjax.config import Config, MeshConfig
from gptjax.plan.topology import parse_topology
from gptjax.plan.training import TRAIN, train_command

command = importlib.import_module("gptjax.plan.__main__")
pytestmark = pytest.mark.usefixtures("as_a_process")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """As configs/1558m.yaml, of one layer."""
    path = tmp_path_factory.mktemp("configs") / "wide.yaml"
    path.write_text(
        "model: {preset: 1558m, num_layers: 1}\ndata: {seq_len: 1024}\noptim: {accumulate: 4}\n"
    )
    return str(path)


def planned(capsys, *arguments):
    """(The last line of a plan, the configuration that training reads from it)."""
    assert command.main([*arguments, "--predict", "--largest", "false"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].strip()
    words = shlex.split(line)
    while "=" in words[0]:
        words = words[1:]
    assert words[:3] == TRAIN.split()
    return line, parse(Config, TRAIN, "", words[3:])[0]


@pytest.mark.parametrize(
    ("arguments", "mesh", "batch", "options"),
    [
        (["--topology", "h100:1"], (1, 1, 1), 4, ""),
        (
            ["--topology", "v5e:16x16"],
            (4, 64, 1),
            256,
            " --data.batch_size 256 --mesh.data 4 --mesh.fsdp 64",
        ),
        (
            ["--topology", "h100:16", "--mesh.data", "-1"],
            (16, 1, 1),
            16,
            " --data.batch_size 16 --mesh.data 16",
        ),
        (["--topology", "h100:8", "--mesh.fsdp", "4", "--compare"], (1, 4, 1), 4, " --mesh.fsdp 4"),
        (["--topology", "h100:1", "--tokens", "1e9"], (1, 1, 1), 4, " --train.steps 61036"),
        (
            [
                "--topology",
                "h100:1",
                "--optim.mu_dtype",
                "bfloat16",
            ],
            *((1, 1, 1), 4, " --optim.mu_dtype bfloat16"),
        ),
    ],
)
def test_the_plan_ends_with_the_training_command(arguments, mesh, batch, options, file, capsys):
    line, cfg = planned(capsys, "--config", file, *arguments)
    assert line == f"{TRAIN} --config {file}{options}"
    assert (cfg.mesh, cfg.data.batch_size) == (MeshConfig(*mesh), batch)


def test_a_token_budget_sets_the_number_of_steps(file, capsys):
    _, cfg = planned(capsys, "--config", file, "--topology", "h100:8", "--tokens", "1e9")
    tokens = cfg.train.steps * cfg.optim.accumulate * cfg.data.batch_size * cfg.data.seq_len
    assert 1e9 <= tokens < 1e9 + tokens / cfg.train.steps


def test_without_a_config_file_the_command_has_every_changed_option(capsys):
    model = ["--model.preset", "124m", "--model.num_layers", "1", "--model.dropout", "0.1"]
    _, cfg = planned(capsys, *model, "--data.seq_len", "256", "--topology", "h100:8")
    assert (cfg.model.preset, cfg.model.num_layers, cfg.model.dropout, cfg.data.seq_len) == (
        "124m",
        1,
        0.1,
        256,
    )
    assert (cfg.mesh, cfg.data.batch_size) == (MeshConfig(fsdp=8), 8)


def test_a_config_file_may_hold_options_of_the_plan(tmp_path, capsys):
    """Training leaves out of a config file what it does not read."""
    file = tmp_path / "plan.yaml"
    file.write_text(
        "topology: h100:1\nlog: {wandb: project}\nname: null\nmodel: {preset: 124m, num_layers: "
        "1}\n"
    )
    line, cfg = planned(capsys, "--config", str(file))
    assert line == f"{TRAIN} --config {file}"
    assert (cfg.model.preset, cfg.log.wandb) == ("124m", "project")


def test_the_command_undoes_options_of_the_file_and_simulates_devices(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("model: {preset: 124m}\ndata: {tokenizer: byte}\nlog: {tensorboard: true}\n")
    cfg = parse(
        Config,
        TRAIN,
        "",
        ["--config", str(file), "--data.tokenizer", "null", "--log.tensorboard", "false"],
    )[0]
    line = train_command(cfg, Path(file), parse_topology("cpu:8"))
    assert (
        line
        == f"JAX_NUM_CPU_DEVICES=8 {TRAIN} --config {file} --data.tokenizer null --log.tensorboard false"
    )
    assert parse(Config, TRAIN, "", shlex.split(line)[4:])[0] == cfg
