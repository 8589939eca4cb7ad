"""Rows cut into chunks and joined again are the rows, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig
from gptjax.models.chunks import (
    LEAST_ROWS,
    join_chunks,
    num_chunks,
    row_chunks,
    sum_of_shares,
    total,
)
from gptjax.parallel.mesh import make_mesh, whole
from gptjax.parallel.sharding import on_mesh
from tests.compare import normal
from tests.models import tiny

H = normal(0, 8, 3, 4)
TARGETS = jnp.arange(24, dtype=jnp.int32).reshape(8, 3)
MESHES = [None, make_mesh(MeshConfig(2, 2, 2), {}, 8), make_mesh(MeshConfig(fsdp=4), {}, 8)]


@pytest.mark.parametrize("mesh", MESHES, ids=["one device", "data 2 x fsdp 2 x tensor 2", "fsdp 4"])
@pytest.mark.parametrize("chunks", [1, 2, 4, 7])
def test_chunks_hold_each_row_once_and_join_again(mesh, chunks):
    def f(h):
        cut = row_chunks(h, TARGETS, None, tiny.config(loss_chunks=chunks), None)
        return cut, join_chunks([rows for rows, _, _ in cut], h)

    cut, joined = jax.jit(on_mesh(mesh, f))(H)
    np.testing.assert_array_equal(joined, H)
    rows, targets, weights = (np.concatenate(parts) for parts in zip(*cut, strict=True))
    np.testing.assert_array_equal(rows, np.asarray(H).reshape(24, 4)[targets])
    assert sorted(targets) == list(range(24))
    np.testing.assert_allclose(weights, 1 / 24)


@pytest.mark.parametrize("mesh", MESHES, ids=["one device", "data 2 x fsdp 2 x tensor 2", "fsdp 4"])
def test_a_sum_over_rows_is_the_sum_of_its_shares(mesh):
    x, y = (whole(mesh, rows) for rows in (normal(1, 24, 8), normal(2, 24, 4)))
    product = lambda x, y: jnp.einsum("nv,nc->vc", x, y)  # noqa: E731
    ours = jax.jit(on_mesh(mesh, lambda x, y: total(sum_of_shares(product, x, y))))(x, y)
    if mesh:
        assert len(ours) == mesh.shape["data"]
        ours = ours.sum(0)
    np.testing.assert_allclose(ours, np.asarray(x).T @ np.asarray(y), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("tokens", "chunks"),
    [(1, 1), (256, 1), (LEAST_ROWS, 1), (LEAST_ROWS + 1, 2), (16 * 1024, 8), (2**20, 66)],
)
def test_auto_makes_a_chunks_scores_as_large_as_the_hidden_state(tokens, chunks):
    """By Liger's rule 124M has 50304 / 768 = 65.5 chunks of a batch that is large enough."""
    cfg = ModelConfig(preset="124m", vocab_size=50257)
    assert num_chunks(cfg, tokens) == chunks
    rows = -(-tokens // chunks)
    assert rows == tokens or chunks == -(-tokens // LEAST_ROWS) or rows * 50304 <= tokens * 768


def test_a_configured_number_of_chunks_is_used():
    assert num_chunks(tiny.config(loss_chunks=3), 10**6) == 3
