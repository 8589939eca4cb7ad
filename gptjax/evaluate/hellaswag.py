"""HellaSwag (Zellers et al. 2019), scored as llm.c does: choose one of four endings for a context.

The model's answer is the ending whose tokens have the lowest loss given the context, summed (acc)
or averaged (acc_norm). llm.c's ``dev/data/hellaswag.py`` prints both, its C programs acc_norm.
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
from gptjax.evaluate.statistics import Estimate, ratio
from gptjax.files import open_file
from gptjax.formats.llmc_eval import ENDINGS, Question, is_questions, read_questions
from gptjax.models.batch import Batch
from gptjax.tokenizers import Tokenizer, is_gpt2

NAME = "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
LONGEST_LINE = 1 << 20  # bytes; the longest of the original has 2,000


def find_questions(dataset: str, root: Path) -> Path | None:
    """The file of questions that ``dataset`` names; None if it is something else.

    Args:
        dataset: ``hellaswag``, for the 10,042 validation questions, which are downloaded to
            ``root/downloads`` and verified against the pinned SHA-256; an llm.c evaluation file; or
            JSON lines whose first has ``endings``.
        root: the folder of corpora.

    Raises:
        DataError: the download fails or does not match the SHA-256, or the name is misspelt.

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
    """The questions of JSON lines like the original's: ``ctx``, four ``endings``, and ``label``,
    the index of the right one.

    As in llm.c, each ending gets a leading space, and context and ending are tokenized separately.

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
                    f"line {number} of {path} is not a question with ctx, endings and label: "
                    f"{reason}"
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
                    f"line {number} of {path} has the label {str(label)[:20]!r}, not one from 0 to "
                    f"{ENDINGS - 1}"
                )
            begin = [] if tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
            answers = [tokenizer.encode_more(f" {ending}") for ending in endings]
            questions.append(Question(begin + tokenizer.encode(context), answers, label))
    return questions


def load_questions(path: Path, tokenizer: Tokenizer | None) -> list[Question]:
    """The questions of a file that `find_questions` found.

    Raises:
        FormatError: it is damaged.
        DataError: there is no tokenizer for its text, or it holds GPT-2's ids and the tokenizer is
            not GPT-2's.

    """
    if is_questions(path):
        if tokenizer and not is_gpt2(tokenizer):
            raise DataError(
                f"{path} holds GPT-2's ids, but the model's tokenizer is {tokenizer.name} of "
                f"{tokenizer.vocab_size} ids: evaluate on {NAME} or a .jsonl, which are text"
            )
        return read_questions(path)
    if not tokenizer:
        raise DataError(
            f"{path} is text, and the model has no tokenizer: name one, as in --tokenizer gpt2"
        )
    return read_jsonl(path, tokenizer)


class Rows(NamedTuple):
    """R rows, each a context with one of its `ENDINGS` endings."""

    ids: np.ndarray
    """(R, T + 1) int32, padded with 0. T is the longest row's, or the model's longest sequence."""
    scored: np.ndarray
    """(R, T) bool: the ending's targets; the context's last token predicts the first of them."""
    labels: np.ndarray
    """(R / 4,) the right endings."""
    cut: int
    """Questions whose context was cut at the start to fit the model."""


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
        raise DataError("there are no questions")
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
    """The fraction of right answers; standard errors are over questions."""

    questions: int
    acc: Estimate
    """Choosing by the summed loss of an ending."""
    acc_norm: Estimate
    """Choosing by the mean loss of an ending's tokens."""


def accuracy(sums: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Accuracy from the endings' summed losses and lengths, (4 n,) each, and the labels, (n,). If
    losses are equal, the first ending is the answer.
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
        batch_size: rows at a time; it changes the losses by rounding at most.
        advance: called with the number of rows just done and the accuracy so far as text.

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
    """Batches of one shape; the last is padded with masked rows."""
    for begin in range(0, len(rows.ids), batch_size):
        some = slice(begin, begin + batch_size)
        missing = (0, max(0, begin + batch_size - len(rows.ids))), (0, 0)
        ids, scored = np.pad(rows.ids[some], missing), np.pad(rows.scored[some], missing)
        yield Batch(ids[:, :-1], ids[:, 1:], scored.astype(np.float32))
