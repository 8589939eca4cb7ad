"""Errors to plant in a backward, each named by what it breaks: a piece of a function's source and
what takes its place.
"""

import sys
from typing import Any, NamedTuple

from gptjax.explore import faults
from gptjax.models import chunks, gpt2, layers, llama, transformer
from gptjax.ops import (
    cross_entropy_bwd,
    dropout_bwd,
    embedding_bwd,
    gelu_bwd,
    layernorm_bwd,
    linear_bwd,
    rmsnorm_bwd,
    rotary_bwd,
    swiglu_bwd,
)
from gptjax.ops.attention import materialised_bwd
from gptjax.ops.blockwise import blockwise_bwd
from gptjax.parallel import sharding
from gptjax.xla import products


class Planted(NamedTuple):
    """One error."""

    function: Any
    breaks: str
    right: str
    """Piece of the source, there once."""
    wrong: str
    setting: str = ""
    """Of tests/verify/test_mutations.py, if the line is not reached in the plain one."""

    def __str__(self) -> str:
        """The module, the function without its suffix, and what is broken."""
        module = self.function.__module__.rpartition(".")[2]
        return f"{module}.{self.function.__name__.removesuffix('_bwd')}: {self.breaks}"


def in_function(function: Any, *errors: tuple[str, ...]) -> list[Planted]:
    return [Planted(function, *error) for error in errors]


