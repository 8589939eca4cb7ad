import pytest

from gptjax.datasets import CORPORA
from gptjax.datasets.__main__ import main


def test_prepares_text_and_says_what_it_made(tmp_path, capsys):
    (tmp_path / "tale.txt").write_text("It was the best of times. " * 100)
    assert (
        main([str(tmp_path / "tale.txt"), "--root", str(tmp_path / "data"), "--tokenizer", "char"])
        == 0
    )
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["train"] == "2,340 tokens in 1 shard"
    assert shown["val"] == "260 tokens in 1 shard"
    assert shown["folder"].startswith(f"{tmp_path}/data/tale-char-")
    assert len(shown["sha256"]) == 64


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonesuch"], "nonesuch is neither a file or folder"),
        ([], "dataset"),
        (["pydoc", "--tokens", "many"], "tokens"),
        (["pydoc", "--tokenzier", "byte"], "unknown option tokenzier: did you mean tokenizer?"),
    ],
)
def test_bad_input_ends_in_one_sentence(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_the_corpora(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in CORPORA)
