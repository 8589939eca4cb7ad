"""The first op that is wrong is named, whatever the error: in an op, in what joins the ops, or in
what is done with results.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from gptjax import ops
from gptjax.config import MeshConfig
from gptjax.models import gpt2, transformer
from gptjax.parallel.mesh import make_mesh
from gptjax.verify import trace
from gptjax.xla.barrier import barrier
from tests.compare import FLOAT64_TOLERANCE, relative_l2
from tests.models import tiny
from tests.verify.planted import planted

CFG = tiny.config(dropout=0.1, dropout_mlp=0.2)
USERS = dict.fromkeys(("attention_bwd", "cross_entropy_bwd"), transformer)


def part(*args):
    """Where GPT-2's gradient parts."""
    params, batch, key = tiny.params(CFG), tiny.batch(CFG), jax.random.key(1)
    loss, loss_and_grad = (
        lambda p, b, f=f: f(p, b, CFG, key) for f in (transformer.loss, transformer.loss_and_grad)
    )
    found = trace.first_mismatch(loss, loss_and_grad, params, batch, largest=1e-12)
    return found and str(found)


def plant(monkeypatch, name, change, layer=None):
    """Let ``change`` alter what the op gives, everywhere or in its ``layer``-th call from the
    loss.
    """
    user = USERS.get(name, gpt2)
    right = getattr(user, name)
    calls = iter(range(1000))

    @functools.wraps(right)
    def wrong(*args, **kwargs):
        inner = functools.wraps(right)(lambda *arrays: change(right(*args[:-1], *arrays, **kwargs)))
        return (
            right(*args, **kwargs)
            if layer is not None and next(calls) != layer
            else jax.jit(inner)(args[-1])
        )

    monkeypatch.setattr(user, name, wrong)


def test_a_right_gradient_parts_nowhere():
    assert part() is None


def test_calls_are_recorded_with_their_places():
    params, batch = tiny.params(CFG), tiny.batch(CFG)
    (loss, grads), calls = trace.record(
        lambda p, b: transformer.loss_and_grad(p, b, CFG), params, batch
    )
    assert loss == transformer.loss_and_grad(params, batch, CFG)[0]
    assert (grads.wpe == transformer.loss_and_grad(params, batch, CFG)[1].wpe).all()
    places = [call.place for call in calls]
    assert places[0] == "embedding (wte)"
    assert places[1] == "embedding (wpe)"
    assert places[3:8] == [
        "layer 0, layernorm (ln1w)",
        "layer 0, linear (qw)",
        "layer 0, linear (kw)",
        "layer 0, linear (vw)",
        "layer 0, attention (after vw)",
    ]
    assert "layer 1, gelu (after fcw)" in places
    names = [call.op for call in calls]
    assert names.count("gelu_fwd") == names.count("gelu_bwd") == 2


def test_gradients_of_every_ops_result_are_jaxs():
    """Of the input embeddings, against what the hand-written backward gives to the embedding, and
    the sum over sequences.
    """
    params, batch = tiny.params(CFG), tiny.batch(CFG)
    first, *_ = trace.cotangents(lambda p, b: transformer.loss(p, b, CFG), params, batch)
    _, calls = trace.record(lambda p, b: transformer.loss_and_grad(p, b, CFG), params, batch)
    dy = [call for call in calls if call.op == "embedding_bwd"][-1].ins[-1]
    assert relative_l2(first, dy) < FLOAT64_TOLERANCE
    assert (
        relative_l2(first.sum(0), transformer.loss_and_grad(params, batch, CFG)[1].wpe[:7])
        < FLOAT64_TOLERANCE
    )


@pytest.mark.parametrize(
    ("op", "layer", "place"),
    [
        ("gelu_bwd", None, "layer 1, gelu (after fcw)"),
        ("gelu_bwd", 1, "layer 0, gelu (after fcw)"),
        ("attention_bwd", 1, "layer 0, attention (after vw)"),
        ("cross_entropy_bwd", None, "cross_entropy (after lnfw)"),
        ("layernorm_bwd", None, "layernorm (lnfw)"),
        ("layernorm_bwd", 2, "layer 1, layernorm (ln1w)"),
        ("linear_bwd", 7, "layer 0, linear (fcw)"),
        ("dropout_bwd", 0, "layer 1, dropout (after fcprojw)"),
        ("embedding_bwd", None, "embedding (wpe)"),
        ("embedding_bwd", 1, "embedding (wte)"),
    ],
)
def test_the_first_wrong_op_is_named(monkeypatch, op, layer, place):
    def change(result):
        return jax.tree.map(lambda x: x * (1 + 1e-8), result)

    if op == "cross_entropy_bwd":
        right = transformer.cross_entropy_bwd
        monkeypatch.setattr(
            transformer,
            op,
            jax.jit(functools.wraps(right)(lambda *a: change(right(*a))), static_argnums=1),
        )
    else:
        plant(monkeypatch, op, change, layer)
    assert re.fullmatch(
        re.escape(f"{place}: {op} gives a wrong gradient (relative L2 error ") + r"\d\.\de-\d\d\)",
        part(),
    )


