import dataclasses
from types import SimpleNamespace

import pytest

from gptjax.bench import ceiling
from gptjax.bench.ceiling import Ceiling
from gptjax.config import ModelConfig
from gptjax.parallel.devices import DEVICES
from gptjax.plan.kernels import REACHED


def test_the_floor_is_all_products_and_one_pass_of_adamw():
    """GPT-2 124M, B=4, T=64: 193 GFLOP and 7 passes over 0.498 GB; at 450 GFLOP/s and 70 GB/s some
    480 ms.
    """
    cfg = ModelConfig(preset="124m", vocab_size=50257).resolve("cpu", 64)
    floor = ceiling.step_floor(cfg, 256, 64, Ceiling(450e9, 70e9, 60e9))
    assert floor == pytest.approx(193.0e9 / 450e9 + 7 * 0.4978e9 / 70e9, rel=2e-3)


def on(kind, monkeypatch):
    """Let JAX's only device be of this kind."""
    monkeypatch.setattr(ceiling.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])


def test_the_data_sheet_s_rate_gives_the_ideal_step(monkeypatch):
    """124M, 6 FLOPs for each parameter and token and 12 L C T for attention: 14.09 TFLOP for
    16 x 1,024 tokens, on an H100 of 989 TFLOP/s.
    """
    cfg = ModelConfig(preset="124m", vocab_size=50257, dtype="bfloat16").resolve("cuda", 1024)
    on("NVIDIA H100 80GB HBM3", monkeypatch)
    assert ceiling.peak_seconds(cfg, 16384, 1024) == pytest.approx(14.09e12 / 989e12, rel=1e-3)
    assert ceiling.peak_seconds(dataclasses.replace(cfg, dtype="float32"), 16384, 1024) is None
    on("cpu", monkeypatch)
    assert ceiling.peak_seconds(cfg, 16384, 1024) is None


def test_rates_are_the_data_sheet_s_or_measured(monkeypatch):
    monkeypatch.setattr(ceiling, "measure", lambda cfg, tokens: Ceiling(81e9, 7e9, 5e9))
    on("NVIDIA H200", monkeypatch)
    assert ceiling.device_rates(ModelConfig(preset="124m"), 8) == DEVICES["NVIDIA H200"]
    on("cpu", monkeypatch)
    found = ceiling.device_rates(ModelConfig(preset="124m"), 8)
    assert (found.flops * REACHED, found.bandwidth) == pytest.approx((81e9, 7e9))


def test_decoding_reads_each_weight_once():
    cfg = ModelConfig(preset="124m", vocab_size=50257, dtype="float32").resolve("cpu", 64)
    assert ceiling.decode_floor(cfg, Ceiling(1.0, 70e9, 50e9)) == pytest.approx(
        4 * 124_439_808 / 50e9
    )
    narrow = dataclasses.replace(cfg, dtype="bfloat16")
    assert ceiling.decode_floor(narrow, Ceiling(1.0, 70e9, 50e9)) == pytest.approx(
        2 * 124_439_808 / 50e9
    )
    untied = ModelConfig(preset="tinyllama-1.1b", dtype="bfloat16").resolve("cpu", 64)
    assert ceiling.decode_floor(untied, Ceiling(1.0, 70e9, 50e9)) == pytest.approx(
        2 * (1_100_048_384 - 32000 * 2048) / 50e9
    )


def test_measured_rates_are_plausible(monkeypatch):
    monkeypatch.setattr(ceiling, "STREAM_BYTES", 8_000_000)
    found = ceiling.measure(
        ModelConfig(num_layers=1, num_heads=2, channels=64, dtype="float32").resolve("cpu", 8), 64
    )
    assert 1e7 < found.flops < 1e16
    assert 1e7 < found.bandwidth < 1e14
