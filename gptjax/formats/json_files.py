"""Untrusted JSON files."""

import json
import os
from typing import Any

from gptjax.errors import FormatError
from gptjax.files import read_small

LARGEST = 1 << 26  # bytes: GPT-2's tokenizer.json has 3.6 million


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FormatError: it cannot be read, is not a regular file, is larger than `LARGEST`, or does not
            hold a JSON object.

    """
    try:
        content = json.loads(read_small(path, LARGEST))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is not a JSON object")
    return content
