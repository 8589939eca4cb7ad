import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.formats.llmc import DebugState
from gptjax.models import gpt2, transformer
from gptjax.models.params import stack
from gptjax.parallel.sharding import num_shards
from gptjax.train import step as train_step
from gptjax.verify import model, references
from tests.compare import FLOAT64_TOLERANCE
from tests.models import mlp_family, tiny
from tests.verify.subject import subject


def plant(monkeypatch, factor=1.1):
    right = gpt2.gelu_bwd

    def gelu_bwd(saved, dy):
        return right(saved, dy) * factor

    monkeypatch.setattr(gpt2, "gelu_bwd", jax.jit(gelu_bwd))


@pytest.fixture
def gradient_only(monkeypatch):
    """Leave the Hessian-vector product out."""
    monkeypatch.setattr(references, "against_hessian", lambda subject: None)


@pytest.mark.parametrize(("layers", "dtype"), [("unroll", "float64"), ("scan", "float32")])
def test_against_autodiff(layers, dtype):
    changes = {"dropout": 0.1, "dropout_mlp": 0.2, "loss_chunks": 2, "recompute": "block"}
    report = references.against_autodiff(subject(layers=layers, dtype=dtype, **changes))
    assert report
    assert not report.relaxed
    assert len(report.gradient.rows) == 16 * 2 + 4 + 1
    assert len(report.gradient.tensors) == len(report.curvature.tensors) + 1 == 21
    assert report.gradient.tensors[-1].tensor == "input_embeddings"
    assert [row.tensor for row in report.forward.rows] == ["loss", "logits"]
    worst = report.gradient.worst.relative_l2
    assert worst < FLOAT64_TOLERANCE if dtype == "float64" else 1e-8 < worst < 1e-5


def test_a_planted_gelu_error_is_located_and_found_in_the_curvature(monkeypatch):
    plant(monkeypatch)
    report = references.against_autodiff(subject(layers="scan", num_layers=1))
    wrong = {row.tensor for row in report.gradient.rows if not row.ok}
    assert {"wte", "fcw", "ln1w", "input_embeddings"} <= wrong
    assert not {"lnfw", "lnfb"} & wrong
    assert report.mismatch.place == "layer 0, gelu (after fcw)"
    assert report.mismatch.what == "gelu_bwd gives a wrong gradient"
    assert not report.curvature
    assert report.forward


def test_an_error_that_depends_on_a_setting_is_blamed_on_the_settings(monkeypatch, gradient_only):
    double = lambda dx, x: 2 * x  # noqa: E731
    # What is recomputed is not what the forward computed
    monkeypatch.setattr(transformer, "barrier", double)
    report = references.against_autodiff(subject(num_layers=1, recompute="block"))
    assert not report
    assert str(report.mismatch).startswith(
        "model.layers, model.recompute, model.loss_chunks, optim.accumulate or the mesh: "
    )


def test_a_gradient_of_terms_that_cancel_is_not_called_wrong(monkeypatch, gradient_only):
    """All targets are nearly certain: rounding of the logits, some 200, is magnified by as much in
    a small loss.
    """
    of = subject(dtype="float32", num_layers=1)
    row = 1.19 * of.params.wte[0]
    lnf = {"lnfw": of.params.lnfw * 1e-2, "lnfb": 200 * row / jnp.vdot(row, row)}
    params = of.params._replace(wte=of.params.wte.at[0].set(row), **lnf)
    sure = of._replace(
        params=params, batch=of.batch._replace(targets=jnp.full_like(of.batch.targets, 0))
    )
    report = references.against_autodiff(sure)
    assert report.forward
    assert report.gradient
    assert report.relaxed
    assert float(model.by_hand(sure).loss) < 0.2
    monkeypatch.setattr(references, "_locate", lambda subject: None)
    plant(monkeypatch, 1.01)
    assert not references.against_autodiff(sure)


def test_tolerances_are_relaxed_before_anything_is_called_wrong(monkeypatch, gradient_only):
    """With next to none derived, what JAX's own gradient moves by is still allowed."""
    derived = references.tolerances
    monkeypatch.setattr(
        references, "tolerances", lambda *a: jax.tree.map(lambda t: t * 1e-3, derived(*a))
    )
    report = references.against_autodiff(subject(num_layers=1))
    assert report.gradient
    assert report.relaxed
    assert "parameter moves by one unit in the last place" in str(report)


def test_an_error_in_a_setting_is_not_called_jaxs_own(monkeypatch):
    monkeypatch.setattr(transformer, "barrier", lambda dx, x: 2 * x)
    report = references.against_file(*recomputed())
    assert "check the reference" not in report.closing
    assert str(report.mismatch).startswith("model.layers, model.recompute")


