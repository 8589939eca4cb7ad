import io
import sys

import pytest

from gptjax import tokenizers
from gptjax.tokenizers.__main__ import main

TEXT = "the cat sat on the mat, the dog sat on the log\n" * 20


@pytest.fixture
def bpe(tmp_path, capsys):
    (tmp_path / "cats.txt").write_text(TEXT)
    path = str(tmp_path / "cats.json")
    assert main(["train", "--input", str(tmp_path / "cats.txt"), "--vocab_size", "270", "--output", path]) == 0
    assert capsys.readouterr().out == f"270 ids in {path}\n"
    return path


def feed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_text_to_ids_and_back(bpe, capsys, monkeypatch):
    main(["encode", "--tokenizer", bpe, "the", "cat"])
    ids = capsys.readouterr().out.split()
    assert ids == [str(i) for i in tokenizers.load(bpe).encode("the cat")]
    main(["decode", "--tokenizer", bpe, *ids])
    assert capsys.readouterr().out == "the cat\n"
    feed(monkeypatch, "the log\n")
    main(["encode", "--tokenizer", bpe])
    feed(monkeypatch, capsys.readouterr().out)
    main(["decode", "--tokenizer", bpe])
    assert capsys.readouterr().out == "the log\n\n"


def test_characters(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("cabbage")
    main(["train", "--kind", "char", "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t.json")])
    main(["encode", "--tokenizer", str(tmp_path / "t.json"), "bag"])
    assert capsys.readouterr().out.splitlines()[1] == "1 0 4"


def test_export_is_llm_cs_file(bpe, tmp_path, capsys):
    main(["export", "--tokenizer", bpe, "--output", str(tmp_path / "t.bin")])
    assert "270 tokens in" in capsys.readouterr().out
    assert tokenizers.find(str(tmp_path / "t.bin")).encode(TEXT) == tokenizers.load(bpe).encode(TEXT)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "train, encode, decode or export"),
        (["train"], "input"),
        (["train", "--input", "/nonexistent/*.txt"], "holds no text"),
        (["encode", "--tokenizer", "gpt3", "text"], "there is no tokenizer gpt3"),
        (["decode", "--tokenizer", "byte", "x"], "x"),
        (["encode", "--tokenzier", "byte"], "tokenzier"),
    ],
)
def test_bad_input_ends_in_one_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_vocabulary_larger_than_the_text_gives(bpe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--input", str(tmp_path / "cats.txt"), "--vocab_size", "9999", "--output", bpe])
    assert "too short for a vocabulary of 9999" in capsys.readouterr().err
