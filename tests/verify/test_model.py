import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.formats.llmc import DebugState
from gptjax.models import gpt2
from gptjax.models.params import stack
from gptjax.verify import model
from gptjax.verify.model import Subject
from tests.compare import relative_l2
from tests.models import tiny


def subject(**changes):
    cfg = tiny.config(**changes)
    key = jax.random.key(3) if cfg.dropout else None
    return Subject(cfg, tiny.params(cfg, jnp.float32), tiny.batch(cfg), key)


def plant(monkeypatch, factor=1.1):
    right = gpt2.gelu_bwd

    def gelu_bwd(saved, dy):
        return right(saved, dy) * factor

    monkeypatch.setattr(gpt2, "gelu_bwd", jax.jit(gelu_bwd))


@pytest.mark.parametrize(("layers", "dtype"), [("unroll", "float64"), ("scan", "float32")])
def test_against_autodiff(layers, dtype):
    report = model.against_autodiff(subject(layers=layers, dtype=dtype, dropout=0.1, loss_chunks=2, recompute="block"))
    assert report
    assert len(report.gradient.rows) == 12 * 2 + 4 + 1
    assert len(report.gradient.tensors) == len(report.curvature.tensors) + 1 == 17
    assert report.gradient.tensors[-1].tensor == "input_embeddings"
    assert [row.tensor for row in report.forward.rows] == ["loss", "logits"]
    worst = report.gradient.worst.relative_l2
    assert worst < 1e-14 if dtype == "float64" else 1e-8 < worst < 1e-5


def test_a_planted_gelu_error_is_named_with_its_layer_and_found_in_the_curvature_too(monkeypatch):
    plant(monkeypatch)
    report = model.against_autodiff(subject(layers="scan", num_layers=1))
    wrong = {row.tensor for row in report.gradient.rows if not row.ok}
    assert {"wte", "fcw", "ln1w", "input_embeddings"} <= wrong
    assert not {"lnfw", "lnfb"} & wrong
    assert report.parting.place == "layer 0, gelu (after fcw)"
    assert report.parting.what == "gelu_bwd gives a wrong gradient"
    assert not report.curvature
    assert report.forward


def test_an_error_that_only_a_setting_brings_is_blamed_on_the_settings(monkeypatch):
    monkeypatch.setattr(gpt2, "_not_before", lambda dx, x: 2 * x)  # what is recomputed is not what the forward computed
    report = model.against_autodiff(subject(num_layers=1, recompute="block"))
    assert not report
    assert str(report.parting).startswith("model.layers, model.recompute, model.loss_chunks or optim.accumulate: ")


def test_sixteen_bits_have_a_ratio_to_autodiffs_distance():
    report = model.against_autodiff(subject(dtype="bfloat16", channels=32, num_layers=1))
    assert report
    assert report.curvature is None
    ratios = {row.tensor: row.ratio for row in report.gradient.tensors}
    assert ratios["fcb"] < 0.9 > ratios["qkvb"]  # sums in float32, where JAX's are in bfloat16
    assert max(ratios.values()) < 1 + 4 / np.sqrt(2 * 32)


def test_sixteen_bits_further_off_than_autodiff_are_wrong(monkeypatch):
    right = gpt2.linear_bwd

    def linear_bwd(x, w, dy):
        dx, dw, db = right(x, w, dy)
        return dx, (dw * 32).astype(jnp.bfloat16).astype(dw.dtype) * (1 / 32 + 0.001), db

    monkeypatch.setattr(gpt2, "linear_bwd", jax.jit(linear_bwd))
    monkeypatch.setattr(model, "_locate", lambda *args: None)
    report = model.against_autodiff(subject(dtype="bfloat16", channels=32))
    wrong = {row.tensor for row in report.gradient.tensors if not row.ok}
    assert wrong == {"qkvw", "attprojw", "fcw", "fcprojw"}


