"""Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), run by tiktoken."""

import base64
import dataclasses
import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator

import tiktoken

from gptjax.errors import DataError
from gptjax.tokenizers.interface import END_OF_TEXT, Tokenizer

GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
GPT2_IDS = 50257
LARGEST = 1 << 20  # ids
LONGEST_RUN = 1 << 19  # of blanks; tiktoken's regular expression panics from about 2 ** 20 on
LONGEST_WORD = 1 << 10  # bytes, in training
BLANKS = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class BytePairEncoding(Tokenizer):
    """A byte-level BPE: it encodes any text without loss. End-of-text is the last id.

    Raises:
        ValueError: a token is empty or repeats, or a byte has no token.

    """

    name: str
    tokens: tuple[bytes, ...]
    """The bytes of each id but end-of-text. Ids are the ranks of the merges."""
    kind = "bpe"

    def __post_init__(self) -> None:
        known = set(self.tokens)
        if (
            b"" in known
            or len(known) != len(self.tokens)
            or not all(bytes([b]) in known for b in range(256))
        ):
            raise ValueError("its tokens are empty, repeat, or do not cover every byte")

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding, made on first use."""
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        special = {END_OF_TEXT: len(self.tokens)}
        return tiktoken.Encoding(
            self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    def __reduce__(self) -> tuple[object, ...]:
        return BytePairEncoding, (self.name, self.tokens)

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """See `Tokenizer`."""
        return (*self.tokens, END_OF_TEXT.encode())

    @property
    def end_of_text(self) -> int:
        """See `Tokenizer`."""
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`. Half a surrogate pair is encoded as U+FFFD; a run of blanks is cut every
        `LONGEST_RUN`.
        """
        # A run that long covers one of these samples, which is faster than searching all the text
        step = LONGEST_RUN // 2
        if any(text[i : i + step // 2].isspace() for i in range(0, len(text), step)):
            return [i for part in _cut_blanks(text) for i in self.encoding.encode_ordinary(part)]
        return self.encoding.encode_ordinary(text)

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pair of tokens that each token of several bytes merges, in order of rank.

        Merging a token's bytes by all lower ranks leaves the two tokens of its own merge.

        Raises:
            DataError: a token is not the merge of two earlier ones, so no list of merges yields it.

        """
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        pairs = []
        for token, rank in ranks.items():
            if len(token) == 1:
                continue
            parts = _merge(token, ranks, rank)
            if len(parts) != 2:
                raise DataError(
                    f"token {rank} of {self.name}, {token!r}, is not the merge of two tokens "
                    "before it"
                )
            pairs.append((parts[0], parts[1]))
        return pairs

    def content(self) -> dict[str, object]:
        """See `Tokenizer`. GPT-2's tokens are written out, too, so that decoding needs no
        network.
        """
        return {"tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens]}


def _cut_blanks(text: str) -> Iterator[str]:
    runs = (range(*match.span()) for match in BLANKS.finditer(text))
    cuts = (cut for run in runs for cut in run[LONGEST_RUN::LONGEST_RUN])
    for begin, end in itertools.pairwise([0, *cuts, len(text)]):
        yield text[begin:end]


def _merge(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """The parts of ``token`` after all merges of rank less than ``below``, lowest first."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 1:
        joined = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest >= below:
            break
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@functools.cache
def gpt2() -> BytePairEncoding:
    """GPT-2's own BPE of 50,257 ids. tiktoken downloads its two files once and caches them
    (``TIKTOKEN_CACHE_DIR``).

    Raises:
        DataError: it is not cached and cannot be downloaded.

    """
    try:
        encoding = tiktoken.get_encoding("gpt2")
    # An error of requests is an OSError; a cached file with a wrong hash raises ValueError
    except (OSError, ValueError) as error:
        raise DataError(
            "GPT-2's vocabulary is not in tiktoken's cache and cannot be downloaded: "
            "set TIKTOKEN_CACHE_DIR to a folder that holds it, go online once, or name a tokenizer "
            "that needs no download, such as byte or, to train one on your text, bpe:4096"
        ) from error
    return BytePairEncoding(
        "gpt2", tuple(map(encoding.decode_single_token_bytes, range(encoding.n_vocab - 1)))
    )


def byte() -> BytePairEncoding:
    """A BPE without merges: the 256 bytes and end-of-text."""
    return BytePairEncoding("byte", tuple(bytes([b]) for b in range(256)))


def train_bpe(texts: Iterable[str], vocab_size: int, name: str) -> BytePairEncoding:
    """Train a byte-level BPE on ``texts`` with GPT-2's splitting pattern: ids for 256 bytes, the
    merges, then end-of-text.

    Words longer than `LONGEST_WORD` bytes are split, since training takes time quadratic in their
    length. Ctrl-C ends the call at once and discards the trainer's work.

    Raises:
        ValueError: the texts are too short for that many merges, or ``vocab_size`` is out of range.

    """
    from tokenizers import Regex, models, pre_tokenizers, trainers  # only training needs them
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    if not 257 <= vocab_size <= LARGEST:
        raise ValueError(f"a byte-level vocabulary has from 257 to {LARGEST} ids, not {vocab_size}")
    bpe = HuggingFaceTokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = pre_tokenizers.Split(Regex(f".{{{LONGEST_WORD}}}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    interruptible(lambda texts: bpe.train_from_iterator(texts, trainer), texts)
    by_id = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    if len(by_id) != vocab_size - 1:
        raise ValueError(
            f"the text is too short for a vocabulary of {vocab_size}: it gives {len(by_id) + 1} "
            "ids, so ask for no more"
        )
    to_byte = {character: byte for byte, character in PRINTABLE.items()}
    return BytePairEncoding(name, tuple(bytes(to_byte[c] for c in token) for token, _ in by_id))


def interruptible(work: Callable[[Iterable[str]], None], texts: Iterable[str]) -> None:
    """Call ``work(texts)`` in a thread, so that native code does not delay signals; its errors are
    raised here.
    """
    errors: list[BaseException] = []
    stopped = threading.Event()

    def until_stopped() -> Iterator[str]:
        return itertools.takewhile(lambda text: not stopped.is_set(), texts)

    def run() -> None:
        try:
            work(until_stopped())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
    finally:
        stopped.set()
    if errors:
        raise errors[0]


def _printable() -> dict[int, str]:
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in shown)
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(others)}


PRINTABLE = _printable()
"""GPT-2's printable character for each byte in ``vocab.json`` and ``merges.txt``: printable Latin-1
stands for itself, other bytes count up from U+0100."""


def printable(token: bytes) -> str:
    """A token as written in ``vocab.json`` and ``merges.txt``."""
    return "".join(map(PRINTABLE.__getitem__, token))
