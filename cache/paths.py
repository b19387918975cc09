"""Paths inside a store that may come from someone else: never outside it, never a device, never too large.

A symlink is followed in one case only: a file that DVC linked into its own content-addressed cache
(`cache.type symlink`), whose bytes the ledger names anyway.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from advkd.cache.durable import fsync_folder
from advkd.cache.errors import DamagedError

MAX_METADATA_BYTES = 16 << 20
"""More than any `zarr.json` or ledger record needs."""
_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}(?:\.dir)?$")


def safe_folder(store: Path, relative: str, *, make: bool = False) -> Path:
    """A folder of a store, made if wanted.

    Raises:
        DamagedError: a symlink leads elsewhere.
    """
    folder = store / relative
    if make:
        current = store
        for part in Path(relative).parts:
            current = current / part
            if current.is_symlink():
                break
            if not current.is_dir():
                current.mkdir(exist_ok=True)
                fsync_folder(current.parent)  # its name must outlive a power cut as well
    if os.path.realpath(folder) != os.path.join(os.path.realpath(store), relative).rstrip("/"):
        raise DamagedError(f"{folder} is reached through a symlink, which a cache has none of; nothing was touched")
    return folder


def open_file(store: Path, relative: str) -> int:
    """A descriptor of a plain file of a store, for reading; the folder must have been checked.

    Raises:
        FileNotFoundError: it isn't there.
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
        FileNotFoundError: it isn't there.
        DamagedError: it is no plain file, or larger than it can be.
    """
    with open(open_file(store, relative), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DamagedError(f"{store / relative} is larger than {limit:,} bytes, which can't be")
    return data
