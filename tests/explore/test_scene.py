"""What the page shows, against direct computation."""

import base64
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.explore import scene
from gptjax.explore.faults import faults_of, planted
from gptjax.models import transformer
from gptjax.verify import trace
from gptjax.verify.comparison import compare, leaf_names


def fault_of(shown, name):
    return next(f for f in shown.scene["faults"] if f["id"] == name)


@pytest.fixture(params=["shown", "llama"])
def either(request):
    return request.getfixturevalue(request.param)


def test_the_ops_are_complete_and_in_order(either):
    shown = either
    _, calls = trace.record(partial(transformer.loss, cfg=shown.cfg), shown.params, shown.batch)
    ops = [call.base for call in calls if call.jaxpr.jaxpr.eqns]
    drawn = [node["op"] for node in shown.scene["nodes"]]
    assert drawn == [*ops[:-1], "classifier", "cross_entropy"]
    assert set(drawn) | {"block"} == set(shown.scene["lessons"])
    assert len({node["id"] for node in shown.scene["nodes"]}) == len(drawn)


def test_the_loss_and_each_tokens_are_the_networks(shown):
    data, args = shown.scene, (shown.params, shown.batch, shown.cfg)
    assert data["loss"] == pytest.approx(float(transformer.loss(*args)), rel=1e-14)
    assert data["token_losses"] == pytest.approx(
        transformer.token_losses(*args)[0].tolist(), abs=6e-4
    )


def test_the_gradient_is_jaxs(shown):
    reference = jax.grad(transformer.loss)(shown.params, shown.batch, shown.cfg)
    rows = shown.scene["tensors"]
    assert [(row["tensor"], row["layer"]) for row in rows] == leaf_names(reference)
    for row, leaf in zip(rows, jax.tree.leaves(reference), strict=True):
        assert row["norm"] == pytest.approx(float(jnp.linalg.norm(leaf)), rel=1e-10)
        assert row["error"] < math.log10(shown.scene["tolerance"]) < -11
    assert shown.scene["verdict"] == "no op's gradient differs from JAX's"


def test_every_op_agrees_with_jax(either):
    shown = either
    for node in shown.scene["nodes"]:
        errors = [e["error"] for e in node["errors"]]
        assert errors, node["name"]
        assert max(errors) < -14, node["name"]
        assert node["received"] is None or node["received"] < -14
    for block in shown.scene["blocks"]:
        assert max(e["error"] for e in block["errors"]) < -14


def test_pictures_are_of_the_activations_and_gradients(shown):
    """Of the final norm, whose output and its gradient are easily had otherwise."""
    x = transformer.hidden(shown.params, shown.batch.inputs, shown.cfg)
    head = shown.params.wte

    def loss(h):
        scores = (h[0] @ head.T)[:, : shown.cfg.vocab_size]
        log_p = jax.nn.log_softmax(scores)
        return -jnp.take_along_axis(log_p, shown.batch.targets[0][:, None], 1).mean()

    node = next(n for n in shown.scene["nodes"] if n["weight"] == "lnfw")
    for picture, array in ((node["y"], x[0]), (node["dy"], jax.grad(loss)(x)[0])):
        assert picture["norm"] == pytest.approx(float(jnp.linalg.norm(array)), rel=1e-12)
        cells = np.frombuffer(base64.b64decode(picture["cells"]), np.int8)
        drawn = cells.reshape(picture["rows"], picture["columns"]) / 127 * picture["largest"]
        clipped = np.clip(array, -picture["largest"], picture["largest"])
        np.testing.assert_allclose(drawn, clipped, atol=picture["largest"] / 127)


def test_the_stream_is_what_the_blocks_leave(shown):
    cfg, params = shown.cfg, shown.params
    positions = transformer.positions_of(shown.batch.inputs)
    x = transformer.embed_fwd(params, shown.batch.inputs, positions, cfg)
    for block, w in zip(shown.scene["blocks"], params.blocks, strict=True):
        x, _ = transformer.training_block(transformer.attention, w, x, positions, cfg, None)
        assert block["y"]["norm"] == pytest.approx(float(jnp.linalg.norm(x)), rel=1e-12)


