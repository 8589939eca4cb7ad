import pytest

from gptjax.config import ModelConfig, OptimConfig
from gptjax.datasets.batches import BatchShape
from gptjax.plan import search
from gptjax.plan.compiled import Compiled, TooLarge
from gptjax.plan.predict import Work, state_bytes
from gptjax.plan.topology import parse_topology
from gptjax.train.optimizer import make_optimizer

MODEL = ModelConfig(preset="124m", vocab_size=50257, num_layers=2).resolve("cuda", 1024)
OPTIMIZER = make_optimizer(OptimConfig(), 10, MODEL)
WORK = Work(MODEL, BatchShape(1, 8, 1024), (1, 4, 1))


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 1000])
def test_bisection_finds_the_largest_that_fits(most):
    assert search.bisect_largest(lambda n: n <= most) == most


def test_the_largest_batch_by_shapes_fits_and_one_more_row_does_not():
    plan = search.make_plan(WORK, parse_topology("h100:4"), OPTIMIZER, "manual", None, 1e9, True)
    assert plan.source == search.PREDICTED
    room = 0.95 * 80e9 - sum(state_bytes(WORK, OPTIMIZER).values())
    assert search.temporary_bytes(WORK.with_rows(plan.largest)) <= room
    assert search.temporary_bytes(WORK.with_rows(plan.largest + 1)) > room


def compiler(total_of):
    """In place of the compiler: one whose step takes as many bytes as ``total_of`` the rows."""

    def compile_work(work, optimizer, backward, devices):
        total = total_of(work.rows)
        return (
            total
            if isinstance(total, TooLarge)
            else Compiled({"temporaries": total}, [], 0.0, 1e12, 0.1, [])
        )

    return compile_work


@pytest.mark.parametrize(
    ("total_of", "largest"),
    [
        (lambda rows: 1e9 * rows + 2e9, 74),
        (lambda rows: 1e9 * rows + 2e9 + 2e7 * max(0, rows - 4) ** 2, 32),  # the most is 43
        (lambda rows: 30e9 * rows if rows < 3 else TooLarge("", int(30e9 * rows)), 2),
        (lambda rows: 30e9 * rows if rows < 3 else TooLarge("", None), 2),
        (lambda rows: 60e9 * rows, 1),
        (lambda rows: 90e9 * rows, 0),
        (lambda rows: 1e9, None),
    ],
)
def test_the_largest_batch_is_extrapolated_and_compiled(total_of, largest, monkeypatch):
    monkeypatch.setattr(search, "compile_work", compiler(total_of))
    plan = search.make_plan(
        WORK, parse_topology("h100:4"), OPTIMIZER, "manual", [object()], 1e9, True
    )
    assert plan.largest == largest
    assert plan.compiled


def test_a_step_that_the_compiler_refuses_is_predicted_and_says_so(monkeypatch):
    monkeypatch.setattr(
        search, "compile_work", compiler(lambda rows: TooLarge("it uses 20G of 16G", None))
    )
    plan = search.make_plan(
        WORK, parse_topology("h100:4"), OPTIMIZER, "manual", [object()], 1e9, False
    )
    assert not plan.compiled
    assert (
        plan.source
        == "predicted from shapes, not compiled: the compiler refuses the step, it uses 20G of 16G"
    )
    assert plan.largest is None