def test_an_error_in_a_weights_gradient_alone_is_named(monkeypatch):
    plant(monkeypatch, "linear_bwd", lambda result: (result[0], result[1], -result[2]), 6)
    assert part().startswith("layer 0, linear (fcprojw): linear_bwd gives a wrong gradient")


def test_an_error_between_the_ops_is_named_by_who_receives_it(monkeypatch):
    monkeypatch.setattr(
        gpt2, "block_bwd", planted("gpt2.block: the stream's gradient is not added to the MLP's")
    )
    received = "dropout_bwd receives a wrong gradient, though every op before it is right"
    assert part().startswith(f"layer 1, dropout (after attprojw): {received}")
    monkeypatch.undo()
    monkeypatch.setattr(transformer, "blocks_bwd", lambda *args: _scaled(right_blocks(*args)))
    assert part().startswith(f"dropout (after wpe): {received}")


right_blocks = transformer.blocks_bwd


def _scaled(result):
    return result[0] * 2, result[1]


def test_gradients_put_together_wrongly_are_named(monkeypatch):
    right = gpt2.block_bwd

    def swapped(*args):
        dx, dw = right(*args)
        return dx, dw._replace(qw=dw.kw, kw=dw.qw)

    monkeypatch.setattr(gpt2, "block_bwd", swapped)
    assert part().startswith("gradient of ")
    assert "combined wrongly" in part()


def test_a_weight_is_followed_through_casts_reshapes_layouts_and_barriers():
    """The call is named by the weight, whatever was done to it on the way that leaves its
    values.
    """
    mesh = make_mesh(MeshConfig(data=8), {}, 8)

    def f(w, x):
        cast = barrier(x, w["cast"].astype(jnp.float64))
        shaped = lax.optimization_barrier((x, w["shaped"].reshape(4, 3)))[1]
        laid_out = lax.with_sharding_constraint(w["laid_out"].T, jax.NamedSharding(mesh, jax.P()))
        for weight in (cast, shaped, laid_out, w["scaled"] * 2):
            ops.linear_fwd(x, weight)

    weights = {
        "cast": jnp.ones((4, 3), jnp.float32),
        "shaped": jnp.ones(12),
        "laid_out": jnp.ones((3, 4)),
        "scaled": jnp.ones((4, 3)),
    }
    places = []
    jax.jit(
        lambda w, x: trace.run(f, w, x, on_call=lambda call: places.append(call.place) or call.outs)
    )(weights, jnp.ones((1, 2, 4)))
    assert places == [
        "linear (cast)",
        "linear (shaped)",
        "linear (laid_out)",
        "linear (after laid_out)",
    ]


def test_a_backward_may_return_more_than_the_call_has_arguments(monkeypatch):
    """A linear layer without bias: what its backward gives for one is not looked at."""

    def loss(w, x):
        return ops.linear_fwd(x, w)[0].sum()

    def loss_and_grad(w, x):
        y, saved = ops.linear_fwd(x, w)
        return y.sum(), ops.linear_bwd(saved, w, jnp.ones_like(y))[1]

    w, x = jnp.ones((4, 3)), jnp.ones((1, 2, 4))
    assert trace.first_mismatch(loss, loss_and_grad, w, x, largest=1e-12) is None
    wrong = lambda w, x: (loss(w, x), 2 * loss_and_grad(w, x)[1])  # noqa: E731
    assert trace.first_mismatch(loss, wrong, w, x, largest=1e-12) is not None


def test_a_backward_in_another_order_is_named(monkeypatch):
    unnamed = ops.gelu_bwd.__wrapped__  # not a call in the traced program
    monkeypatch.setattr(
        gpt2, "gelu_bwd", lambda saved, dy: gpt2.dropout_bwd(None, 0.0, unnamed(saved, dy))
    )
    assert part() == (
        "layer 1, dropout (after fcprojw): dropout_bwd is called where the reversed forward "
        "has "
        "layer 1, gelu (after fcw) (relative L2 error 1.0e+00)"
    )


def test_a_forward_that_differs_from_the_plain_one_is_named(monkeypatch):
    right = transformer.attention_fwd
    wrong = jax.jit(functools.wraps(right)(lambda *a, **k: jax.tree.map(lambda x: x * 1.01, right(*a, **k))), static_argnums=0,
                    static_argnames="rate")  # fmt: skip
    monkeypatch.setattr(
        transformer,
        "attention_fwd",
        lambda name, q, k, v, rate, key, segments: wrong(name, q, k, v, rate=rate),
    )
    assert part().startswith(
        "layer 0, attention (after vw): attention_fwd gives a different value in the plain forward"
    )
