"""Progress of work that takes long: a callable of the user's, or a bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], object] | bool | None
"""Called with what is done and what there is in all (tokens of a prefill); True for a bar on stderr."""


@contextmanager
def reporting(
    progress: Progress, total: int, doing: str = "reading", unit: str = "tokens"
) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told how many units more are done."""
    done = 0
    if callable(progress):
        call = progress

        def tell(more: int) -> None:
            nonlocal done
            done += more
            call(done, total)

        yield tell
        return
    if not progress or not total:
        yield lambda more: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    # Transient, and none at all where stderr is a file: what stays on the screen is the answer.
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda more: bar.advance(task, more)
