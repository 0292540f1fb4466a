"""A line on the terminal: epoch, figures, steps a second and time left. Silent off a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Meter:
    """Shows how far training is.

    Args:
        epochs, steps: the length of training, and of an epoch.
        done: epochs done before.
        shown: None for "if standard error is a terminal".
    """

    def __init__(self, epochs: int, steps: int, done: int, shown: bool | None) -> None:
        console = Console(stderr=True)
        self._steps = steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not (console.is_terminal if shown is None else shown),
        )
        self._task = self._bar.add_task(
            f"epoch {done + 1}/{epochs}", total=epochs * steps, completed=done * steps, rate="", figures=""
        )
        self._epochs = epochs

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trail: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self) -> None:
        """One step is done."""
        speed = self._bar.tasks[0].speed
        self._bar.update(self._task, advance=1, rate="" if speed is None else f"{speed:.1f} steps/s")

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done and measured."""
        shown = []
        for name in ("clean", "robust", "verified"):
            value = record[f"{name}_accuracy"]
            if value is not None:
                shown.append(f"{name} {100 * value:.1f}")
        following = min(record["epoch"] + 1, self._epochs)
        self._bar.update(self._task, description=f"epoch {following}/{self._epochs}", figures=" ".join(shown))
