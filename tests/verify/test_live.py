"""The check as a hook of the trainer; what it compares with is tested in tests/verify/test_references.py."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, DataConfig, OptimConfig
from gptjax.train import step as steps
from gptjax.train.optimizer import make_optimizer
from gptjax.train.trainer import WrongGradientError
from gptjax.verify.live import LiveCheck
from tests.models import tiny

MODEL = tiny.config(num_layers=1, dtype="float32", attention="materialised")


@pytest.fixture(scope="module")
def compiled():
    with jax.enable_x64(False):
        optimizer = make_optimizer(OptimConfig(), 10, MODEL)
        params = tiny.params(MODEL, jnp.float32)
        state = steps.add_optimizer(params, MODEL, optimizer)
        batch = jax.tree.map(lambda x: np.asarray(x)[None], tiny.batch(MODEL))
        return steps.compile_step(MODEL, optimizer, "manual", state, batch, jax.random.key(0)), state, batch


@pytest.fixture
def trainer(compiled, tmp_path):
    """What the check reads of a trainer."""
    program, state, _ = compiled
    cfg = Config(MODEL, DataConfig(batch_size=2, seq_len=7))
    run = SimpleNamespace(cfg=cfg, model=MODEL, key=jax.random.key(0), folder=tmp_path)
    with jax.enable_x64(False):
        buffer = steps.gradient_buffer(state.params)
        yield SimpleNamespace(run=run, compiled=program, state=state, buffer=buffer, done=4)


def test_a_right_gradient_gives_its_error(trainer, compiled, tmp_path):
    found = LiveCheck(trainer)(compiled[2])
    assert 0 < found["gradient_error"] < 1e-5
    assert not list(tmp_path.iterdir())


def test_a_wrong_gradient_ends_the_run_and_leaves_a_report(trainer, compiled, tmp_path):
    program = compiled[0]

    def wrong(*args):
        loss, gradient, norm = program.gradient(*args)
        return loss, gradient._replace(lnfb=-gradient.lnfb), norm

    trainer.compiled = program._replace(gradient=wrong)
    with pytest.raises(WrongGradientError, match=r"step 5: .*verify-step-5.html"):
        LiveCheck(trainer)(compiled[2])
    assert {p.name for p in tmp_path.iterdir()} == {"verify-step-5.html", "verify-step-5.json"}
