"""The same weights in Hugging Face's GPT-2 on PyTorch: our forward is GPT-2's, and so are gradient and AdamW steps.

Against PyTorch itself where it is installed (the [parity] extra), and everywhere against what it computed once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import steps
from gptjax.models import gpt2
from gptjax.models.gpt2 import Batch
from gptjax.models.params import Params, stack
from gptjax.optim import OptimConfig, init_opt_state, make_optimizer
from gptjax.steps import TrainState
from tests.compare import relative_l2
from tests.golden import torch_gpt2
from tests.models import tiny

V = torch_gpt2.SIZES["vocab_size"]
SIZES = {"num_layers": 2, "num_heads": 4, "channels": 32, "vocab_size": V, "max_seq_len": 24}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def live(dtype):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return torch_gpt2.compute(dtype)


SOURCES = [
    pytest.param(lambda: (torch_gpt2.load(), "float32"), id="file"),
    *(
        pytest.param(lambda d=d: (live(d), d), id=d, marks=[pytest.mark.parity, pytest.mark.filterwarnings("default")])
        for d in ("float32", "float64")
    ),
]


@pytest.fixture(params=SOURCES, scope="module")
def theirs(request):
    """(what PyTorch computed, its dtype)."""
    return request.param()


def ours(theirs):
    """Configuration, parameters and batch."""
    found, dtype = theirs
    cfg = tiny.config(**SIZES, layers="scan", dtype=dtype)
    padded = found["params"]._replace(wte=np.pad(found["params"].wte, ((0, cfg.padded_vocab_size - V), (0, 0))))
    return cfg, jax.tree.map(jnp.asarray, padded), Batch(jnp.asarray(found["ids"][:, :-1]), jnp.asarray(found["ids"][:, 1:]))


def assert_close(mine: Params, expected: Params, tolerance: float):
    mine = stack(mine)._replace(wte=mine.wte[:V])
    for name, a, b in zip(Params._fields, mine, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert relative_l2(a, b) <= tolerance, name


def test_logits_loss_and_all_gradients(theirs):
    found, dtype = theirs
    cfg, params, batch = ours(theirs)
    assert relative_l2(gpt2.logits(params, batch.inputs, cfg), found["logits"]) <= TOLERANCE[dtype]
    loss, grads = gpt2.loss_and_grad(params, batch, cfg)
    assert float(loss) == pytest.approx(found["losses"][0], rel=TOLERANCE[dtype])
    assert_close(grads, found["grads"], TOLERANCE[dtype])


def test_ten_adamw_steps(theirs):
    found, dtype = theirs
    cfg, params, batch = ours(theirs)
    beta1, beta2 = torch_gpt2.ADAMW["betas"]
    config = OptimConfig(
        learning_rate=torch_gpt2.ADAMW["lr"], schedule="constant", weight_decay=torch_gpt2.WEIGHT_DECAY,
        beta1=beta1, beta2=beta2, eps=torch_gpt2.ADAMW["eps"], grad_clip=0,
    )  # fmt: skip
    optimizer = make_optimizer(config, torch_gpt2.STEPS)
    state = TrainState(params, init_opt_state(optimizer, params))
    batches = jax.tree.map(lambda x: x[None], batch)
    compiled = steps.compile_step(cfg, optimizer, "manual", state, batches, jax.random.key(0))
    for step, loss in enumerate(found["losses"]):
        state, metrics = steps.run_step(compiled, state, batches, jax.random.key(0), step)
        assert float(metrics.loss) == pytest.approx(loss, rel=TOLERANCE[dtype]), step
    assert found["losses"][-1] < found["losses"][0] - 0.3
    assert_close(state.params, found["trained"], TOLERANCE[dtype])


def test_the_file_is_small():
    assert torch_gpt2.FILE.stat().st_size < 1_000_000