def test_attention_shows_its_probabilities(either):
    (first, *_) = [node for node in either.scene["nodes"] if node["op"] == "attention"]
    assert [p["name"] for p in first["heads"]] == [f"head {h}" for h in range(either.cfg.num_heads)]
    for p in first["heads"]:
        T = p["rows"]
        cells = np.frombuffer(base64.b64decode(p["cells"]), np.int8).reshape(T, T)
        assert not np.triu(cells, 1).any()
        assert cells[0, 0] == 127


def test_every_fault_is_found_and_blamed_on_its_op(either):
    shown = either
    nodes = {node["id"]: node for node in shown.scene["nodes"]}
    for fault in shown.scene["faults"]:
        assert fault["wrong"] > 0, fault["id"]
        assert fault["verdict"] != shown.scene["verdict"], fault["id"]
        if fault["op"] in shown.scene["lessons"] and fault["op"] != "block":
            assert nodes[fault["blamed"]]["op"] == fault["op"], fault["id"]
            assert f"{fault['op']}_bwd gives a wrong gradient" in fault["verdict"], fault["id"]


def test_a_fault_that_changes_nothing_is_not_offered(shown, llama):
    """A sum over a group of one head is that head, and an untied table gets no other gradient."""
    names = [{fault["id"] for fault in one.scene["faults"]} for one in (shown, llama)]
    grouped, tied = "attention-dk-of-the-first-query-head-of-each-group", "a-tied-table"
    assert [grouped in found for found in names] == [False, True]
    assert [any(tied in name for name in found) for found in names] == [True, False]
    offered = faults_of(shown.cfg, {node["op"] for node in shown.scene["nodes"]})
    assert {fault.name for fault in offered} - names[0] == {grouped}


def test_damage_is_what_the_broken_code_computes(shown):
    name = "gelu-no-derivative-of-tanh"
    fault = next(f for f in faults_of(shown.cfg, ["gelu"]) if f.name == name)
    args = shown.params, shown.batch
    reference = jax.grad(transformer.loss)(*args, shown.cfg)
    with planted(fault):
        _, wrong = transformer.loss_and_grad(*args, shown.cfg)
    data = fault_of(shown, name)
    rows = compare(wrong, reference, shown.scene["tolerance"]).rows
    # Compiled as a whole it rounds otherwise
    errors = [max(scene.logarithm(row.relative_l2), -13) for row in rows]
    assert [max(error, -13) for error in data["errors"]] == pytest.approx(errors, abs=0.3)
    assert data["wrong"] == sum(not row.ok for row in rows)


def test_damage_spreads_towards_the_first_layer_alone(shown):
    """Of GELU: everything before the last layer's is hurt, and nothing after it."""
    data, limit = fault_of(shown, "gelu-no-derivative-of-tanh"), math.log10(1e-10)
    last = max(int(n["id"]) for n in shown.scene["nodes"] if n["op"] == "gelu")
    assert data["blamed"] == str(last)
    for node, error in data["received"].items():
        assert (error > limit) == (int(node) < last), node


def test_the_change_is_shown(shown):
    lines = fault_of(shown, "gelu-2-instead-of-3-in-the-cubic's-derivative")["code"]
    assert [line.strip() for mark, line in lines if mark == "-"] == [
        "du = SLOPE * (1 + 3 * CUBIC * xf * xf)"
    ]
    assert [line.strip() for mark, line in lines if mark == "+"] == [
        "du = SLOPE * (1 + 2 * CUBIC * xf * xf)"
    ]


@pytest.mark.parametrize(
    ("error", "shown_as"), [(0.0, -20), (1e-15, -15), (math.nan, 4), (math.inf, 4), (1e9, 4)]
)
def test_logarithms_are_finite(error, shown_as):
    assert scene.logarithm(error) == shown_as
