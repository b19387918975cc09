"""Writes that survive a crash: temp file, fsync, rename, fsync of the folder.

A rename alone survives a killed process but not a power cut, after which a renamed file may be empty.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from advkd.cache.errors import CacheError
from advkd.cache.files.strict_json import pretty_json

PARTIAL_SUFFIX = ".partial"
_PIECE = 1 << 20
_FICLONE = 0x40049409
"""Linux' ioctl that lets two files share their extents (btrfs, XFS, bcachefs) until one is changed."""


def holds_something(path: Path) -> bool:
    """Whether a path exists and is no empty folder."""
    return path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_durably(path: Path) -> None:
    """Remove a file if it is there, so that it doesn't come back after a power cut."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    fsync_folder(path.parent)


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all; an earlier file of that name stays until the new one is durable."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())

    _put(path, write)


def write_verified(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file whole or not at all and compare it with what was meant.

    Raises:
        CacheError: the file reads back differently.
    """
    view = memoryview(data).cast("B")
    write_atomically(path, [view])
    with path.open("rb") as file:
        pieces = (bytes(view[start : start + _PIECE]) for start in range(0, len(view), _PIECE))
        same = all(file.read(_PIECE) == piece for piece in pieces) and not file.read(1)
    if not same:
        raise CacheError(f"{path} reads back differently from what was written: is the disk failing?")


def link_or_copy(source: Path, target: Path) -> str:
    """Put a file at another path, whole or not at all: as a hard link, else a reflink, else a copy.

    Returns:
        How: "hard link", "reflink" or "copy".
    """
    how = "hard link"

    def link(partial: Path) -> None:
        nonlocal how
        original = source.resolve(strict=True)  # a link would stay a link
        try:
            os.link(original, partial)
            return
        except OSError:
            pass  # another file system, or one without hard links
        with original.open("rb") as reading, partial.open("wb") as writing:
            try:
                fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
                how = "reflink"
            except OSError:
                shutil.copyfileobj(reading, writing, 1 << 20)
                how = "copy"
            writing.flush()
            os.fsync(writing.fileno())

    _put(target, link)
    return how


def _put(path: Path, make: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique on every host: two builders may share the folder.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    try:
        make(partial)
        partial.replace(path)
        # Renaming one hard link over another of the same file does nothing and leaves both names.
        partial.unlink(missing_ok=True)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and durably."""
    write_atomically(path, [pretty_json(value)])
