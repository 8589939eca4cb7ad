import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax import tokenizers
from gptjax.config import OptimConfig
from gptjax.convert.__main__ import main
from gptjax.convert.weights import Q8_0, load_weights, open_weights, write_weights
from gptjax.formats import llama2c, llmc, llmc_tokenizer, safetensors
from gptjax.formats.lazy import collect, tensor_names
from gptjax.formats.token_shards import write_shard
from gptjax.models.params import stack
from gptjax.train.checkpoint import CheckpointWriter
from gptjax.train.optimizer import make_optimizer
from gptjax.train.step import init_state
from tests.commands import expect_error
from tests.conftest import ROOT
from tests.models import tiny

CFG = tiny.config(dtype="float32")
BPE = tokenizers.train_bpe(["the cat sat on the mat"] * 9, 262, "cats")


@pytest.fixture
def model(tmp_path):
    """An llm.c model, version 3."""
    path = tmp_path / "model.bin"
    llmc.write_model(path, tiny.params(CFG, jnp.float32), CFG)
    return path


@pytest.fixture(params=["unroll", "scan"])
def run(tmp_path, request):
    """The folder of a run, with its tokenizer."""
    cfg = tiny.config(dtype="float32", layers=request.param, vocab_size=262, dropout=0.1)
    optimizer = make_optimizer(OptimConfig(), 10, cfg)
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", keep=1)
    writer.save(3, init_state(jax.random.key(3), cfg, optimizer), cfg, optimizer, {})
    writer.close()
    BPE.save(tmp_path / "run" / "tokenizer.json")
    return tmp_path / "run"


def convert(*args):
    assert main([str(arg) for arg in args]) == 0


# SHA-256 of a model of fixed numbers in each format: what others have written stays what is written
FILES = {
    ("m.bin", "float32"): "d75a8a94593779e6ef7c484218109f7b8c3aeb39e0be5bbb2e6434deba5b2634",
    ("m.bin", "bfloat16"): "c8eca45c1fd348ceb45f4d2ac61996c982ddb999a29f667f6f07e526b407fd3a",
    (
        "m.safetensors",
        "float32",
    ): "3f427ed6617ee502a27aab5c61e1d52ae8c95bc1572c838986e042d2e1ae113c",
    (
        "m.safetensors",
        "bfloat16",
    ): "a46b6650fe4402091e5179226731bc49a30f1d5dbd6aeb29f883617c87cd872e",
    (
        "hf/model.safetensors",
        "float32",
    ): "a443e670a64daabc023941c878ffc784350a702914f4f320f74e181c0ca61695",
    (
        "hf/model.safetensors",
        "bfloat16",
    ): "476898871b2db648bad59678bcf5b0c6dc088908aa5da00689b0f4bccdf4dd1f",
    (
        "hf/config.json",
        "float32",
    ): "561c8172f6e00e70a015697b45b3e71fe12c6191d929dd603d795170b06304bd",
}


@pytest.mark.parametrize(("name", "dtype"), FILES)
def test_the_bytes_of_a_format_do_not_change(tmp_path, name, dtype):
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, 1, 12, 11, 2, 2, 8, 0  # version 1, whose vocabulary has no pad rows
    # Exact in 16 bits
    numbers = np.arange(11 * 8 + 12 * 8 + 2 * (12 * 8 * 8 + 13 * 8) + 2 * 8) % 251 / 64 - 2
    source = tmp_path / "source.bin"
    source.write_bytes(header.tobytes() + numbers.astype("<f4").tobytes())
    convert(source, tmp_path / name.split("/")[0], "--dtype", dtype)
    assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == FILES[name, dtype]


