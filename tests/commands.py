"""How tests run commands."""

from collections.abc import Callable
from typing import Any

import pytest


def expect_error(
    main: Callable[[list[str]], int], arguments: list[str], message: str, capsys: Any
) -> None:
    """The command ends with exit status 2 and one sentence on stderr, which holds ``message``."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
