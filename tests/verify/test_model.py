import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.verify import model
from tests.compare import FLOAT64_TOLERANCE, relative_l2
from tests.verify.subject import subject


def test_input_embeddings_gradient_by_taking_them_as_an_argument():
    """A position's embedding is added to each sequence's token there, so its gradient is the sum of
    theirs.
    """
    found = model.by_hand(subject())
    assert relative_l2(found.embeddings.sum(0), found.params.wpe[:7]) < FLOAT64_TOLERANCE
    assert (
        relative_l2(model.by_autodiff(subject()).embeddings, found.embeddings) < FLOAT64_TOLERANCE
    )


def test_tolerances_grow_with_the_reference_s_rounding():
    of = subject(dtype="float32")
    exact, rounded = model.tolerances(of), model.tolerances(of, jnp.float32)
    assert rounded.loss == pytest.approx(exact.loss * np.sqrt(2))
    assert (
        max(
            jax.tree.leaves(
                model.tolerances(of._replace(cfg=dataclasses.replace(of.cfg, dtype="float64")))
            )
        )
        < 1e-12
    )


def test_tolerances_relax_by_the_references_own_change():
    """Of w^3 - 3 w, derivative 3 w^2 - 3, at w near 1: moved by u, the derivative moves by 2 u /
    (w^2 - 1) of itself.
    """
    params = {"a": jnp.full(1000, 1.5), "b": jnp.full(1000, 1 + 1e-6)}
    gradient = lambda p: jax.tree.map(lambda w: 3 * w * w - 3, p)  # noqa: E731
    (wide,) = model.relaxed_tolerances(
        ({"a": 1e-13, "b": 1e-13},), lambda p: (gradient(p),), params, jnp.float64
    )
    assert wide["a"] == 1e-13
    assert wide["b"] == pytest.approx(4 * 2**-52 * 1e6, rel=0.2)


def test_noise_is_on_everything_but_the_vocabularys_pad_rows():
    cfg = subject().cfg
    params = model.noisy_params(jax.random.key(0), cfg)
    assert (params.wte[cfg.vocab_size :] == 0).all()
    assert (params.wte[: cfg.vocab_size] != 0).all()
    assert all((x != 0).all() for x in jax.tree.leaves(params._replace(wte=None)))
    assert jnp.std(params.blocks[0].qb) == pytest.approx(model.NOISE, rel=0.7)


def test_the_reference_is_the_mean_over_all_micro_batches():
    """As one batch of all rows has it."""
    parts = subject(A=3, num_layers=1)
    rows = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), parts.batch)
    found, expected = model.by_autodiff(parts), model.by_autodiff(parts._replace(batch=rows))
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-14)
    for ours, theirs in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
    ):
        assert relative_l2(ours, theirs) < 1e-13


def test_tolerances_relax_for_each_part_by_its_own_change():
    """The logits do not make it zero but for rounding."""
    params, sizes = {"a": jnp.full(1000, 1 + 1e-3, jnp.float32)}, (1e6, 1e-6)
    gradient = lambda p: tuple(jax.tree.map(lambda w, s=s: s * (w * w - 1), p) for s in sizes)  # noqa: E731
    values, wide = model.relaxed_tolerances(
        ({"a": 1e-7}, {"a": 1e-7}), gradient, params, jnp.float32
    )
    assert wide["a"] == pytest.approx(values["a"], rel=0.1)
    assert wide["a"] > 1e-4
