"""Files of other programs where something else is expected: named for what they are, in one
sentence.
"""

import pytest

from gptjax.convert import __main__ as convert
from gptjax.datasets import __main__ as datasets
from gptjax.tokenizers import __main__ as tokenizers
from tests.formats.test_recognise import FILES

OURS = {
    "a token shard",
    "an llm.c model",
    "an llm.c tokenizer",
    "an llm.c debug state",
    "an llm.c evaluation file",
    "a GGUF model",
    "a llama2.c model (version 0)",
    "a llama2.c model (version 1)",
    "a llama2.c model (version 2)",
    "a llama2.c tokenizer",
}
MODELS = {kind for kind in FILES if kind.startswith("a llama2.c model")} | {"a GGUF model"}
TOKENIZERS = {"a llama2.c tokenizer", "a GGUF model", "a SentencePiece model"}
FOREIGN = sorted(FILES.keys() - OURS - {"a safetensors file"})
READ = {"a model's weights": MODELS, "a tokenizer": TOKENIZERS}
"""What is read at a place, though damaged as here: an error of its own."""
PLACES = {
    "a token shard": lambda path: tokenizers.main(
        ["decode", "--tokenizer", "byte", "--input", path]
    ),
    "a model's weights": lambda path: convert.main([path, f"{path}.safetensors"]),
    "a tokenizer": lambda path: tokenizers.main(["encode", "--tokenizer", path, "text"]),
    "text": lambda path: datasets.main([path, "--root", f"{path}-data", "--tokenizer", "byte"]),
}


@pytest.mark.parametrize("expected", PLACES)
def test_a_foreign_file_is_named(expected, tally, tmp_path, capsys):
    tried = held = 0
    for kind in sorted({*FOREIGN} - READ.get(expected, set())):
        for content in FILES[kind]:
            path = tmp_path / f"{tried}.bin"
            path.write_bytes(content)
            with pytest.raises(SystemExit) as ended:
                PLACES[expected](str(path))
            error = capsys.readouterr().err
            tried += 1
            held += ended.value.code == 2 and error.endswith(
                f": error: {path} is {kind}, not {expected}\n"
            )
    tally("foreign files, named where another is expected", tried, held)


@pytest.mark.parametrize("kind", sorted({*FOREIGN} - MODELS - TOKENIZERS))
def test_inspect_says_what_it_is(kind, tmp_path, capsys):
    for content in FILES[kind]:
        (tmp_path / "x.bin").write_bytes(content)
        assert convert.main([str(tmp_path / "x.bin"), "--inspect"]) == 0
        format_, size = capsys.readouterr().out.splitlines()
        assert format_.split(maxsplit=1) == ["format", kind.split(" ", 1)[1]]
        assert size.split(maxsplit=1) == ["size", f"{len(content):,} bytes"]


def test_among_the_shards_of_a_corpus_it_is_named_too(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(FILES["a llama2.c model (version 0)"][0])
    with pytest.raises(SystemExit):
        datasets.main([str(tmp_path)])
    assert "train.bin is a llama2.c model (version 0), not a token shard" in capsys.readouterr().err
