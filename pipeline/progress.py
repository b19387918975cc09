"""Progress: a bar on a terminal, a line per minute elsewhere (`dvc repro`, SLURM, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
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

SECONDS_PER_LINE = 60.0
"""Often enough to see that a job is alive, seldom enough for the log of a day."""


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_rate(speed, task.fields["unit"]) if speed else "")


def _rate(speed: float, unit: str) -> str:
    return f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.2g} {unit}/s"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class TerminalReporter:
    """Reports to stderr, as a `advkd.stages.reporter.Reporter`; off a terminal every `SECONDS_PER_LINE` at most.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._on_terminal = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._on_terminal,
        )
        self._task: TaskID | None = None
        self._clock = clock
        self._started = self._last_line = clock()
        self._done_before = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, description: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a task; its rate counts from here, without what was done earlier."""
        self._task = self._progress.add_task(description, total=total, completed=done, unit=unit, note="")
        self._started = self._last_line = self._clock()
        self._done_before = done

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count finished units; an empty note leaves the last one standing."""
        if self._task is None:
            return
        self._progress.update(self._task, advance=amount)
        if note:
            self._progress.update(self._task, note=note)
        now = self._clock()
        if not self._on_terminal and now - self._last_line >= SECONDS_PER_LINE:
            self._last_line = now
            self.say(self._line(self._progress.tasks[self._task], now - self._started))

    def _line(self, task: Task, seconds: float) -> str:
        done, total, unit, note = int(task.completed), int(task.total or 0), task.fields["unit"], task.fields["note"]
        speed = (done - self._done_before) / seconds
        left = f", about {duration((total - done) / speed)} left" if speed and total > done else ""
        return f"{task.description}: {done:,} of {total:,} {unit}, {_rate(speed, unit)}{left}{note and f'; {note}'}"

    def finish(self) -> None:
        """Leave the finished bar standing."""
        self._progress.refresh()
        self._task = None

    def say(self, text: str) -> None:
        """Print a line, above the bar on a terminal."""
        self._console.print(text, markup=False)
