"""YAML configurations: plain values in sections, without aliases, which let a small file expand
into a huge one.
"""

import os
from typing import Any

import jsonargparse
import yaml

from gptjax.errors import FormatError
from gptjax.files import read_text

LARGEST = 1 << 16  # bytes: the longest configuration has 3,000
DEEPEST = 16  # nested sections and lists
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class AliasError(yaml.YAMLError):
    """A value reused by an alias: ten lines can expand to 10^9 values, or without end."""


def load(text: str) -> Any:
    """Parse a document by the rules of jsonargparse, where ``1e-3`` is a number.

    Raises:
        yaml.YAMLError: it is not YAML, has an alias (``*name``) or a key twice, is nested too
        deeply, or holds an invalid value.

    """
    try:
        _check(yaml.compose(text, LOADER))
        return jsonargparse.get_loader("yaml")(text)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def read_mapping(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a mapping from a file.

    Raises:
        FormatError: it is not a regular file of at most `LARGEST` bytes, or not a YAML mapping.
        OSError: it cannot be read.

    """
    try:
        found = load(read_text(path, LARGEST))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} does not hold KEY: VALUE lines")
    return found


def _check(root: yaml.Node | None) -> None:
    """Raise a YAMLError for valid YAML that `load` refuses."""
    seen: set[int] = set()
    waiting = [(root, 0)] if root else []
    while waiting:
        node, depth = waiting.pop()
        where = f"on line {node.start_mark.line + 1}"
        if id(node) in seen:
            raise AliasError(f"the value {where} is used again by an alias (*name): write it out")
        if depth > DEEPEST:
            raise yaml.YAMLError(f"the value {where} is nested more than {DEEPEST} deep")
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise yaml.YAMLError(
                        f"{key.value} is given again on line {key.start_mark.line + 1}: leave one "
                        "out"
                    )
                keys.add(key.value if isinstance(key, yaml.ScalarNode) else "")
                waiting += [(key, depth + 1), (value, depth + 1)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(value, depth + 1) for value in node.value]
