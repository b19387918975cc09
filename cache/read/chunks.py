"""A cache's chunk files: opened with care, mapped once, each segment checked against the ledger when first touched."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import DamagedError
from advkd.cache.format.layout import State
from advkd.cache.format.ledger import HOW_TO_MEND, SEGMENT_BYTES, ArrayRecord, BlockRecord, crc32c
from advkd.cache.format.records import Records
from advkd.cache.format.source import Source
from advkd.cache.format.zarr_metadata import CRC_BYTES
from advkd.cache.read.chunk_cache import Scratch
from advkd.cache.read.mapping import ReadAhead, Window

MAX_MAPPED_FILES = 4096
"""Of one state; a Linux process may map 65,530 altogether."""
MAX_MAPPED_BYTES = 1 << 40
"""Of one state: address space, not memory."""
Bytes = npt.NDArray[np.uint8]
Seeds = npt.NDArray[np.int64]
Checked = npt.NDArray[np.bool_]
_NOT_READY = -(1 << 62)
_Identity = tuple[int, int, int]
"""Device, inode and time of change of a file: what was checked of another doesn't count for it."""


class ChunkFiles:
    """Where the chunk files are: in the store's folder, or brought to a scratch folder."""

    def __init__(self, source: Source, scratch: Scratch | None) -> None:
        self.address = source.address
        self._source = source
        self._scratch = scratch

    def open(self, chunk: str, expected: ArrayRecord) -> BinaryIO:
        """A chunk's local file, opened, which has the recorded size.

        Raises:
            DamagedError: it is missing or has another size.
        """
        where = f"{self.address}/{chunk}"
        try:
            if self._scratch is not None:
                file: BinaryIO = self._scratch.fetch(chunk, expected).open("rb")
            else:
                file = self._source.open(chunk, expected.num_bytes)
        except FileNotFoundError:
            raise DamagedError(f"{where} is missing, but the ledger has it; {HOW_TO_MEND}") from None
        size = os.fstat(file.fileno()).st_size
        if size != expected.num_bytes:
            file.close()
            raise DamagedError(f"{where} has {size} bytes, the ledger says {expected.num_bytes}; {HOW_TO_MEND}")
        return file

    def path(self, chunk: str, expected: ArrayRecord) -> Path:
        """A chunk's local file, which has the recorded size; a remote one comes to the scratch folder.

        Raises:
            DamagedError: it is missing or has another size.
        """
        self.open(chunk, expected).close()
        if self._scratch is not None:
            return self._scratch.path(expected)
        return Path(self.address) / chunk

    def fetch(self, chunks: Sequence[tuple[str, ArrayRecord]], fetched: Callable[[int], None]) -> None:
        """Bring many chunks of a remote store here; nothing to do for a local one.

        Raises:
            UsageError: they don't fit on the disk.
            DamagedError: bytes differ from the ledger.
        """
        if self._scratch is not None:
            self._scratch.fetch_all(chunks, fetched)


