"""Conversations: read from JSON lines, tokenized by a chat template, packed into sequences.

A line is ``{"messages": [{"role": ..., "content": ...}, ...]}``. A corpus of conversations has a
shard of labels next to each token shard, of the same length: which tokens the assistant wrote, and
which begin a conversation.
"""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.cli.progress import progress
from gptjax.datasets.prepare import (
    SOURCE_FILE,
    TOKENIZER_FILE,
    Scan,
    Split,
    content_hash,
    folder_name,
    id_dtype,
    of_split,
    write_shards,
)
from gptjax.datasets.text import LONGEST_LINE, Piece, kind_of, open_text
from gptjax.errors import ConfigError, DataError, FormatError
from gptjax.files import write_folder
from gptjax.formats.token_shards import Shard, open_shard
from gptjax.models.batch import Batch
from gptjax.ops import IGNORE_INDEX
from gptjax.tokenizers import Tokenizer
from gptjax.tokenizers.chat_template import ChatTemplate, Message, render

ROLES = ("system", "user", "assistant")
LABELS = ".labels"  # suffix of a shard of labels
ASSISTANT, FIRST = 1, 2  # bits of a label
TEMPLATE_FILE = "chat_template.jinja"


def hold_conversations(files: list[Path]) -> bool:
    """Whether the first line of the first file has ``messages``.

    Raises:
        FormatError: it is not JSON.

    """
    if kind_of(files[0]) not in (".jsonl", ".ndjson"):
        return False
    with open_text(files[0]) as file:
        line = file.readline(LONGEST_LINE)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "messages" in row


def read_conversations(files: list[Path]) -> Iterator[list[Message]]:
    """The conversations of all files, in order.

    Raises:
        FormatError: a line is not JSON.
        DataError: a line is not a conversation.

    """
    for path in files:
        with open_text(path) as file:
            lines = iter(lambda file=file: file.readline(LONGEST_LINE), "")  # type: ignore[misc]
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _conversation(f"{path}, line {number}", line)


def _conversation(where: str, line: str) -> list[Message]:
    if len(line) == LONGEST_LINE:
        raise FormatError(f"{where} is longer than {LONGEST_LINE} characters")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where} has no list of messages")
    for message in messages:
        known = isinstance(message, dict) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            raise DataError(
                f"{where} has a message that is not a role, one of {', '.join(ROLES)}, and content"
            )
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{where} has no message of the assistant, so there is nothing to learn")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def prepare_conversations(
    files: list[Path], root: Path, name: str, tokenizer: Tokenizer, template: ChatTemplate
) -> Path:
    """Tokenize conversations into shards unless that was done before; returns their folder.

    A tenth of the conversations is held out for validation.

    Args:
        files: JSON lines.
        root: the folder of prepared corpora.
        name: first part of the folder's name.
        tokenizer: the model's.
        template: renders a conversation.

    Raises:
        DataError: a line is not a conversation, or there are fewer than two.
        FormatError: a line is not JSON, or the template is invalid.

    """
    with progress("reading", sum(path.stat().st_size for path in files)) as advance:
        digest = content_hash(files, template.source, advance)
    folder = root / f"{name}-{folder_name(tokenizer)}-{digest[:12]}"
    if folder.exists():
        return folder
    number = sum(1 for _ in read_conversations(files))
    if number < 2:
        raise DataError(f"{files[0]} has {number} conversation: training takes at least two")

    def write(into: Path) -> None:
        with progress("tokenizing", number) as advance:
            for split in ("train", "val"):
                found = _labelled(files, number, split, partial(_ids, tokenizer, template), advance)
                _write(into, split, found, tokenizer)
        tokenizer.save(into / TOKENIZER_FILE)
        (into / TEMPLATE_FILE).write_text(template.source)
        source = {"files": [str(path) for path in files], "sha256": digest, "conversations": number}
        (into / SOURCE_FILE).write_text(json.dumps(source, indent=1))

    return write_folder(folder, write)


