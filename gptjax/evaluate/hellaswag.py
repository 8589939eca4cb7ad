"""HellaSwag (Zellers et al. 2019): which of four endings goes on from a context? Scored as llm.c
scores it.

Each context is completed by each of its endings; the answer is the one whose tokens have the lowest
loss in sum (acc), or in the mean (acc_norm). llm.c's ``dev/data/hellaswag.py`` gives both, its C
programs the second one.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.datasets.download import fetch
from gptjax.errors import DataError, FormatError
from gptjax.evaluate.corpus import score
from gptjax.evaluate.estimate import Estimate, ratio
from gptjax.files import open_file
from gptjax.formats.llmc_eval import ENDINGS, Question, is_questions, read_questions
from gptjax.models.batch import Batch
from gptjax.tokenizers import Tokenizer, is_gpt2

NAME = "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
LONGEST_LINE = 1 << 20  # bytes; the longest of the original has 2,000


def find_questions(dataset: str, root: Path) -> Path | None:
    """The file of questions that ``dataset`` stands for; None where it stands for something else.

    Args:
        dataset: ``hellaswag``, its 10,042 validation questions, which are downloaded to
            ``root/downloads`` and held against the pinned SHA-256; an evaluation file of llm.c; or
            JSON lines, of which the first has ``endings``.
        root: the folder that corpora are kept in.

    Raises:
        DataError: it cannot be downloaded, is not what is pinned, or is a misspelt name.

    """
    if dataset == NAME:
        return fetch(URL, root / "downloads" / "hellaswag_val.jsonl", SHA256)
    path = Path(dataset)
    if not path.exists() and difflib.get_close_matches(dataset, [NAME], 1, 0.8):
        raise DataError(f"there is no dataset {dataset}: did you mean {NAME}?")
    if path.is_file() and (
        _begins_with_endings(path) if path.suffix == ".jsonl" else is_questions(path)
    ):
        return path
    return None


def _begins_with_endings(path: Path) -> bool:
    with open_file(path) as file:
        try:
            first = next(
                (line for line in iter(partial(file.readline, LONGEST_LINE), b"") if line.strip()),
                b"",
            )
            return "endings" in json.loads(first)
        except (ValueError, TypeError, RecursionError):
            return False


def read_jsonl(path: Path, tokenizer: Tokenizer) -> list[Question]:
    """The questions of JSON lines like the original's: ``ctx``, four ``endings`` and ``label``, the
    right one's index.

    A blank goes before each ending, and context and ending are tokenized each by itself, as llm.c
    does.

    Raises:
        FormatError: a line is not such an object.
        DataError: the tokenizer's vocabulary lacks a character.

    """
    questions = []
    with open_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                context, endings, label = row["ctx"], row["endings"], row["label"]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)[:100]
                raise FormatError(
                    f"line {number} of {path} is no question with ctx, endings and label: {reason}"
                ) from error
            texts = [context, *endings] if isinstance(endings, list) else []
            if len(texts) != 1 + ENDINGS or not all(
                isinstance(text, str) and text for text in texts
            ):
                raise FormatError(
                    f"line {number} of {path} does not have a context and {ENDINGS} endings of text"
                )
            if type(label) is not int or not 0 <= label < ENDINGS:
                raise FormatError(
                    f"line {number} of {path} has the label {str(label)[:20]!r}: 0 to "
                    f"{ENDINGS - 1} is expected"
                )
            begin = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
            answers = [tokenizer.encode_more(f" {ending}") for ending in endings]
            questions.append(Question(begin + tokenizer.encode(context), answers, label))
    return questions


def load_questions(path: Path, tokenizer: Tokenizer | None) -> list[Question]:
    """The questions of a file that `find_questions` found.

    Raises:
        FormatError: it is damaged.
        DataError: text cannot be tokenized; or the file's ids are GPT-2's, and the tokenizer's are
            not.

    """
    if is_questions(path):
        if tokenizer and not is_gpt2(tokenizer):
            raise DataError(
                f"{path} holds GPT-2's ids, but the model's tokenizer is {tokenizer.name} of "
                f"{tokenizer.vocab_size} ids: "
                f"evaluate on {NAME} or a .jsonl, whose text is tokenized with it"
            )
        return read_questions(path)
    if not tokenizer:
        raise DataError(
            f"{path} is text, and no tokenizer is known for the model: give --tokenizer, gpt2 say"
        )
    return read_jsonl(path, tokenizer)


class Rows(NamedTuple):
    """Contexts with an ending each, `ENDINGS` rows a question; R rows in all."""

    ids: np.ndarray
    """(R, T + 1) int32, 0 after the end. T is the longest that occurs, or the model's."""
    scored: np.ndarray
    """(R, T) bool: targets that are the ending's, the first of them predicted by the context's last
    token.
    """
    labels: np.ndarray
    """(R / 4,) the right endings."""
    cut: int
    """Questions whose context lost tokens at its start, to fit the model."""


