"""One progress bar for what takes its time, bytes to fetch or characters to tokenize: on stderr, where that is a terminal."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextlib.contextmanager
def progress(what: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how far ``what`` is: call what this yields with the bytes, or characters, just done.

    Args:
        what: a few words before the bar.
        total: bytes in all; None if nobody knows.
        done: those done before.

    """
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total, completed=done)
        yield lambda count: bars.update(task, advance=count)
