"""A disk that fails, fills up or is cut off at one chosen change."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHANGING = ("fsync", "link", "mkdir", "replace", "rename")
CLEANING = ("unlink", "rmdir", "remove")


class Killed(BaseException):
    """The process has ended: whatever it tries from here on doesn't happen."""


class Faults:
    """Lets the nth change of the disk fail: a write, a link, a new folder, a renaming, an fsync.

    Args:
        nth: counted from 0; None to count only.
        how: "once": only that one fails; "full": all from then on do; "killed": nothing happens any more, tidying up
            neither. A write that fails has written half.
    """

    def __init__(self, nth: int | None, how: str) -> None:
        self.nth = nth
        self.how = how
        self.count = 0
        self.dead = False

    def step(self) -> bool:
        """Whether this change fails."""
        number, self.count = self.count, self.count + 1
        fails = self.nth is not None and (number == self.nth or (number > self.nth and self.how != "once"))
        self.dead = self.dead or (fails and self.how == "killed")
        return fails

    def fail(self) -> None:
        if self.dead:
            raise Killed
        raise OSError(errno.ENOSPC, "No space left on device")

    def changing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.dead or self.step():
                self.fail()
            return original(*arguments, **keywords)

        return call

    def cleaning(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.dead:
                self.fail()
            return original(*arguments, **keywords)

        return call

    def opening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            opened = original(file, mode, *arguments, **keywords)
            return opened if mode == "rb" else _Writing(opened, self)

        return call

    @contextmanager
    def happening(self) -> Iterator[None]:
        """While they do."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGING:
                patch.setattr(os, name, self.changing(getattr(os, name)))
            for name in CLEANING:
                patch.setattr(os, name, self.cleaning(getattr(os, name)))
            patch.setattr(io, "open", self.opening(io.open))
            yield


class _Writing:
    """A file whose writes may fail half-way."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file = file
        self._faults = faults

    def write(self, data: Any) -> Any:
        if self._faults.step():
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            self._faults.fail()
        return self._file.write(data)

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
