"""Errors planted in every backward, one at a time: the verifier has to find each one.

A planted error replaces a piece of a function's source. What finds it is a comparison that the command makes: of that op by
itself with JAX's gradient, or of the whole model's gradient. The score is printed at the end of the test run.
"""

import functools
import importlib
import inspect
import sys
import textwrap
from typing import NamedTuple

import jax
import pytest

from gptjax.models import gpt2
from gptjax.verify import compare, ops
from tests.models import tiny


class Planted(NamedTuple):
    """One error: in which function, of what kind, and the piece of source that it replaces."""

    where: str
    kind: str
    right: str
    wrong: str


OPS = {  # function: (module, the cases of `gptjax.verify.ops` that run it, its planted errors)
    "linear_bwd": (
        "ops.linear",
        ["linear"],
        [
            ("transposed operand", "as_used(w.astype(dy.dtype), *axes)", "as_used(w.astype(dy.dtype), *axes)[::-1]"),
            ("sign", "as_used(contract", "as_used(-contract"),
            ("wrong axis", "platform_dependent(x, dy", "platform_dependent(x[:, ::-1], dy"),
            ("missing accumulation", "db = dy.astype(acc).sum((0, 1))", "db = dy.astype(acc)[0].sum(0)"),
            ("missing scale", "_weight_gradient).astype(w.dtype)", "_weight_gradient).astype(w.dtype) / x.shape[0]"),
            ("wrong axis", ".sum((0, 1))", ".sum((0, 1))[::-1]"),
        ],
    ),
    "layernorm_bwd": (
        "ops.norm",
        ["layernorm"],
        [
            ("dropped term", "dn - dn.mean(-1, keepdims=True) - n", "dn - n"),
            ("dropped term", " - n * (dn * n).mean(-1, keepdims=True)", ""),
            ("sign", "dn.mean(-1, keepdims=True) - n *", "dn.mean(-1, keepdims=True) + n *"),
            ("missing scale", "dx = rstd * (", "dx = ("),
            ("wrong axis", "dn.mean(-1, keepdims=True) -", "dn.mean(1, keepdims=True) -"),
            ("missing scale", 'dn = dyf * jnp.broadcast_to(as_used(w, "C").astype(mean.dtype), dy.shape)', "dn = dyf"),
            ("stale statistic", "(x.astype(mean.dtype) - mean) * rstd", "(x.astype(mean.dtype) - mean[:, :1]) * rstd"),
            ("stale statistic", "(x.astype(mean.dtype) - mean) * rstd", "(x.astype(mean.dtype) - mean) * rstd[:, :1]"),
            ("pre- for post-activation", "dw = (dyf * n)", "dw = (dyf * x.astype(mean.dtype))"),
            ("missing accumulation", "db = dyf.sum((0, 1))", "db = dyf[:, -1].sum(0)"),
        ],
    ),
    "gelu_bwd": (
        "ops.activation",
        ["gelu"],
        [
            ("dropped term", "0.5 * (1 + t) + 0.5 * xf * (1 - t * t) * du", "0.5 * (1 + t)"),
            ("dropped term", "0.5 * (1 + t) + 0.5 * xf", "0.5 * xf"),
            ("missing scale", "1 + 3 * CUBIC", "1 + CUBIC"),
            ("missing scale", "du = SLOPE * (", "du = ("),
            ("sign", "(1 - t * t)", "(1 + t * t)"),
            ("sign", "0.5 * (1 + t) +", "0.5 * (1 - t) +"),
            ("pre- for post-activation", "0.5 * xf * (1 - t * t)", "0.5 * t * (1 - t * t)"),
        ],
    ),
    "dropout_bwd": (
        "ops.dropout",
        ["dropout"],
        [
            ("missing scale", "dy * (1 / (1 - rate))", "dy"),
            ("missing scale", "1 / (1 - rate)", "1 / rate"),
            ("off-by-one mask", "jnp.where(keep,", "jnp.where(jnp.roll(keep, 1, -1),"),
            ("sign", "jnp.where(keep,", "jnp.where(~keep,"),
            ("dropped term", "jnp.where(keep, dy * (1 / (1 - rate)), jnp.zeros((), dy.dtype))", "dy * (1 / (1 - rate))"),
        ],
    ),
    "embedding_bwd": (
        "ops.embedding",
        ["embedding"],
        [
            ("missing accumulation", "dwte.at[tokens].add(dy)", "dwte.at[tokens].set(dy)"),
            ("missing accumulation", "dwpe.at[positions].add(dy.sum(0))", "dwpe.at[positions].add(dy[0])"),
            ("missing accumulation", "dwpe.at[positions].add(dy.sum(0))", "jnp.zeros_like(dwpe).at[positions].add(dy.sum(0))"),
            ("wrong axis", "dwpe.at[positions]", "dwpe.at[positions[::-1]]"),
            ("off-by-one mask", "dwte.at[tokens]", "dwte.at[jnp.roll(tokens, 1, 1)]"),
            ("sign", "dwte.at[tokens].add(dy)", "dwte.at[tokens].add(-dy)"),
        ],
    ),
    "cross_entropy_bwd": (
        "ops.loss",
        ["cross-entropy"],
        [
            (
                "dropped term",
                "jnp.where(_is_target(x, targets), -jnp.ones((), x.dtype), jnp.exp(x - lse[:, None]))",
                "jnp.exp(x - lse[:, None])",
            ),
            ("dropped term", "dloss * weights * q", "dloss * weights"),
            ("missing scale", "dloss * weights * q", "dloss * q"),
            ("missing scale", "dloss * weights * q", "weights * q"),
            ("sign", "-jnp.ones((), x.dtype)", "jnp.ones((), x.dtype)"),
            ("off-by-one mask", "_is_target(x, targets)", "_is_target(x, targets + 1)"),
            ("stale statistic", "lse[:, None]", "jnp.roll(lse, 1)[:, None]"),
            ("stale statistic", "weights * q)", "weights * jnp.roll(q, 1))"),
            ("dropped term", "_exclude_padding(logits.astype(lse.dtype), vocab_size)", "logits.astype(lse.dtype)"),
        ],
    ),
    "materialised_bwd": (
        "ops.attention",
        ["attention materialised"],
        [
            ("dropped term", "(dp - (dp * pf).sum(-1, keepdims=True))", "dp"),
            ("wrong axis", "(dp * pf).sum(-1, keepdims=True)", "(dp * pf).sum(-2, keepdims=True)"),
            ("missing scale", " / math.sqrt(q.shape[3])", ""),
            ("missing scale", "math.sqrt(q.shape[3])", "math.sqrt(q.shape[2])"),
            ("transposed operand", '"bhts,bthd->bshd", r, do', '"bhst,bthd->bshd", r, do'),
            ("transposed operand", '"bhts,bshd->bthd", ds, k', '"bhts,bshd->bthd", ds, q'),
            ("pre- for post-activation", '"bhts,bthd->bshd", r, do', '"bhts,bthd->bshd", p, do'),
            ("dropped term", "dp = dropout_bwd(keep, rate, dr)", "dp = dr"),
            ("off-by-one mask", "pf = p.astype(acc)", "pf = jnp.tril(p.astype(acc), -1)"),
            ("sign", "pf * (dp - (", "pf * (dp + ("),
        ],
    ),
    "blockwise_bwd": (
        "ops.blockwise",
        ["attention blockwise"],
        [
            ("dropped term", "(dp - deltai[..., None])", "dp"),
            ("missing scale", " * scale).astype", ").astype"),
            ("stale statistic", "lsei[..., None]", "lsei[..., :1, None]"),
            ("off-by-one mask", "lax.cond(j <= i, visit", "lax.cond(j < i, visit"),
            ("missing accumulation", "dkj += jnp", "dkj = jnp"),
            ("missing accumulation", "dvj += jnp", "dvj = jnp"),
            ("missing accumulation", "dq.at[i].add(", "dq.at[i].set("),
            ("transposed operand", '"bhrs,bhrd->bhsd", ds, qi', '"bhrs,bhrd->bhsd", ds, doi'),
            ("dropped term", "dp = dropout_bwd(keep, rate, dr)", "dp = dr"),
            ("pre- for post-activation", '"bhrs,bhrd->bhsd", r.astype(doi.dtype)', '"bhrs,bhrd->bhsd", p.astype(doi.dtype)'),
            ("sign", "(dp - deltai", "(dp + deltai"),
        ],
    ),
}
MODEL = {  # functions of gpt2.py
    "block_bwd": [
        ("dropped term", "dx = dx + dx2", "dx = dx2"),
        ("dropped term", "dx = dx + dx1", "dx = dx1"),
        ("sign", "dx = dx + dx2", "dx = dx - dx2"),
        ("transposed operand", "join_heads(dq, dk, dv)", "join_heads(dk, dq, dv)"),
        ("pre- for post-activation", "gelu_bwd(saved.gelu, dg)", "gelu_bwd(saved.fcproj, dg)"),
        ("stale statistic", "layernorm_bwd(saved.ln1,", "layernorm_bwd(saved.ln2,"),
        ("stale statistic", "layernorm_bwd(saved.ln2,", "layernorm_bwd(saved.ln1,"),
        ("off-by-one mask", "dropout_bwd(saved.drop1", "dropout_bwd(saved.drop2"),
        ("dropped term", "dm = dropout_bwd(saved.drop2, cfg.dropout, dx)", "dm = dx"),
        ("dropped term", "linear_bwd(saved.fc, w.fcw, df, axes=FC)", "linear_bwd(saved.fc, w.fcw, dg, axes=FC)"),
        ("wrong axis", "dqkvw, dqkvb, dattprojw, dattprojb", "dqkvw[:, ::-1], dqkvb, dattprojw, dattprojb"),
        ("transposed operand", "dattprojw, dattprojb, dln2w", "dattprojw.T, dattprojb, dln2w"),
    ],
    "blocks_bwd": [
        ("missing accumulation", "cfg, reverse=True)", "cfg)"),
        ("stale statistic", "block_bwd(w, saved, dx, cfg", "block_bwd(jax.tree.map(lambda x: x * 1.001, w), saved, dx, cfg"),
    ],
    "loss_and_grad": [
        ("dropped term", "dx = dropout_bwd(drop, cfg.dropout, dx)", "dx = dx * 1"),
        ("missing accumulation", "positions, dwte, jnp", "positions, jnp.zeros_like(dwte), jnp"),
        ("pre- for post-activation", "layernorm_bwd(lnf, params", "layernorm_bwd(lnf._replace(x=h), params"),
        ("missing scale", "layernorm_bwd(lnf, params.lnfw, dh)", "layernorm_bwd(lnf, params.lnfb, dh)"),
        ("off-by-one mask", "embedding_bwd(batch.inputs", "embedding_bwd(batch.targets"),
    ],
    "_classifier_and_grad": [
        ("missing accumulation", "dwte = dw if dwte is None else dwte + dw", "dwte = dw"),
        ("transposed operand", '"nv,nc->vc", dscores, x', '"nv,nc->vc", dscores, jnp.roll(x, 1, 0)'),
        ("missing scale", 'contract("nv,vc->nc", dscores, w)', 'contract("nv,vc->nc", dscores, w) / 2'),
        ("pre- for post-activation", '"nv,nc->vc", dscores, x', '"nv,nc->vc", scores, x'),
        ("sign", "dscores = cross", "dscores = -cross"),
    ],
}
PLANTED = [Planted(name, *error) for name, (_, _, errors) in OPS.items() for error in errors]
PLANTED_IN_MODEL = [Planted(name, *error) for name, errors in MODEL.items() for error in errors]


