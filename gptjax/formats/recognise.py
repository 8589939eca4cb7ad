"""Identify a file by its content, so that an unsupported one is named, not mistaken for another.

A magic number of two or four bytes could also begin a file of token ids, so further structure is
checked where a format has any. Nothing is unpickled.
"""

import io
import itertools
import math
import pickletools
import re
import struct
import zipfile
import zlib
from pathlib import Path

from gptjax.files import open_file

LOOKED_AT = 1024  # bytes from the start
LLMC = {
    20240326: "an llm.c model",
    20240327: "an llm.c debug state",
    20240328: "an llm.c tokenizer",
    20240520: "a token shard",
    20240801: "a token shard",
    20240522: "an llm.c evaluation file",
}
"""Descriptions of llm.c's files by magic number."""
LLAMA2C_MAGIC = 0x616B3432
LLAMA2C_MODEL, LLAMA2C_TOKENIZER = "a llama2.c model", "a llama2.c tokenizer"
SAFETENSORS = "a safetensors file"
SENTENCEPIECE = "a SentencePiece model"
GGUF = "a GGUF model"
LARGEST_VOCABULARY = 1 << 26  # bytes of a llama2.c tokenizer
LONGEST_TOKEN = 1 << 12
BEGINNINGS = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "a PyTorch checkpoint (a pickle)",
}
TENSORFLOW_END = bytes.fromhex("57fb808b247547db")  # end of an .index file


def recognise(path: Path) -> str | None:
    """Describe the file, as in ``a llama2.c model (version 0)``; None for text and unknown content.

    Raises:
        OSError: it cannot be read.

    """
    size = path.stat().st_size
    with open_file(path) as file:
        start = file.read(LOOKED_AT)
        file.seek(max(0, size - 8))
        end = file.read(8)
    magic = int.from_bytes(start[:4], "little")
    if len(start) == LOOKED_AT and magic in LLMC:
        return LLMC[magic]
    for beginning, name in BEGINNINGS.items():
        if start.startswith(beginning):
            return name
    if start[:4] == b"GGUF" and 1 <= int.from_bytes(start[4:8], "little") <= 99:
        return GGUF
    if start[:4] == end[-4:] == b"PAR1":
        return "a Parquet file"
    if re.match(rb"BZh[1-9]1AY&SY", start):
        return "a bzip2 file"
    if end == TENSORFLOW_END or re.search(r"\.data-\d{5}-of-\d{5}$", path.name):
        return "a TensorFlow checkpoint"
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") <= size - 8:
        return SAFETENSORS
    by_content = (
        _zip(path, start)
        or _gzip(start)
        or _llama2c(start, size)
        or _protobuf(start)
        or _pickle(start, end)
    )
    return by_content or _tokenizer(path)


def _zip(path: Path, start: bytes) -> str | None:
    if start[:4] != b"PK\x03\x04" or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        names = []
    if any(name.endswith("/data.pkl") for name in names):
        return "a PyTorch checkpoint (a zip of pickles)"
    return (
        "a NumPy archive (.npz)"
        if names and all(name.endswith(".npy") for name in names)
        else "a zip archive"
    )


def _gzip(start: bytes) -> str | None:
    if start[:3] != b"\x1f\x8b\x08":
        return None
    try:
        zlib.decompressobj(31).decompress(start, LOOKED_AT)
    except zlib.error:
        return None
    return "a gzip file"


def _llama2c(start: bytes, size: int) -> str | None:
    """Version 0 has no magic: its seven sizes must imply exactly the file's size."""
    if len(start) < 28:
        return None
    magic, version = struct.unpack_from("<Ii", start)
    if magic == LLAMA2C_MAGIC and 1 <= version <= 99:
        return f"{LLAMA2C_MODEL} (version {version})"
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack_from("<7i", start)
    if (
        min(dim, hidden, layers, heads, kv_heads, positions, abs(vocabulary)) < 1
        or dim % heads
        or heads % kv_heads
    ):
        return None
    head = dim // heads
    block = 2 * dim + 2 * dim * dim + 2 * dim * kv_heads * head + 3 * dim * hidden
    tables = abs(vocabulary) * dim * (1 if vocabulary > 0 else 2)
    numbers = tables + layers * block + dim + 2 * positions * (head // 2)
    return f"{LLAMA2C_MODEL} (version 0)" if size == 28 + 4 * numbers else None


def _protobuf(start: bytes) -> str | None:
    """SentencePiece models begin with two pieces, each a text and a score; ONNX models with a
    version and the producer's name.
    """
    piece = re.compile(rb"\n([\x07-\x7f])\n(.)", re.DOTALL)
    at = 0
    for _ in range(2):
        found = piece.match(start, at)
        if not found or start[found.end() + found[2][0] : found.end() + found[2][0] + 1] != b"\x15":
            break
        at += 2 + found[1][0]
    else:
        return SENTENCEPIECE
    writer = re.match(rb"\x08[\x01-\x1f]\x12([\x01-\x40])", start)
    if writer and len(start) > 4 + writer[1][0]:
        name, after = start[4 : 4 + writer[1][0]], start[4 + writer[1][0]]
        if name.isascii() and name.decode().isprintable() and after in b"\x1a\x22\x28\x32\x3a\x42":
            return "an ONNX model"
    return None


def _pickle(start: bytes, end: bytes) -> str | None:
    if not re.match(rb"\x80[\x02-\x05]", start) or not end.endswith(b"."):
        return None
    try:
        found = len(list(itertools.islice(pickletools.genops(io.BytesIO(start)), 4)))
    except ValueError:
        return None
    return "a Python pickle" if found > 1 else None


def _tokenizer(path: Path) -> str | None:
    """llama2.c's ``tokenizer.bin``: the longest token's length, then each one's score, length and
    bytes, up to the end.
    """
    if not 16 <= path.stat().st_size <= LARGEST_VOCABULARY:
        return None
    with open_file(path) as file:
        announced, longest = int.from_bytes(file.read(4), "little"), 0
        while 1 <= announced <= LONGEST_TOKEN and (entry := file.read(8)):
            if len(entry) < 8:
                return None
            score, length = struct.unpack("<fI", entry)
            if (
                not math.isfinite(score)
                or not 1 <= length <= announced
                or len(file.read(length)) < length
            ):
                return None
            longest = max(longest, length)
    return LLAMA2C_TOKENIZER if longest and longest == announced else None
