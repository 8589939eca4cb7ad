import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import transformer
from gptjax.models.batch import Batch
from gptjax.ops import IGNORE_INDEX
from tests.models import tiny

CFG = tiny.config(num_layers=1)  # 11 ids, at most 12 of them
PARAMS = tiny.params(CFG)
FUNCTIONS = {
    "loss": lambda batch: transformer.loss(PARAMS, batch, CFG),
    "loss_and_grad": lambda batch: transformer.loss_and_grad(PARAMS, batch, CFG),
    "loss_manual": lambda batch: transformer.loss_manual(PARAMS, batch, CFG),
    "grad of loss_manual": lambda batch: jax.grad(transformer.loss_manual)(PARAMS, batch, CFG),
    "token_losses": lambda batch: transformer.token_losses(PARAMS, batch, CFG),
    "hidden": lambda batch: transformer.hidden(PARAMS, batch.inputs, CFG),
    "logits": lambda batch: transformer.logits(PARAMS, batch.inputs, CFG),
}
of_each = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


def numpys(T=7):
    return Batch(*(np.array(x) for x in tiny.batch(CFG, T=T)[:2]))


@of_each
@pytest.mark.parametrize("of", ["numpy", "jax", "jit"])
def test_a_sequence_longer_than_the_position_table_is_refused(f, of):
    batch = jax.tree.map({"numpy": np.asarray}.get(of, jnp.asarray), numpys(T=13))
    with pytest.raises(
        ValueError,
        match=r"^inputs are 13 tokens long, but the model reads at most max_seq_len 12: shorten them",
    ):
        (jax.jit(f) if of == "jit" else f)(batch)


@of_each
@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_an_id_outside_the_vocabulary_is_reported_with_its_position(f, bad):
    """-1 is `IGNORE_INDEX`, but of targets alone."""
    inputs = numpys().inputs.astype(np.int64)
    inputs[1, 3] = bad
    with pytest.raises(
        ValueError, match=rf"^inputs must be ids from 0 to 10, not {bad} at \[1, 3\](\n|$)"
    ):
        f(numpys()._replace(inputs=inputs))


def test_an_error_lists_only_the_first_of_many_invalid_ids():
    batch = numpys()
    batch.targets[0, :3] = 11, -2, IGNORE_INDEX
    batch.targets[1, 2:6] = 50
    with pytest.raises(
        ValueError,
        match=r"^targets must be .*, not 11 at \[0, 0\], -2 at \[0, 1\], 50 at \[1, 2\] and 3 more$",
    ):
        transformer.loss(PARAMS, batch, CFG)


@of_each
def test_numpy_and_jax_batches_give_the_same_result(f):
    batch = numpys(T=12)
    batch.inputs[0, 0], batch.targets[0, 0] = 10, IGNORE_INDEX
    jax.tree.map(np.testing.assert_array_equal, f(batch), f(jax.tree.map(jnp.asarray, batch)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inputs": np.zeros((2, 7))},
            r"inputs must be integers of shape \(B, T\), not float64 of shape \(2, 7\)",
        ),
        (
            {"inputs": np.zeros(7, np.int32)},
            r"inputs must be integers of shape \(B, T\), not int32 of shape \(7,\)",
        ),
        (
            {"targets": np.zeros((2, 1), np.int32)},
            r"targets must have the inputs' shape \(2, 7\), not \(2, 1\)",
        ),
        ({"mask": np.ones((1, 7))}, r"mask must have the inputs' shape \(2, 7\), not \(1, 7\)"),
    ],
)
def test_arrays_that_do_not_form_a_batch_are_rejected(changes, message):
    for f in (transformer.loss, functools.partial(jax.jit(transformer.loss, static_argnums=2))):
        with pytest.raises(ValueError, match=message):
            f(PARAMS, numpys()._replace(**changes), CFG)