IN_OPS = {  # the cases of `gptjax.verify.ops` that run them, by the beginning of their names
    "linear": in_function(
        linear_bwd,
        ("inputs in reverse order in dx", "w.astype(dy.dtype)", "w.astype(dy.dtype)[::-1]"),
        ("sign of dx", "dx = times_transpose", "dx = -times_transpose"),
        (
            "dw pairs x with dy at another time",
            "products(x, dy)",
            "products(x[:, ::-1], dy)",
        ),
        ("dw is a mean over the batch", "products(x, dy)", "products(x, dy) / x.shape[0]"),
        ("db of the first sequence alone", ".sum((0, 1))", "[0].sum(0)"),
        ("db in reverse order", ".sum((0, 1))", ".sum((0, 1))[::-1]"),
    )
    + in_function(
        products._sum_of_outer_products_on_cpu,
        (
            "the wide form is transposed once too often",
            "barrier(dy, dwt).T",
            "barrier(dy, dwt).reshape(inputs, outputs)",
        ),
        (
            "the narrow form pairs rows in reverse",
            "(barrier(dy, x), dy)",
            "(barrier(dy, x)[:, ::-1], dy)",
        ),
    ),
    "layernorm": in_function(
        layernorm_bwd,
        ("no part through the mean", "dn - dn.mean(-1, keepdims=True) - n", "dn - n"),
        ("no part through the variance", " - n * (dn * n).mean(-1, keepdims=True)", ""),
        (
            "sign of the part through the variance",
            "dn.mean(-1, keepdims=True) - n *",
            "dn.mean(-1, keepdims=True) + n *",
        ),
        ("not divided by the deviation", "dx = rstd * (", "dx = ("),
        ("mean over time", "dn.mean(-1, keepdims=True) -", "dn.mean(1, keepdims=True) -"),
        (
            "no gain in dx",
            "dn = dyf * jnp.broadcast_to(w.astype(mean.dtype), dy.shape)",
            "dn = dyf",
        ),
        ("the first row's mean", "astype(mean.dtype) - mean)", "astype(mean.dtype) - mean[:, :1])"),
        ("the first row's deviation", "- mean) * rstd", "- mean) * rstd[:, :1]"),
        ("dw of x instead of its normal form", "(dyf * n).sum", "(dyf * x.astype(mean.dtype)).sum"),
        ("db of the last position alone", "dyf.sum((0, 1))", "dyf[:, -1].sum(0)"),
    ),
    "gelu": in_function(
        gelu_bwd,
        ("no derivative of tanh", "0.5 * (1 + t) + 0.5 * xf * (1 - t * t) * du", "0.5 * (1 + t)"),
        ("the derivative of tanh alone", "0.5 * (1 + t) + 0.5 * xf", "0.5 * xf"),
        ("cubic coefficient 2 instead of 3", "1 + 3 * CUBIC", "1 + 2 * CUBIC"),
        ("inner slope 1", "du = SLOPE * (", "du = ("),
        ("1 + t^2 for 1 - t^2", "(1 - t * t)", "(1 + t * t)"),
        ("1 - t for 1 + t", "0.5 * (1 + t) +", "0.5 * (1 - t) +"),
        ("t for x", "0.5 * xf * (1 - t * t)", "0.5 * t * (1 - t * t)"),
    ),
    "rmsnorm": in_function(
        rmsnorm_bwd,
        ("no part through the mean square", " - n * (dn * n).mean(-1, keepdims=True)", ""),
        ("sign of the part through the mean square", "(dn - n *", "(dn + n *"),
        ("not divided by the root", "dx = rstd * (", "dx = ("),
        ("mean over time", ".mean(-1, keepdims=True)", ".mean(1, keepdims=True)"),
        (
            "no gain in dx",
            "dn = dyf * jnp.broadcast_to(w.astype(rstd.dtype), dy.shape)",
            "dn = dyf",
        ),
        ("the first row's root", "astype(rstd.dtype) * rstd", "astype(rstd.dtype) * rstd[:, :1]"),
        ("dw of x instead of its normal form", "(dyf * n).sum", "(dyf * n / rstd).sum"),
        ("dw of the first sequence alone", ".sum((0, 1))", "[0].sum(0)"),
    ),
    "swiglu": in_function(
        swiglu_bwd,
        ("no derivative of the sigmoid", " + g * s * (1 - s)", ""),
        ("the derivative of the sigmoid alone", "(s + g * s", "(g * s"),
        ("1 + s for 1 - s", "(1 - s)", "(1 + s)"),
        ("dgate without up", "dgate = d * u *", "dgate = d *"),
        ("dup without the gate", "(d * g * s)", "(d * s)"),
        ("dup without the sigmoid", "(d * g * s)", "(d * g)"),
        ("gate and up are exchanged", "g, u, d =", "u, g, d ="),
    ),
    "rotary": in_function(
        rotary_bwd,
        ("it turns the same way", "theta, -1)", "theta, 1)"),
        ("it does not turn", "return _rotate(dy, positions, theta, -1)", "return dy * 1"),
        ("positions in reverse", "positions, theta", "positions[..., ::-1], theta"),
        ("another wavelength", "theta, -1", "2 * theta, -1"),
    ),
    "dropout": in_function(
        dropout_bwd,
        ("what is kept is not scaled", "dy * (1 / (1 - rate))", "dy"),
        ("what is kept is scaled by 1 / rate", "1 / (1 - rate)", "1 / rate"),
        ("the mask is moved by one", "jnp.where(keep,", "jnp.where(jnp.roll(keep, 1, -1),"),
        ("what was dropped is kept", "jnp.where(keep,", "jnp.where(~keep,"),
        (
            "nothing is dropped",
            "jnp.where(keep, dy * (1 / (1 - rate)), jnp.zeros((), dy.dtype))",
            "dy * (1 / (1 - rate))",
        ),
    ),
    "embedding": in_function(
        embedding_bwd,
        ("of an id that comes twice, the last counts", ".add(dy", ".set(dy"),
        ("rows of the ids in reverse", "dtable.at[ids]", "dtable.at[ids[:, ::-1]]"),
        ("sign", ".add(dy", ".add(-dy"),
        ("what the table's gradient was is lost", "dtable.at", "(0 * dtable).at"),
    ),
    "cross-entropy": in_function(
        cross_entropy_bwd,
        (
            "the target counts as any other",
            "jnp.where(_is_target(x, targets), -jnp.ones((), x.dtype), jnp",
            "(jnp",
        ),
        ("not the others' share", "dloss * weights * q", "dloss * weights"),
        ("targets are not weighed", "dloss * weights * q", "dloss * q"),
        ("not the loss's own gradient", "dloss * weights * q", "weights * q"),
        ("sign at the target", "-jnp.ones((), x.dtype)", "jnp.ones((), x.dtype)"),
        ("the id after the target's", "_is_target(x, targets)", "_is_target(x, targets + 1)"),
        ("another row's normalisation", "lse[:, None]", "jnp.roll(lse, 1)[:, None]"),
        ("another row's share", "weights * q)", "weights * jnp.roll(q, 1))"),
        (
            "padding takes part",
            "_exclude_padding(logits.astype(lse.dtype), vocab_size)",
            "logits.astype(lse.dtype)",
        ),
    ),
    "attention materialised": in_function(
        materialised_bwd,
        ("the softmax's Jacobian is its diagonal", "(dp - (dp * pf).sum(-1, keepdims=True))", "dp"),
        (
            "the Jacobian sums over queries",
            "(dp * pf).sum(-1, keepdims=True)",
            "(dp * pf).sum(-2, keepdims=True)",
        ),
        ("scores are not scaled", " / math.sqrt(q.shape[3])", ""),
        (
            "scores are scaled by the number of heads",
            "math.sqrt(q.shape[3])",
            "math.sqrt(q.shape[2])",
        ),
        ("dv of transposed probabilities", '"bkrs,brkd->bskd", r, do', '"bksr,brkd->bskd", r, do'),
        ("dq of queries", '"bkrs,bskd->brkd", ds, k', '"bkrs,bskd->brkd", ds, q'),
        ("dk of keys", '"bkrs,brkd->bskd", ds, q', '"bkrs,brkd->bskd", ds, k'),
        ("dv of what dropout dropped, too", '"bkrs,brkd->bskd", r, do', '"bkrs,brkd->bskd", p, do'),
        ("dp of what dropout dropped, too", "dp = dropout_bwd(keep, rate, dr)", "dp = dr"),
        (
            "a position does not see itself",
            "pf = p.astype(acc)",
            "pf = jnp.tril(p.astype(acc), -1)",
        ),
        ("sign in the Jacobian", "pf * (dp - (", "pf * (dp + ("),
    ),
    "attention blockwise": in_function(
        blockwise_bwd,
        ("the softmax's Jacobian is its diagonal", "(dp - deltai[..., None])", "dp"),
        ("scores are not scaled", " * scale).astype", ").astype"),
        ("the first row's normalisation", "lsei[..., None]", "lsei[..., :1, None]"),
        (
            "a block of queries does not see its own keys",
            "lax.cond(j <= i, visit",
            "lax.cond(j < i, visit",
        ),
        ("dk of the last block of queries alone", "dkj += jnp", "dkj = jnp"),
        ("dv of the last block of queries alone", "dvj += jnp", "dvj = jnp"),
        ("dq of the last block of keys alone", "dq.at[i].add(", "dq.at[i].set("),
        ("dk of the output's gradient", '"bkrs,bkrd->bksd", ds, qi', '"bkrs,bkrd->bksd", ds, doi'),
        ("dp of what dropout dropped, too", "dp = dropout_bwd(keep, rate, dr)", "dp = dr"),
        ("dv of what dropout dropped, too", "r.astype(doi.dtype), doi", "p.astype(doi.dtype), doi"),
        ("sign in the Jacobian", "(dp - deltai", "(dp + deltai"),
    ),
}


