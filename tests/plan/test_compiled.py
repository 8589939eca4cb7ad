from types import SimpleNamespace

import jax
import pytest

from gptjax.config import ModelConfig, OptimConfig
from gptjax.datasets.batches import BatchShape
from gptjax.plan import compiled
from gptjax.plan.predict import Work
from gptjax.train.optimizer import make_optimizer

MODEL = ModelConfig(
    num_layers=1, num_heads=2, channels=16, vocab_size=128, max_seq_len=8, dtype="float32"
)
WORK = Work(MODEL.resolve("cpu", 8), BatchShape(1, 4, 8), (1, 1, 1))
OPTIMIZER = make_optimizer(OptimConfig(), 10, MODEL)


def test_one_device_sends_nothing_and_two_do():
    with jax.enable_x64(False):
        alone = compiled.compile_work(WORK, OPTIMIZER, "manual", jax.devices()[:1])
        two = compiled.compile_work(
            WORK._replace(mesh=(2, 1, 1)), OPTIMIZER, "manual", jax.devices()[:2]
        )
    assert alone.collectives == []
    assert {c.kind for c in two.collectives} == {"all-reduce"}
    assert {"gradients", "temporaries", "program"} <= set(alone.memory)
    assert alone.flops > two.flops > 0
    assert alone.seconds > 0


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory. Used 1.5G of 1.0G hbm.",
            ("it uses 1.5G of 1.0G", 3 * 2**29),
        ),
        ("RESOURCE_EXHAUSTED:  no room\n at all", ("RESOURCE_EXHAUSTED: no room at all", None)),
    ],
)
def test_a_lack_of_memory_is_returned_as_a_result(monkeypatch, message, expected):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compiled, "compile_step", refuse)
    assert compiled.compile_work(WORK, OPTIMIZER, "manual", jax.devices()[:1]) == expected


def test_other_compiler_errors_are_raised(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: other")

    monkeypatch.setattr(compiled, "compile_step", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compiled.compile_work(WORK, OPTIMIZER, "manual", jax.devices()[:1])


GPU_STEP = """ENTRY %main (a: f32[96,8]) -> f32[8] {
  %one = f32[1000000]{0} all-reduce-start(%a), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %x = f32[25000000]{0} custom-call(), custom_call_target="g"
  %one.done = f32[1000000]{0} all-reduce-done(%one)
  %two = f32[1000000]{0} all-reduce-start(%b), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
  %two.done = f32[1000000]{0} all-reduce-done(%two)
}
"""


def test_kernels_hide_no_more_than_the_collective_they_overlap(monkeypatch):
    """The first of two equal sums is hidden by a kernel that takes longer, the second by none."""
    program = SimpleNamespace(
        as_text=lambda: GPU_STEP,
        cost_analysis=dict,
        memory_analysis=lambda: SimpleNamespace(generated_code_size_in_bytes=0),
    )
    step = SimpleNamespace(gradient=program, updates=(), memory={})
    monkeypatch.setattr(compiled, "compile_step", lambda *_: step)
    monkeypatch.setattr(compiled, "mesh_of", lambda *_: None)
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    found = compiled.compile_work(WORK._replace(mesh=(8, 1, 1)), OPTIMIZER, "manual", [gpu] * 8)
    assert sum(k.seconds for k in found.kernels) == pytest.approx(1e8 / 3.35e12)
    assert found.exposed == pytest.approx(2 * 4e6 * 7 / 8 / 450e9)
