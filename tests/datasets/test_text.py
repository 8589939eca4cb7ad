import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.datasets import text
from gptjax.datasets.text import find_files, pieces
from gptjax.errors import DataError, FormatError

arrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

STORIES = ["Once upon a time.\n", "", "Zwölf Boxkämpfer\n\njagen Viktor.", "The end."]


def documents(*paths, column=None):
    """Each document as a whole."""
    found = {}
    for number, part in pieces(list(paths), column):
        found[number] = found.get(number, "") + part
    return found


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(content):
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


# Formats: the same four stories in each, the empty one left out


def test_plain_text_is_one_document_to_the_last_byte(tmp_path):
    assert documents(written(tmp_path / "a.txt", "one\r\n\ntwo\n")) == {0: "one\r\n\ntwo\n"}


def test_plain_text_is_split_at_separator_lines(tmp_path):
    """As TinyStories has it; the newlines around a separator are no part of the stories."""
    path = written(
        tmp_path / "a.txt", "\nOne.\n<|endoftext|>\n\nTwo\n\nthree.\n<|endoftext|>\nFour.\n"
    )
    assert documents(path) == {0: "\nOne.", 1: "Two\n\nthree.", 2: "Four.\n"}


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_json_lines_compressed_or_not(tmp_path, suffix, pack):
    lines = "".join(json.dumps({"id": 7, "text": story}) + "\n" for story in STORIES)
    path = written(tmp_path / f"a.jsonl{suffix}", pack(lines.encode()))
    assert documents(path) == dict(enumerate(filter(None, STORIES)))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_text_compressed_in_several_frames(tmp_path, suffix, pack):
    """As ``cat a.gz b.gz`` and parallel compressors make them."""
    path = written(tmp_path / f"a.txt{suffix}", pack(b"first, ") + pack(b"second"))
    assert documents(path) == {0: "first, second"}


def test_parquet(tmp_path):
    parquet.write_table(arrow.table({"id": [1, 2, 3, 4], "text": STORIES}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == dict(enumerate(filter(None, STORIES)))


def test_the_text_column_is_found_or_named(tmp_path):
    table = {"id": [1], "title": ["A"], "story": ["Once."]}
    parquet.write_table(arrow.table(table), tmp_path / "a.parquet")
    lines = written(tmp_path / "a.jsonl", json.dumps({"id": 1, "title": "A", "story": "Once."}))
    for path in (tmp_path / "a.parquet", lines):
        assert documents(path) == {0: "A"}
        assert documents(path, column="story") == {0: "Once."}
        with pytest.raises(DataError, match="body"):
            documents(path, column="body")


def test_documents_count_through_all_files(tmp_path):
    first = written(tmp_path / "a.jsonl", '"one"\n\n"two"\n')
    second = written(tmp_path / "b.txt", "three")
    assert list(documents(first, second).values()) == ["one", "two", "three"]
    assert len(documents(first, second)) == 3


# Pieces


@given(
    words=st.lists(st.text("ab .,\n\t\u00a0ä\U0001f600'1", max_size=9), max_size=60),
    size=st.integers(1, 40),
    separators=st.booleans(),
)
def test_pieces_are_tokenized_as_the_whole(words, size, separators):
    """Cut anywhere that `pieces` does, GPT-2's pattern finds the same words."""
    import regex

    from gptjax.tokenizers import GPT2_PATTERN

    whole = ("<|endoftext|>" if separators else " ").join(words)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = written(Path(folder) / "a.txt", whole)
        expected = documents(path)  # in one piece each
        patch.setattr(text, "PIECE", size)
        parts = list(pieces([path]))
    found = {}
    for number, part in parts:
        found.setdefault(number, []).extend(regex.findall(GPT2_PATTERN, part))
    assert found == {
        number: regex.findall(GPT2_PATTERN, document) for number, document in expected.items()
    }


def test_a_long_document_comes_in_pieces(tmp_path):
    line = "All work and no play makes Jack a dull boy.\n"
    path = written(tmp_path / "a.txt", line * 100_000)
    parts = list(pieces([path]))
    assert len(parts) >= 4
    assert {number for number, _ in parts} == {0}
    assert "".join(part for _, part in parts) == line * 100_000
    assert max(len(part) for _, part in parts) <= 2 * text.PIECE


# Finding files


def test_a_folder_is_searched_to_the_bottom_and_sorted(tmp_path):
    for name in ("b.txt", "a/c.jsonl.gz", "a/.hidden.txt", "a/picture.png", "d.parquet"):
        written(tmp_path / name, b"")
    assert [str(p.relative_to(tmp_path)) for p in find_files(str(tmp_path))] == [
        "a/c.jsonl.gz",
        "b.txt",
        "d.parquet",
    ]


def test_a_pattern(tmp_path):
    for name in ("a1.txt", "a2.txt", "b.txt"):
        written(tmp_path / name, b"")
    assert [p.name for p in find_files(str(tmp_path / "a*.txt"))] == ["a1.txt", "a2.txt"]
    with pytest.raises(DataError, match="has no text"):
        find_files(str(tmp_path / "c*.txt"))


# Damage


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"caf\xe9"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9]),
        ("a.txt.gz", b"not gzip at all"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:20] + b"\xff" * 20),
        ("a.txt.zst", zstd(b"text" * 1000)[:-3]),
        ("a.txt.zst", b"not zstd at all"),
        ("a.jsonl", b'{"text": "one"}\n{"text": '),
        ("a.parquet", b"PAR1 and nothing else"),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, name, content):
    path = written(tmp_path / name, content)
    with pytest.raises(FormatError, match=str(path)) as caught:
        documents(path)
    assert "\n" not in str(caught.value)


def test_documents_count_without_the_empty_ones(tmp_path):
    path = written(
        tmp_path / "a.jsonl", "".join(f'\n{{"text": ""}}\n{{"text": "{n}"}}\n' for n in range(40))
    )
    assert documents(path) == {n: str(n) for n in range(40)}


def test_the_first_rows_text_column_is_every_rows(tmp_path):
    path = written(
        tmp_path / "a.jsonl", '{"content": "a", "url": "x"}\n{"url": "y", "content": "b"}\n'
    )
    assert documents(path) == {0: "a", 1: "b"}


def test_halves_of_surrogate_pairs_become_a_placeholder(tmp_path):
    assert documents(written(tmp_path / "a.jsonl", r'{"text": "a\ud800b\ud83d\ude00"}')) == {
        0: "a\ufffdb\U0001f600"
    }


def test_a_long_run_of_blanks_is_passed_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 1000)
    content = "word " * 300 + " \t" * 200_000 + "end " * 300
    parts = [piece.text for piece in pieces([written(tmp_path / "a.txt", content)])]
    assert "".join(parts) == content
    assert len(parts) > 2


def test_text_without_blanks_is_cut_anyway(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 1000)
    monkeypatch.setattr(text, "LONGEST", 4000)
    parts = [piece.text for piece in pieces([written(tmp_path / "a.txt", "x" * 50_000)])]
    assert "".join(parts) == "x" * 50_000
    assert max(map(len, parts)) <= 5000


def test_a_line_of_json_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 1000)
    with pytest.raises(FormatError, match="line 2 is longer than 1000 characters"):
        documents(written(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "' + "x" * 2000 + '"}\n'))


def test_json_nested_without_end(tmp_path):
    with pytest.raises(FormatError, match="line 1 is not JSON"):
        documents(written(tmp_path / "a.jsonl", "[" * 200_000))