IN_LLAMA = [
    *in_function(
        llama.block_bwd,
        (
            "the MLP's output keeps what dropout dropped",
            "dm = dropout_bwd(saved.drop2, cfg.dropout, dx)",
            "dm = dx",
        ),
        ("the MLP's last matrix gets the stream's gradient", "w.w2, dm)", "w.w2, dx)"),
        (
            "dropout in the MLP drops nothing",
            "dg = dropout_bwd(saved.drop_mlp, cfg.dropout_mlp, dg)",
            "dg = dg * 1",
        ),
        ("gate and up are exchanged", "dgate, dup = swiglu", "dup, dgate = swiglu"),
        ("up goes back through the gate's weight", "w.w3, dup)", "w.w1, dup)"),
        ("the gate gets up's gradient", "w.w1, dgate)", "w.w1, dup)"),
        ("up does not reach the MLP's input", "add(dh2, dh3)", "dh2"),
        ("the other norm's root", "rmsnorm_bwd(saved.ffn_norm", "rmsnorm_bwd(saved.att_norm"),
        ("the stream's gradient is not added to the MLP's", "dx = dx + dx2", "dx = dx2"),
        ("attention's branch by the MLP's mask", "(saved.drop1", "(saved.drop2"),
        ("attention's projection gets the stream's gradient", "w.wo, da)", "w.wo, dx)"),
        ("keys and values are exchanged", "dq, dk, dv = attend", "dq, dv, dk = attend"),
        ("keys are not rotated back", "cfg.rope_theta, dk)", "1.0, dk)"),
        ("queries are rotated with the keys", "cfg.rope_theta, dq)", "1.0, dq)"),
        ("values go back through the keys' weight", "w.wv, dv)", "w.wk, dv)"),
        (
            "keys come from the MLP's input",
            "linear_bwd(saved.qkv, w.wk",
            "linear_bwd(saved.ffn, w.wk",
        ),
        ("queries do not reach attention's input", "add(dhq, dhk, dhv)", "add(dhk, dhv)"),
        ("queries' sign", "w.wq, dq)", "w.wq, -dq)"),
        ("the stream's gradient is not added to attention's", "dx = dx + dx1", "dx = dx1"),
        ("the key weight's gradient for the value's", "wv=dwv", "wv=dwk"),
        ("the gate's weight gets up's gradient", "w1=dw1", "w1=dw3"),
    ),
    *in_function(
        llama.embed_bwd,
        ("time runs backwards", "dx.astype(dhead.dtype)", "dx.astype(dhead.dtype)[:, ::-1]"),
        (
            "the classifier's part of the tied table is lost",
            '{"tok_emb": embedding_bwd(tokens, dhead, dx)}',
            '{"tok_emb": embedding_bwd(tokens, 0 * dhead, dx)}',
            "tied llama",
        ),
        ("an untied table gets the classifier's part", "jnp.zeros_like(dhead)", "dhead"),
        ("an untied classifier is halved", '"wcls": dhead', '"wcls": dhead / 2'),
    ),
    *in_function(
        llama.norm_bwd,
        ("sign", "saved, params.final_norm, dh)", "saved, params.final_norm, -dh)"),
        (
            "the gain's gradient is doubled",
            '"final_norm": dfinal_norm',
            '"final_norm": 2 * dfinal_norm',
        ),
    ),
    *in_function(
        llama.recompute,
        (
            "what dropout dropped is back",
            "dropout_bwd(saved.drop_mlp, cfg.dropout_mlp, g)",
            "g",
            "gelu in llama",
        ),
        (
            "sign",
            "swiglu_again(dx, saved.swiglu)",
            "-swiglu_again(dx, saved.swiglu)",
            "gelu in llama",
        ),
    ),
    *in_function(
        layers.rmsnorm_bwd,
        (
            "the root is doubled",
            "barrier_except_tpu(dy, saved.rstd)",
            "2 * barrier_except_tpu(dy, saved.rstd)",
        ),
        ("sign", "ops.rmsnorm_bwd(saved, w, dy)", "ops.rmsnorm_bwd(saved, w, -dy)"),
        ("dx waits and is doubled", "cpu_barrier(dw, dx)", "cpu_barrier(dw, 2 * dx)"),
    ),
    *in_function(
        layers.swiglu_bwd,
        (
            "gate and up are exchanged",
            "gate=barrier_except_tpu(dy, saved.gate)",
            "gate=barrier_except_tpu(dy, saved.up)",
        ),
    ),
    *in_function(
        layers.swiglu_again,
        (
            "gate and up are exchanged",
            "saved.gate), saved.up)",
            "saved.up), saved.gate)",
            "gelu in llama",
        ),
    ),
    *in_function(
        transformer.positions_of,
        (
            "they do not restart at a document",
            "place - lax.cummax(jnp.where(starts, place, 0), axis=1)",
            "place",
            "gpt2 packed",  # rotations by positions that are all shifted are the same
        ),
    ),
    *in_function(
        transformer.blocks_bwd,
        (
            "documents see each other where a block is computed again",
            "cfg, key, segments",
            "cfg, key, None",
            "packed block",
        ),
    ),
]

