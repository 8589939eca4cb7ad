"""JSON files that come from elsewhere."""

import json
from pathlib import Path
from typing import Any

from gptjax.errors import FormatError

LARGEST = 1 << 26  # bytes: GPT-2's tokenizer.json has 3.6 million


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FormatError: it cannot be read, is larger than `LARGEST`, or holds something else.

    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise FormatError(f"{path} has {size} bytes, more than the {LARGEST} that are read as JSON")
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} is not a JSON object")
    return content
