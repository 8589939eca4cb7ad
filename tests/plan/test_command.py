"""``python -m gptjax.plan`` as a user meets it."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from tests.commands import expect_error
from tests.conftest import ROOT
from tests.plan.conftest import needs_libtpu

command = importlib.import_module("gptjax.plan.__main__")
DEBUG = ["--config", str(ROOT / "configs" / "debug.yaml"), "--model.num_layers", "1"]
LARGE = ["--config", str(ROOT / "configs" / "1558m.yaml")]


pytestmark = pytest.mark.usefixtures("as_a_process")


def lines(out):
    return {line[:12].strip(): line[13:] for line in out.splitlines()}


def test_a_pod_is_planned_without_a_tpu(capsys, tmp_path):
    """The configured batch of one device, on 256."""
    file = str(tmp_path / "plan.json")
    assert (
        command.main(
            [*LARGE, "--topology", "v5e:16x16", "--predict", "--tokens", "30e9", "--json", file]
        )
        == 0
    )
    out = capsys.readouterr().out
    found = lines(out)
    assert found["topology"] == "v5e:16x16: 256 x TPU v5 lite of 17.18 GB each"
    assert found["mesh"].startswith(
        "data 4 x fsdp 64 x tensor 1, chosen because none is configured, data.batch_size 256 instead of 4"
    )
    assert "attention splash" in found["model"]
    assert found["source"] == "memory and collectives predicted from shapes, not compiled"
    assert found["memory"].endswith("usable (95% of its memory): fits")
    record = json.loads((tmp_path / "plan.json").read_text())["plans"]["splash"]
    assert record["total"] == sum(record["memory"].values())
    biases = 48 * 7 * 1600  # of q, k, v and the hidden units, which fsdp does not cut
    assert record["memory"]["parameters"] == pytest.approx(
        4 * ((1557.6e6 - biases) / 64 + biases), rel=1e-3
    )
    assert record["floor"]["overlapped"] < record["floor"]["exposed"]
    minutes = 30e9 / (4 * 256 * 1024) * record["floor"]["overlapped"] / 60
    assert f"{minutes:,.1f} minutes for 3e+10 tokens" in out
    assert found["reduce-scatter"[:10]].endswith("at 200 GB/s")
    assert found["assuming"].startswith(
        "197 TFLOP/s in bfloat16, 819 GB/s of memory, and all links sending at once"
    )
    assert found["train"] == "in one process on each of 64 machines:"


def test_simulated_devices_are_compiled_for(capsys):
    assert (
        command.main([*DEBUG, "--topology", "cpu:2", "--mesh.fsdp", "2", "--largest", "false"]) == 0
    )
    found = lines(capsys.readouterr().out)
    assert found["mesh"] == "data 1 x fsdp 2 x tensor 1"
    assert found["source"].startswith("memory and collectives compiled for cpu in")
    assert "largest" not in found
    assert found["floor"] == "unknown: no data sheet gives this device's rate in float32"


def test_compare_lists_every_attention_that_the_topology_supports(capsys):
    assert command.main([*LARGE, "--topology", "h100:8", "--compare", "--largest", "false"]) == 0
    out = capsys.readouterr().out
    assert "largest" not in out
    names = [line.split()[0] for line in out.splitlines()]
    assert names[names.index("attention") + 1 :] == [
        "cudnn",
        "blockwise",
        "materialised",
        "train",
        "python",
    ]


def test_a_model_that_does_not_fit(capsys):
    assert command.main([*LARGE, "--topology", "v5e:1x1", "--predict"]) == 0
    found = lines(capsys.readouterr().out)
    assert found["memory"].endswith("usable (95% of its memory): DOES NOT FIT")
    assert found["largest"].startswith("not even one row per device fits")
    assert "sent" in found
    assert found["train"] == "not possible: it does not fit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "topology is missing: it must be cpu:8"),
        (["--topology", "v5e:3x5"], "such as 2x2 or 2x4"),
        (["--topology", "h100:8", "--tokens", "0"], "tokens must be above 0"),
        (["--topology", "h100:8", "--json", "nowhere/p.json"], "there is no folder"),
        (
            ["--topology", "h100:8", "--mesh.tensor", "8"],
            "model.num_heads 25 is not divisible by mesh.tensor = 8: for 8",
        ),
        (
            ["--topology", "h100:16", "--mesh.fsdp", "4"],
            "4 devices, but there are 16 devices in 2 processes, which must all",
        ),
        (
            ["--topology", "v5e:16x16", "--mesh.fsdp", "4"],
            "4 devices, but there are 256 devices in 64 processes, which must all",
        ),
        (
            ["--topology", "h100:8", "--model.attention", "splash"],
            "model.attention splash needs a TPU, not cuda",
        ),
        (["--topologie", "h100:8"], "did you mean topology?"),
        (["--topology", "cpu:16"], "JAX has started with 8 devices, too few for cpu:16"),
    ],
)
def test_bad_input(arguments, message, capsys):
    expect_error(command.main, [*LARGE, *arguments], message, capsys)


@needs_libtpu
@pytest.mark.parametrize(
    "topology",
    ["124m-fineweb v5e:2x4", "124m-fineweb v4:2x2x1", "1558m v5e:4x4", "1558m v5p:2x2x2"],
)
def test_the_real_step_compiles_for_the_real_topology(topology, tmp_path):
    """In a process of its own, without the flags of these tests; minutes each. It sends no less
    than has to be sent.
    """
    config, topology = topology.split()
    unset = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    arguments = [
        "--config",
        str(ROOT / "configs" / f"{config}.yaml"),
        "--topology",
        topology,
        "--largest",
        "false",
    ]
    run = [sys.executable, "-m", "gptjax.plan", *arguments, "--json", str(tmp_path / "plan.json")]
    subprocess.run(run, env=environment, cwd=ROOT, check=True)
    assert command.main([*arguments, "--predict", "--json", str(tmp_path / "shapes.json")]) == 0
    plan, shapes = (
        json.loads((tmp_path / name).read_text())["plans"]["splash"]
        for name in ("plan.json", "shapes.json")
    )
    assert plan["compiled"]
    assert plan["total"] < plan["capacity"]
    assert plan["memory"]["temporaries"] > plan["saved"]
    kinds = {c["kind"] for c in plan["collectives"]}
    assert "all-gather" in kinds
    assert kinds & {"reduce-scatter", "all-reduce", "collective-permute"}
    assert sum(c["sent"] for c in plan["collectives"]) > sum(
        c["sent"] for c in shapes["collectives"]
    )
