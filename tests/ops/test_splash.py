"""The TPU's kernel, in Pallas's interpreter, against attention written out; on a TPU it was
compiled, and not run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

from gptjax.config import MeshConfig
from gptjax.ops import attention, attention_bwd, attention_fwd, splash
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import on_mesh
from tests.compare import assert_same_gradients, normal, relative_l2
from tests.models import tiny

ORIGINAL = kernel.make_splash_mha_single_device


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernel's own code mixes ranks and dtypes, and takes at most 32 bits."""
    made = functools.partial(ORIGINAL, interpret=True)
    monkeypatch.setattr(kernel, "make_splash_mha_single_device", made)
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.enable_x64(False),
    ):
        yield


def qkv(T):
    return [normal(seed, 2, T, 2, 8, dtype=jnp.float32) for seed in range(4)]


def test_forward_and_backward_equal_the_materialised_ones():
    """Over several blocks: three of `LANES`, as one of 384 would hide what happens between them."""
    *args, do = qkv(3 * splash.LANES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splash, "LARGEST_BLOCK", splash.LANES)
        o, saved = jax.jit(splash.splash_fwd)(*args)
        ours = jax.jit(lambda saved, do: saved(do))(saved, do)
    o2, saved2 = attention_fwd("materialised", *args)
    assert relative_l2(o, o2) < 1e-6
    assert_same_gradients(
        ours, attention_bwd("materialised", saved2, do), tuple(args), tolerance=1e-5
    )


def test_groups_of_heads_and_packed_documents():
    q, _, _, do = (normal(seed, 2, splash.LANES, 4, 8, dtype=jnp.float32) for seed in range(4))
    _, k, v, _ = qkv(splash.LANES)
    segments = jnp.asarray([[0] * 50 + [1] * 78, [3] * splash.LANES], jnp.int32)
    o, saved = attention_fwd("splash", q, k, v, segments=segments)
    o2, saved2 = attention_fwd("materialised", q, k, v, segments=segments)
    assert relative_l2(o, o2) < 1e-6
    ours, theirs = attention_bwd("splash", saved, do), attention_bwd("materialised", saved2, do)
    assert_same_gradients(ours, theirs, (q, k, v), tolerance=1e-5)


def test_splash_is_selected_by_name_and_differentiated_by_jax():
    *args, do = qkv(splash.LANES)
    o, saved = attention_fwd("splash", *args)
    np.testing.assert_array_equal(o, attention("splash", *args)[0])
    by_jax = jax.vjp(lambda *x: attention("splash", *x)[0], *args)[1](do)
    assert_same_gradients(attention_bwd("splash", saved, do), by_jax, tuple(args), tolerance=1e-6)


def test_on_a_mesh_each_device_runs_splash_on_its_own_rows_and_heads():
    *args, do = qkv(splash.LANES)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), tiny.config(num_heads=2).axis_sizes, 2)

    def both(q, k, v, do):
        o, saved = attention_fwd("splash", q, k, v)
        return o, attention_bwd("splash", saved, do)

    cut = jax.NamedSharding(mesh, jax.P("data", None, "tensor", None))
    compiled = jax.jit(on_mesh(mesh, both), in_shardings=(cut,) * 4).lower(*args, do).compile()
    assert not [
        kind for kind in ("all-gather", "all-reduce", "all-to-all") if kind in compiled.as_text()
    ]
    o, grads = compiled(*args, do)
    assert len(o.sharding.device_set) == 4
    o2, grads2 = both(*args, do)
    assert relative_l2(o, o2) < 1e-6
    assert_same_gradients(grads, grads2, tuple(args), tolerance=1e-6)


@pytest.mark.parametrize(
    ("T", "block"), [(128, 128), (384, 384), (640, 128), (1024, 512), (1536, 512), (1280, 256)]
)
def test_the_block_size_is_the_largest_that_divides_the_sequence(T, block):
    sizes = splash._kernel(T, 1).kwargs["block_sizes"]
    assert (sizes.block_q, sizes.block_kv, sizes.block_kv_dkv) == (block, block, block)


def test_q_k_and_v_are_stored_with_time_last():
    """In a TPU's memory heads of 64 channels would take as much as 128."""
    sizes = splash._kernel(splash.LANES, 1).kwargs["block_sizes"]
    assert {sizes.q_layout, sizes.k_layout, sizes.v_layout} == {kernel.QKVLayout.SEQ_MINOR}
