"""How a stage tells a person how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Shows a stage's progress."""

    def start(self, description: str, total: int, unit: str, done: int = 0) -> None:
        """A task begins: `total` units of work, `done` of them finished earlier."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Some units are done; `note` is a short current reading, such as a loss."""

    def finish(self) -> None:
        """The task is done."""

    def say(self, text: str) -> None:
        """One line worth reading."""


class SilentReporter:
    """Listens to nothing; for tests and library use."""

    def start(self, description: str, total: int, unit: str, done: int = 0) -> None:
        """Ignore."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""

    def say(self, text: str) -> None:
        """Ignore."""