def identify(planted: Planted) -> str:
    return f"{planted.where}: {planted.kind}: {planted.wrong}"


def wrong_version(function, planted: Planted):
    """The function with the planted error, in a namespace of its own."""
    module = sys.modules[function.__module__]
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(planted.right) == 1, f"{planted.right!r} is not in {planted.where} once"
    names = dict(vars(module))
    exec(compile(source.replace(planted.right, planted.wrong), f"<{identify(planted)}>", "exec"), names)
    return names[function.__name__]


@functools.cache
def cases():
    return {case.name: case for case in ops.op_cases()}


@pytest.mark.parametrize("planted", PLANTED, ids=identify)
def test_an_error_in_an_op_is_found(planted, monkeypatch):
    module_name, names, _ = OPS[planted.where]
    module = importlib.import_module(f"gptjax.{module_name}")
    wrong = wrong_version(getattr(module, planted.where), planted)
    for user in (module, ops, ops.ops):
        if hasattr(user, planted.where):
            monkeypatch.setattr(user, planted.where, wrong)
    assert not all(ops.op_against_autodiff(case).ok for case in ops.op_cases() if case.name in names)


CFG = tiny.config(dropout=0.2, loss_chunks=2)


@functools.cache
def reference():
    """Parameters, batch, key, JAX's gradient."""
    args = tiny.params(CFG), tiny.batch(CFG), jax.random.key(1)
    return *args, jax.jit(jax.grad(functools.partial(gpt2.loss, cfg=CFG)))(*args[:2], key=args[2])


