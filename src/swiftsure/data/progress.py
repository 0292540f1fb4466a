"""One progress bar with rate and time left: drawn on a terminal, silent off it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Give a function that takes the number of steps (images or bytes) just done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    # Only here: rich takes longer to import than a small set takes to load.
    from rich import progress as bars
    from rich.console import Console

    amount = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if in_bytes else (bars.MofNCompleteColumn(),)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *amount, bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