class StateRows:
    """The rows of one recorded state over all blocks.

    Args:
        files: where its chunks are.
        records: the ledger.
        state: which one.
        num_blocks: blocks that the array declares.
        block_size: rows of each.
        row_bytes: bytes of each row.
    """

    def __init__(
        self,
        files: ChunkFiles,
        records: Records[BlockRecord],
        state: State,
        num_blocks: int,
        block_size: int,
        row_bytes: int,
    ) -> None:
        self._files = files
        self._records = records
        self._state = state
        self._block_size = block_size
        self._row_bytes = row_bytes
        self._body_bytes = block_size * row_bytes
        self._window: Window | None = None
        num_slots = min(num_blocks, MAX_MAPPED_FILES, MAX_MAPPED_BYTES // self._body_bytes)
        self._blocks_in_slots = np.full(max(num_slots, 1), -1, dtype=np.int64)
        self._next_slot = 0
        self._first_rows = np.full(num_blocks, -1, dtype=np.int64)
        """Of each block in the window; -1 where it isn't mapped."""
        self._shifts = np.full(num_blocks, _NOT_READY, dtype=np.int64)
        """What leads from a seed of each block to its row in the window, where every segment was checked."""
        self._checked: dict[int, tuple[_Identity, Checked]] = {}
        self._ahead = ReadAhead()
        self._lock = threading.Lock()  # a thread must not map another block where one just gathers

    def gather(self, seeds: Seeds, out: Bytes | None = None) -> Bytes:
        """Copy the rows of some seeds, after checking the segments that they lie in.

        Args:
            seeds: int64, shape (n,), each declared.
            out: uint8, shape (n, row_bytes), C-contiguous; a new array if None.

        Raises:
            NotCachedError: a block was never committed.
            DamagedError: its record or bytes are not what they were.
        """
        blocks = seeds // self._block_size
        with self._lock:
            index: Seeds = self._shifts[blocks]
            index += seeds
            if not len(seeds) or index.min() < 0:
                num_slots = len(self._blocks_in_slots)
                if len(blocks) > num_slots and len(wanted := np.unique(blocks)) > num_slots:
                    return self._gather_in_parts(seeds, blocks, wanted[::num_slots], out)
                index = self._prepare(seeds, blocks)
            if out is None:  # only now: files of the sizes that are claimed are there
                out = np.empty((len(seeds), self._row_bytes), dtype=np.uint8)
            if len(seeds):
                assert self._window is not None
                self._ahead.before(self._window, index)
                # The indices are in range; mode="raise" would gather into a buffer first.
                self._window.rows.take(index, axis=0, out=out, mode="clip")
                self._ahead.after()
            return out

    def _gather_in_parts(self, seeds: Seeds, blocks: Seeds, starts: Seeds, out: Bytes | None) -> Bytes:
        parts = np.searchsorted(starts, blocks, side="right")
        for part in range(1, len(starts) + 1):
            here = np.flatnonzero(parts == part)
            index = self._prepare(seeds[here], blocks[here])
            if out is None:
                out = np.empty((len(seeds), self._row_bytes), dtype=np.uint8)
            assert self._window is not None
            self._ahead.before(self._window, index)
            out[here] = self._window.rows[index]
            self._ahead.after()
        assert out is not None
        return out

    def block(self, block: int) -> Bytes:
        """All rows of a block without copying: a read-only map of its own, every segment checked.

        Raises:
            NotCachedError: a block was never committed.
            DamagedError: its record or bytes are not what they were.
        """
        with self._open(block) as (descriptor, checked):
            window = Window(1, self._body_bytes + CRC_BYTES, self._row_bytes)
            window.put(0, descriptor)
        if not checked.all():
            window.will_need(0, 0, self._body_bytes)
        with self._lock:
            self._check(window.file(0), block, checked, np.flatnonzero(~checked))
        return window.rows[: self._block_size]

    def _prepare(self, seeds: Seeds, blocks: Seeds) -> Seeds:
        """Map the blocks that are not, check the segments that were not; the seeds' rows in the window."""
        rows = seeds - blocks * self._block_size
        unready = np.unique(blocks[self._shifts[blocks] == _NOT_READY])
        for block in unready:
            if self._first_rows[block] < 0:
                self._take_slot(int(block), blocks)
        for block in unready:
            here = rows[blocks == block] * self._row_bytes
            first, last = here // SEGMENT_BYTES, (here + self._row_bytes - 1) // SEGMENT_BYTES
            touched = np.unique([np.minimum(first + i, last) for i in range(int((last - first).max()) + 1)])
            assert self._window is not None
            slot = int(self._first_rows[block]) // self._window.rows_per_slot
            checked = self._checked[int(block)][1]
            segments = touched[~checked[touched]]
            for segment in segments:
                self._window.will_need(slot, int(segment) * SEGMENT_BYTES, SEGMENT_BYTES)
            self._check(self._window.file(slot), int(block), checked, segments)
            self._note_ready(int(block), bool(checked.all()))
        index: Seeds = self._first_rows[blocks] + rows
        return index

    def _note_ready(self, block: int, ready: bool) -> None:
        self._shifts[block] = self._first_rows[block] - block * self._block_size if ready else _NOT_READY

    def _take_slot(self, block: int, wanted: Seeds) -> None:
        """Map a block where none is, or one that isn't wanted now."""
        with self._open(block) as (descriptor, checked):
            if self._window is None:  # only now: a file of the size that is claimed is there
                self._window = Window(len(self._blocks_in_slots), self._body_bytes + CRC_BYTES, self._row_bytes)
            slot = self._next_slot
            while (held := self._blocks_in_slots[slot]) >= 0 and (wanted == held).any():
                slot = (slot + 1) % len(self._blocks_in_slots)
            self._next_slot = (slot + 1) % len(self._blocks_in_slots)
            if held >= 0:
                self._first_rows[held], self._shifts[held], self._blocks_in_slots[slot] = -1, _NOT_READY, -1
            self._window.put(slot, descriptor)
            self._blocks_in_slots[slot] = block
            self._first_rows[block] = slot * self._window.rows_per_slot
            self._note_ready(block, bool(checked.all()))

    @contextmanager
    def _open(self, block: int) -> Iterator[tuple[int, Checked]]:
        """A descriptor of a block's file, and which of its segments were checked."""
        chunk, expected = self._records.chunk(self._state, block)
        with self._files.open(chunk, expected) as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if block not in self._checked or self._checked[block][0] != identity:
                self._checked[block] = (identity, np.zeros(len(expected.segments) // 8, dtype=np.bool_))
            yield file.fileno(), self._checked[block][1]

    def _check(self, file: Bytes, block: int, checked: Checked, segments: Seeds) -> None:
        if len(segments):
            crcs = self._records.chunk(self._state, block)[1].crcs()
        for segment in segments:
            start = int(segment) * SEGMENT_BYTES
            body = file[start : min(start + SEGMENT_BYTES, self._body_bytes)]
            if crc32c(body.tobytes()) != crcs[segment]:
                raise DamagedError(
                    f"{self._files.address}: state {self._state.name} of block {block} is damaged near byte {start}; "
                    f"{HOW_TO_MEND}"
                )
            checked[segment] = True
