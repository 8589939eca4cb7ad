"""The command as a person runs it, on a tiny model."""

import dataclasses
import importlib
import json
import shutil

import jax
import numpy as np
import pytest
import yaml

from gptjax import tokenizers
from gptjax.cli import progress
from gptjax.config import OptimConfig
from gptjax.convert import __main__ as convert
from gptjax.convert.weights import load_weights
from gptjax.datasets import find_corpus
from gptjax.datasets.batches import validation_batches
from gptjax.evaluate.__main__ import main
from gptjax.formats import llmc
from gptjax.formats.token_shards import open_shard, write_shard
from gptjax.models.batch import Batch
from gptjax.models.transformer import token_losses
from gptjax.train.checkpoint import CheckpointWriter
from gptjax.train.optimizer import make_optimizer
from gptjax.train.step import evaluate, make_eval_loss, make_state
from tests.commands import expect_error
from tests.evaluate.test_hellaswag import ROW
from tests.formats.test_llmc_eval import EXAMPLE, evaluation_file
from tests.models import tiny

CFG = tiny.config(num_layers=1, vocab_size=300, max_seq_len=32, dropout=0.1, dtype="float32")
OTHER = tiny.config(num_layers=1, dtype="float32")
OTHER_PARAMS = tiny.unigram(OTHER, [1 / 11] * 11)
TEXT = "".join(f"The cat number {n} sat on the mat, and the dog saw it.\n" for n in range(300))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, the run ``tiny`` whose corpus it is, the same model in ``hf``, and
    ``m.bin``, another.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text.txt").write_text(TEXT)
    data = {
        "dataset": str(folder / "text.txt"),
        "tokenizer": "bpe:300",
        "column": None,
        "tokens": None,
    }
    corpus = find_corpus(data["dataset"], folder / "data", data["tokenizer"])
    writer = CheckpointWriter(folder / "tiny" / "checkpoints", keep=1)
    with jax.enable_x64(False):
        optimizer = make_optimizer(OptimConfig(), 10, CFG)
        writer.save(3, make_state(jax.random.key(0), CFG, optimizer), CFG, optimizer, {})
    writer.close()
    corpus.tokenizer.save(folder / "tiny" / "tokenizer.json")
    (folder / "tiny" / "config.yaml").write_text(
        yaml.safe_dump({"model": dataclasses.asdict(CFG), "data": data})
    )
    assert convert.main([str(folder / "tiny"), str(folder / "hf")]) == 0
    llmc.write_model(folder / "m.bin", OTHER_PARAMS, OTHER)
    return folder


def run(place, checkpoint, dataset, *args):
    """The figures that the command writes."""
    out = place / "figures.json"
    options = ["--root", place / "data", "--json", out, *args]
    with jax.enable_x64(False):
        assert (
            main(
                [
                    str(x)
                    for x in ("--checkpoint", place / checkpoint, "--dataset", dataset, *options)
                ]
            )
            == 0
        )
    return json.loads(out.read_text())


def test_the_figures_are_those_of_training(place, capsys):
    """The loss equals that of training's validation on the same tokens."""
    prepared = set((place / "data").iterdir())
    found = run(
        place, "tiny", place / "text.txt", "--seq_len", 16, "--tokens", 90, "--batch_size", 5
    )
    (corpus,) = prepared
    batches = validation_batches([open_shard(corpus / "val_000000.bin")], 90, 2, 16, CFG.vocab_size)
    expected = evaluate(make_eval_loss(CFG), load_weights(str(place / "tiny"))[1], batches)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert (found["tokens"], found["windows"], found["seq_len"]) == (96, 6, 16)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 96 / found["bytes"] / np.log(2))
    assert found["loss_stderr"] > 0
    assert set((place / "data").iterdir()) == prepared  # the corpus is not prepared again
    out = capsys.readouterr().out
    assert f"loss       {found['loss']:.4f} ± {found['loss_stderr']:.4f} nats a token" in out
    assert "tokenizer  bpe-300, 300 ids\n" in out


