"""What XLA is told about a GPU that is not here, and that it compiles a step for it."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from gptjax.config import ModelConfig
from gptjax.models.params import num_padded_params
from gptjax.parallel.devices import DEVICES
from gptjax.plan.collectives import bytes_sent, collectives
from gptjax.plan.kernels import kernels
from gptjax.xla.gpu import CUDNN, TARGETS, assumed_cudnn, proto_text
from tests.conftest import ROOT

needs_plugin = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="needs JAX's CUDA plugin (the [cuda-aot] extra)",
)


LAYERS = 3


def parsed(text):
    """The fields of a message in text format, by a reader of its own."""
    stack = [{}]
    for name, opens, string, number, closes in re.findall(
        r'(?:(\w+)\s*(?:(\{)|:\s*(?:"([^"]*)"|([\d.]+))))|(\})', text
    ):
        if opens:
            stack.append(stack[-1].setdefault(name, {}))
        elif closes:
            stack.pop()
        else:
            stack[-1][name] = string or (float(number) if "." in number else int(number))
    assert len(stack) == 1
    return stack[0]


def test_a_description_is_written_as_it_reads():
    assert (
        proto_text({"a": 1, "b": {"c": 0.5, "d": {"e": "f g"}}})
        == 'a: 1\nb {\nc: 0.5\nd {\ne: "f g"\n}\n}\n'
    )
    for target in TARGETS.values():
        assert parsed(proto_text(target)) == target


# TFLOP/s in float32, as NVIDIA's data sheets give them
FLOAT32 = {
    "NVIDIA H100 80GB HBM3": 67,
    "NVIDIA H100 PCIe": 51,
    "NVIDIA H200": 67,
    "NVIDIA A100-SXM4-80GB": 19.5,
    "NVIDIA L4": 30.3,
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_gpu_is_what_its_data_sheet_says(kind):
    target, device = TARGETS[kind]["gpu_device_info"], DEVICES[kind]
    assert target["memory_bandwidth"] == pytest.approx(device.bandwidth, rel=1e-3)
    assert device.memory * 0.98 <= target["device_memory_size"] <= device.memory * 1.075
    rate = 2 * target["core_count"] * target["fpus_per_core"] * target["clock_rate_ghz"] / 1e3
    assert rate == pytest.approx(FLOAT32[kind], rel=0.015)
    assert target["shared_memory_per_block_optin"] < target["shared_memory_per_core"]


def test_the_h100_is_the_one_that_is_described_elsewhere(shared):
    theirs = parsed(re.sub(r"#.*", "", (shared / "gpu" / "h100.txtpb").read_text()))
    assert TARGETS[theirs["device_description_str"]] == theirs


@pytest.fixture
def module():
    """Where JAX asks for cuDNN's version while a step is traced."""
    return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")


def test_cudnn_is_assumed_only_meanwhile(module, monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(module, "check_cudnn_version", missing)
    with pytest.raises(ZeroDivisionError), assumed_cudnn():
        assert module.check_cudnn_version() == CUDNN[0] * 10_000 + CUDNN[1] * 100 == 91_000
        raise ZeroDivisionError
    assert module.check_cudnn_version is missing


def test_an_installed_cudnn_answers_for_itself(module, monkeypatch):
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 92_100)
    with assumed_cudnn():
        assert module.check_cudnn_version() == 92_100


def test_a_jax_that_does_not_ask(module, monkeypatch):
    monkeypatch.delattr(module, "check_cudnn_version")
    with assumed_cudnn():
        assert not hasattr(module, "check_cudnn_version")


@needs_plugin
def test_a_step_compiles_for_an_h100(tmp_path):
    """In a process of its own, as the plugin is loaded for good. Both programs write over every
    buffer that is donated.
    """
    command = [
        sys.executable,
        "-m",
        "gptjax.bench",
        "--what",
        "program",
        "--platform",
        "cuda",
        "--hlo",
        str(tmp_path / "hlo"),
    ]
    config = ["--config", str(ROOT / "configs" / "debug.yaml"), "--model.num_layers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [*command, *config], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert (
        "compiled for NVIDIA H100 80GB HBM3, bfloat16, attention cudnn, layers unroll, 512 tokens"
    ) in done.stdout
    names = {
        f"{way}-{part}.txt" for way in ("manual", "autodiff") for part in ("gradient", "update")
    }
    assert {path.name for path in (tmp_path / "hlo").iterdir()} == names
    arrays = 4 + 16  # a block's weights, and those around it
    for name in names:
        text = (tmp_path / "hlo" / name).read_text()
        header = text.splitlines()[0]
        assert text.startswith("HloModule")
        assert "is_scheduled=true" in header
        # The gradient's buffer; weights and both moments
        donated = arrays if "gradient" in name else 3 * arrays
        assert header.count("may-alias") + header.count("must-alias") >= donated
        assert ("__cudnn$fmhaSoftmaxBackward" in text) == ("gradient" in name)
    ours = (tmp_path / "hlo" / "manual-gradient.txt").read_text()
    assert ours.count('"epilogue":"BIAS_GELU_AUX"') == 1  # bias and GELU by the product itself
    assert ours.count('"epilogue":"BIAS"') == 5  # q, k, v and both projections
    # Both residual branches, and two of the three gradients through q, k and v
    assert ours.count('"beta":1') == 4
    # The norm of 20 small gradients: the sum of their concatenation, in steps
    norm = [k for k in kernels(ours, DEVICES["NVIDIA H100 80GB HBM3"]) if "norms.py" in k.source]
    assert sum(k.kind == "reduction" for k in norm) == 3
    # The norm pads its vector
    assert not re.search(r"\[\d+,[\d,]+\]\S* (transpose|pad)\(", ours)
    totals = re.findall(r"^in all +\| +([\d,]+) ", done.stdout, re.MULTILINE)
    assert len(totals) == 2


def compiled_for_8_h100s(mesh, folder):
    """The gradient's collectives, one by one, and the program; its layers are as wide as 124M's."""
    command = [sys.executable, "-m", "gptjax.bench", "--what", "program", "--platform", "cuda"]
    options = {
        "config": ROOT / "configs" / "debug.yaml",
        "hlo": folder,
        mesh: 8,
        "model.num_layers": LAYERS,
        "model.channels": 768,
        "model.vocab_size": 50257,
    }
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    subprocess.run([*command, *arguments], env=environment, check=True, timeout=600)
    text = (folder / "manual-gradient.txt").read_text()
    return collectives(text), text


@needs_plugin
def test_every_gradient_is_summed_over_data_once(tmp_path):
    """The tied table's, too: the sums send no more bytes than the parameters have."""
    found, _ = compiled_for_8_h100s("mesh.data", tmp_path)
    sizes = {"num_layers": LAYERS, "num_heads": 4, "channels": 768, "max_seq_len": 128}
    cfg = ModelConfig(**sizes, vocab_size=50257)
    assert {c.kind for c in found} == {"all-reduce"}
    once = bytes_sent("all-reduce", 4 * num_padded_params(cfg), 8)
    assert sum(c.sent for c in found) == pytest.approx(once, rel=1e-3)


@needs_plugin
def test_over_fsdp_a_table_is_gathered_in_bfloat16_and_each_layer_scattered(tmp_path):
    found, text = compiled_for_8_h100s("mesh.fsdp", tmp_path)
    gathers = re.findall(r" = (.*) all-gather-start\(", text)
    assert any("bf16[50304,768]" in types for types in gathers)
    assert not any("f32[50304,768]" in types for types in gathers)
    assert sum(c.times for c in found if c.kind == "reduce-scatter") == LAYERS + 1
