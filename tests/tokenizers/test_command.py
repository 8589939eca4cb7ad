"""``python -m gptjax.tokenizers`` as a user meets it."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest

from gptjax import tokenizers
from gptjax.formats import llmc_tokenizer
from gptjax.formats.token_shards import open_shard
from gptjax.tokenizers.__main__ import main
from tests.conftest import ROOT

TEXT = "the cat sat on the mat, the dog sat on the log\n" * 20


@pytest.fixture
def bpe(tmp_path):
    (tmp_path / "cats.txt").write_text(TEXT)
    tokenizers.train_bpe([TEXT], 270, "cats").save(tmp_path / "cats.json")
    return str(tmp_path / "cats.json")


def feed(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_text_to_ids_and_back(bpe, capsysbinary):
    main(["encode", "--tokenizer", bpe, "the", "cat"])
    ids = capsysbinary.readouterr().out.split()
    assert [int(i) for i in ids] == tokenizers.load(bpe).encode("the cat")
    main(["decode", "--tokenizer", bpe, *(i.decode() for i in ids)])
    assert capsysbinary.readouterr().out == b"the cat"


@pytest.mark.parametrize("text", ["the log\n", "no end", "\r\n two\r", "", "Straße\0"])
def test_a_pipe_gives_the_bytes_back(bpe, capsysbinary, monkeypatch, text):
    feed(monkeypatch, text.encode())
    main(["encode", "--tokenizer", bpe])
    feed(monkeypatch, capsysbinary.readouterr().out)
    main(["decode", "--tokenizer", bpe])
    assert capsysbinary.readouterr().out == text.encode()


def test_half_a_character_is_written_as_it_is(capsysbinary):
    main(["decode", "--tokenizer", "byte", "195", "256", "999"])
    assert capsysbinary.readouterr().out == b"\xc3<|endoftext|>\xef\xbf\xbd"


def test_a_terminal_gets_a_line_end(capsysbinary, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["decode", "--tokenizer", "byte", "97"])
    assert capsysbinary.readouterr().out == b"a\n"


def test_shards_written_and_read(bpe, tmp_path, capsysbinary, monkeypatch):
    feed(monkeypatch, TEXT.encode() * 400)
    shard = str(tmp_path / "train.bin")
    main(["encode", "--tokenizer", bpe, "--output", shard])
    ids = open_shard(shard).tokens
    assert capsysbinary.readouterr().out.decode() == f"{ids.size} ids in {shard}, uint16\n"
    assert ids.tolist() == tokenizers.load(bpe).encode(TEXT * 400)
    main(["decode", "--tokenizer", bpe, "--input", shard])
    assert capsysbinary.readouterr().out == TEXT.encode() * 400
    ids.astype("<i4").tofile(shard)  # without a header, too
    main(["decode", "--tokenizer", bpe, "--input", shard])
    assert capsysbinary.readouterr().out == TEXT.encode() * 400


def test_training_a_bpe(bpe, tmp_path, capsys):
    made = tmp_path / "t.json"
    assert (
        main(
            [
                "train",
                "--input",
                str(tmp_path / "cats.txt"),
                "--vocab_size",
                "270",
                "--output",
                str(made),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == f"270 ids in {made}\n"
    assert tokenizers.load(made).name == "cats-bpe-270"
    assert tokenizers.load(made).tokens == tokenizers.load(bpe).tokens


def test_trained_on_several_files(tmp_path, capsys):
    for name, text in (("a.txt", "cabbage"), ("b.txt", "bean\n")):
        (tmp_path / name).write_text(text)
    made = tmp_path / "t.json"
    main(
        [
            "train",
            "--kind",
            "char",
            "--input",
            str(tmp_path / "a.txt"),
            str(tmp_path / "b.txt"),
            "--output",
            str(made),
        ]
    )
    assert tokenizers.load(made) == tokenizers.Characters("\nabcegn", "a-char")
    main(["encode", "--tokenizer", str(made), "bag"])
    assert capsys.readouterr().out.splitlines()[1] == "2 1 5"


@pytest.mark.parametrize("which", ["trained", "byte"])
def test_export_is_llm_cs_file(which, bpe, tmp_path, capsys):
    which = bpe if which == "trained" else which
    main(["export", "--tokenizer", which, "--output", str(tmp_path / "t.bin")])
    source = tokenizers.find(which)
    size = (tmp_path / "t.bin").stat().st_size
    assert (
        capsys.readouterr().out
        == f"{source.vocab_size} tokens in {tmp_path / 't.bin'}, {size} bytes\n"
    )
    assert tokenizers.find(tmp_path / "t.bin").tokens == source.tokens


def test_gpt2_exported_in_both_versions(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken_cache"))
    for version, end_of_text in ((1, 0), (2, 50256)):
        made = tmp_path / f"t{version}.bin"
        main(["export", "--tokenizer", "gpt2", "--version", str(version), "--output", str(made)])
        header = np.fromfile(made, "<u4", 256)
        assert header[:5].tolist() == [llmc_tokenizer.MAGIC, version, 50257, end_of_text, 0]
        assert tokenizers.find(made).tokens == tokenizers.gpt2().tokens


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "train, encode, decode or export"),
        (["train"], "input"),
        (["train", "--input", "/nonexistent/*.txt"], "has no text"),
        (["encode", "--tokenizer", "gpt3", "text"], "there is no tokenizer gpt3"),
        (
            ["encode", "--tokenizer", "byte"],
            "standard input is not UTF-8 text: invalid start byte at byte 1",
        ),
        (
            ["encode", "--tokenizer", "byte", "--output", "/nonexistent/x.bin", "a"],
            "/nonexistent/x.bin",
        ),
        (
            ["encode", "--tokenizer", "byte", "--output", "x.bin", ""],
            "there are no token ids to write to x.bin",
        ),
        (["decode", "--tokenizer", "byte", "x"], "x"),
        (["decode", "--tokenizer", "byte", "--input", "x.bin", "1"], "leave one of them out"),
        (["decode", "--tokenizer", "byte", "--input", "x.bin"], "token shard x.bin cannot be read"),
        (["encode", "--tokenzier", "byte"], "tokenzier"),
        (
            ["export", "--tokenizer", "byte", "--version", "1", "--output", "x.bin"],
            "does not fit llm.c's file: version 1",
        ),
    ],
)
def test_bad_input_ends_in_one_sentence(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    feed(monkeypatch, b"a\xff")
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ids_on_standard_input_that_are_none(capsys, monkeypatch):
    feed(monkeypatch, b"1 2 three")
    with pytest.raises(SystemExit):
        main(["decode", "--tokenizer", "byte"])
    assert "ids must be whole numbers" in capsys.readouterr().err


def test_characters_have_no_end_of_text_to_export(tmp_path, capsys):
    tokenizers.Characters("ab").save(tmp_path / "t.json")
    with pytest.raises(SystemExit):
        main(
            ["export", "--tokenizer", str(tmp_path / "t.json"), "--output", str(tmp_path / "t.bin")]
        )
    assert "has no end-of-text id" in capsys.readouterr().err


def test_a_vocabulary_larger_than_the_text_gives(bpe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "train",
                "--input",
                str(tmp_path / "cats.txt"),
                "--vocab_size",
                "9999",
                "--output",
                str(tmp_path / "new.json"),
            ]
        )
    assert "too short for a vocabulary of 9999" in capsys.readouterr().err


def test_a_missing_option_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["export"])
    assert "error: give --tokenizer" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gptjax.tokenizers", "encode", "--tokenizer", "byte", "short"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(write)
    assert (done.stderr, done.returncode) == (b"", 141)


def test_nothing_is_overwritten(bpe, tmp_path, capsys):
    before = (tmp_path / "cats.json").read_bytes()
    for args in (
        ["train", "--input", str(tmp_path / "cats.txt")],
        ["encode", "--tokenizer", bpe, "a"],
        ["export", "--tokenizer", bpe],
    ):
        with pytest.raises(SystemExit):
            main([*args, "--output", bpe])
        assert "cats.json already exists" in capsys.readouterr().err
    assert (tmp_path / "cats.json").read_bytes() == before
