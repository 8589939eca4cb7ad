"""Operations of small programs, counted by hand, and those of a step against the model's
dimensions.
"""

import jax
import jax.numpy as jnp
import pytest

from gptjax.bench import program
from gptjax.config import Config, DataConfig
from tests.models import tiny

X = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)


def count(function, *arguments, platform="cpu"):
    return program.operations(
        jax.jit(function)
        .trace(*arguments)
        .lower(lowering_platforms=(platform,))
        .compiler_ir("stablehlo")
    )


def test_what_is_called_twice_counts_twice():
    inner = jax.jit(lambda x: jnp.sin(x) @ x.T)
    found = count(lambda x: (inner(x), inner(2 * x)), X)
    assert found.times["sine"] == found.times["dot_general"] == found.times["transpose"] == 2
    assert found.nbytes["sine"] == 2 * 4 * 8 * 2
    assert found.nbytes["dot_general"] == 2 * 4 * 4 * 2
    assert found.times["multiply"] == 1


def test_loops_count_once_and_reductions_bodies_do_not_count():
    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.cos(x), x).astype(jnp.float32).max()

    found = count(looped, X)
    assert found.times["cosine"] == found.times["while"] == found.times["reduce"] == 1
    assert found.nbytes["convert"] == 4 * 8 * 4
    assert found.nbytes["reduce"] == 4
    assert not found.times["maximum"]


def test_a_kernel_goes_by_its_own_name():
    found = count(lambda x: jax.lax.top_k(x, 2), X, platform="cpu")
    assert not found.times["custom_call"]
    symmetric = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert count(jnp.linalg.eigvalsh, symmetric).times["lapack_ssyevd_ffi"] == 1


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_products_of_a_step(platform):
    """Three products of each of a block's six matrices and of the classifier, and six of
    materialised attention.
    """
    cfg = Config(
        data=DataConfig(batch_size=2, seq_len=8),
        model=tiny.config(dtype="float32", attention="materialised"),
    )
    model = cfg.model.resolve(platform, 8)
    for backward in ("manual", "autodiff"):
        found = program.lowered_step(cfg, model, backward, platform)
        assert found.times["dot_general"] == model.num_layers * (3 * 6 + 6) + 3
