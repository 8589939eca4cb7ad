"""Errors planted in every backward, one at a time: the verifier has to find each one.

What finds it is a comparison that the command makes: of an op by itself with JAX's gradient, or of
the whole model's loss and gradient, on one device or on a mesh. The score is printed at the end of
the test run.
"""

import ast
import functools
import inspect
import textwrap
from collections import Counter
from typing import Any

import pytest

from gptjax import ops as package
from gptjax.config import MeshConfig
from gptjax.models import gpt2, layers, llama, transformer
from gptjax.train.step import mean_loss_and_grad
from gptjax.verify import compare, ops
from gptjax.verify.model import by_autodiff, parameters, run_program
from tests.verify.planted import IN_MODEL, IN_OPS, plant
from tests.verify.subject import subject


@pytest.fixture(autouse=True)
def traced_afresh():
    """What an error is planted below must not be traced already, nor stay so."""
    package.linear_bwd.clear_cache()
    yield
    package.linear_bwd.clear_cache()


EACH_IN_OPS = [(cases, error) for cases, errors in IN_OPS.items() for error in errors]


@pytest.mark.parametrize(
    ("cases", "error"), EACH_IN_OPS, ids=lambda x: "" if isinstance(x, str) else str(x)
)
def test_an_error_in_an_op_is_found(cases, error, monkeypatch):
    plant(monkeypatch, error)
    assert not all(
        ops.op_against_autodiff(case).ok for case in ops.op_cases() if case.name.startswith(cases)
    )


GPT2: dict[str, Any] = {}
LLAMA = {"family": "llama", "num_heads": 4, "num_kv_heads": 2, "channels": 16, "tied": False}
SETTINGS = {  # a model, and how it is computed
    "": (GPT2, {}),
    "gelu": (GPT2, {"recompute": "gelu"}),
    "block": (GPT2, {"recompute": "block"}),
    "mesh": (GPT2, {"mesh": MeshConfig(2, 2, 2)}),
    "gpt2 packed": (GPT2 | {"packed": True}, {}),
    "llama": (LLAMA, {}),
    "gelu in llama": (LLAMA, {"recompute": "gelu"}),
    "tied llama": (LLAMA | {"tied": True}, {}),
    "packed llama": (LLAMA | {"packed": True}, {}),
    "packed block": (LLAMA | {"packed": True}, {"recompute": "block"}),
    "mesh of llama": (LLAMA, {"mesh": MeshConfig(2, 2, 2)}),
}
DROPOUT = {"B": 4, "dropout": 0.2, "dropout_mlp": 0.3}


def check(setting, run):
    """The gradient that training computes in this setting, against JAX's on one device."""
    model, computation = SETTINGS[setting]
    found = run(subject(**model, **computation, **DROPOUT, loss_chunks=2))
    return compare(found, reference(setting))


def run_op_by_op(subject):
    """`run_program` without compiling the whole: the ops of every error are compiled once."""
    if subject.mesh is not None:
        return run_program(subject)
    return mean_loss_and_grad(
        parameters(subject), subject.batch, subject.key, cfg=subject.cfg, backward="manual"
    )


def reference(setting):
    return _reference(tuple(SETTINGS[setting][0].items()))


@functools.cache
def _reference(model):
    found = by_autodiff(subject(**dict(model), **DROPOUT))
    return found.loss, found.params


@pytest.mark.parametrize("error", IN_MODEL, ids=str)
def test_an_error_in_the_models_backward_is_found(error, monkeypatch):
    reference(error.setting)
    plant(monkeypatch, error)
    assert not check(error.setting, run_op_by_op)


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_a_planted_error_nothing_is_found(setting):
    assert check(setting, run_program)
    assert check(setting, run_op_by_op)


def test_without_a_planted_error_every_op_is_right():
    assert all(ops.op_against_autodiff(case).ok for case in ops.op_cases())


def test_no_two_errors_have_one_name():
    names = Counter(str(error) for error in IN_MODEL) + Counter(
        f"{case} {error}" for case, error in EACH_IN_OPS
    )
    assert max(names.values()) == 1


def test_every_backward_of_the_package_has_errors_planted_in_it():
    # Which calls one of two
    backwards = {name for name in package.__all__ if name.endswith("_bwd")} - {"attention_bwd"}
    assert backwards | {"materialised_bwd", "blockwise_bwd"} <= {
        error.function.__name__ for _, error in EACH_IN_OPS
    }


EVERY_LINE = [
    gpt2.block_bwd,
    gpt2.embed_bwd,
    gpt2.norm_bwd,
    gpt2.recompute,
    llama.block_bwd,
    llama.embed_bwd,
    llama.norm_bwd,
    llama.recompute,
    transformer.loss_and_grad,
    transformer.classifier_and_grad,
    transformer.blocks_bwd,
    layers.linear_bwd,
    layers.layernorm_bwd,
    layers.gelu_bwd,
    layers.gelu_again,
    layers.rmsnorm_bwd,
    layers.swiglu_bwd,
    layers.swiglu_again,
    transformer.embed_bwd,
]


@pytest.mark.parametrize(
    "function", EVERY_LINE, ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}"
)
def test_every_line_of_the_models_backward_has_an_error_planted_in_it(function):
    """All statements that compute something, those for a mesh included."""
    source = textwrap.dedent(inspect.getsource(function))
    hit = {
        source[: source.index(error.right)].count("\n") + 1
        for error in IN_MODEL
        if error.function is function
    }
    hit |= {
        source[: source.index(e.right) + len(e.right)].count("\n") + 1
        for e in IN_MODEL
        if e.function is function
    }
    for node in ast.walk(ast.parse(source)):
        compound = ast.FunctionDef | ast.If | ast.For
        if (
            not isinstance(node, ast.stmt)
            or isinstance(node, compound)
            or not any(map(computes, ast.walk(node)))
        ):
            continue
        assert hit & set(range(node.lineno, node.end_lineno + 1)), ast.unparse(node)


def computes(node):
    """A call; what names a value, the family or the settings computes nothing."""
    settings = {"family_of(cfg)", "resolved(cfg, batch)"}
    return isinstance(node, ast.Call) and ast.unparse(node) not in settings