@pytest.mark.parametrize("split", ["val", "train"])
def test_text_is_tokenized_with_the_model_s_tokenizer(place, split):
    """All windows of the split, from its second token on; the bytes are those of the text."""
    found = run(place, "hf", place / "text.txt", "--tokens", 0, "--split", split)
    (folder,) = (path for path in (place / "data").iterdir() if path.name.startswith("text-hf-"))
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    assert tokenizer.pieces == tokenizers.load(place / "tiny" / "tokenizer.json").pieces
    ids = open_shard(folder / f"{split}_000000.bin").tokens.tolist()
    windows = (len(ids) - 1) // 32
    assert (found["tokens"], found["windows"]) == (32 * windows, windows)
    assert found["bytes"] == len(tokenizer.decode_bytes(ids[1 : 32 * windows + 1]))


def text_losses(place, capsys, *args):
    """The listing of a text, the figures, and the last line."""
    out = place / "text.json"
    with jax.enable_x64(False):
        assert main([str(x) for x in ("--json", out, *args)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.replace(",", " ").split() for line in lines if line[:6].strip().isdecimal()]
    return rows, json.loads(out.read_text()), lines[-1]


def test_each_token_of_a_text_has_its_loss(place, capsys):
    rows, found, last = text_losses(
        place, capsys, "--checkpoint", place / "hf", "--text", "The cat"
    )
    tokenizer = tokenizers.load(place / "tiny" / "tokenizer.json")
    ids = tokenizer.encode("The cat")
    assert [int(row[0]) for row in rows] == found["ids"] == ids
    cfg, params = load_weights(str(place / "hf"))
    row = np.array([ids], np.int32)
    with jax.enable_x64(False):
        expected = token_losses(params, Batch(row[:, :-1], row[:, 1:]), cfg.resolve("cpu", 4))
    np.testing.assert_allclose(found["losses"], expected[0], rtol=1e-5)
    assert [row[1] for row in rows[1:]] == [f"{loss:.4f}" for loss in found["losses"]]
    assert last == f"loss       {np.mean(found['losses']):.4f} nats a token"
    assert found["text"] == "The cat"


def test_a_text_may_begin_as_a_document_does(place, capsys):
    """GPT-2's documents begin after end-of-text; by default only a begin-of-text is put there."""
    both = [
        text_losses(place, capsys, "--checkpoint", place / "hf", "--text", "The cat", "--bos", bos)[
            1
        ]
        for bos in ("true", "false")
    ]
    end = tokenizers.load(place / "tiny" / "tokenizer.json").end_of_text
    assert both[0]["ids"] == [end, *both[1]["ids"]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["hf"], "give either --dataset or --text to evaluate on"),
        (["hf", "--text", "a", "--dataset", "b"], "give either --dataset or --text to evaluate on"),
        (
            ["hf", "--text", "a cat", "--tokens", "3"],
            "tokens applies to a dataset only: leave it out",
        ),
        (
            ["hf", "--text", "a cat", "--split", "train"],
            "split applies to a dataset only: leave it out",
        ),
        (["hf", "--dataset", "b", "--bos", "true"], "bos applies to text only: leave it out"),
        (["hf", "--text", "README.md"], "'README.md' is the name of a file: evaluate on it with"),
        (["hf", "--text", ""], "the text has 0 tokens, but it takes 2 to 33"),
        (["hf", "--text", "x y " * 40], "tokens, but it takes 2 to 33: give another"),
        (["m.bin", "--text", "a cat"], "has no tokenizer: name one"),
        (["m.bin", "--text", "a", "--tokenizer", "byte"], "the tokenizer byte has 257 ids, but"),
    ],
)
def test_a_text_that_cannot_be_scored(place, capsys, args, message):
    with jax.enable_x64(False):
        expect_error(main, ["--checkpoint", str(place / args[0]), *args[1:]], message, capsys)


def test_the_same_figures_whatever_the_batch_size(place):
    one, other = (run(place, "hf", place / "text.txt", "--batch_size", size) for size in (1, 7))
    for name in ("loss", "loss_stderr", "perplexity", "bits_per_byte", "bits_per_byte_stderr"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)
    assert one["tokens"] == other["tokens"]


def test_no_more_rows_are_computed_than_are_scored(place, monkeypatch):
    module, shapes = importlib.import_module("gptjax.evaluate.corpus"), []
    losses = module.compiled_losses
    monkeypatch.setattr(
        module,
        "compiled_losses",
        lambda p, b, cfg: shapes.append(b.inputs.shape) or losses(p, b, cfg),
    )
    run(place, "hf", place / "text.txt", "--tokens", 20, "--batch_size", 8)
    assert shapes == [(1, 32)]


