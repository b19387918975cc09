"""A local scratch folder for chunks of remote stores, named by their content.

A chunk is checked when it is fetched, then mapped like a local one. Stores that share blocks share its files. The
folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from advkd.cache.errors import DamagedError, UsageError
from advkd.cache.files.durable import write_atomically
from advkd.cache.format.array_record import ArrayRecord
from advkd.cache.format.source import Source

SPARE_BYTES = 64 << 20
"""Free space to leave on the disk."""


def default_scratch() -> Path:
    """`ADVKD_SCRATCH`, else `advkd` in the user's cache folder."""
    chosen = os.environ.get("ADVKD_SCRATCH")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advkd"


class Scratch:
    """Chunks of one remote store, kept locally."""

    def __init__(self, source: Source, folder: Path) -> None:
        self._source = source
        self.folder = folder

    def path(self, record: ArrayRecord) -> Path:
        """Path for a chunk of that content, whether it is there or not."""
        return self.folder / record.sha256[:2] / record.sha256

    def holds(self, record: ArrayRecord) -> bool:
        """Whether it is there."""
        try:
            return self.path(record).stat().st_size == record.num_bytes
        except FileNotFoundError:
            return False

    def fetch(self, chunk: str, record: ArrayRecord) -> Path:
        """Fetch a chunk unless it is there, and check it.

        Raises:
            DamagedError: the remote file is missing or differs from its ledger.
        """
        path = self.path(record)
        if self.holds(record):
            return path
        try:
            data = self._source.read(chunk, record.num_bytes)
        except FileNotFoundError:
            raise DamagedError(f"{self._source.address}/{chunk} is missing, but the ledger has it") from None
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise DamagedError(f"{self._source.address}/{chunk} differs from what its ledger says")
        write_atomically(path, [data])
        return path

    def fetch_all(
        self, chunks: Sequence[tuple[str, ArrayRecord]], fetched: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        """Fetch many chunks, after checking that the disk has room.

        Raises:
            UsageError: they don't fit.
        """
        wanted = [(chunk, record) for chunk, record in chunks if not self.holds(record)]
        needed = sum(record.num_bytes for _, record in wanted)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed and needed + SPARE_BYTES > free:
            raise UsageError(
                f"{self._source.address}: the chosen states need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free "
                f"in {self.folder}: choose fewer states or seeds, or another folder with ADVKD_SCRATCH"
            )
        for chunk, record in wanted:
            self.fetch(chunk, record)
            fetched(record.num_bytes)