@pytest.mark.parametrize("planted", PLANTED_IN_MODEL, ids=identify)
def test_an_error_in_the_models_backward_is_found(planted, monkeypatch):
    params, batch, key, expected = reference()
    monkeypatch.setattr(gpt2, planted.where, wrong_version(getattr(gpt2, planted.where), planted))
    _, gradient = jax.jit(functools.partial(gpt2.loss_and_grad, cfg=CFG))(params, batch, key=key)
    assert not compare(gradient, expected)


def test_without_a_planted_error_nothing_is_found():
    params, batch, key, expected = reference()
    _, gradient = jax.jit(functools.partial(gpt2.loss_and_grad, cfg=CFG))(params, batch, key=key)
    assert compare(gradient, expected)
    assert all(ops.op_against_autodiff(case).ok for case in ops.op_cases())


def test_every_kind_of_error_is_planted():
    planted = PLANTED + PLANTED_IN_MODEL
    assert {error.kind for error in planted} == {
        "dropped term", "sign", "wrong axis", "missing scale", "transposed operand", "off-by-one mask",
        "pre- for post-activation", "missing accumulation", "stale statistic",
    }  # fmt: skip
    assert len(set(planted)) == len(planted)
    backwards = {name for name in vars(gpt2) if name.endswith("_bwd")} - {"attention_bwd"}  # which calls one of two
    assert backwards | {"materialised_bwd", "blockwise_bwd"} <= {error.where for error in planted}