def shards(folder, ids=range(11), tokenizer=None):
    """A folder of token shards."""
    folder.mkdir()
    for split in ("train", "val"):
        write_shard(folder / f"{split}.bin", list(ids) * 3)
    if tokenizer:
        tokenizer.save(folder / "tokenizer.json")
    return folder


def test_shards_that_name_no_tokenizer(place, tmp_path, capsys):
    """They are the model's, if that has one; GPT-2's are not assumed of a model of fewer ids."""
    found = run(place, "hf", shards(tmp_path / "a"), "--seq_len", 4)
    assert found["bits_per_byte"] > 0
    assert "taken from the model, as the shards do not name theirs" in capsys.readouterr().out
    found = run(place, "m.bin", tmp_path / "a", "--seq_len", 4)
    assert (found["bytes"], found["bits_per_byte"]) == (None, None)
    out = capsys.readouterr().out
    assert "tokenizer  unknown\n" in out
    assert "bits/byte  unknown without the tokenizer" in out


def test_hellaswag_in_both_forms(place, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text((json.dumps(ROW) + "\n") * 3)
    found = run(place, "tiny", tmp_path / "q.jsonl", "--examples", 2, "--batch_size", 3)
    assert (found["questions"], found["cut"], found["acc"] in (0, 1), found["acc_stderr"]) == (
        2,
        0,
        True,
        0,
    )
    out = capsys.readouterr().out
    assert "questions  2 of" in out
    assert f"acc_norm   {found['acc_norm']:.4f} ± 0.0000" in out
    (tmp_path / "e.bin").write_bytes(evaluation_file([EXAMPLE, [[7] * 12, *EXAMPLE[1:]]]))
    assert run(place, "m.bin", tmp_path / "e.bin")["cut"] == 1
    assert (
        "cut        1 contexts at the start, to fit the model's 12 positions"
        in capsys.readouterr().out
    )


def test_lines_tell_how_far_it_is_where_there_is_no_terminal(place, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    run(place, "hf", place / "text.txt", "--tokens", 64, "--batch_size", 1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["scoring 1/2", "scoring 2/2"]
    assert lines[0].split(" | ")[1].startswith("loss 5.")


@pytest.mark.parametrize(
    ("checkpoint", "dataset", "args", "message"),
    [
        ("none", "text.txt", [], "none does not exist: name a run"),
        ("hf", "nonesuch", [], "nonesuch is neither a file or folder"),
        ("hf", "helaswag", [], "did you mean hellaswag?"),
        (
            "hf",
            "text.txt",
            ["--seq_len", "33"],
            "data.seq_len 33 does not fit model.max_seq_len 32",
        ),
        ("hf", "text.txt", ["--seq_len", "0"], "seq_len must be at least 1, not 0"),
        ("hf", "text.txt", ["--batch_size", "0"], "batch_size must be at least 1, not 0"),
        ("hf", "text.txt", ["--tokens", "-1"], "tokens must be at least 0, not -1"),
        ("hf", "text.txt", ["--split", "test"], "split"),
        ("hf", "text.txt", ["--dytpe", "float32"], "unknown option dytpe: did you mean dtype?"),
        ("hf", "text.txt", ["--json", "none/x.json"], "there is no folder"),
        ("hf", "text.txt", ["--examples", "5"], "examples applies to HellaSwag only"),
        (
            "hf",
            "text.txt",
            ["--tokenizer", "byte"],
            "has its own tokenizer, hf of 300 ids, and byte is another",
        ),
        ("m.bin", "text.txt", ["--tokenizer", "byte"], "the tokenizer byte has 257 ids, but"),
        ("m.bin", "other", [], "the tokenizer of other has 257 ids, but model.vocab_size is 11"),
        (
            "hf",
            "other",
            [],
            "other was tokenized with byte of 257 ids, but the model's tokenizer is hf of 300",
        ),
        ("hf", "large", ["--seq_len", "4"], "holds token id 300 near position"),
        (
            "hf",
            "short",
            [],
            "no val shard of short holds the 33 tokens of one window: lower seq_len",
        ),
        ("hf", "cut.bin", [], "is truncated or malformed"),
        ("hf", "label.jsonl", [], "line 1 of label.jsonl has the label '7', not one from 0 to 3"),
        ("m.bin", "q.jsonl", [], "the model has no tokenizer"),
        ("hf", "q.jsonl", ["--tokens", "5"], "limit HellaSwag with examples"),
        (
            "hf",
            "long.jsonl",
            [],
            "an ending has 501 tokens, but the model takes sequences of at most 32",
        ),
    ],
)
def test_bad_input_ends_in_one_sentence(
    place, tmp_path, checkpoint, dataset, args, message, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    if dataset == "other":
        shards(tmp_path / "other", tokenizer=tokenizers.byte())
    elif dataset == "large":
        shards(tmp_path / "large", range(290, 301))
    elif dataset == "short":
        shards(tmp_path / "short", range(10))
    (tmp_path / "cut.bin").write_bytes(evaluation_file([EXAMPLE])[:-2])
    for name, row in {
        "q": ROW,
        "label": ROW | {"label": 7},
        "long": ROW | {"endings": ["x" * 500] * 4},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    if dataset == "cut.bin":
        checkpoint = "m.bin"
    with jax.enable_x64(False):
        expect_error(
            main,
            ["--checkpoint", str(place / checkpoint), "--dataset", dataset, *args],
            message,
            capsys,
        )
    assert not (tmp_path / "data").exists() or dataset == "text.txt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {dataset: 3}", "data.dataset: Expected a str"),
        (
            "model: {preset: 124m}\ndata: {batch_size: 0}",
            "data.batch_size must be at least 1, not 0",
        ),
        ("data: [1, 2]", ""),
        ("model: {preset: 124m}\nseeed: 1", "unknown option seeed: did you mean seed?"),
        ("[", ""),
        ("", ""),
        (b"\xff\xfe", ""),
        (None, ""),
    ],
)
def test_the_configuration_of_a_run_is_checked_as_any_other(
    place, tmp_path, content, message, capsys
):
    run = tmp_path / "run"
    shutil.copytree(place / "tiny", run)
    file = run / "config.yaml"
    if content is None:
        file.unlink()
        file.symlink_to(tmp_path / "none")
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [
        "--checkpoint",
        str(run),
        "--dataset",
        str(place / "text.txt"),
        "--root",
        str(place / "data"),
    ]
    with jax.enable_x64(False), pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert f"correct {file}, or remove it" in error


def test_text_is_not_tokenized_as_the_model_was_not(place, tmp_path, capsys):
    """Where the run's own tokenizer is damaged, no other is assumed; ids need none."""
    run = tmp_path / "run"
    shutil.copytree(place / "tiny", run)
    (run / "config.yaml").unlink()
    (run / "tokenizer.json").write_text("{}")
    arguments = [
        "--checkpoint",
        str(run),
        "--seq_len",
        "4",
        "--root",
        str(place / "data"),
        "--dataset",
    ]
    with jax.enable_x64(False):
        expect_error(main, [*arguments, str(place / "text.txt")], "has no tokenizer", capsys)
        assert main([*arguments, str(shards(tmp_path / "ids", tokenizer=tokenizers.byte()))]) == 0


def test_a_checkpoint_that_diverged(tmp_path, capsys):
    llmc.write_model(
        tmp_path / "nan.bin", OTHER_PARAMS._replace(lnfb=OTHER_PARAMS.lnfb * np.nan), OTHER
    )
    arguments = [
        "--checkpoint",
        str(tmp_path / "nan.bin"),
        "--dataset",
        str(shards(tmp_path / "a")),
        "--seq_len",
        "4",
    ]
    expect_error(
        main, arguments, "that are not finite: it is damaged, or its training diverged", capsys
    )


def test_weights_stored_in_few_bits_are_compared_with_float32(place, capsys):
    exact, rounded = (
        run(place, "hf", place / "text.txt", "--tokens", 64, "--weights", how)
        for how in ("float32", "q4_0")
    )
    assert "divergence" not in exact
    assert rounded["float32_loss"] == pytest.approx(exact["loss"], rel=1e-5)
    assert rounded["loss"] != rounded["float32_loss"]
    assert rounded["divergence"] > 0
    assert 0 < rounded["agreement"] <= 1
    out = capsys.readouterr().out
    assert f"divergence {rounded['divergence']:.6f} ± " in out
    assert f"agreement  {rounded['agreement']:.4f} ± " in out
