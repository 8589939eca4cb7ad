"""llama2.c's byte-pair encoding by scores, which is that of SentencePiece (Kudo and Richardson
2018) with a byte for each character that the vocabulary lacks.
"""

import base64
import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from gptjax.errors import ConfigError
from gptjax.formats.llama2c_tokenizer import BEGIN, BYTES, END, FIRST_BYTE, FIRST_TEXT, UNKNOWN
from gptjax.tokenizers.interface import Tokenizer
from gptjax.tokenizers.sentencepiece import BPE, NORMAL, SentencePiece
from gptjax.tokenizers.space_first import SPACE, SpaceFirst

CONTROLS = {"<unk>": UNKNOWN, "<s>": BEGIN, "</s>": END}
CONTROL_TEXTS = (b"<unk>", b"\n<s>\n", b"\n</s>\n")  # as tokenizer.bin has them
LARGEST = 1 << 20  # ids
KEPT_WORDS = 1 << 16  # whose ids are remembered


@dataclasses.dataclass(frozen=True)
class Llama2c(SpaceFirst):
    """Any text encodes, after a space, which decoding drops.

    The characters of a text, or the bytes of those that are no token, are merged pair by pair: each
    time the two neighbours whose joined text has the best score, of equals the leftmost.

    Raises:
        ValueError: the tokens do not begin with three controls and the bytes, one is empty, there
            are too many, or not one finite score for each.

    """

    tokens: tuple[bytes, ...]
    """As they are in ``tokenizer.bin``: the bytes are ``<0x00>`` to ``<0xFF>``."""
    scores: tuple[float, ...]
    name: str = "llama2c"
    kind = "llama2c"
    begin_of_text = BEGIN
    end_of_text = END

    def __post_init__(self) -> None:
        if (
            self.tokens[FIRST_BYTE:FIRST_TEXT] != BYTES
            or b"" in self.tokens
            or len(self.tokens) > LARGEST
        ):
            raise ValueError(
                f"its {len(self.tokens)} tokens do not begin with three controls and the bytes, "
                f"one is empty, or they are more than {LARGEST}"
            )
        if len(self.scores) != len(self.tokens) or not all(map(math.isfinite, self.scores)):
            raise ValueError("its tokens do not have a finite score each")

    def __reduce__(self) -> tuple[object, ...]:
        return Llama2c, (self.tokens, self.scores, self.name)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """See `Tokenizer`."""
        return CONTROLS

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """See `Tokenizer`."""
        controls = (text.encode() for text in CONTROLS)
        return (*controls, *(bytes([b]) for b in range(256)), *self.tokens[FIRST_TEXT:])

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        """The id of each text: of the tokens that alone are text, the first."""
        texts = (token.decode("utf-8", "surrogateescape") for token in self.tokens[FIRST_TEXT:])
        found: dict[str, int] = {}
        for i, text in enumerate(texts, FIRST_TEXT):
            found.setdefault(text, i)
        return found

    @functools.cached_property
    def _inner(self) -> np.ndarray:
        """The pairs of neighbouring characters within tokens, sorted: between any other two, no
        merge joins anything.
        """
        pairs = [_pairs(text) for text in self._ids]
        return np.unique(np.concatenate(pairs)) if pairs else np.zeros(0, np.int64)

    @functools.cached_property
    def _merged(self) -> Callable[[str], tuple[int, ...]]:
        return functools.lru_cache(KEPT_WORDS)(self._merge)

    def encode_more(self, text: str) -> list[int]:
        """See `SpaceFirst`. Half a surrogate pair is encoded as U+FFFD."""
        if not text:
            return []
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        apart = ~np.isin(_pairs(text), self._inner)
        cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(text)]
        words = (text[begin:end] for begin, end in itertools.pairwise(cuts))
        return [i for word in words for i in self._merged(word)]

    def _merge(self, word: str) -> tuple[int, ...]:
        """The ids of a word: a heap holds the merges that are possible, a linked list what is left
        of the word.
        """
        ids, scores = self._ids, self.scores
        parts = list(word)
        after = list(range(1, len(parts) + 1))
        before = list(range(-1, len(parts) - 1))
        heap: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(parts):
                joined = parts[left] + parts[right]
                if joined in ids and parts[left] in ids and parts[right] in ids:
                    heapq.heappush(heap, (-scores[ids[joined]], left, right, joined))

        for i in range(len(parts) - 1):
            offer(i, i + 1)
        while heap:
            _, left, right, joined = heapq.heappop(heap)
            # One of the two was merged otherwise since
            if not parts[left] or not parts[right] or parts[left] + parts[right] != joined:
                continue
            parts[left], parts[right] = joined, ""
            after[left] = after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        found: list[int] = []
        for part in filter(None, parts):
            found += [ids[part]] if part in ids else [FIRST_BYTE + b for b in part.encode()]
        return tuple(found)

    def content(self) -> dict[str, object]:
        """See `Tokenizer`."""
        return {
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
            "scores": list(self.scores),
        }


SCORED = (Llama2c, SentencePiece)
"""Kinds of tokenizers that have a score for each token."""


def scored(tokenizer: Tokenizer) -> Llama2c:
    """The tokenizer as one that llama2.c's file can hold.

    Raises:
        ConfigError: its tokens have no scores, or are not in llama2.c's order.

    """
    if isinstance(tokenizer, SentencePiece):
        return _from_sentencepiece(tokenizer)
    if not isinstance(tokenizer, Llama2c):
        raise ConfigError(
            f"the tokenizer {tokenizer.name} merges by rank, where llama2.c's file has a score for "
            "each token: export it as llm.c's file instead"
        )
    return tokenizer


def _from_sentencepiece(tokenizer: SentencePiece) -> Llama2c:
    """As llama2.c's ``tokenizer.py`` exports it: line ends around the two controls."""
    model = tokenizer.read
    texts = [piece.text.replace(SPACE, " ") for piece in model.pieces]
    texts[BEGIN : END + 1] = (f"\n{text}\n" for text in texts[BEGIN : END + 1])
    kinds = {piece.kind for piece in model.pieces[FIRST_TEXT:]}
    ids = (tokenizer.special_tokens, tokenizer.begin_of_text, tokenizer.end_of_text)
    if ids != (CONTROLS, BEGIN, END) or kinds - {NORMAL} or model.kind != BPE:
        raise ConfigError(
            f"the tokenizer {tokenizer.name} has other controls than llama2.c, or is no BPE: its "
            "file cannot hold it"
        )
    tokens = tuple(text.encode() for text in texts)
    try:
        return Llama2c(tokens, tuple(piece.score for piece in model.pieces), tokenizer.name)
    except ValueError as error:
        raise ConfigError(
            f"the tokenizer {tokenizer.name} does not fit llama2.c's file: {error}"
        ) from error


def _pairs(text: str) -> np.ndarray:
    """(n - 1,) int64: each two neighbouring characters of a text as one number."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    return points[:-1] << 21 | points[1:]
