import jax
import numpy as np
import pytest

from gptjax import checkpoint, steps
from gptjax.checkpoint import CheckpointWriter, restore_newest
from gptjax.errors import CheckpointError
from gptjax.optim import OptimConfig, make_optimizer
from tests.models import tiny

OPTIMIZER = make_optimizer(OptimConfig(), 10)
CFG = tiny.config(dtype="float32")


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 3 and 5, whose parameters differ."""
    states = {n: steps.init_state(jax.random.key(n), CFG, OPTIMIZER) for n in (3, 5)}
    writer = CheckpointWriter(tmp_path / "c", keep=2)
    for n, state in states.items():
        writer.save(n, state, CFG, {"position": n})
    writer.close()
    return tmp_path / "c", states


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_newest_comes_back_as_it_was(saved):
    folder, states = saved
    restored = restore_newest(folder, CFG, OPTIMIZER)
    assert (restored.step, restored.meta) == (5, {"position": 5})
    assert_equal(restored.state, states[5])


def test_it_comes_back_in_the_layout_asked_for(saved):
    folder, states = saved
    restored = restore_newest(folder, tiny.config(dtype="float32", layers="scan"), OPTIMIZER)
    np.testing.assert_array_equal(restored.state.params.fcw[1], states[5].params.fcw[1])
    np.testing.assert_array_equal(restored.state.opt_state.moments[1].mu.fcw, 0)


def test_a_first_moment_in_bfloat16_comes_back_and_is_not_taken_for_another(saved, tmp_path):
    """Nor is a checkpoint that has the other kind taken for a damaged one."""
    folder, _ = saved
    rounded = make_optimizer(OptimConfig(mu_dtype="bfloat16"), 10)
    state = steps.init_state(jax.random.key(3), CFG, rounded)
    clip, adam = state.opt_state.moments
    moments = clip, adam._replace(mu=jax.tree.map(lambda p: p.astype("bfloat16"), state.params))
    state = state._replace(opt_state=state.opt_state._replace(moments=moments))
    writer = CheckpointWriter(tmp_path / "rounded", keep=1)
    writer.save(1, state, CFG, {})
    writer.close()
    assert_equal(restore_newest(tmp_path / "rounded", CFG, rounded).state, state)
    with pytest.raises(CheckpointError, match="optim.mu_dtype bfloat16, not None"):
        restore_newest(tmp_path / "rounded", CFG, OPTIMIZER)
    with pytest.raises(CheckpointError, match="optim.mu_dtype None, not bfloat16"):
        restore_newest(folder, CFG, rounded)
    assert not list(folder.glob("damaged-*"))


def test_what_was_saved_is_what_counts_even_if_the_storage_reads_without_complaint(saved, monkeypatch):
    """The storage returns other numbers for step 5: the checksums notice."""
    folder, states = saved
    real = checkpoint._checksums
    calls = []

    def checksums(tree):
        calls.append(1)
        if len(calls) == 1:
            one_bit_more = np.nextafter(np.float32(1), np.float32(2))
            params = tree.params._replace(lnfw=tree.params.lnfw.at[3].set(one_bit_more))
            tree = tree._replace(params=params)
        return real(tree)

    monkeypatch.setattr(checkpoint, "_checksums", checksums)
    with pytest.warns(UserWarning, match="step_00000005 is damaged and was set aside: its checksums do not match"):
        restored = restore_newest(folder, CFG, OPTIMIZER)
    assert restored.step == 3
    assert_equal(restored.state, states[3])


def test_nothing_to_restore(tmp_path):
    assert restore_newest(tmp_path / "none", CFG, OPTIMIZER) is None


@pytest.mark.filterwarnings("ignore:checkpoint")
def test_all_damaged_is_an_error_not_a_fresh_start(saved):
    folder, _ = saved
    for path in folder.glob("step_*/state/manifest.ocdbt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        restore_newest(folder, CFG, OPTIMIZER)
    assert len(list(folder.glob("damaged-*"))) == 2
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):  # nor at the second try
        restore_newest(folder, CFG, OPTIMIZER)


def test_running_out_of_memory_is_no_damage(saved, monkeypatch):
    folder, _ = saved

    def fail(tree):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(checkpoint, "_checksums", fail)
    with pytest.raises(CheckpointError, match="cannot be read: RESOURCE_EXHAUSTED"):
        restore_newest(folder, CFG, OPTIMIZER)
    assert not list(folder.glob("damaged-*"))


def test_another_model_is_refused_and_nothing_is_set_aside(saved):
    folder, _ = saved
    with pytest.raises(CheckpointError, match=r"was trained with model\.num_heads 2, not 4"):
        restore_newest(folder, tiny.config(dtype="float32", num_heads=4), OPTIMIZER)
    assert not list(folder.glob("damaged-*"))
