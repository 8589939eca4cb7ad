"""What is predicted from shapes, against what XLA compiles for 8 simulated devices, and against sums by hand."""

import dataclasses
import math

import jax
import pytest

from gptjax.data import BatchShape
from gptjax.models.config import GPT2Config
from gptjax.models.params import flops_per_token, num_matrix_params, param_shapes
from gptjax.optim import OptimConfig, make_optimizer
from gptjax.plan.compiled import TooLarge, _refused, compile_work
from gptjax.plan.predict import Work, saved_bytes, state_bytes, step_collectives, step_flops, step_traffic, working_bytes

OPTIMIZER = make_optimizer(OptimConfig(), 10)
CFG = GPT2Config(num_layers=2, num_heads=8, channels=256, vocab_size=1024, max_seq_len=128, dtype="float32")
SHAPE = BatchShape(1, 16, 128)


def work(mesh=(1, 1, 1), accumulate=1, **changes):
    return Work(dataclasses.replace(CFG, **changes).resolve("cpu", 128), SHAPE._replace(accumulate=accumulate), mesh)


CASES = {
    "one device, recompute block": (work(recompute="block"), 0.15),
    "fsdp, recompute gelu": (work((1, 8, 1), recompute="gelu"), 0.15),
    "all, chunks": (work((2, 2, 2), loss_chunks=2), 0.15),
    "tensor, recompute block": (work((1, 2, 4), recompute="block"), 0.15),
}


@pytest.mark.parametrize("name", CASES)
def test_memory_and_collectives_are_about_what_is_compiled(name):
    """Gathers and exchanges to a hundredth; XLA's CPU compiler sums whole gradients where others scatter them."""
    planned, tolerance = CASES[name]
    with jax.enable_x64(False):
        found = compile_work(planned, OPTIMIZER, "manual", jax.devices()[: math.prod(planned.mesh)])
        predicted = saved_bytes(planned) + working_bytes(planned)
        state = state_bytes(planned, OPTIMIZER)
    assert {part: found.memory[part] for part in state} == state
    assert predicted == pytest.approx(found.memory["temporaries"], rel=tolerance)
    expected = {(c.kind, c.group): c.sent for c in step_collectives(planned)}
    vectors = 0.003 * sum(expected.values())
    for c in found.collectives:
        if c.kind in ("all-gather", "all-to-all"):
            assert c.sent == pytest.approx(expected.pop((c.kind, c.group), 0), rel=0.01, abs=vectors)
    assert not {kind for kind, _ in expected} & {"all-gather", "all-to-all"}


def test_state_falls_with_the_devices_and_the_batch_is_shared_out():
    one = work()
    for n in (2, 4, 8):
        many = work((1, n, 1))
        assert state_bytes(many, OPTIMIZER)["parameters"] * n == state_bytes(one, OPTIMIZER)["parameters"]
        assert saved_bytes(many) * n == saved_bytes(one)
        assert many.with_rows(one.rows).rows == one.rows
    assert state_bytes(work((8, 1, 1)), OPTIMIZER) == state_bytes(one, OPTIMIZER)


def test_what_a_block_saves_by_hand():
    """Two LayerNorms' inputs and outputs and their statistics, q, k, v, the probabilities, o, and the MLP's two."""
    rows, C, H, T = 16 * 128, 256, 8, 128
    block = rows * (2 * (2 * C + 2) + 3 * C + H * T + C + 8 * C)
    end = rows * (2 * C + 2)
    assert saved_bytes(work()) == 4 * (2 * block + end)
    assert saved_bytes(work(recompute="gelu")) == 4 * (2 * (block - rows * 4 * C) + end)
    assert saved_bytes(work(recompute="block")) == 4 * (2 * rows * C + end)
    assert saved_bytes(work(attention="blockwise")) == 4 * (2 * (block - rows * H * (T - 1)) + end)  # one lse in place of T


def test_a_kernel_saves_what_blockwise_attention_does():
    model = GPT2Config(preset="124m").resolve("cuda", 1024)
    assert model.attention == "cudnn"
    kernel, loops = (
        Work(m, BatchShape(1, 4, 1024), (1, 1, 1)) for m in (model, dataclasses.replace(model, attention="blockwise"))
    )
    assert saved_bytes(kernel) == saved_bytes(loops)


def test_flops_are_the_usual_convention_and_what_is_recomputed():
    assert num_matrix_params(GPT2Config(preset="124m")) == 12 * 12 * 768**2 + 50304 * 768
    planned = work()
    vectors = sum(map(math.prod, param_shapes(planned.model))) - num_matrix_params(planned.model)
    usual = flops_per_token(planned.model, 128) - 6 * vectors
    assert step_flops(planned) == usual * SHAPE.tokens
    assert step_flops(work((2, 2, 2))) == usual * SHAPE.tokens / 8
    blocks = num_matrix_params(planned.model) - 1024 * 256
    assert step_flops(work(recompute="block")) == (usual + 2 * blocks + 4 * 2 * 256 * 128) * SHAPE.tokens


def test_micro_batches_repeat_the_passes_and_not_the_update():
    (once, update), (twice, same) = step_traffic(work()), step_traffic(work(accumulate=2))
    assert same == update
    assert twice > 2 * once


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded",
            TooLarge("it uses 20.50G of 15.75G", int(20.5 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: too much", TooLarge("RESOURCE_EXHAUSTED: too much", None)),
    ],
)
def test_a_step_that_the_compiler_refuses(message, expected):
    assert _refused(message) == expected