def recomputed():
    of = subject(num_layers=1, recompute="block")
    return of, debug_state(of)


def test_sixteen_bits_have_a_ratio_to_autodiffs_distance():
    report = references.against_autodiff(subject(dtype="bfloat16", channels=32, num_layers=1))
    assert report
    assert report.curvature is None
    ratios = {row.tensor: row.ratio for row in report.gradient.tensors}
    assert ratios["fcb"] < 0.9 > ratios["vb"]  # sums in float32, where JAX's are in bfloat16
    assert ratios.pop("kb") is None  # zero but for rounding
    assert max(ratios.values()) < 1 + 4 / np.sqrt(2 * 16)


def test_sixteen_bits_further_off_than_autodiff_are_wrong(monkeypatch):
    right = gpt2.linear_bwd

    def linear_bwd(x, w, dy):
        dx, dw, db = right(x, w, dy)
        return dx, (dw * 32).astype(jnp.bfloat16).astype(dw.dtype) * (1 / 32 + 0.001), db

    monkeypatch.setattr(gpt2, "linear_bwd", jax.jit(linear_bwd))
    monkeypatch.setattr(references, "_locate", lambda *args: None)
    report = references.against_autodiff(subject(dtype="bfloat16", channels=32))
    wrong = {row.tensor for row in report.gradient.tensors if not row.ok}
    assert wrong == {"qw", "kw", "vw", "attprojw", "fcw", "fcprojw"}


ALL_AXES = {"mesh": MeshConfig(2, 2, 2), "B": 4}


@pytest.mark.parametrize(
    "program",
    [
        {"A": 3, "dropout": 0.1, "dropout_mlp": 0.1},
        {**ALL_AXES, "dropout": 0.1, "layers": "scan", "loss_chunks": 2},
        {**ALL_AXES, "A": 2, "dtype": "bfloat16", "channels": 32, "num_layers": 1},
    ],
    ids=["micro-batches", "mesh", "both, in 16 bits"],
)
def test_the_program_that_the_configuration_runs_is_right(gradient_only, program):
    report = references.against_autodiff(subject(**program))
    assert report
    assert not report.relaxed


@pytest.mark.parametrize(
    "program",
    [{}, {**ALL_AXES, "A": 2, "layers": "scan"}],
    ids=["one device", "mesh and micro-batches"],
)
def test_a_family_that_the_package_does_not_know_is_verified(monkeypatch, program):
    """One without attention, with a classifier of its own. A name that is in the layers and outside
    is told apart.
    """
    with mlp_family.registered() as name:
        report = references.against_autodiff(subject(family=name, dropout_mlp=0.2, **program))
        assert report
        assert {"embed", "upw", "head", "blocks.normw", "normw"} <= {
            row.tensor for row in report.gradient.tensors
        }
        right = mlp_family.gelu_bwd
        monkeypatch.setattr(mlp_family, "gelu_bwd", lambda x, dy: 1.1 * right(x, dy))
        report = references.against_autodiff(subject(family=name, num_layers=1, **program))
        assert not report
        # 1.1 times what GELU's backward gave
        assert report.mismatch.place == "layer 0, linear (upw)"


