import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import gpt2, transformer
from gptjax.models.decode import (
    PART,
    decode,
    empty_cache,
    extend,
    prefill,
    store_for_decoding,
)
from gptjax.xla import native
from tests.models import tiny

PADDING = jnp.array([0, 2, 3], jnp.int32)  # of prompts of 4, 2 and 1 ids


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_cached_logits_equal_uncached_at_every_position(layers, stored):
    """Prompts of different lengths in one batch, then one token at a time, in a cache longer than
    the sequences.
    """
    cfg = tiny.config(layers=layers)
    params, tokens = tiny.params(cfg), tiny.batch(cfg, B=3, T=11).inputs
    weights = store_for_decoding(params, cfg) if stored else params
    logits, cache = jax.jit(prefill, static_argnames=("slots", "cfg"))(
        weights, tokens[:, :4], PADDING, slots=13, cfg=cfg
    )
    step = jax.jit(decode, static_argnames="cfg")
    for end in range(4, 12):
        for row, padding in enumerate(PADDING.tolist()):
            alone = transformer.logits(params, tokens[row : row + 1, padding:end], cfg)
            np.testing.assert_allclose(logits[row], alone[0, -1], rtol=1e-12, atol=1e-14)
        if end < 11:
            logits, cache = step(weights, tokens[:, end], PADDING, cache, jnp.int32(end), cfg=cfg)


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": "scan"}, {"family": "llama", "num_heads": 4, "num_kv_heads": 2, "tied": False}],
)
def test_extending_the_cache_equals_reading_everything_at_once(changes):
    """Prompts, then five tokens of which the last two fill up, then the three that belong there:
    logits at every position are those of reading anew.
    """
    cfg = tiny.config(**changes)
    params, tokens = tiny.params(cfg), tiny.batch(cfg, B=3, T=11).inputs
    read = jax.jit(extend, static_argnames="cfg")
    _, cache = jax.jit(prefill, static_argnames=("slots", "cfg"))(
        params, tokens[:, :4], PADDING, slots=13, cfg=cfg
    )
    fillers = tokens[:, 4:9].at[:, 3:].set(0)
    first, cache = read(params, fillers, PADDING, cache, jnp.int32(4), cfg=cfg)
    second, _ = read(params, tokens[:, 7:11], PADDING, cache, jnp.int32(7), cfg=cfg)
    found = jnp.concatenate([first[:, :3], second], 1)
    for row, padding in enumerate(PADDING.tolist()):
        alone = transformer.logits(params, tokens[row : row + 1, padding:], cfg)
        np.testing.assert_allclose(found[row], alone[0, -7:], rtol=1e-12, atol=1e-14)
    only, _ = read(
        params, tokens[:, 7:11], PADDING, cache, jnp.int32(7), cfg=cfg, only=jnp.int32(1)
    )
    np.testing.assert_allclose(only[:, 0], second[:, 1], rtol=1e-12)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_a_prompt_read_in_parts_is_read_as_if_at_once(layers):
    """Also where one of the rows is only padding in a part."""
    cfg = tiny.config(layers=layers, max_seq_len=2 * PART + 8)
    params, tokens = tiny.params(cfg), tiny.batch(cfg, B=2, T=2 * PART + 3).inputs
    padding = jnp.array([0, PART + 5], jnp.int32)
    logits, cache = jax.jit(prefill, static_argnames=("slots", "cfg"))(
        params, tokens[:, : 2 * PART], padding, slots=2 * PART + 4, cfg=cfg
    )
    more, _ = jax.jit(extend, static_argnames="cfg")(
        params, tokens[:, 2 * PART :], padding, cache, jnp.int32(2 * PART), cfg=cfg
    )
    found = jnp.concatenate([logits[:, None], more], 1)
    for row, begin in enumerate(padding.tolist()):
        alone = transformer.logits(params, tokens[row : row + 1, begin:], cfg)
        np.testing.assert_allclose(found[row], alone[0, -4:], rtol=1e-11, atol=1e-13)


def test_a_block_is_traced_once_for_all_layers(monkeypatch):
    cfg, traced = tiny.config(num_layers=3, layers="unroll"), []
    fwd = gpt2.block_fwd
    monkeypatch.setattr(gpt2, "block_fwd", lambda *args: traced.append(0) or fwd(*args))
    ids, padding = jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32)
    jax.eval_shape(lambda p: prefill(p, ids, padding, 8, cfg), tiny.params(cfg))
    assert len(traced) == 1


