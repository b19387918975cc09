"""Paths inside a store that a stranger may have made: never outside it, never a device, never too large.

A symlink is followed in one case only: a file that DVC linked into its own content-addressed cache
(`cache.type symlink`), whose bytes the ledger names anyway.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from advkd.cache.errors import DamagedError
from advkd.cache.files.durable import fsync_folder

MAX_METADATA_BYTES = 16 << 20
"""More than any `zarr.json` or ledger record needs."""
_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}(?:\.dir)?$")


def safe_folder(store: Path, relative: str, *, make: bool = False) -> Path:
    """A folder of a store, created if `make`.

    Raises:
        DamagedError: a symlink leads elsewhere, or a file is in the way.
    """
    current = store
    for part in Path(relative).parts:
        current = current / part
        if part in ("..", os.sep) or current.is_symlink():
            raise DamagedError(
                f"{store / relative} is reached through a symlink, and a cache has none; nothing was changed"
            )
        if make and not current.is_dir():
            try:
                current.mkdir(exist_ok=True)
            except FileExistsError:
                raise DamagedError(f"{current} is a file where a cache has a folder: remove it") from None
            fsync_folder(current.parent)  # its name must outlive a power cut as well
    return current


def safe_target(store: Path, relative: str) -> Path:
    """Where a file of a store is to be written; creates its folder.

    Raises:
        DamagedError: a symlink leads elsewhere, or a folder is in the way.
    """
    folder, _, name = relative.rpartition("/")
    path = safe_folder(store, folder, make=True) / name
    if path.is_dir() and not path.is_symlink():
        raise DamagedError(f"{path} is a folder where a cache has a file: remove it")
    return path


def open_file(store: Path, relative: str) -> int:
    """A descriptor of a plain file of a store, for reading; the folder must have been checked.

    Raises:
        FileNotFoundError: it is absent.
        DamagedError: it is a symlink (other than DVC's), a device or a folder.
    """
    path = os.path.join(store, relative)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW)
    except NotADirectoryError:
        raise DamagedError(f"{path}: a part of that path is a file, not a folder") from None
    except OSError as error:
        if error.errno != errno.ELOOP or not _DVC_OBJECT.search(os.path.realpath(path)):
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise DamagedError(f"{path} is a symlink or a device; a cache has plain files only") from None
            raise
        descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"{path} is not a plain file")
    return descriptor


def read_bounded(store: Path, relative: str, limit: int = MAX_METADATA_BYTES) -> bytes:
    """The bytes of a small file of a store.

    Raises:
        FileNotFoundError: it is absent.
        DamagedError: it is no plain file, or has more than `limit` bytes.
    """
    with open(open_file(store, relative), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, limit) + 1)
    if len(data) > limit:
        raise DamagedError(f"{store / relative} is larger than {limit:,} bytes, more than any such file has")
    return data


def walk(root: Path) -> Iterator[str]:
    """Every file below a folder, relative to it, in a fixed order; symlinks are listed and not followed.

    Works for any depth of nesting; a folder that can't be listed is yielded itself.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except FileNotFoundError:
            continue  # removed just now by another process
        except OSError:
            yield folder
            continue
        for entry in reversed(found):
            if not entry.is_dir(follow_symlinks=False):
                yield f"{folder}/{entry.name}".lstrip("/")
        folders += [f"{folder}/{entry.name}".lstrip("/") for entry in found if entry.is_dir(follow_symlinks=False)]
