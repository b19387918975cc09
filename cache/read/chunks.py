"""A cache's chunk files: opened safely, mapped once, each segment checked against the ledger at its first use."""

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
from advkd.cache.format.array_record import SEGMENT_BYTES, ArrayRecord, crc32c
from advkd.cache.format.arrays import ArraySpec
from advkd.cache.format.hashing import Seeds
from advkd.cache.format.ledger import HOW_TO_FIX, BlockRecord
from advkd.cache.format.records import Records
from advkd.cache.format.source import Source
from advkd.cache.format.zarr_metadata import CRC_BYTES
from advkd.cache.read.chunk_cache import Scratch
from advkd.cache.read.mapping import MappedFiles, ReadAhead

MAX_MAPPED_FILES = 4096
"""Per array; a Linux process may have 65,530 maps by default."""
MAX_MAPPED_BYTES = 1 << 40
"""Per array: address space, not memory."""
Bytes = npt.NDArray[np.uint8]
Checked = npt.NDArray[np.bool_]
_NOT_READY = -(1 << 62)
_Identity = tuple[int, int, int]
"""Device, inode and modification time of a file: a replaced file is checked again."""


class ChunkFiles:
    """Access to chunk files: in the store's folder, or fetched to a scratch folder."""

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
            raise DamagedError(f"{where} is missing, but the ledger has it; {HOW_TO_FIX}") from None
        size = os.fstat(file.fileno()).st_size
        if size != expected.num_bytes:
            file.close()
            raise DamagedError(f"{where} has {size} bytes, the ledger says {expected.num_bytes}; {HOW_TO_FIX}")
        return file

    def path(self, chunk: str, expected: ArrayRecord) -> Path:
        """A chunk's local file, which has the recorded size; a remote one is fetched to the scratch folder.

        Raises:
            DamagedError: it is missing or has another size.
        """
        self.open(chunk, expected).close()
        if self._scratch is not None:
            return self._scratch.path(expected)
        return Path(self.address) / chunk

    def fetch(self, chunks: Sequence[tuple[str, ArrayRecord]], fetched: Callable[[int], None]) -> None:
        """Fetch many chunks of a remote store; does nothing for a local one.

        Raises:
            UsageError: they don't fit on the disk.
            DamagedError: bytes differ from the ledger.
        """
        if self._scratch is not None:
            self._scratch.fetch_all(chunks, fetched)


