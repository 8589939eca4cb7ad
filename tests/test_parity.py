"""The same weights in Hugging Face's GPT-2 and Llama on PyTorch: our forward is theirs, and so are
gradient and AdamW steps.

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
from tests.golden import torch_gpt2, torch_llama
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
    trained = after_adamw(torch_gpt2, found["losses"], TOLERANCE[dtype], *ours(theirs))
    assert_close(trained, found["trained"], TOLERANCE[dtype])


def after_adamw(golden, losses, tolerance, cfg, params, batch):
    """The parameters after the steps of AdamW that ``golden`` describes; each loss is theirs."""
    beta1, beta2 = golden.ADAMW["betas"]
    config = OptimConfig(
        learning_rate=golden.ADAMW["lr"], schedule="constant", weight_decay=golden.WEIGHT_DECAY,
        beta1=beta1, beta2=beta2, eps=golden.ADAMW["eps"], grad_clip=0,
    )  # fmt: skip
    optimizer = make_optimizer(config, golden.STEPS, cfg)
    state = TrainState(params, optimizer.transform.init(params))
    batches = jax.tree.map(lambda x: x[None], batch)
    compiled = steps.compile_step(cfg, optimizer, "manual", state, batches, jax.random.key(0))
    buffer = steps.gradient_buffer(params)
    for step, loss in enumerate(losses, 1):
        state, buffer, metrics = steps.run_step(
            compiled, state, buffer, batches, jax.random.key(0), step
        )
        assert float(metrics.loss) == pytest.approx(loss, rel=tolerance), step
    assert losses[-1] < losses[0] - 0.3
    return state.params


@pytest.mark.parametrize("golden", [torch_gpt2, torch_llama])
def test_the_file_is_small(golden):
    assert golden.FILE.stat().st_size < 1_000_000


# Llama


def live_llama(tied):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return torch_llama.compute(tied)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (source, tied),
            id=f"{name}-{kind}",
            marks=[pytest.mark.parity, pytest.mark.filterwarnings("default")] * (name == "live"),
        )
        for name, source in (("file", torch_llama.load), ("live", live_llama))
        for kind, tied in torch_llama.KINDS.items()
    ],
)
def llama(request):
    """(what PyTorch computed, our configuration, parameters, batch)."""
    source, tied = request.param
    found = source(tied)
    cfg = tiny.config(
        family="llama", num_layers=torch_llama.L, num_heads=torch_llama.H,
        num_kv_heads=torch_llama.K, channels=torch_llama.C, vocab_size=torch_llama.V,
        hidden=torch_llama.SIZES["intermediate_size"], max_seq_len=torch_llama.T, tied=tied,
        rope_theta=torch_llama.THETA, norm_eps=torch_llama.EPS, layers="scan", dtype="float32",
    )  # fmt: skip
    tables = {"tok_emb": found["params"].tok_emb, "wcls": found["params"].wcls}
    rows = ((0, cfg.padded_vocab_size - torch_llama.V), (0, 0))
    padded = {name: np.pad(x, rows) for name, x in tables.items() if x is not None}
    params = jax.tree.map(jnp.asarray, found["params"]._replace(**padded))
    ids = found["ids"]
    return found, cfg, params, Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]))


def assert_llama_close(mine, expected):
    mine, expected = torch_llama.named_tensors(mine), torch_llama.named_tensors(expected)
    assert mine.keys() == expected.keys()
    for name, theirs in expected.items():
        x = mine[name][: torch_llama.V] if name in ("tok_emb", "wcls") else mine[name]
        assert x.dtype == theirs.dtype, name
        assert x.shape == theirs.shape, name
        assert relative_l2(x, theirs) <= TOLERANCE["float32"], name


def test_logits_loss_and_all_gradients_of_llama(llama):
    found, cfg, params, batch = llama
    logits = transformer.logits(params, batch.inputs, cfg)
    assert relative_l2(logits, found["logits"]) <= TOLERANCE["float32"]
    loss, grads = transformer.loss_and_grad(params, batch, cfg)
    assert float(loss) == pytest.approx(found["losses"][0], rel=TOLERANCE["float32"])
    assert_llama_close(grads, found["grads"])


def test_ten_adamw_steps_of_llama(llama):
    found, *ours = llama
    trained = after_adamw(torch_llama, found["losses"], TOLERANCE["float32"], *ours)
    assert_llama_close(trained, found["trained"])


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


SMALL_LLAMA = {
    "family": "llama",
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden": 24,
    "vocab_size": 310,
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}!{% endfor %}"


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_llamas_that_we_write(transformers, tmp_path, tied, dtype):
    """The same logits, ids and conversation."""
    pytest.importorskip("sentencepiece")
    from gptjax.formats import safetensors

    cats = tokenizers.train_sentencepiece(["the cat sat on the mat"] * 9, 285, "cats")
    changes = {"vocab_size": 285, "tied": tied, "rope_theta": 5e3, "norm_eps": 1e-6}
    cfg = tiny.config(**SIZES | SMALL_LLAMA | changes, dtype="float32")
    kind = np.dtype(jnp.dtype(dtype))
    path = tmp_path / "m.safetensors"
    safetensors.write_model(path, tiny.params(cfg, jnp.float32), cfg, kind)
    source = open_weights(str(path))._replace(tokenizer=cats, chat_template=TEMPLATE)
    write_weights(source, tmp_path / "hf", "hf", kind)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()), report
    assert str(model.dtype) == f"torch.{dtype}"
    ids = np.array([[1, *cats.encode("the  cat sat")]])
    assert relative_l2(our_logits(path, ids), their_logits(model.float(), ids)) < 1e-5
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("the  cat sat")["input_ids"] == ids[0].tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "user: hello!"
    again = open_weights(str(tmp_path / "hf"))
    assert again.chat_template == TEMPLATE
    assert again.tokenizer.encode("the  cat") == cats.encode("the  cat")


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "20KB"}])
@pytest.mark.parametrize("tied", [True, False])
def test_we_load_the_llamas_that_transformers_writes(transformers, tmp_path, tied, how):
    config = transformers.LlamaConfig(**torch_llama.SIZES, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, **how)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not how
    ids = np.arange(20).reshape(2, 10)
    assert relative_l2(our_logits(tmp_path, ids), their_logits(model, ids)) < 1e-5


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_transformers_continues_stories260k_as_llama2c_does(transformers, tmp_path, shared):
    """The real weights and tokenizer, from llama2.c's files to a folder."""
    import hashlib

    import torch

    source = open_weights(str(shared / "llama2c" / "stories260K.bin"))
    tok512 = tokenizers.find(shared / "llama2c" / "tok512.bin")
    write_weights(source._replace(tokenizer=tok512), tmp_path / "hf", "hf", np.dtype(np.float32))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    begin = torch.tensor([[theirs.bos_token_id]])
    ids = model.generate(begin, max_new_tokens=200, do_sample=False)[0]
    text = theirs.decode(ids, skip_special_tokens=True).encode()[:464]
    assert hashlib.md5(text).hexdigest() == "16274658e722e6d5f0effe0dd7a16084"
