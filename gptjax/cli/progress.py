"""Progress bars on stderr, shown only on a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator

LINE_EVERY_S = 60.0


@contextlib.contextmanager
def progress(what: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; call the yielded function with the number of bytes just done.

    Where stderr is not a terminal, work of unknown size is named in a line.

    Args:
        what: a few words before the bar.
        total: bytes in all; None if unknown.
        done: bytes done before.

    """
    import rich.console  # imported late: most commands show no bar
    import rich.progress as bar

    columns = (
        bar.TextColumn("{task.description}"),
        bar.BarColumn(),
        bar.DownloadColumn(),
        bar.TransferSpeedColumn(),
        bar.TimeRemainingColumn(),
    )
    console = rich.console.Console(stderr=True)
    if total is None and not console.is_terminal:
        console.print(what)
    with bar.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task(what, total=total, completed=done)
        yield lambda count: bars.update(task, advance=count)


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show how many of ``total`` are done; call the yielded function with the number just done and
    a short status.

    Where stderr is not a terminal, print a line every `LINE_EVERY_S` seconds instead of the bar.
    """
    import rich.console
    import rich.progress as bar

    columns = (
        bar.TextColumn(what),
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TextColumn("{task.description}"),
        bar.TimeElapsedColumn(),
        bar.TextColumn("left"),
        bar.TimeRemainingColumn(),
    )
    console = rich.console.Console(stderr=True, soft_wrap=True, highlight=False)
    with bar.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task("", total=total)
        done, said = 0, time.monotonic()

        def advance(count: int, standing: str) -> None:
            nonlocal done, said
            done += count
            bars.update(task, completed=done, description=standing)
            if not console.is_terminal and time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                console.print(f"{what} {done:,}/{total:,} | {standing}", markup=False)

        yield advance
