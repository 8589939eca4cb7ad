"""The check of a step's gradient while training; tests/train/test_command.py runs it in
training.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gptjax.config import Config, DataConfig, OptimConfig, TrainConfig
from gptjax.datasets.batches import BatchShape
from gptjax.models import gpt2
from gptjax.train import step as steps
from gptjax.train.optimizer import make_optimizer
from gptjax.train.trainer import WrongGradientError
from gptjax.verify.live import LiveCheck
from tests.models import tiny

KEY = jax.random.key(4)


def trainer(folder):
    """What the check looks at of a trainer after two steps."""
    model = tiny.config(num_layers=1)
    cfg = Config(model, DataConfig(batch_size=2, seq_len=7), OptimConfig(), TrainConfig())
    params = tiny.params(model)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps, model)
    state = steps.TrainState(params, optimizer.transform.init(params))
    batch = jax.tree.map(lambda x: x[None], tiny.batch(model))
    compiled = steps.compile_step(model, optimizer, "manual", state, batch, KEY)
    run = SimpleNamespace(
        cfg=cfg, model=model, key=KEY, folder=folder, shape=BatchShape(1, 2, 7), mesh=None
    )
    buffer = steps.gradient_buffer(params)
    return SimpleNamespace(run=run, state=state, compiled=compiled, buffer=buffer, done=2), batch


def test_the_right_gradient_is_measured_and_lies_in_the_buffer(tmp_path):
    found, batch = trainer(tmp_path)
    error = LiveCheck(found)(batch)["gradient_error"]
    assert 0 <= error < 1e-12
    _, expected, _ = found.compiled.gradient(
        found.state.params, batch, KEY, np.int32(3), steps.gradient_buffer(found.state.params)
    )
    assert (found.buffer.wte == expected.wte).all()


def test_a_wrong_one_ends_training_and_leaves_a_report(tmp_path, monkeypatch):
    right = gpt2.gelu_bwd
    monkeypatch.setattr(gpt2, "gelu_bwd", lambda x, dy: 1.001 * right(x, dy))
    found, batch = trainer(tmp_path)
    with pytest.raises(WrongGradientError, match="step 3: .*GRADIENTS ARE WRONG"):
        LiveCheck(found)(batch)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json"]
