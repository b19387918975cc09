"""Many files of one size, mapped at consecutive addresses, so that NumPy sees a single array of rows.

Random mini-batches touch dozens of files. Indexing them one by one costs more than copying the rows; in one array
`numpy.take` gathers a batch as fast as from one large memory map. Python's `mmap` cannot map a file at a given address,
so this module calls the C library's. Such a map also holds no file descriptor.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

_HUGE_PAGE = 1 << 21
"""Bytes that x86-64 and 64-bit Arm map by one entry if address and file offset agree modulo this."""
_MAP_FIXED = 0x10  # the same on Linux and macOS
_FAILED = ctypes.c_void_p(-1).value


class MappedFiles:
    """Address space with slots for files of equal size, each of whole rows and a few bytes more.

    Attributes:
        rows: uint8, shape (num_slots · rows_per_slot, row_bytes), read-only; zeros where no file is mapped.
        rows_per_slot: distance from the first row of a file to that of the next.
    """

    def __init__(self, num_slots: int, file_bytes: int, row_bytes: int) -> None:
        self._file_bytes = file_bytes
        unit = _slot_unit(file_bytes, row_bytes)
        self._stride = -(-file_bytes // unit) * unit
        self.rows_per_slot = self._stride // row_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._reserved = mmap.mmap(-1, num_slots * self._stride + _HUGE_PAGE, flags=flags, prot=mmap.PROT_READ)
        flat: npt.NDArray[np.uint8] = np.frombuffer(self._reserved, dtype=np.uint8)
        found: int = flat.__array_interface__["data"][0]
        self._begin = -found % _HUGE_PAGE
        self._address = found + self._begin
        self.rows = flat[self._begin : self._begin + num_slots * self._stride].reshape(-1, row_bytes)

    def put(self, slot: int, descriptor: int) -> None:
        """Map a file read-only into a slot, replacing its previous file; the descriptor may be closed afterwards.

        Raises:
            OSError: the system allows no more maps.
        """
        address = self._address + slot * self._stride
        found = _libc().mmap(address, self._file_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        if found == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"can't map a file ({os.strerror(number)})")
        # Rows are read at random: most of what the system reads ahead would be wasted.
        self._reserved.madvise(mmap.MADV_RANDOM, self._begin + slot * self._stride, self._stride)

    def will_need(self, slot: int, start: int, num_bytes: int) -> None:
        """Ask the system to start reading part of a mapped file, without waiting."""
        self._ask(slot * self._stride + start, min(num_bytes, self._file_bytes - start))

    def will_need_rows(self, index: npt.NDArray[np.int64]) -> None:
        """The same for some rows, so that the disk reads them concurrently instead of one after the other."""
        row_bytes = self.rows.shape[1]
        for start in (np.sort(index) * row_bytes).tolist():
            self._ask(start, row_bytes)

    def _ask(self, start: int, num_bytes: int) -> None:
        begin = start & -mmap.PAGESIZE
        self._reserved.madvise(mmap.MADV_WILLNEED, self._begin + begin, start + num_bytes - begin)

    def file(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of a mapped file; a later `put` changes them, so don't keep the array."""
        start = slot * self._stride
        return self.rows.reshape(-1)[start : start + self._file_bytes]


class ReadAhead:
    """Asks the system for rows before they are copied, while they are not in memory.

    Asking costs more than copying if everything is in memory, so it starts when a gather had to wait for the disk. From
    time to time one gather doesn't ask, to find out whether that is still so.
    """

    ASKED = 128
    """Gathers that ask between two that don't: fewer than one in a hundred waits without having asked."""

    def __init__(self) -> None:
        self._left = 0
        self._waits = 0

    def before(self, mapped: MappedFiles, index: npt.NDArray[np.int64]) -> None:
        """Ask for the rows that will be copied, if the last gathers had to wait."""
        if self._left:
            mapped.will_need_rows(index)
        else:
            self._waits = _num_waits()

    def after(self) -> None:
        """Check whether copying had to wait."""
        if self._left:
            self._left -= 1
        elif _num_waits() != self._waits:
            self._left = self.ASKED


def _num_waits() -> int:
    """Page faults of this thread that waited for the disk."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_majflt


def _slot_unit(file_bytes: int, row_bytes: int) -> int:
    """Unit of a slot's size: whole rows, and huge pages if that costs no more address space than the file's size.

    The system can then map a file that it caches in large pieces by huge pages. Rows of hundreds of kilobytes are read
    up to 1.5 times as fast, because the processor looks up fewer pages.
    """
    huge = math.lcm(_HUGE_PAGE, row_bytes)
    return huge if huge <= file_bytes else math.lcm(mmap.PAGESIZE, row_bytes)


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    number, size = ctypes.c_int, ctypes.c_size_t
    library.mmap.argtypes = (ctypes.c_void_p, size, number, number, number, ctypes.c_longlong)
    library.mmap.restype = ctypes.c_void_p
    return library