def _ids(
    tokenizer: Tokenizer, template: ChatTemplate, messages: list[Message]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) of a conversation."""
    parts = render(messages, template, tokenizer)
    ids = np.concatenate([np.array(part, np.int64) for part, _ in parts])
    labels = np.concatenate([np.full(len(part), ASSISTANT * said) for part, said in parts])
    labels[0] |= FIRST
    return ids, labels


def _labelled(
    files: list[Path], number: int, split: Split, encode: Any, advance: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    indices = (Piece(i, " ") for i in range(number))
    chosen = {piece.document for piece in of_split(indices, Scan(number, number), split)}
    for i, messages in enumerate(read_conversations(files)):
        if i in chosen:
            yield encode(messages)
            advance(1)


def _write(
    into: Path, split: Split, found: Iterator[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer
) -> None:
    """Write ids and labels side by side; a conversation corpus fits in memory."""
    pairs = list(found)
    write_shards(into, split, (ids for ids, _ in pairs), id_dtype(tokenizer))
    labels = (labels for _, labels in pairs)
    write_shards(into, split, labels, np.dtype("<u2"), LABELS)


def labels_of(shard: Shard) -> np.ndarray | None:
    """The labels of a shard's tokens; None if it holds no conversations.

    Raises:
        FormatError: the labels are damaged.

    """
    path = shard.path.with_suffix(LABELS)
    if not path.exists():
        return None
    labels = open_shard(path).tokens
    if labels.size != shard.tokens.size or labels.max() > ASSISTANT | FIRST:
        raise FormatError(f"{path} does not label the {shard.tokens.size} tokens of {shard.path}")
    return labels


class Conversations:
    """Sequences of T tokens, each packed with whole conversations in order.

    A conversation of more than T + 1 tokens is cut at its end. The rest of a sequence is padding:
    segments of their own, whose targets do not count.
    """

    def __init__(self, shards: list[Shard], seq_len: int, vocab_size: int) -> None:
        """Decide what each sequence holds, from the labels alone."""
        self.shards, self.seq_len, self.vocab_size = shards, seq_len, vocab_size
        self.labels = [_require(labels_of(shard), shard) for shard in shards]
        self.rows: list[list[tuple[int, int, int]]] = []  # (shard, begin, end) of its conversations
        self.cut = 0
        left = 0
        for number, labels in enumerate(self.labels):
            starts = [*np.flatnonzero(np.asarray(labels) & FIRST).tolist(), labels.size]
            for begin, end in itertools.pairwise(starts):
                self.cut += end - begin > seq_len + 1
                end = min(end, begin + seq_len + 1)
                if end - begin - 1 > left:
                    self.rows.append([])
                    left = seq_len
                self.rows[-1].append((number, begin, end))
                left -= end - begin - 1

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Sequence ``index``: inputs, targets and segments, (T,) int32.

        Raises:
            DataError: it holds an id beyond the model's vocabulary.

        """
        T = self.seq_len
        inputs, targets = np.zeros(T, np.int32), np.full(T, IGNORE_INDEX, np.int32)
        segments = np.zeros(T, np.int32)
        at = 0
        for segment, (shard, begin, end) in enumerate(self.rows[int(index)]):
            ids = np.asarray(self.shards[shard].tokens[begin:end], np.int64)
            if ids.max() >= self.vocab_size:
                raise DataError(
                    f"{self.shards[shard].path} holds token id {ids.max()}, but model.vocab_size "
                    f"is {self.vocab_size}: use the tokenizer that belongs to this model"
                )
            said = np.asarray(self.labels[shard][begin + 1 : end]) & ASSISTANT
            place = slice(at, at + len(ids) - 1)
            inputs[place], segments[place] = ids[:-1], segment
            targets[place] = np.where(said, ids[1:], IGNORE_INDEX)
            at = place.stop
        segments[at:] = len(self.rows[int(index)])
        return Batch(inputs, targets, segments=segments)


def _require(labels: np.ndarray | None, shard: Shard) -> np.ndarray:
    if labels is None:
        raise ConfigError(f"{shard.path} has no labels beside it, unlike the other shards")
    return labels
