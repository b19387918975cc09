"""Progress for a person at a terminal; nothing but plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed and speed >= 10 else _slow(speed, task))


def _slow(speed: float | None, task: Task) -> str:
    return f"{speed:.2f} {task.fields['unit']}/s" if speed else ""


class TerminalReporter:
    """A bar with rate and time left on stderr where that is a terminal; `say` prints lines anywhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, description: str, total: int, unit: str, done: int = 0) -> None:
        """A task begins; the rate counts from here, not from what was done earlier."""
        self._task = self._progress.add_task(description, total=total, completed=done, unit=unit, note="")

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, advance=amount, note=note)

    def finish(self) -> None:
        """Leave the finished bar standing."""
        self._progress.refresh()
        self._task = None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False)
