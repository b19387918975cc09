"""A background thread for one job at a time: a block is written while the next one is sampled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class Background:
    """Runs one job at a time, so that at most two blocks are in memory: one being written, one being sampled."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job once the previous one is done.

        Raises:
            Exception: whatever the previous job raised.
        """
        self.wait()
        self._pending = self._executor.submit(job)

    def check(self) -> None:
        """Raise what the job raised, if it has failed: a build should not sample for an hour while the disk is full."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the job, and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the job, after an error too: a block that was sampled is worth writing."""
        try:
            if kind is None:
                self.wait()
        finally:
            self._executor.shutdown(wait=True)
