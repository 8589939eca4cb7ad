import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.models.params import (
    decay_mask,
    flops_per_token,
    head_of,
    init_params,
    is_stacked,
    num_block_params,
    num_matrix_params,
    num_padded_params,
    num_params,
    param_axes,
    param_shapes,
    rows,
    stack,
    unstack,
)
from tests.models import tiny


@pytest.mark.parametrize(
    ("preset", "published"),
    [("124m", 124_439_808), ("350m", 354_823_168), ("774m", 774_030_080), ("1558m", 1_557_611_200)],
)
def test_presets_have_the_published_number_of_parameters(preset, published):
    """As Hugging Face's gpt2, gpt2-medium, gpt2-large and gpt2-xl."""
    assert num_params(ModelConfig(preset=preset, vocab_size=50257)) == published


def test_flops_of_124m():
    """6 N + 12 L C T with llm.c's padded N = 124,475,904."""
    assert (
        flops_per_token(ModelConfig(preset="124m", vocab_size=50257), 1024)
        == 6 * 124_475_904 + 12 * 12 * 768 * 1024
    )


def test_flops_of_llamas_leave_an_untied_embedding_out():
    """TinyLlama's 22 layers have 4 of 32 heads of keys and values; SmolLM2 is tied."""
    C, F = 2048, 5632
    block = 2 * C * C + 2 * C * (4 * 64) + 3 * C * F + 2 * C
    multiplied = 22 * block + C + 32000 * C
    untied = ModelConfig(preset="tinyllama-1.1b")
    assert num_params(untied) == multiplied + 32000 * C == 1_100_048_384
    assert flops_per_token(untied, 2048) == 6 * multiplied + 12 * 22 * C * 2048
    assert num_matrix_params(untied) == multiplied - (2 * 22 + 1) * C
    tied = ModelConfig(preset="smollm2-135m")
    assert flops_per_token(tied, 512) == 6 * 134_515_008 + 12 * 30 * 576 * 512


def test_counts_add_up():
    """124M's own, and those that a token is multiplied with: 12 layers of 12 C^2, and the
    classifier.
    """
    cfg = ModelConfig(preset="124m", vocab_size=50257)
    assert num_padded_params(cfg) == num_params(cfg) + 47 * 768
    assert num_block_params(cfg) == 12 * 12 * 768**2
    assert num_matrix_params(cfg) == num_block_params(cfg) + 50304 * 768


def test_initial_distribution():
    cfg = tiny.config(channels=128, num_layers=8, vocab_size=1000, max_seq_len=64, layers="scan")
    params = init_params(jax.random.key(0), cfg)
    assert jax.tree.map(jnp.shape, params) == param_shapes(cfg)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    block = params.blocks
    for name, x in {
        "wte": params.wte[: cfg.vocab_size],
        "wpe": params.wpe,
        "qw": block.qw,
        "fcw": block.fcw,
    }.items():
        assert np.std(x) == pytest.approx(0.02, rel=0.03), name
        assert abs(np.mean(x)) < 5 * 0.02 / x.size**0.5, name
    for name in ("attprojw", "fcprojw"):
        # Sqrt(2 L) = 4
        assert np.std(getattr(block, name)) == pytest.approx(0.02 / 4, rel=0.03), name
    assert all((x == 1).all() for x in (block.ln1w, block.ln2w, params.lnfw))
    assert all((getattr(block, name) == 0).all() for name in block._fields if name.endswith("b"))
    assert (params.wte[cfg.vocab_size :] == 0).all()
    assert params.wte.shape == (1024, 128)


def test_no_two_tensors_have_the_same_initial_values():
    block = init_params(jax.random.key(0), tiny.config(layers="scan")).blocks
    assert len({np.asarray(x).tobytes() for x in (block.qw, block.kw, block.vw)}) == 3
    assert len({np.asarray(x).tobytes() for x in block.qw}) == 2


def test_layout_changes_nothing_but_the_layout():
    scanned = init_params(jax.random.key(0), tiny.config(layers="scan"))
    unrolled = init_params(jax.random.key(0), tiny.config(layers="unroll"))
    assert is_stacked(scanned.blocks)
    assert not is_stacked(unrolled.blocks)
    jax.tree.map(np.testing.assert_array_equal, stack(unrolled), scanned)
    jax.tree.map(np.testing.assert_array_equal, unstack(scanned), unrolled)
    assert stack(scanned) is scanned
    assert unstack(unrolled) is unrolled
    np.testing.assert_array_equal(unrolled.blocks[1].fcw, scanned.blocks.fcw[1])


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_axes_give_the_shape_of_each_tensor(layers):
    cfg = tiny.config(layers=layers)
    params = init_params(jax.random.key(0), cfg)

    def check(x, axes):
        assert x.shape == tuple(cfg.axis_sizes[axis] for axis in axes)

    jax.tree.map(check, params, param_axes(cfg))


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_weight_decay_is_on_matrices_and_embeddings_alone(layers):
    cfg = tiny.config(layers=layers)
    params = init_params(jax.random.key(0), cfg)
    mask = decay_mask(params, cfg)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    for block in [mask.blocks] if layers == "scan" else mask.blocks:
        assert {name for name, decayed in block._asdict().items() if decayed} == {
            "qw",
            "kw",
            "vw",
            "attprojw",
            "fcw",
            "fcprojw",
        }
    assert [mask.wte, mask.wpe, mask.lnfw, mask.lnfb] == [True, True, False, False]


def test_the_classifier_is_the_familys_head():
    params = init_params(jax.random.key(0), tiny.CONFIG)
    assert head_of(params, tiny.CONFIG) is params.wte


def test_rows_list_the_weight_table_in_order():
    names = [name for name, *_ in rows(tiny.CONFIG)]
    assert names[:4] == ["wte", "wpe", "ln1w", "ln1b"]
    assert names[-2:] == ["lnfw", "lnfb"]
    assert [layered for _, layered, *_ in rows(tiny.CONFIG)] == [False] * 2 + [True] * 16 + [
        False
    ] * 2