@pytest.mark.parametrize("through", ["hf", "m.safetensors"])
def test_round_trips_give_the_same_bytes(model, tmp_path, through):
    convert(model, tmp_path / through)
    convert(tmp_path / through, tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("through", ["hf", "m.safetensors"])
def test_sixteen_bits_survive_thirty_two(model, tmp_path, through):
    convert(model, tmp_path / "half.bin", "--dtype", "bfloat16")
    convert(tmp_path / "half.bin", tmp_path / through)
    convert(tmp_path / through, tmp_path / "whole.bin", "--dtype", "float32")
    convert(tmp_path / "whole.bin", tmp_path / "back.bin", "--dtype", "bfloat16")
    assert (tmp_path / "back.bin").read_bytes() == (tmp_path / "half.bin").read_bytes()


def test_a_run_goes_to_every_format_and_starts_another(run, tmp_path, capsys):
    _, params = load_weights(str(run))
    for name in ("hf", "m.safetensors", "m.bin"):
        convert(run, tmp_path / name)
        _, found = load_weights(str(tmp_path / name))
        jax.tree.map(np.testing.assert_array_equal, stack(found), stack(params))
    assert "format     gptjax run" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["resid_pdrop"] == 0.1
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert theirs.encode("the mat").ids == BPE.encode("the mat")


GROUPED = {"family": "llama", "num_heads": 4, "num_kv_heads": 2, "channels": 32, "hidden": 64}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0"])
def test_gguf_keeps_model_tokenizer_and_template(tmp_path, capsys, dtype):
    """A tokenizer that is named for a source goes into the file."""
    pytest.importorskip("gguf")
    cfg = tiny.config(vocab_size=270, dtype="float32", **GROUPED)
    safetensors.write_model(
        tmp_path / "m.safetensors", tiny.params(cfg, jnp.float32), cfg, np.dtype("<f4")
    )
    BPE.save(tmp_path / "t.json")
    source = tmp_path / "m.safetensors"
    convert(source, tmp_path / "m.gguf", "--dtype", dtype, "--tokenizer", tmp_path / "t.json")
    assert "was left out" not in capsys.readouterr().out
    found = open_weights(str(tmp_path / "m.gguf"))
    assert found.cfg.architecture == cfg.architecture
    assert found.tokenizer.encode("the mat") == BPE.encode("the mat")
    assert found.tokenizer.vocab_size == 270
    assert tokenizers.find(tmp_path / "m.gguf").same_as(found.tokenizer)
    convert(tmp_path / "m.gguf", "--inspect")
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
    assert kinds[dtype] in capsys.readouterr().out.splitlines()[0]
    convert(tmp_path / "m.gguf", tmp_path / "back.safetensors")
    if dtype == "float32":
        assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
    write_weights(found._replace(chat_template="{{ messages }}"), tmp_path / "t.gguf", "gguf", Q8_0)
    assert open_weights(str(tmp_path / "t.gguf")).chat_template == "{{ messages }}"


@pytest.mark.parametrize("name", ["hf", "m.safetensors", "m.gguf"])
def test_float16_rounds_each_number_and_refuses_those_beyond_it(tmp_path, name, capsys):
    if name == "m.gguf":
        pytest.importorskip("gguf")
    cfg = tiny.config(dtype="float32", **GROUPED)
    params = tiny.params(cfg, jnp.float32)
    source = tmp_path / "source.safetensors"
    safetensors.write_model(source, params, cfg, np.dtype("<f4"))
    convert(source, tmp_path / name, "--dtype", "float16")
    found = load_weights(str(tmp_path / name))[1]
    for ours, theirs in zip(found.blocks, params.blocks, strict=True):
        np.testing.assert_array_equal(ours.wo, theirs.wo.astype("float16"))
    large = params._replace(tok_emb=params.tok_emb.at[3, 1].set(1e5))
    safetensors.write_model(source, large, cfg, np.dtype("<f4"))
    arguments = [str(source), str(tmp_path / f"large-{name}"), "--dtype", "float16"]
    expect_error(main, arguments, "numbers beyond 65504, float16's largest: write", capsys)


def test_what_is_printed(model, tmp_path, capsys):
    convert(model, tmp_path / "m.safetensors")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "format     llm.c model"
    assert lines[2] == "tensors    36 of float32"
    digest = hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    assert lines[-1].endswith(f"bytes, sha256 {digest}")


def test_inspect_knows_every_file(model, tmp_path, capsys):
    write_shard(tmp_path / "train.bin", [1, 2, 3])
    np.arange(1, 9, dtype="<u2").tofile(tmp_path / "old.bin")
    BPE.save(tmp_path / "t.json")
    llmc_tokenizer.write_tokenizer(tmp_path / "t.bin", BPE.pieces, BPE.end_of_text)
    convert(model, tmp_path / "m.safetensors")
    capsys.readouterr()
    expected = {
        "model.bin": "llm.c model",
        "train.bin": "token shard",
        "old.bin": "token shard without a header",
        "t.json": "tokenizer",
        "t.bin": "tokenizer",
        "m.safetensors": "gptjax safetensors",
    }
    for name, kind in expected.items():
        convert(tmp_path / name, "--inspect")
        assert capsys.readouterr().out.splitlines()[0] == f"format     {kind}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.bin", "x.bin"], "none.bin does not exist"),
        (["model.bin"], "the destination is missing"),
        (["model.bin", "model.bin"], "model.bin already exists"),
        (["model.bin", "none/x.bin"], "there is no folder"),
        (["model.bin", "x.pt"], "x.pt would be a PyTorch pickle, which is not written"),
        (["text.pt", "x.bin"], "it may be a PyTorch pickle"),
        (["text.index", "x.bin"], "it may be a TensorFlow checkpoint"),
        (["text.txt", "x.bin", "--inspect"], "in an unknown format"),
        (["model.bin", "x.bin", "--to", "onnx"], "onnx"),
        (
            ["model.bin", "x.gguf"],
            "a GGUF model holds models of the family llama, and this is gpt2",
        ),
        (["model.bin", "x.bin", "--dtype", "float16"], "in float32 or bfloat16, not in float16"),
        (["model.bin", "x", "--dtype", "q8_0"], "hf has no blocks of 8 bits: q8_0 is of GGUF"),
        (["model.bin", "x", "--tokenizer", "byte"], "the tokenizer byte has 257 ids, but"),
        (["model.bin", "x.bin", "--dtpye", "float32"], "dtpye"),
    ],
)
def test_bad_input_ends_in_one_sentence(model, tmp_path, args, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.pt", "text.index", "text.txt"):
        (tmp_path / name).write_text("not a model")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


MEASURE = """
import sys, threading, time
from gptjax.convert.__main__ import main
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
main(sys.argv[1:3])  # first a small one: what is left after that is the program itself
before, peak, going = held(), [0.0], [True]
def watch():
    while going[0]:
        peak[0] = max(peak[0], held())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
main(sys.argv[3:5])
going[0] = False
thread.join()
print("PEAK", peak[0] - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "way",
    [
        ("big.bin", "hf"),
        ("hf", "back.bin"),
        ("big.bin", "m.safetensors"),
        ("head", "back.bin"),
        ("run", "m.safetensors"),
    ],
)
def test_one_tensor_at_a_time_is_in_memory(model, tmp_path, way):
    """Of a model of 208 MB whose largest tensor has 16 MB, at most one and a half of those is held
    at once.

    A run is tried with one tensor of 128 MB, beside which TensorStore's own buffers are small.
    """
    layers, vocab_size, largest = (1, 65536, 128) if way[0] == "run" else (16, 8192, 16)
    cfg = tiny.config(
        dtype="float32", num_layers=layers, channels=512, vocab_size=vocab_size, max_seq_len=512
    )
    shapes = {(name, layer): shape for name, layer, shape in tensor_names(cfg)}
    zeros = collect(
        cfg, lambda *place: np.zeros(shapes[place], np.float32), lambda *place: np.dtype("<f4")
    )
    llmc.write_model(tmp_path / "big.bin", zeros, cfg)
    if way[0] == "hf":
        convert(tmp_path / "big.bin", tmp_path / "hf")
    if way[0] == "head":  # a folder that holds the token embedding twice
        convert(tmp_path / "big.bin", tmp_path / "head")
        file = tmp_path / "head" / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].copy()}, file)
    small = model
    if way[0] == "run":
        small = tmp_path / "small"
        for folder, size in (
            (small, dataclasses.replace(cfg, num_layers=1, channels=8, hidden=32)),
            (tmp_path / "run", cfg),
        ):
            writer = CheckpointWriter(folder / "checkpoints", keep=1)
            optimizer = make_optimizer(OptimConfig(), 1, size)
            writer.save(1, init_state(jax.random.key(0), size, optimizer), size, optimizer, {})
            writer.close()
    args = [
        str(small),
        str(tmp_path / "small.safetensors"),
        str(tmp_path / way[0]),
        str(tmp_path / way[1]),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, "-c", MEASURE, *args],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert float(shown.stdout.split("PEAK")[1]) < 1.5 * largest


def test_only_an_all_bfloat16_model_is_written_in_bfloat16(model, tmp_path, capsys):
    convert(model, tmp_path / "hf", "--dtype", "bfloat16")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    exact = np.float32(1 + 2**-20)
    mixed = tensors | {"transformer.h.0.mlp.c_fc.bias": np.full(32, exact)}
    save_file(mixed, file)
    capsys.readouterr()
    convert(tmp_path / "hf", tmp_path / "back.safetensors")
    assert "tensors    36 of bfloat16 and float32" in capsys.readouterr().out
    assert (load_file(tmp_path / "back.safetensors")["fcb.0"] == exact).all()


@pytest.mark.parametrize("kind", [BPE, tokenizers.train_characters(["the cat"])])
@pytest.mark.parametrize("name", ["m.bin", "m.safetensors", "hf"])
def test_every_export_keeps_the_tokenizer(model, tmp_path, capsys, name, kind):
    """Beside the file, where the format cannot hold it."""
    cfg = dataclasses.replace(CFG, vocab_size=262)
    llmc.write_model(tmp_path / "262.bin", tiny.params(cfg, jnp.float32), cfg)
    kind.save(tmp_path / "t.json")
    convert(tmp_path / "262.bin", tmp_path / name, "--tokenizer", tmp_path / "t.json")
    assert open_weights(str(tmp_path / name)).tokenizer.same_as(kind)
    beside = "gptjax_tokenizer.json" if name == "hf" else f"{name}.tokenizer.json"
    told = f"cannot hold the {kind.kind} tokenizer: it is in {beside}" in capsys.readouterr().out
    assert told == (name != "hf" or kind is not BPE)


def test_inspect_lists_the_tensors(model, capsys):
    convert(model, "--inspect")
    title, *lines = capsys.readouterr().out.splitlines()[4:]
    assert title.split("  ")[-1] == "first numbers"
    assert len(lines) == len(list(tensor_names(CFG)))
    name, shape, dtype, size, *first = lines[0].split()
    assert (name, shape, dtype, size) == ("wte", "11x8", "float32", "88")
    _, params = load_weights(str(model))
    np.testing.assert_allclose(np.float64(first), params.wte[0, :3], rtol=1e-3)
    assert lines[-1].startswith("lnfb")


def test_an_opened_model_prints_in_a_line(model):
    assert (
        repr(open_weights(str(model)))
        == "<llm.c model: gpt2, 1,944 parameters, 2 layers, no tokenizer>"
    )


def test_what_is_no_longer_there_afterwards_is_said(run, tmp_path, capsys):
    (run / "tokenizer.json").write_text("{}")
    convert(run, tmp_path / "hf")
    assert "tokenizer  none (" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(range(256)) * 8, b"\x80\x02}" + b"\xff\xfe" * 900]
)
def test_inspect_does_not_take_anything_for_ids(tmp_path, capsys, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content + bytes(len(content) % 2))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "pytorch_model.bin"), "--inspect"])
    assert "in an unknown format: it may be a PyTorch pickle" in capsys.readouterr().err


def test_inspect_reads_tokenizers_and_rejects_an_invalid_debug_state(run, tmp_path, capsys):
    convert(run, tmp_path / "hf")
    capsys.readouterr()
    convert(tmp_path / "hf" / "tokenizer.json", "--inspect")
    assert "262 ids, end-of-text 261" in capsys.readouterr().out
    np.array([llmc.STATE_MAGIC, 99, -5, 7, *[0] * 252], "<i4").tofile(tmp_path / "s.bin")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "s.bin"), "--inspect"])
    assert (
        "is an invalid llm.c debug state: version 99, -5 x 7 tokens in 1024 bytes"
        in capsys.readouterr().err
    )


LLAMA = tiny.config(
    family="llama", num_heads=4, num_kv_heads=2, channels=16, hidden=24, tied=False, dtype="float32"
)


@pytest.fixture
def llama(tmp_path):
    """A llama2.c model, version 0."""
    path = tmp_path / "llama.bin"
    llama2c.write_model(path, tiny.params(LLAMA, jnp.float32), LLAMA)
    return path


@pytest.mark.parametrize("through", [["a.safetensors"], ["a.bin"], ["a.safetensors", "b.bin"]])
def test_llama2_cs_model_through_other_formats_gives_the_same_bytes(llama, tmp_path, through):
    source = llama
    for name in through:
        options = ["--to", "llama2c", "--version", 1] if name.endswith(".bin") else []
        convert(source, tmp_path / name, *options)
        source = tmp_path / name
    convert(source, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == llama.read_bytes()


def test_llama2_cs_models_are_described_with_their_version(llama, tmp_path, capsys):
    for version in (0, 1, 2):
        convert(llama, tmp_path / f"{version}.bin", "--version", version)
        capsys.readouterr()
        convert(tmp_path / f"{version}.bin", "--inspect")
        shown = capsys.readouterr().out
        assert f"format     llama2.c model (version {version})" in shown
        assert "vocabulary 11, 12 positions" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "llmc"], "an llm.c model holds models of the family gpt2, and this is llama"),
        (["--dtype", "bfloat16"], "is in float32, or with --version 2 in int8"),
        (["--to", "safetensors", "--version", "2"], "version is of a llama2.c model"),
        (["--version", "3"], "version"),
    ],
)
def test_llama2_cs_options_where_they_do_not_belong(llama, tmp_path, options, message, capsys):
    expect_error(main, [str(llama), str(tmp_path / "new.bin"), *options], message, capsys)
    assert not (tmp_path / "new.bin").exists()


def test_a_theta_that_llama2_cs_file_lacks_is_not_lost(tmp_path, capsys):
    cfg = dataclasses.replace(LLAMA, rope_theta=1e5)
    safetensors.write_model(
        tmp_path / "m.safetensors", tiny.params(cfg, jnp.float32), cfg, np.dtype("<f4")
    )
    arguments = [str(tmp_path / "m.safetensors"), str(tmp_path / "m.bin")]
    expect_error(main, arguments, "cannot hold this model's 100000", capsys)
    assert not (tmp_path / "m.bin").exists()


def test_a_cut_model_of_llama2_c_is_not_called_a_pickle(llama, tmp_path, capsys):
    llama.write_bytes(llama.read_bytes()[:-4])
    size = llama.stat().st_size
    expect_error(
        main,
        [str(llama), str(tmp_path / "new.bin")],
        f"llama2.c model of version 0, but its header announces {size + 4} bytes, and it has {size}",
        capsys,
    )
