"""Turns Ctrl-C and SIGTERM into a flag that a loop polls between steps, so that it stops at a consistent state."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

PASSED_ON = 1.0
"""Seconds within which a second Ctrl-C counts as the same one: the terminal sends it to every process of a command, and
a launcher such as `torchrun` forwards its own copy."""


class StopRequest:
    """While active, the first signal sets `requested`.

    A second Ctrl-C interrupts at once. A second SIGTERM changes nothing: cluster managers send it to every process, and
    launchers forward it too. Outside the main thread, where no signal arrives, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._earlier: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > PASSED_ON:
            raise KeyboardInterrupt
