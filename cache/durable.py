"""Writes that survive a crash: temp file, fsync, rename, fsync of the folder.

A rename alone survives a killed process but not a power cut, after which a renamed file may be empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"


def holds_something(path: Path) -> bool:
    """Whether anything is at a path; an empty folder counts as nothing."""
    return path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all; an earlier file of that name stays until the new one is durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, shortest float that reads back the same; no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def pretty_json(value: Any) -> bytes:
    """The same for files that people open."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically and durably."""
    write_atomically(path, [pretty_json(value)])


def write_once(path: Path, value: Any) -> None:
    """Write a JSON file unless it is there already."""
    if not path.is_file():
        write_json(path, value)