def make_rows(questions: list[Question], max_seq_len: int, vocab_size: int) -> Rows:
    """Lay the questions out for a model.

    Raises:
        DataError: there are none, an id is beyond the vocabulary, or an ending is longer than the
            model's sequences.

    """
    rows = [
        (question.context + ending, len(ending))
        for question in questions
        for ending in question.endings
    ]
    if not rows:
        raise DataError("there is not one question to ask")
    longest, largest = max(length for _, length in rows), max(max(ids) for ids, _ in rows)
    if longest > max_seq_len:
        raise DataError(
            f"an ending has {longest} tokens, but the model takes sequences of at most "
            f"{max_seq_len}"
        )
    if largest >= vocab_size:
        raise DataError(
            f"a question has token id {largest}, but model.vocab_size is {vocab_size}: tokenize "
            "it for this model"
        )
    T = min(max_seq_len, max(len(ids) for ids, _ in rows) - 1)
    padded = np.zeros((len(rows), T + 1), np.int32)
    scored = np.zeros((len(rows), T), bool)
    for i, (ids, length) in enumerate(rows):
        kept = ids[-(T + 1) :]
        padded[i, : len(kept)] = kept
        scored[i, len(kept) - 1 - length : len(kept) - 1] = True
    cut = sum(any(len(q.context) + len(ending) > T + 1 for ending in q.endings) for q in questions)
    return Rows(padded, scored, np.array([question.label for question in questions]), cut)


class Accuracy(NamedTuple):
    """The share of right answers; standard errors over questions."""

    questions: int
    acc: Estimate
    """By the summed loss of the ending."""
    acc_norm: Estimate
    """By its mean loss a token."""


def accuracy(sums: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Of summed losses and numbers of tokens, (4 n,) each, and the right endings, (n,). Of equals
    the first is the answer.
    """
    right = [
        (x.reshape(-1, ENDINGS).argmin(1) == labels).astype(np.float64)
        for x in (sums, sums / lengths)
    ]
    return Accuracy(len(labels), *(ratio(r, 1.0) for r in right))


def score_questions(
    params: Any,
    rows: Rows,
    cfg: ModelConfig,
    batch_size: int,
    advance: Callable[[int, str], None] = lambda rows, text: None,
) -> Accuracy:
    """Answer every question.

    Args:
        params: in the layout of ``cfg.layers``.
        rows: see `make_rows`.
        cfg: resolved.
        batch_size: rows at a time; it changes the answers by no more than rounding.
        advance: called with the rows just done, and the share of right answers so far in words.

    Raises:
        CheckpointError: a loss is not finite.

    """
    lengths = rows.scored.sum(1)
    sums = np.zeros(len(lengths))
    done = 0
    for _, losses in score(params, _batches(rows, batch_size), cfg):
        new = losses.sum(1)[: len(sums) - done]
        sums[done : done + len(new)] = new
        done += len(new)
        n = done // ENDINGS
        so_far = (
            accuracy(sums[: n * ENDINGS], lengths[: n * ENDINGS], rows.labels[:n]) if n else None
        )
        advance(len(new), f"acc_norm {so_far.acc_norm.value:.4f}" if so_far else "")
    return accuracy(sums, lengths, rows.labels)


def _batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """All of one shape: the last is filled up with rows that do not count."""
    for begin in range(0, len(rows.ids), batch_size):
        some = slice(begin, begin + batch_size)
        missing = (0, max(0, begin + batch_size - len(rows.ids))), (0, 0)
        ids, scored = np.pad(rows.ids[some], missing), np.pad(rows.scored[some], missing)
        yield Batch(ids[:, :-1], ids[:, 1:], scored.astype(np.float32))