IN_MODEL = [
    *in_function(
        gpt2.block_bwd,
        (
            "the MLP's branch keeps what dropout dropped",
            "dm = dropout_bwd(saved.drop2, cfg.dropout, dx)",
            "dm = dx",
        ),
        ("the MLP's projection gets the stream's gradient", "w.fcprojw, dm)", "w.fcprojw, dx)"),
        (
            "dropout in the MLP drops nothing",
            "dg = dropout_bwd(saved.dropmlp, cfg.dropout_mlp, dg)",
            "dg = dg * 1",
        ),
        ("GELU at its output", "gelu_bwd(saved.gelu, dg)", "gelu_bwd(saved.fcproj, dg)"),
        ("GELU is the identity", "w.fcw, df)", "w.fcw, dg)"),
        (
            "the statistics of the other norm, before the MLP",
            "layernorm_bwd(saved.ln2,",
            "layernorm_bwd(saved.ln1,",
        ),
        ("the stream's gradient is not added to the MLP's", "dx = dx + dx2", "dx = dx2"),
        ("sign of the MLP's branch", "dx = dx + dx2", "dx = dx - dx2"),
        (
            "attention's branch by the MLP's mask",
            "dropout_bwd(saved.drop1",
            "dropout_bwd(saved.drop2",
        ),
        ("attention's projection gets the stream's gradient", "w.attprojw, da)", "w.attprojw, dx)"),
        ("queries and keys are exchanged", "dq, dk, dv = attend", "dk, dq, dv = attend"),
        ("values go back through the keys' weight", "w.vw, dv)", "w.kw, dv)"),
        (
            "keys come from the MLP's input",
            "linear_bwd(saved.qkv, w.kw",
            "linear_bwd(saved.fc, w.kw",
        ),
        ("queries go back through the keys' weight", "w.qw, dq)", "w.kw, dq)"),
        ("values do not reach attention's input", "add(dhq, dhk, dhv)", "add(dhq, dhk)"),
        ("the stream's gradient is not added to attention's", "dx = dx + dx1", "dx = dx1"),
        ("the key weight's gradient for the query's", "qw=dqw", "qw=dkw"),
        (
            "attention's projection has its heads in reverse",
            "attprojw=dattprojw",
            "attprojw=dattprojw[::-1]",
        ),
    ),
    *in_function(
        gpt2.embed_bwd,
        (
            "time runs backwards",
            "dx = dx.astype(dhead.dtype)",
            "dx = dx.astype(dhead.dtype)[:, ::-1]",
        ),
        ("positions of the first sequence alone", "dx.sum(0) if", "dx[0] if"),
        (
            "positions of packed sequences are doubled",
            "== 1 else dx",
            "== 1 else 2 * dx",
            "gpt2 packed",
        ),
        ("positions in reverse", "embedding_bwd(positions", "embedding_bwd(positions[::-1]"),
        (
            "the classifier's part of the tied table is lost",
            "(tokens, dhead, dx)",
            "(tokens, jnp.zeros_like(dhead), dx)",
        ),
        ("positions twice", '"wpe": dwpe', '"wpe": 2 * dwpe'),
    ),
    *in_function(
        gpt2.norm_bwd,
        ("the bias for the gain", "params.lnfw, dh", "params.lnfb, dh"),
        (
            "gain and bias are exchanged",
            '{"lnfw": dlnfw, "lnfb": dlnfb}',
            '{"lnfw": dlnfb, "lnfb": dlnfw}',
        ),
    ),
    *in_function(
        gpt2.recompute,
        (
            "GELU of another input",
            "gelu_again(dx, saved.gelu)",
            "gelu_again(dx, 2 * saved.gelu)",
            "gelu",
        ),
        (
            "what dropout dropped is back",
            "dropout_bwd(saved.dropmlp, cfg.dropout_mlp, g)",
            "g",
            "gelu",
        ),
    ),
    *(error._replace(setting=error.setting or "llama") for error in IN_LLAMA),
    *in_function(
        layers.linear_bwd,
        ("sign", "ops.linear_bwd(x, w, dy)", "ops.linear_bwd(x, w, -dy)"),
        ("dx waits and is doubled", "cpu_barrier((dw, db), dx)", "cpu_barrier((dw, db), 2 * dx)"),
    ),
    *in_function(
        layers.layernorm_bwd,
        (
            "the mean for the deviation",
            "barrier_except_tpu(dy, saved.rstd)",
            "barrier_except_tpu(dy, saved.mean)",
        ),
        ("sign", "ops.layernorm_bwd(saved, w, dy)", "ops.layernorm_bwd(saved, w, -dy)"),
        ("gain and bias are exchanged", "dx), dw, db", "dx), db, dw"),
    ),
    *in_function(
        layers.gelu_bwd,
        ("x and dy are exchanged", "barrier_except_tpu(dy, x), dy", "barrier_except_tpu(x, dy), x"),
    ),
    *in_function(
        layers.gelu_again, ("the derivative's variable for the value", "[0]", "[1]", "gelu")
    ),
    *in_function(
        transformer.embed_bwd,
        (
            "time runs backwards on the way to the tables",
            'compute_layout(dx, "B"',
            'compute_layout(dx[:, ::-1], "B"',
        ),
        (
            "the sequences are exchanged on the way to the tables",
            'param_layout(inputs, "B", None)',
            'param_layout(inputs[::-1], "B", None)',
        ),
        ("one device's tables are doubled", "positions, dhead, dx)", "positions, 2 * dhead, dx)"),
        ("the tables' rows are all id 0", "rows.reshape(", "0 * rows.reshape(", "mesh"),
        (
            "rows add to another shard's ids",
            "split(inputs), split",
            "split(inputs)[::-1], split",
            "mesh",
        ),
        ("the tables of one shard over data", "shards.sum(0)", "shards[0]", "mesh"),
    ),
    *in_function(
        transformer.loss_and_grad,
        (
            "inputs and targets are exchanged",
            "checked_batch(batch, cfg)",
            "checked_batch(Batch(*batch[1::-1]), cfg)",
        ),
        (
            "positions run backwards",
            "positions_of(batch.inputs, batch.segments)",
            "positions_of(batch.inputs, batch.segments)[::-1]",
        ),
        (
            "dropout by another key",
            "split_key(key, cfg)",
            "split_key(jax.random.fold_in(key, 1), cfg)",
        ),
        (
            "targets are embedded",
            "embed_fwd(params, batch.inputs",
            "embed_fwd(params, batch.targets",
        ),
        (
            "embeddings without dropout",
            "x, drop = dropout_fwd(x, cfg.dropout, key)",
            "x, drop = x, None",
        ),
        (
            "the layers' keys are exchanged",
            "positions, cfg, keys, batch.segments)\n    h",
            "positions, cfg, keys[::-1], batch.segments)\n    h",
        ),
        (
            "time runs backwards before the final norm",
            "norm_fwd(params, x, cfg)",
            "norm_fwd(params, x[:, ::-1], cfg)",
        ),
        ("inputs are the targets", "h, batch, cfg", "h, batch._replace(targets=batch.inputs), cfg"),
        ("sign before the final norm", "norm, dh)", "norm, -dh)"),
        (
            "layers get each other's activations",
            "(params.blocks, saved, dx",
            "(params.blocks, saved[::-1], dx",
        ),
        (
            "embeddings keep what dropout dropped",
            "dx = dropout_bwd(drop, cfg.dropout, dx)",
            "dx = dx * 1",
        ),
        (
            "the embeddings' gradient goes to the targets",
            "embed_bwd(params, batch.inputs",
            "embed_bwd(params, batch.targets",
        ),
        ("layers get each other's gradients", "blocks=dblocks", "blocks=dblocks[::-1]"),
        ("half of it", "g.astype(w.dtype), grads", "g.astype(w.dtype) / 2, grads"),
    ),
    *in_function(
        transformer.classifier_and_grad,
        (
            "the classifier is not the embedding",
            "gathered_head(head, h)",
            "gathered_head(head[::-1], h)",
        ),
        ("scores of other rows", "if dh else x, w)", "if dh else x[::-1], w)"),
        (
            "targets of other rows",
            "cross_entropy_fwd(scores, targets,",
            "cross_entropy_fwd(scores, targets[::-1],",
        ),
        ("sign of the scores' gradient", "dscores = cross", "dscores = -cross"),
        (
            "half of dh",
            'contract("nv,vc->nc", dscores, w)',
            'contract("nv,vc->nc", dscores, w) / 2',
        ),
        (
            "dhead pairs scores with other rows",
            '"nv,nc->vc", dscores, x',
            '"nv,nc->vc", dscores, jnp.roll(x, 1, 0)',
        ),
        (
            "dhead of the last chunk alone",
            "dhead = dw if dhead is None else dhead + dw",
            "dhead = dw",
        ),
        ("a chunk's loss is doubled", "value.append(nll)", "value.append(2 * nll)"),
        ("chunks are joined in reverse", "join_chunks(dh, h)", "join_chunks(dh[::-1], h)"),
    ),
    *in_function(
        transformer.blocks_bwd,
        ("each layer doubles what it gets", 'compute_layout(dx, "B"', 'compute_layout(2 * dx, "B"'),
        (
            "a block is computed again of another input",
            "barrier(dx, saved)",
            "barrier(dx, saved[:, ::-1])",
            "block",
        ),
        (
            "GELU is not computed again",
            "family.recompute(saved, dx, cfg)",
            "saved._replace(fcproj=saved.gelu)",
            "gelu",
        ),
        (
            "weights of the backward on a mesh are doubled",
            "partial(barrier, dx)",
            "lambda w: 2 * barrier(dx, w)",
            "mesh",
        ),
        ("attention's dropout is not scaled", "rate=cfg.dropout", "rate=0.0"),
        (
            "other weights than in the forward",
            "block_bwd(to_compute(w, cfg)",
            "block_bwd(to_compute(blocks[0], cfg)",
        ),
        ("sign between layers", "return dx, to_params", "return -dx, to_params"),
        ("layers from the first to the last", "cfg, reverse=True)", "cfg)"),
    ),
    *in_function(
        transformer.to_params,
        ("half of it", "dw.astype(w.dtype)", "dw.astype(w.dtype) / 2"),
        (
            "a mesh doubles it",
            "param_layout(x, *weight.axes)",
            "param_layout(2 * x, *weight.axes)",
            "mesh",
        ),
    ),
    *in_function(
        chunks.join_chunks,
        (
            "chunks are joined in reverse",
            "jnp.concatenate(chunks)",
            "jnp.concatenate(chunks[::-1])",
        ),
        (
            "shares are joined in reverse on a mesh",
            "for c in chunks], 1)",
            "for c in chunks[::-1]], 1)",
            "mesh",
        ),
    ),
    *in_function(
        chunks.sum_of_shares,
        ("sign", "return f(*rows)", "return -f(*rows)"),
        (
            "shares are weighed on a mesh",
            "jax.vmap(f)",
            "jax.vmap(lambda *rows: 2 * f(*rows))",
            "mesh",
        ),
    ),
    *in_function(
        chunks.total,
        ("half of it", "terms if _shares", "terms / 2 if _shares"),
        (
            "shares are not all summed on a mesh",
            "sum_over_fsdp(terms,",
            "sum_over_fsdp(terms.at[0].set(0),",
            "mesh",
        ),
    ),
    *in_function(
        sharding.sum_over_fsdp,
        (
            "what is scattered over fsdp is doubled",
            "lax.psum_scatter(terms,",
            "2 * lax.psum_scatter(terms,",
            "mesh",
        ),
    ),
]


def planted(name: str) -> Any:
    """The function with the error of this name in it."""
    (error,) = [error for error in IN_MODEL if str(error) == name]
    return wrong_version(error)


def wrong_version(error: Planted) -> Any:
    """The function with the error in it, in a namespace of its own."""
    return faults.wrong_version(error.function, error.right, error.wrong)


def plant(monkeypatch: Any, error: Planted) -> None:
    """Let every module of the package that has the function have the wrong version."""
    name, wrong = error.function.__name__, wrong_version(error)
    for module in [module for path, module in sys.modules.items() if path.startswith("gptjax")]:
        if vars(module).get(name) is error.function:
            monkeypatch.setattr(module, name, wrong)