def test_input_embeddings_gradient_by_taking_them_as_an_argument():
    """Moving all position embeddings is moving the input embeddings of every sequence."""
    found = model.by_hand(subject())
    assert relative_l2(found.embeddings.sum(0), found.params.wpe[:7]) < 1e-14
    assert relative_l2(model.by_autodiff(subject()).embeddings, found.embeddings) < 1e-13


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_against_differences(layers):
    report = model.against_differences(subject(layers=layers), layers=layers == "unroll")
    assert report
    assert len(report.gradient.rows) == 3 + (28 if layers == "unroll" else 16)
    assert report.gradient.worst.relative_l2 < 1e-8


def test_against_differences_finds_a_planted_error_and_names_it(monkeypatch):
    plant(monkeypatch, 1 + 1e-6)
    report = model.against_differences(subject(), layers=False)
    assert not report
    assert report.parting.place == "layer 1, gelu (after fcw)"


def debug_state(of, **changes):
    """What another program, right in all but ``changes``, would have written."""
    found = model.by_autodiff(of)
    inputs, targets = (np.asarray(x) for x in of.batch[:2])
    grads = jax.tree.map(lambda x: np.asarray(x, np.float32), stack(found.params))
    logits = np.asarray(found.logits, np.float32)
    return DebugState(inputs, targets, logits, float(found.loss), grads)._replace(**changes)


def test_against_another_programs_gradients():
    of = subject(layers="scan")
    report = model.against_file(of, debug_state(of))
    assert report
    assert 1e-9 < report.gradient.worst.relative_l2 < 1e-7  # the file has float32
    assert report.gradient.worst.ulps <= 0.5


def test_another_programs_wrong_gradient_loss_or_logits_are_found():
    of = subject(num_layers=1)
    right = debug_state(of)
    assert not model.against_file(of, right._replace(loss=right.loss * 1.0001))
    assert not model.against_file(of, right._replace(logits=right.logits * 1.0001))
    report = model.against_file(of, right._replace(grads=right.grads._replace(fcw=right.grads.fcw * 1.0001)))
    assert {row.tensor for row in report.gradient.rows if not row.ok} == {"fcw"}
    assert report.parting is None  # ours is JAX's, so it is the file that differs
    assert "but it is JAX's own gradient" in report.closing


def live(cfg, gradient=None):
    """The check of a training step of two micro-batches."""
    from gptjax.steps import mean_loss_and_grad, step_key

    def run(params, batch, key, step):
        return mean_loss_and_grad(params, batch, step_key(key, step, cfg), cfg, "manual")

    batch = jax.tree.map(lambda a, b: jnp.stack([a, b]), tiny.batch(cfg), tiny.batch(cfg, seed=1))
    return model.against_live(jax.jit(gradient or run), cfg, tiny.params(cfg, jnp.float32), batch, jax.random.key(0), 7)


@pytest.mark.parametrize(
    "changes", [{"dtype": "float32", "layers": "scan", "dropout": 0.1}, {"dtype": "bfloat16", "channels": 32}]
)
def test_live_gradient(changes):
    report = live(tiny.config(**changes))
    assert report
    assert (report.gradient.rows[0].ratio is None) == (changes["dtype"] == "float32")


def test_live_gradient_that_is_wrong(monkeypatch):
    plant(monkeypatch, 1.01)
    report = live(tiny.config(dtype="float32"))
    assert not report
    assert report.parting.place == "layer 1, gelu (after fcw)"


def test_tolerances_grow_with_the_reference_s_rounding():
    of = subject(dtype="float32")
    exact, rounded = model.tolerances(of), model.tolerances(of, jnp.float32)
    assert rounded.loss == pytest.approx(exact.loss * np.sqrt(2))
    assert max(jax.tree.leaves(model.tolerances(of._replace(cfg=dataclasses.replace(of.cfg, dtype="float64"))))) < 1e-12
