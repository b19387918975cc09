"""Writing a cache: whole blocks, each committed by its ledger record, under a lock that dies with its owner.

A block's life: lock → skip if committed and intact → write each state whole → read back and hash → fsync → ledger
record. A crash at any moment loses the block in flight and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from advkd.cache.durable import PARTIAL_SUFFIX, fsync_folder, holds_something, write_atomically, write_json
from advkd.cache.errors import CacheError, DamagedError, LockedError, MismatchError, NotACacheError
from advkd.cache.layout import (
    CRC_BYTES,
    blocks_of,
    chunk_path,
    files_below,
    metadata_files,
    record_path,
    seeds_of,
    states_path,
)
from advkd.cache.ledger import ArrayRecord, BlockRecord, crc32c, read_record
from advkd.cache.reader import TrajectoryCache, read_metadata
from advkd.cache.recipe import Layout, Recipe, differences

OnMismatch = Literal["stop", "set-aside"]


class CacheWriter:
    """A store opened for writing one recipe in one layout."""

    def __init__(self, path: Path, recipe: Recipe, layout: Layout) -> None:
        self.path = path
        self.recipe = recipe
        self.layout = layout
        self.set_aside: Path | None = None
        """Where a store of another recipe was moved to make room, if one was."""

    @classmethod
    def open(cls, path: str | Path, recipe: Recipe, layout: Layout, on_mismatch: OnMismatch = "stop") -> Self:
        """Open a store to build or extend it; create it if nothing is there.

        Raises:
            MismatchError: a cache of another recipe or layout is there, and `on_mismatch` is "stop".
            NotACacheError: something that is no cache is there.
        """
        writer = cls(Path(path), recipe, layout)
        if not writer.continues(on_mismatch) and writer.exists():
            # Under the old store's own lock: a builder that still writes it must not find another in its place.
            with _held(writer.path):
                writer.set_aside = _set_aside(writer.path)
        if not writer.exists():
            writer._create()
        return writer

    def continues(self, on_mismatch: OnMismatch) -> bool:
        """Whether a store of this very recipe and layout is there.

        Raises:
            MismatchError: another one is, and `on_mismatch` is "stop".
        """
        problem = self.mismatch()
        if problem and on_mismatch == "stop":
            raise MismatchError(
                f"{self.path} was built otherwise ({problem}): choose another --out, "
                "or --on-mismatch set-aside renames it"
            )
        return problem is None and self.exists()

    def exists(self) -> bool:
        """Whether a store is there; an empty folder counts as nothing."""
        return holds_something(self.path)

    def mismatch(self) -> str | None:
        """In words, how the store that is there differs from what is to be written; None if it doesn't.

        Raises:
            NotACacheError: something that is no cache is there.
        """
        if not self.exists():
            return None
        found_recipe, found_layout = read_metadata(self.path)
        lines = differences(found_recipe.to_json(), self.recipe.to_json())
        lines += differences(found_layout.to_json(), self.layout.to_json())
        if not lines:
            return None
        return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")

    def _create(self) -> None:
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        try:
            for name, value in metadata_files(self.recipe, self.layout, 0).items():
                write_json(partial / name, value)
            partial.rename(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise NotACacheError(f"{self.path} appeared while it was being created; run the command again") from None
        fsync_folder(self.path.parent)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store for writing.

        Raises:
            LockedError: another process holds it. The lock is the operating system's and dies with its owner.
        """
        with _held(self.path):
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove what a killed writer left half-written."""
        for path in files_below(self.path, ""):
            if path.name.endswith(PARTIAL_SUFFIX):
                path.unlink()

    def missing(self, seeds: range) -> list[int]:
        """Blocks covering `seeds` that are not committed, or whose record or file sizes are not intact."""
        return [block for block in blocks_of(seeds, self.layout.block_size) if not self.is_committed(block)]

    def is_committed(self, block: int) -> bool:
        """Whether a block has a valid record and files of the recorded sizes (contents are `verify`'s task)."""
        try:
            record = read_record(self.path, block)
        except DamagedError:
            return False
        if record is None or (record.fingerprint, record.layout_hash) != (
            self.recipe.fingerprint,
            self.layout.layout_hash,
        ):
            return False
        for state in self.layout.states:
            file = self.path / chunk_path(states_path(state), block, len(self.recipe.item_shape))
            array = record.arrays.get(states_path(state))
            if array is None or not file.is_file() or file.stat().st_size != array.num_bytes:
                return False
        return True

    def grow(self, seeds: range) -> None:
        """Let the arrays declare at least these seeds, widened to whole blocks. Never shrinks."""
        num_seeds = blocks_of(seeds, self.layout.block_size).stop * self.layout.block_size
        num_seeds = max(num_seeds, TrajectoryCache.open(self.path).num_seeds)
        for name, value in metadata_files(self.recipe, self.layout, num_seeds).items():
            path = self.path / name
            if not path.is_file() or json.loads(path.read_bytes()) != value:
                write_json(path, value)

    def commit(self, block: int, states: Mapping[int, npt.NDArray[np.floating[Any]]]) -> BlockRecord:
        """Write one block, every recorded state of all its seeds, and commit it.

        Args:
            block: its number.
            states: by solver steps done, values in stored units, shape (block_size, *item_shape).

        Raises:
            CacheError: the values have another shape, are not finite, or read back differently.
            OSError: the disk is full or failing; nothing of the block counts then.
        """
        (self.path / record_path(block)).unlink(missing_ok=True)
        arrays: dict[str, ArrayRecord] = {}
        shape = (self.layout.block_size, *self.recipe.item_shape)
        for state in self.layout.states:
            values = np.ascontiguousarray(states[state.step], dtype=np.dtype(self.layout.dtype).newbyteorder("<"))
            if values.shape != shape:
                raise CacheError(f"state {state.name} of block {block} has shape {values.shape}, expected {shape}")
            body = values.tobytes()
            data = body + crc32c(body).to_bytes(CRC_BYTES, "little")
            record = ArrayRecord.of(data, values)
            if record.num_nonfinite:
                seeds = seeds_of(block, self.layout.block_size)
                raise CacheError(
                    f"state {state.name} of seeds {seeds.start}:{seeds.stop} has {record.num_nonfinite} values that "
                    "are not finite; the block was not written"
                )
            path = self.path / chunk_path(states_path(state), block, len(self.recipe.item_shape))
            write_atomically(path, [data])
            if path.read_bytes() != data:
                raise CacheError(f"{path} reads back differently from what was written: is the disk failing?")
            arrays[states_path(state)] = record
        committed = BlockRecord(
            block=block,
            fingerprint=self.recipe.fingerprint,
            layout_hash=self.layout.layout_hash,
            arrays=arrays,
        )
        committed.write(self.path)
        return committed


@contextmanager
def _held(store: Path) -> Iterator[None]:
    folder = store / "provenance"
    folder.mkdir(exist_ok=True)
    note = folder / "writer.json"
    lock = FileLock(folder / "writer.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(f"another build is writing {store} ({_owner(note)}): wait for it, or stop it") from None
    try:
        write_json(note, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _owner(note: Path) -> str:
    try:
        value = json.loads(note.read_bytes())
        return f"process {value['pid']} on {value['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its owner left no note"


def _set_aside(path: Path) -> Path:
    """Rename a store out of the way, never over anything."""
    recipe, layout = read_metadata(path)
    label = f"{path.stem}.stale-{recipe.fingerprint[:8]}-{layout.layout_hash[:4]}"
    target = path.with_name(f"{label}{path.suffix}")
    attempt = 1
    while target.exists():
        attempt += 1
        target = path.with_name(f"{label}.{attempt}{path.suffix}")
    path.rename(target)
    fsync_folder(path.parent)
    return target
