"""Downloads: resumed, retried, verified, and renamed to their name once complete."""

import hashlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax.cli.progress import progress
from gptjax.errors import DataError, naming
from gptjax.files import file_lock, open_file

if TYPE_CHECKING:
    import requests

TIMEOUT_S = 30
CHUNK_BYTES = 1 << 16
ATTEMPTS = 5
PAUSE_S = 1.0  # before the second attempt; doubled before each further one
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses worth another attempt


class _InterruptedError(Exception):
    """A transient failure; the part received so far is kept for the next attempt."""


def fetch(url: str, path: Path, sha256: str | None = None) -> Path:
    """Download ``url`` to ``path`` unless the file exists; returns ``path``.

    The file is received as ``NAME.partial`` and renamed once complete. An interrupted download
    resumes if the result can be verified, against ``sha256`` or against the SHA-256 that the
    Hugging Face hub sends for large files (header ``X-Linked-ETag``). Otherwise it starts over.

    Args:
        url: the address to download from.
        path: the file to write; its folders are made.
        sha256: the file's SHA-256 in hexadecimal, if known.

    Raises:
        DataError: there is no network or no such file, or the content is not the expected one.
        OSError: the file cannot be written.

    """
    if path.exists():
        if sha256 and _sha256(path) != sha256:
            raise DataError(
                f"{path} differs from {url}: its SHA-256 is not {sha256}; remove it and try again"
            )
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    reason = ""
    with file_lock(partial.with_name(f".{partial.name}.lock")):
        for attempt in range(ATTEMPTS):
            if path.exists():  # another process was faster
                return path
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                expected = _receive(url, partial, sha256)
            except _InterruptedError as error:
                reason = str(error)
                continue
            _verify(partial, url, expected)
            partial.replace(path)
            return path
    raise DataError(
        f"{url} cannot be downloaded ({reason}): go online and try again, or put the file at "
        f"{path} yourself"
    )


def _receive(url: str, partial: Path, sha256: str | None) -> str | None:
    """Make one attempt. Returns the expected SHA-256, if known."""
    import requests  # imported late: it takes a tenth of a second, and most starts fetch nothing

    held = partial.stat().st_size if partial.exists() else 0
    try:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            expected = sha256 or _announced(response)
            if response.status_code == requests.codes.requested_range_not_satisfiable or (
                held and not expected
            ):
                partial.unlink()
                raise _InterruptedError("the partial file of an earlier attempt cannot be resumed")
            if response.status_code in TRANSIENT:
                raise _InterruptedError(f"HTTP status {response.status_code}")
            if response.status_code not in (requests.codes.ok, requests.codes.partial_content):
                raise DataError(
                    f"{url} cannot be downloaded: the server answers with status "
                    f"{response.status_code}; put the file at "
                    f"{partial.with_name(partial.name.removesuffix('.partial'))} yourself"
                )
            held = held if response.status_code == requests.codes.partial_content else 0
            length = response.headers.get("Content-Length")
            total = held + int(length) if length else None
            with (
                partial.open("ab" if held else "wb") as file,
                progress(f"downloading {partial.stem}", total, held) as advance,
            ):
                for chunk in response.iter_content(CHUNK_BYTES):
                    with naming(partial):
                        file.write(chunk)
                    advance(len(chunk))
        return expected
    except requests.RequestException as error:
        raise _InterruptedError(f"{type(error).__name__}: {_innermost(error)}") from error


def _innermost(error: BaseException) -> str:
    """The message of the innermost cause, without the wrappers of requests and urllib3."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return getattr(error, "strerror", None) or str(error)


def _announced(response: "requests.Response") -> str | None:
    for answer in (*response.history, response):
        match = re.fullmatch(r'"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-ETag", ""))
        if match:
            return match[1]
    return None


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(partial: Path, url: str, expected: str | None) -> None:
    if expected is None:
        return
    found = _sha256(partial)
    if found != expected:
        partial.unlink()
        raise DataError(
            f"{url} has the SHA-256 {found}, not {expected}: the download was removed; try again"
        )