class ArrayRows:
    """The rows of one array over all blocks.

    Args:
        files: access to its chunks.
        records: the ledger.
        spec: the array.
        num_blocks: blocks that it declares.
    """

    def __init__(self, files: ChunkFiles, records: Records[BlockRecord], spec: ArraySpec, num_blocks: int) -> None:
        self._files = files
        self._records = records
        self._spec = spec
        self._block_size = spec.block_size
        self._row_bytes = spec.item_bytes
        self._body_bytes = spec.block_bytes
        self._mapped: MappedFiles | None = None
        num_slots = min(num_blocks, MAX_MAPPED_FILES, MAX_MAPPED_BYTES // self._body_bytes)
        self._blocks_in_slots = np.full(max(num_slots, 1), -1, dtype=np.int64)
        self._next_slot = 0
        self._first_rows = np.full(num_blocks, -1, dtype=np.int64)
        """First row of each mapped block; -1 if it isn't mapped."""
        self._shifts = np.full(num_blocks, _NOT_READY, dtype=np.int64)
        """Row minus seed for each block that is mapped and whose segments were all checked."""
        self._checked: dict[int, tuple[_Identity, Checked]] = {}
        self._ahead = ReadAhead()
        self._lock = threading.Lock()  # one thread must not replace a block that another gathers from

    def gather(self, seeds: Seeds, out: Bytes | None = None) -> Bytes:
        """Copy the rows of some seeds, after checking the segments that contain them.

        Args:
            seeds: int64, shape (n,), each declared.
            out: uint8, shape (n, row_bytes), C-contiguous; a new array if None.

        Raises:
            NotCachedError: a block was never committed.
            DamagedError: its record or bytes are damaged.
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
            if out is None:  # only now, because files of the declared size exist
                out = np.empty((len(seeds), self._row_bytes), dtype=np.uint8)
            if len(seeds):
                assert self._mapped is not None
                self._ahead.before(self._mapped, index)
                # The indices are in range; mode="raise" would gather into a buffer first.
                self._mapped.rows.take(index, axis=0, out=out, mode="clip")
                self._ahead.after()
            return out

    def _gather_in_parts(self, seeds: Seeds, blocks: Seeds, starts: Seeds, out: Bytes | None) -> Bytes:
        parts = np.searchsorted(starts, blocks, side="right")
        for part in range(1, len(starts) + 1):
            here = np.flatnonzero(parts == part)
            index = self._prepare(seeds[here], blocks[here])
            if out is None:
                out = np.empty((len(seeds), self._row_bytes), dtype=np.uint8)
            assert self._mapped is not None
            self._ahead.before(self._mapped, index)
            out[here] = self._mapped.rows[index]
            self._ahead.after()
        assert out is not None
        return out

    def block(self, block: int) -> Bytes:
        """All rows of a block without copying, as a read-only map of its own with every segment checked.

        Raises:
            NotCachedError: a block was never committed.
            DamagedError: its record or bytes are damaged.
        """
        with self._open(block) as (descriptor, checked):
            mapped = MappedFiles(1, self._body_bytes + CRC_BYTES, self._row_bytes)
            mapped.put(0, descriptor)
        if not checked.all():
            mapped.will_need(0, 0, self._body_bytes)
        with self._lock:
            self._check(mapped.file(0), block, checked, np.flatnonzero(~checked))
        return mapped.rows[: self._block_size]

    def _prepare(self, seeds: Seeds, blocks: Seeds) -> Seeds:
        """Map unmapped blocks, check unchecked segments, return the seeds' mapped rows."""
        rows = seeds - blocks * self._block_size
        unready = np.unique(blocks[self._shifts[blocks] == _NOT_READY])
        for block in unready:
            if self._first_rows[block] < 0:
                self._take_slot(int(block), blocks)
        for block in unready:
            here = rows[blocks == block] * self._row_bytes
            first, last = here // SEGMENT_BYTES, (here + self._row_bytes - 1) // SEGMENT_BYTES
            touched = np.unique([np.minimum(first + i, last) for i in range(int((last - first).max()) + 1)])
            assert self._mapped is not None
            slot = int(self._first_rows[block]) // self._mapped.rows_per_slot
            checked = self._checked[int(block)][1]
            segments = touched[~checked[touched]]
            for segment in segments:
                self._mapped.will_need(slot, int(segment) * SEGMENT_BYTES, SEGMENT_BYTES)
            self._check(self._mapped.file(slot), int(block), checked, segments)
            self._note_ready(int(block), bool(checked.all()))
        index: Seeds = self._first_rows[blocks] + rows
        return index

    def _note_ready(self, block: int, ready: bool) -> None:
        self._shifts[block] = self._first_rows[block] - block * self._block_size if ready else _NOT_READY

    def _take_slot(self, block: int, wanted: Seeds) -> None:
        """Map a block into a free slot, or one whose block isn't wanted now."""
        with self._open(block) as (descriptor, checked):
            if self._mapped is None:  # only now, because a file of the declared size exists
                self._mapped = MappedFiles(len(self._blocks_in_slots), self._body_bytes + CRC_BYTES, self._row_bytes)
            slot = self._next_slot
            while (held := self._blocks_in_slots[slot]) >= 0 and (wanted == held).any():
                slot = (slot + 1) % len(self._blocks_in_slots)
            self._next_slot = (slot + 1) % len(self._blocks_in_slots)
            if held >= 0:
                self._first_rows[held], self._shifts[held], self._blocks_in_slots[slot] = -1, _NOT_READY, -1
            self._mapped.put(slot, descriptor)
            self._blocks_in_slots[slot] = block
            self._first_rows[block] = slot * self._mapped.rows_per_slot
            self._note_ready(block, bool(checked.all()))

    @contextmanager
    def _open(self, block: int) -> Iterator[tuple[int, Checked]]:
        """A descriptor of a block's file, and a mask of its checked segments."""
        expected = self._records[block].arrays[self._spec.path]
        with self._files.open(self._spec.chunk_path(block), expected) as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if block not in self._checked or self._checked[block][0] != identity:
                self._checked[block] = (identity, np.zeros(len(expected.segments) // 8, dtype=np.bool_))
            yield file.fileno(), self._checked[block][1]

    def _check(self, file: Bytes, block: int, checked: Checked, segments: Seeds) -> None:
        if len(segments):
            crcs = self._records[block].arrays[self._spec.path].crcs()
        for segment in segments:
            start = int(segment) * SEGMENT_BYTES
            body = file[start : min(start + SEGMENT_BYTES, self._body_bytes)]
            if crc32c(body.tobytes()) != crcs[segment]:
                where = f"{self._files.address}/{self._spec.chunk_path(block)}"
                raise DamagedError(f"{where} is damaged near byte {start}; {HOW_TO_FIX}")
            checked[segment] = True
