import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models.config import GPT2Config
from gptjax.models.params import (
    Block,
    Params,
    decay_mask,
    flops_per_token,
    init_params,
    join_layers,
    num_params,
    param_shapes,
    split_layers,
    stack,
    unstack,
)
from tests.models import tiny


@pytest.mark.parametrize(
    ("preset", "published"), [("124m", 124_439_808), ("350m", 354_823_168), ("774m", 774_030_080), ("1558m", 1_557_611_200)]
)
def test_presets_have_the_published_number_of_parameters(preset, published):
    """As Hugging Face's gpt2, gpt2-medium, gpt2-large and gpt2-xl."""
    assert num_params(GPT2Config(preset=preset)) == published


def test_flops_of_124m():
    """6 N + 12 L C T with llm.c's padded N = 124,475,904."""
    assert flops_per_token(GPT2Config(preset="124m"), 1024) == 6 * 124_475_904 + 12 * 12 * 768 * 1024


def test_initial_distribution():
    cfg = tiny.config(channels=128, num_layers=8, vocab_size=1000, max_seq_len=64, layers="scan")
    params = init_params(jax.random.key(0), cfg)
    assert jax.tree.map(jnp.shape, params, is_leaf=lambda x: hasattr(x, "shape")) == param_shapes(cfg)
    assert {x.dtype for x in params} == {jnp.dtype("float32")}
    for name in ("wte", "wpe", "qkvw", "fcw"):
        x = getattr(params, name)[: cfg.vocab_size] if name == "wte" else getattr(params, name)
        assert np.std(x) == pytest.approx(0.02, rel=0.03), name
        assert abs(np.mean(x)) < 5 * 0.02 / x.size**0.5, name
    for name in ("attprojw", "fcprojw"):
        assert np.std(getattr(params, name)) == pytest.approx(0.02 / 4, rel=0.03), name  # sqrt(2 L) = 4
    assert all((getattr(params, name) == 1).all() for name in ("ln1w", "ln2w", "lnfw"))
    assert all((getattr(params, n) == 0).all() for n in Params._fields if n.endswith("b"))
    assert (params.wte[cfg.vocab_size :] == 0).all()
    assert params.wte.shape == (1024, 128)


def test_layout_changes_nothing_but_the_layout():
    scanned = init_params(jax.random.key(0), tiny.config(layers="scan"))
    unrolled = init_params(jax.random.key(0), tiny.config(layers="unroll"))
    assert isinstance(unrolled.qkvw, tuple)
    jax.tree.map(np.testing.assert_array_equal, stack(unrolled), scanned)
    jax.tree.map(np.testing.assert_array_equal, unstack(scanned), unrolled)
    blocks = split_layers(unrolled)
    assert len(blocks) == 2
    np.testing.assert_array_equal(blocks[1].fcw, scanned.fcw[1])
    assert join_layers(blocks) == Block(*(getattr(unrolled, name) for name in Block._fields))


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_weight_decay_is_on_matrices_and_embeddings_alone(layers):
    mask = decay_mask(init_params(jax.random.key(0), tiny.config(layers=layers)))
    decayed = {name for name, value in mask._asdict().items() if all(jax.tree.leaves(value))}
    assert decayed == {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}
    assert not any(any(jax.tree.leaves(v)) for n, v in mask._asdict().items() if n not in decayed)
