"""One job at a time behind the caller's back: a block is written while the next one is sampled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class Behind:
    """A thread for one job at a time, so that no more than two blocks are in memory: one in it, one being made."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="behind")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Begin a job, once the one before is done.

        Raises:
            Exception: whatever the one before raised.
        """
        self.wait()
        self._pending = self._executor.submit(job)

    def check(self) -> None:
        """Raise at once what the job raised; a build should not sample on for an hour while the disk is full."""
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
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Finish the job: what was sampled is not thrown away because something else went wrong."""
        try:
            if kind is None:
                self.wait()
        finally:
            self._executor.shutdown(wait=True)
