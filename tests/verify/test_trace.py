"""The first op that is wrong is named, whatever the error: in an op, in what joins the ops, or in what is done with results."""

import functools
import re

import jax
import pytest

from gptjax.models import gpt2
from gptjax.verify import trace
from tests.compare import FLOAT64_TOLERANCE, relative_l2
from tests.models import tiny
from tests.verify.test_mutations import Planted, wrong_version

CFG = tiny.config(dropout=0.1)


def part(*args):
    """Where GPT-2's gradient parts."""
    params, batch, key = tiny.params(CFG), tiny.batch(CFG), jax.random.key(1)
    loss, loss_and_grad = (lambda p, b, f=f: f(p, b, CFG, key) for f in (gpt2.loss, gpt2.loss_and_grad))
    found = trace.first_parting(loss, loss_and_grad, params, batch, largest=1e-12)
    return found and str(found)


def plant(monkeypatch, name, change, layer=None):
    """Let ``change`` alter what the op gives, everywhere or in its ``layer``-th call from the loss."""
    right = getattr(gpt2, name)
    calls = iter(range(1000))

    @functools.wraps(right)
    def wrong(*args, **kwargs):
        inner = functools.wraps(right)(lambda *arrays: change(right(*args[:-1], *arrays, **kwargs)))
        return right(*args, **kwargs) if layer is not None and next(calls) != layer else jax.jit(inner)(args[-1])

    monkeypatch.setattr(gpt2, name, wrong)


def test_a_right_gradient_parts_nowhere():
    assert part() is None


def test_calls_are_recorded_with_their_places():
    params, batch = tiny.params(CFG), tiny.batch(CFG)
    (loss, grads), calls = trace.record(lambda p, b: gpt2.loss_and_grad(p, b, CFG), params, batch)
    assert loss == gpt2.loss_and_grad(params, batch, CFG)[0]
    assert (grads.wpe == gpt2.loss_and_grad(params, batch, CFG)[1].wpe).all()
    places = [call.place for call in calls]
    assert places[0] == "embedding (wte)"
    assert places[2:6] == [
        "layer 0, layernorm (ln1w)",
        "layer 0, linear (qkvw)",
        "layer 0, attention (after qkvw)",
        "layer 0, linear (attprojw)",
    ]
    assert "layer 1, gelu (after fcw)" in places
    names = [call.op for call in calls]
    assert names.count("gelu_fwd") == names.count("gelu_bwd") == 2


def test_gradients_of_every_ops_result_are_jaxs():
    """Of the input embeddings, against what the hand-written backward gives to the embedding, and the sum over sequences."""
    params, batch = tiny.params(CFG), tiny.batch(CFG)
    first, *_ = trace.cotangents(lambda p, b: gpt2.loss(p, b, CFG), params, batch)
    _, calls = trace.record(lambda p, b: gpt2.loss_and_grad(p, b, CFG), params, batch)
    dy = next(call for call in calls if call.op == "embedding_bwd").ins[-1]
    assert relative_l2(first, dy) < FLOAT64_TOLERANCE
    assert relative_l2(first.sum(0), gpt2.loss_and_grad(params, batch, CFG)[1].wpe[:7]) < FLOAT64_TOLERANCE


@pytest.mark.parametrize(
    ("op", "layer", "place"),
    [
        ("gelu_bwd", None, "layer 1, gelu (after fcw)"),
        ("gelu_bwd", 1, "layer 0, gelu (after fcw)"),
        ("attention_bwd", 1, "layer 0, attention (after qkvw)"),
        ("cross_entropy_bwd", None, "cross_entropy (after lnfw)"),
        ("layernorm_bwd", None, "layernorm (lnfw)"),
        ("layernorm_bwd", 2, "layer 1, layernorm (ln1w)"),
        ("linear_bwd", 5, "layer 0, linear (fcw)"),
        ("dropout_bwd", 0, "layer 1, dropout (after fcprojw)"),
        ("embedding_bwd", None, "embedding (wte)"),
    ],
)
def test_the_first_wrong_op_is_named(monkeypatch, op, layer, place):
    def change(result):
        return jax.tree.map(lambda x: x * (1 + 1e-8), result)

    if op == "cross_entropy_bwd":
        right = gpt2.cross_entropy_bwd
        monkeypatch.setattr(gpt2, op, jax.jit(functools.wraps(right)(lambda *a: change(right(*a))), static_argnums=1))
    else:
        plant(monkeypatch, op, change, layer)
    assert re.fullmatch(re.escape(f"{place}: {op} gives a wrong gradient (relative L2 error ") + r"\d\.\de-\d\d\)", part())


def test_an_error_in_a_weights_gradient_alone_is_named(monkeypatch):
    plant(monkeypatch, "linear_bwd", lambda result: (result[0], result[1], -result[2]), 4)
    assert part().startswith("layer 0, linear (fcprojw): linear_bwd gives a wrong gradient")


def test_an_error_between_the_ops_is_named_by_who_receives_it(monkeypatch):
    forgets_the_stream = wrong_version(gpt2.block_bwd, Planted("block_bwd", "dropped term", "dx = dx + dx2", "dx = dx2"))
    monkeypatch.setattr(gpt2, "block_bwd", forgets_the_stream)
    received = "dropout_bwd receives a wrong gradient, though every op before it is right"
    assert part().startswith(f"layer 1, dropout (after attprojw): {received}")
    monkeypatch.undo()
    monkeypatch.setattr(gpt2, "blocks_bwd", lambda *args: _scaled(right_blocks(*args)))
    assert part().startswith(f"dropout (after wte): {received}")


right_blocks = gpt2.blocks_bwd


def _scaled(result):
    return result[0] * 2, result[1]


def test_gradients_put_together_wrongly_are_named(monkeypatch):
    join = gpt2.join_layers
    monkeypatch.setattr(gpt2, "join_layers", lambda blocks: join(blocks[::-1]))
    assert part().startswith("gradient of ")
    assert "put together wrongly" in part()


def test_a_backward_in_another_order_is_named(monkeypatch):
    right = gpt2.gelu_bwd
    monkeypatch.setattr(gpt2, "gelu_bwd", lambda saved, dy: gpt2.dropout_bwd(None, 0.0, right.__wrapped__(saved, dy)))
    assert part() == (
        "layer 1, dropout (after fcprojw): dropout_bwd is called where the mirror of the forward has "
        "layer 1, gelu (after fcw) (relative L2 error 1.0e+00)"
    )


def test_a_forward_that_differs_from_the_plain_one_is_named(monkeypatch):
    right = gpt2.attention_fwd
    wrong = jax.jit(functools.wraps(right)(lambda *a, **k: jax.tree.map(lambda x: x * 1.01, right(*a, **k))), static_argnums=0,
                    static_argnames="rate")  # fmt: skip
    monkeypatch.setattr(gpt2, "attention_fwd", lambda name, q, k, v, rate, key: wrong(name, q, k, v, rate=rate))
    assert part().startswith("layer 0, attention (after qkvw): attention_fwd gives another value than in the plain forward")