@pytest.mark.parametrize("how", ["q8_0", "q4_0", "q4_1", "bfloat16"])
def test_a_stack_is_not_copied(how):
    """Neither weights nor the cache: a token's temporaries have fewer bytes than one matrix."""
    if not native.available("product"):
        pytest.skip("there is no C++ compiler that works, or JAX computes elsewhere")
    cfg = tiny.config(dtype="float32", layers="scan", channels=128, num_layers=3)
    params = store_for_decoding(tiny.params(cfg, jnp.float32), cfg, how)
    cache, token = empty_cache(params, cfg, 1, 256), jnp.zeros(1, jnp.int32)
    leaves, tree = jax.tree.flatten(params)

    def step(leaves, cache, slot):
        return decode(jax.tree.unflatten(tree, leaves), token, token, cache, slot, cfg)

    compiled = jax.jit(step, donate_argnums=1).lower(leaves, cache, jnp.int32(9)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < min(128 * 128 // 2, cache.k[0].nbytes)
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes


def test_prompts_that_are_no_whole_parts_are_refused():
    cfg = tiny.config()
    with pytest.raises(ValueError, match="prompts of 129 tokens are no multiple of 128"):
        prefill(None, jnp.zeros((1, PART + 1), jnp.int32), jnp.zeros(1, jnp.int32), 200, cfg)


@pytest.mark.parametrize(("how", "least", "most"), [("q8_0", 1e-4, 2e-2), ("q4_1", 1e-2, 0.4)])
@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_weights_of_few_bits_give_nearly_the_same_logits(how, least, most, layers):
    cfg = tiny.config(dtype="float32", layers=layers)
    params, tokens = tiny.params(cfg, jnp.float32), tiny.batch(cfg, B=3, T=4).inputs
    exact, _ = prefill(params, tokens, PADDING, 4, cfg)
    nearly, _ = prefill(store_for_decoding(params, cfg, how), tokens, PADDING, 4, cfg)
    error = np.linalg.norm(nearly - exact) / np.linalg.norm(exact)
    assert least < error < most


@pytest.mark.parametrize("how", ["as_stored", "bfloat16", "float32"])
def test_stored_weights_keep_their_dtype_or_take_the_chosen_one(how):
    cfg = tiny.config(dtype="float32")
    params = tiny.params(cfg, jnp.float32)
    params = params._replace(wte=params.wte.astype(jnp.bfloat16))
    stored = store_for_decoding(params, cfg, how)
    matrix = "bfloat16" if how == "bfloat16" else "float32"
    assert stored.blocks[0].qw.w.dtype == matrix
    assert stored.wte.w.dtype == ("float32" if how == "float32" else "bfloat16")
    assert (stored.wpe.dtype, stored.lnfw.dtype) == ("float32", "float32")


@pytest.mark.parametrize(
    ("how", "dtype", "expected"),
    [
        ("q8_0", "float32", "float16"),
        ("q4_1", "float32", "float16"),
        ("float32", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("q8_0", "bfloat16", "bfloat16"),
        ("q8_0", "float64", "float64"),
    ],
)
@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_a_cache_is_in_float16_beside_weights_in_blocks_and_in_float32_else(
    how, dtype, expected, layers
):
    cfg = tiny.config(dtype=dtype, layers=layers)
    params = store_for_decoding(tiny.params(cfg, jnp.float32), cfg, how)
    cache = empty_cache(params, cfg, 1, 8)
    assert {x.dtype.name for x in jax.tree.leaves(cache)} == {expected}
    step = jax.jit(
        lambda cache: decode(params, *(jnp.zeros(1, jnp.int32),) * 2, cache, jnp.int32(3), cfg)
    )
    assert jax.tree.map(jnp.shape, step(cache)[1]) == jax.tree.map(jnp.shape, cache)
    assert {x.dtype.name for x in jax.tree.leaves(step(cache)[1])} == {expected}


def test_cache_is_kept_in_the_compute_dtype():
    cfg = tiny.config(dtype="bfloat16", layers="scan")
    params = tiny.params(cfg, jnp.float32)
    _, cache = prefill(params, jnp.ones((2, 3), jnp.int32), jnp.zeros(2, jnp.int32), 5, cfg)
    assert {(x.shape, x.dtype.name) for x in jax.tree.leaves(cache)} == {
        ((2, 2, 2, 5, 4), "bfloat16")
    }
    assert {x.dtype.name for x in jax.tree.leaves(store_for_decoding(params, cfg).blocks.qw)} == {
        "bfloat16"
    }
