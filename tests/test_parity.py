"""The same weights in Hugging Face's GPT-2 on PyTorch: our forward is GPT-2's, and so are gradient
and AdamW steps.

Against PyTorch itself where it is installed (the [parity] extra), and everywhere against what it
computed once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.config import OptimConfig
from gptjax.convert.weights import load_weights, open_weights, write_weights
from gptjax.formats import llmc
from gptjax.models import transformer
from gptjax.models.batch import Batch
from gptjax.train import step as steps
from gptjax.train.optimizer import make_optimizer
from gptjax.train.step import TrainState
from tests.compare import relative_l2
from tests.golden import torch_gpt2
from tests.models import tiny
from tests.models.fused import fuse

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
        pytest.param(
            lambda d=d: (live(d), d),
            id=d,
            marks=[pytest.mark.parity, pytest.mark.filterwarnings("default")],
        )
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
    padded = found["params"]._replace(
        wte=np.pad(found["params"].wte, ((0, cfg.padded_vocab_size - V), (0, 0)))
    )
    return (
        cfg,
        jax.tree.map(jnp.asarray, padded),
        Batch(jnp.asarray(found["ids"][:, :-1]), jnp.asarray(found["ids"][:, 1:])),
    )


def assert_close(mine, expected, tolerance: float):
    """Tensor by tensor as PyTorch has them: the gradient of the keys' bias alone is rounding, in
    both.
    """
    mine, expected = fuse(mine), fuse(expected)
    mine["wte"] = mine["wte"][:V]
    for name, theirs in expected.items():
        assert mine[name].dtype == theirs.dtype, name
        assert mine[name].shape == theirs.shape, name
        assert relative_l2(mine[name], theirs) <= tolerance, name


def test_logits_loss_and_all_gradients(theirs):
    found, dtype = theirs
    cfg, params, batch = ours(theirs)
    assert (
        relative_l2(transformer.logits(params, batch.inputs, cfg), found["logits"])
        <= TOLERANCE[dtype]
    )
    loss, grads = transformer.loss_and_grad(params, batch, cfg)
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
    optimizer = make_optimizer(config, torch_gpt2.STEPS, cfg)
    state = TrainState(params, optimizer.transform.init(params))
    batches = jax.tree.map(lambda x: x[None], batch)
    compiled = steps.compile_step(cfg, optimizer, "manual", state, batches, jax.random.key(0))
    buffer = steps.gradient_buffer(params)
    for step, loss in enumerate(found["losses"], 1):
        state, buffer, metrics = steps.run_step(
            compiled, state, buffer, batches, jax.random.key(0), step
        )
        assert float(metrics.loss) == pytest.approx(loss, rel=TOLERANCE[dtype]), step
    assert found["losses"][-1] < found["losses"][0] - 0.3
    assert_close(state.params, found["trained"], TOLERANCE[dtype])


def test_the_file_is_small():
    assert torch_gpt2.FILE.stat().st_size < 1_000_000


# Folders


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.numpy()


def our_logits(where, ids):
    cfg, params = load_weights(str(where))
    cfg = dataclasses.replace(cfg, dtype="float32").resolve("cpu", ids.shape[1])
    return transformer.logits(params, jnp.asarray(ids), cfg)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_transformers_loads_what_we_write(transformers, tmp_path):
    """The same logits, and from the tokenizer the same ids."""
    bpe = tokenizers.train_bpe(["the cat sat on the mat"] * 9, 262, "cats")
    cfg = tiny.config(**SIZES | {"vocab_size": 262}, dtype="float32")
    llmc.write_model(tmp_path / "m.bin", tiny.params(cfg, jnp.float32), cfg)
    source = open_weights(str(tmp_path / "m.bin"))._replace(tokenizer=bpe)
    write_weights(source, tmp_path / "hf", "hf", np.dtype(np.float32))
    model, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()), report
    ids = np.array([bpe.encode("the cat sat")])
    assert relative_l2(our_logits(tmp_path / "m.bin", ids), their_logits(model, ids)) < 1e-5
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("the cat sat")["input_ids"] == ids[0].tolist()
    assert theirs.eos_token_id == model.config.eos_token_id == 261


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "50KB"}, {"inner": True}])
def test_we_load_what_transformers_writes(transformers, tmp_path, how):
    """In one file, in several, and without the language model's head, as the hub's own gpt2 has
    it.
    """
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": V, "n_positions": 24}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    how = dict(how)
    (model.transformer if how.pop("inner", False) else model).save_pretrained(tmp_path, **how)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "max_shard_size" not in how
    ids = np.arange(20).reshape(2, 10)
    assert relative_l2(our_logits(tmp_path, ids), their_logits(model, ids)) < 1e-5
