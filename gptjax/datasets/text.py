"""Read text files in pieces that fit memory: plain, JSON lines or Parquet, maybe compressed.

A corpus is a sequence of documents. A plain text file is one document, or several separated by
``<|endoftext|>`` (as in TinyStories). In JSON lines and Parquet, each row is one.
"""

import contextlib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.errors import DataError, FormatError
from gptjax.files import check_file, open_file
from gptjax.formats.recognise import recognise
from gptjax.tokenizers import END_OF_TEXT

PIECE = 1 << 20  # characters, approximately
LONGEST = 16 * PIECE  # characters of a piece if there is no safe place to cut
LONGEST_LINE = 1 << 26  # characters of a line of JSON
SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = (".gz", ".zst")


class Piece(NamedTuple):
    """A document or a part of a long one. Tokenizing the pieces one by one gives the ids of the
    whole.
    """

    document: int
    """Number of the document over all files, from 0."""
    text: str


def find_files(dataset: str) -> list[Path]:
    """The text files of a path, a folder (searched recursively) or a glob pattern, sorted.

    Raises:
        DataError: there are none.

    """
    path = Path(dataset)
    if path.is_dir():
        found = [
            p
            for p in path.rglob("*")
            if p.is_file() and kind_of(p) in SUFFIXES and not p.name.startswith(".")
        ]
    elif path.is_file():
        found = [path]
    else:
        found = [p for p in map(Path, glob.glob(dataset, recursive=True)) if p.is_file()]
    if not found:
        raise DataError(
            f"data.dataset {dataset} has no text: name a file, folder or pattern of "
            f"{', '.join(SUFFIXES)} files, each maybe with {' or '.join(COMPRESSED)}"
        )
    return sorted(found)


def pieces(files: list[Path], column: str | None = None) -> Iterator[Piece]:
    """The text of all files, document by document.

    Args:
        files: a file with an unknown suffix is read as plain text.
        column: the column of JSON lines and Parquet that holds the text; None for ``text``, or else
            the first one that holds text.

    Raises:
        FormatError: a file is not what its name says, or is not UTF-8.
        DataError: there is no such column, or a package is missing.

    """
    document = -1
    for path in files:
        read = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}.get(
            kind_of(path), _plain
        )
        before = -1
        found = None if path.suffix in COMPRESSED else recognise(path)
        if found and not (read == _parquet and found == "a Parquet file"):
            raise FormatError(
                f"{path} is {found}, not {'a Parquet file' if read == _parquet else 'text'}"
            )
        try:
            for number, text in read(path, column):
                if text:
                    document, before = document + (number != before), number
                    yield Piece(document, text)
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{path} is not UTF-8 text: {error.reason} "
                f"({error.object[error.start : error.end]!r})"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise FormatError(f"{path} is damaged: {error}") from error


def kind_of(path: Path) -> str:
    """The suffix that determines how to read a file, without that of a compression."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file, decompressed and decoded; line ends are kept."""
    with contextlib.ExitStack() as stack:
        if path.suffix == ".gz":
            binary: Any = stack.enter_context(gzip.open(stack.enter_context(open_file(path))))
        elif path.suffix == ".zst":
            check_file(path)
            binary = stack.enter_context(
                io.BufferedReader(import_arrow(path).input_stream(str(path), compression="zstd"))
            )
        else:
            binary = stack.enter_context(open_file(path))
        try:
            yield stack.enter_context(io.TextIOWrapper(binary, "utf-8", newline=""))
        except OSError as error:
            if path.suffix != ".zst" or error.errno:
                raise
            raise FormatError(f"{path} is damaged: {error}") from error


def _plain(path: Path, column: str | None) -> Iterator[tuple[int, str]]:
    number, rest, begun = 0, "", False

    def part(text: str) -> tuple[int, str]:
        # The separator is on a line of its own
        return number, text.lstrip("\n") if number and not begun else text

    with open_text(path) as file:
        while chunk := file.read(PIECE):
            *ended, rest = (rest + chunk).split(END_OF_TEXT)
            for document in ended:
                yield part(document.rstrip("\n"))
                number, begun = number + 1, False
            cut = _safe_cut(rest)
            if cut:
                yield part(rest[:cut])
                rest, begun = rest[cut:], True
    yield part(rest)


def _safe_cut(text: str) -> int:
    """A position at which cutting a long text does not change its ids: before a space, or a newline
    after a letter or digit, that does not follow another blank. GPT-2's and Llama 3's patterns
    always start a new word there.

    Only the last `PIECE` characters are searched, since the rest was searched before. Returns 0 if
    the text is short or there is no such place; a text of `LONGEST` characters is then cut at its
    end.
    """
    end = len(text) if len(text) > PIECE else 0
    last = max(end - PIECE, 0)
    while end > last:
        end = max(text.rfind(" ", last, end), text.rfind("\n", last, end))
        begins = len(text[last : end + 1].rstrip()) + last  # start of this run of blanks
        after_word = begins > last and text[begins - 1].isalnum()
        if end > last and begins > last and text[begins] in (" \n" if after_word else " "):
            return begins
        end = min(begins, end)
    return len(text) if len(text) >= LONGEST else 0


def _json_lines(path: Path, column: str | None) -> Iterator[tuple[int, str]]:
    name = column
    with open_text(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), "")):
            if len(line) == LONGEST_LINE:
                raise FormatError(
                    f"{path}, line {number + 1} is longer than {LONGEST_LINE} characters"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{path}, line {number + 1} is not JSON: {error}") from error
            row = row if isinstance(row, dict) else {"text": row}
            name = name or (
                "text"
                if "text" in row
                else next((k for k, v in row.items() if isinstance(v, str)), "text")
            )
            if not isinstance(row.get(name), str):
                raise DataError(
                    f"{path}, line {number + 1} has no text in {name!r}, only {', '.join(row)}: "
                    "set data.column"
                )
            yield number, _whole(row[name])


def _whole(text: str) -> str:
    """The text, with halves of surrogate pairs, which JSON can hold, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parquet(path: Path, column: str | None) -> Iterator[tuple[int, str]]:
    arrow = import_arrow(path)
    from pyarrow import parquet

    check_file(path)
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [
                f.name
                for f in schema
                if arrow.types.is_string(f.type) or arrow.types.is_large_string(f.type)
            ]
            name = column or ("text" if "text" in texts else next(iter(texts), "text"))
            if name not in texts:
                raise DataError(
                    f"{path} has no column {name!r} that holds text, only "
                    f"{', '.join(texts) or 'none'}"
                )
            number = 0
            for batch in file.iter_batches(1024, columns=[name]):
                for text in batch.column(0).to_pylist():
                    yield number, text or ""
                    number += 1
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # Arrow's own errors have no number
            raise
        reason = " ".join(str(error).split())
        raise FormatError(f"{path} is not a Parquet file, or is damaged: {reason}") from error


def import_arrow(path: Path) -> Any:
    """Import ``pyarrow`` to read ``path``.

    Raises:
        DataError: it is not installed.

    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path} needs the package pyarrow: pip install 'gptjax[data]'") from error
    return pyarrow
