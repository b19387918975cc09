"""Locks of a store: the operating system's byte-range locks on one file, `provenance/writer.lock`.

    byte 0        presence    shared by all who add blocks, exclusive for whoever moves or removes something
    byte 1        metadata    exclusive and brief, while the number of declared seeds changes
    byte 2 + b    block b     exclusive, while block b is made

The operating system releases a lock when its owner's process ends, however it ends. If the owner was another host, the
file server releases it when that host's lease runs out (NFSv4: usually 90 seconds). No lock is ever broken by its age,
so a builder that is merely slow keeps its block. Locks belong to the open file (`F_OFD_SETLK`), not to the process, so
builders in two threads exclude each other too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from advkd.cache.errors import DamagedError, LockedError
from advkd.cache.files.durable import write_json
from advkd.cache.files.paths import read_bounded, safe_folder, safe_target
from advkd.cache.files.strict_json import in_line, parse_json

LOCK_FILE = "writer.lock"
NOTE_FILE = "writer.json"
PATIENCE = 10.0
"""Seconds to wait for a lock that others hold only briefly."""
_PRESENCE, _METADATA, _FIRST_BLOCK = 0, 1, 2
_SET_LOCK = 90 if sys.platform == "darwin" else 37
"""F_OFD_SETLK, which Python names on Linux only."""


def _flock(kind: int, byte: int) -> bytes:
    if sys.platform == "darwin":
        return struct.pack("qqihh", byte, 1, 0, kind, os.SEEK_SET)
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _try(descriptor: int, kind: int, byte: int) -> bool:
    try:
        fcntl.fcntl(descriptor, _SET_LOCK, _flock(kind, byte))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise LockedError(
                "this file system has no locks, so two builders could overwrite each other: mount it with locks, "
                "or build elsewhere and copy the store"
            ) from None
        raise
    return True


class StoreLocks:
    """The locks of one store."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._file = store / "provenance" / LOCK_FILE

    @contextmanager
    def present(self, sweep: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Add blocks beside other processes that do; `sweep` is called first if there is none.

        Raises:
            LockedError: the store is being moved or repaired.
        """
        with self._open() as descriptor:
            if _try(descriptor, fcntl.F_WRLCK, _PRESENCE):
                self._check_still_there(descriptor)
                sweep()
            self._wait(descriptor, fcntl.F_RDLCK, _PRESENCE)
            self._check_still_there(descriptor)
            note = safe_target(self._store, f"provenance/{NOTE_FILE}")
            write_json(note, {"pid": os.getpid(), "host": socket.gethostname()})
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Move or remove files while no other process writes.

        Raises:
            LockedError: another process is writing.
        """
        with self._open() as descriptor:
            if not _try(descriptor, fcntl.F_WRLCK, _PRESENCE):
                raise LockedError(f"another build is writing {self._store} ({self._owner()}): wait for it or stop it")
            self._check_still_there(descriptor)
            yield

    @contextmanager
    def metadata(self) -> Iterator[None]:
        """Change the number of seeds that the arrays declare.

        Raises:
            LockedError: another process holds this lock for long.
        """
        with self._open() as descriptor:
            self._wait(descriptor, fcntl.F_WRLCK, _METADATA)
            yield

    @contextmanager
    def block(self, block: int) -> Iterator[bool]:
        """Make a block; False if another process is making it now."""
        with self._open() as descriptor:
            yield _try(descriptor, fcntl.F_WRLCK, _FIRST_BLOCK + block)

    @contextmanager
    def _open(self) -> Iterator[int]:
        safe_folder(self._store, "provenance", make=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(self._file, flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise DamagedError(f"{self._file} is not a plain file: remove it") from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DamagedError(f"{self._file} is not a plain file: remove it")
            yield descriptor
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int, kind: int, byte: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while not _try(descriptor, kind, byte):
            if time.monotonic() > deadline:
                raise LockedError(f"{self._store} is being moved or repaired ({self._owner()}): wait, or stop that")
            time.sleep(0.02)

    def _check_still_there(self, descriptor: int) -> None:
        """A store may have been renamed between opening its lock and getting it."""
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(self._file))
        except FileNotFoundError:
            same = False
        if not same:
            raise LockedError(f"{self._store} was moved just now; run the command again")

    def _owner(self) -> str:
        try:
            value = parse_json(read_bounded(self._store, f"provenance/{NOTE_FILE}"))
            return f"process {in_line(value['pid'], 20)} on {in_line(value['host'])}"
        except (OSError, ValueError, KeyError, TypeError):
            return "by an unknown process"