def shard_only(monkeypatch, module, name, wrong):
    """Plant ``wrong`` where a function is called in a program for a mesh."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (right if num_shards() == 1 else wrong)(*args))


def test_an_error_only_on_the_mesh_is_blamed_on_the_mesh(monkeypatch, gradient_only):
    """On one device everything is right: the sign is wrong where devices add rows of the
    embedding.
    """
    right = gpt2.embedding_bwd
    shard_only(
        monkeypatch,
        gpt2,
        "embedding_bwd",
        lambda ids, dtable, dy: 2 * dtable - right(ids, dtable, dy),
    )
    report = references.against_autodiff(subject(**ALL_AXES, num_layers=1))
    assert {row.tensor for row in report.gradient.rows if not row.ok} == {"wte", "wpe"}
    assert report.mismatch.place == "the program on the mesh"
    assert (
        "first at the program on the mesh: only it differs; on one device the gradient is "
        "right" in report.closing
    )
    assert references.against_autodiff(subject(num_layers=1))


def test_an_error_only_in_accumulation_is_blamed_on_it(monkeypatch, gradient_only):
    """Each micro-batch divided by its own number of targets, as if they were as many in each."""
    monkeypatch.setattr(
        train_step, "target_count", lambda batch: 1.1 * jnp.asarray(batch.targets.size, jnp.float32)
    )
    report = references.against_autodiff(subject(A=2, num_layers=1))
    assert not report
    assert report.mismatch.place == "the accumulated program"


def test_micro_batches_are_weighted_by_their_targets(gradient_only):
    of = subject(A=2, num_layers=1)
    of = of._replace(batch=of.batch._replace(targets=of.batch.targets.at[0, :, 2:].set(-1)))
    assert references.against_autodiff(of).gradient
    assert model.shares(of.batch) == pytest.approx([4 / 18, 14 / 18])


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_against_differences(layers):
    report = references.against_differences(subject(layers=layers), layers=layers == "unroll")
    assert report
    assert len(report.gradient.rows) == 3 + (36 if layers == "unroll" else 20)
    assert report.gradient.worst.relative_l2 < 1e-8


def test_against_differences_finds_a_planted_error_and_names_it(monkeypatch):
    plant(monkeypatch, 1 + 1e-6)
    report = references.against_differences(subject(), layers=False)
    assert not report
    assert report.mismatch.place == "layer 1, gelu (after fcw)"


def debug_state(of, **changes):
    """What another program, right in all but ``changes``, would have written."""
    found = model.by_autodiff(of)
    inputs, targets = (np.asarray(x[0]) for x in of.batch[:2])
    grads = jax.tree.map(lambda x: np.asarray(x, np.float32), stack(found.params))
    logits = np.asarray(found.logits, np.float32)
    return DebugState(inputs, targets, logits, float(found.loss), grads)._replace(**changes)


def test_against_another_programs_gradients():
    of = subject(layers="scan")
    report = references.against_file(of, debug_state(of))
    assert report
    assert 1e-9 < report.gradient.worst.relative_l2 < 1e-7  # the file has float32
    assert report.gradient.worst.ulps <= 0.5


def test_another_programs_wrong_gradient_loss_or_logits_are_found():
    of = subject(num_layers=1)
    right = debug_state(of)
    assert not references.against_file(of, right._replace(loss=right.loss * 1.0001))
    assert not references.against_file(of, right._replace(logits=right.logits * 1.0001))
    blocks = right.grads.blocks._replace(fcw=right.grads.blocks.fcw * 1.0001)
    report = references.against_file(of, right._replace(grads=right.grads._replace(blocks=blocks)))
    assert {row.tensor for row in report.gradient.rows if not row.ok} == {"fcw"}
    assert report.mismatch is None  # ours is JAX's, so it is the file that differs
    assert "JAX's own gradient of this forward agrees with it" in report.closing


def live(cfg, run=None, spoil=lambda params: params):
    """The check of a training step of two micro-batches."""
    batch = jax.tree.map(lambda a, b: jnp.stack([a, b]), tiny.batch(cfg), tiny.batch(cfg, seed=1))
    return references.against_live(
        run, cfg, spoil(tiny.params(cfg, jnp.float32)), batch, jax.random.key(0), 7
    )


@pytest.fixture(autouse=True)
def compiled_afresh():
    """What a test plants must not be compiled into the next one's gradient."""
    references._step_gradient.cache_clear()


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32", "layers": "scan", "dropout": 0.1}, {"dtype": "bfloat16", "channels": 32}],
)
def test_live_gradient(changes):
    report = live(tiny.config(**changes))
    assert report
    assert (report.gradient.rows[0].ratio is None) == (changes["dtype"] == "float32")


def test_a_wrong_16_bit_gradient_is_located_in_a_wider_dtype(monkeypatch):
    plant(monkeypatch, 1.5)
    report = live(tiny.config(dtype="bfloat16", channels=32))
    assert not report
    assert report.mismatch.place == "layer 1, gelu (after fcw)"
    assert report.mismatch.error == pytest.approx(0.5, rel=1e-6)


def test_without_a_finite_gradient_there_is_no_live_check():
    cfg = tiny.config(dtype="float32")
    assert live(cfg, lambda *args: 1 / 0, spoil=lambda p: p._replace(lnfw=p.lnfw * jnp.nan)) is None


def test_live_checks_compile_once(monkeypatch):
    cfg = tiny.config(dtype="float32", max_seq_len=9)
    made = []
    step_gradient = references._step_gradient.__wrapped__
    monkeypatch.setattr(
        references,
        "_step_gradient",
        functools.cache(lambda *a: made.append(a) or step_gradient(*a)),
    )
    for _ in range(2):
        assert live(cfg, None)
    assert sorted(backward for _, backward in made) == ["autodiff", "manual"]


def test_live_gradient_that_is_wrong(monkeypatch):
    plant(monkeypatch, 1.01)
    report = live(tiny.config(dtype="float32"))
    assert not report
    assert report.mismatch.place == "layer 1, gelu (after fcw)"
