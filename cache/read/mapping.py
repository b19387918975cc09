"""Many files of one size, mapped one behind the other, so that NumPy sees a single array of rows.

Random mini-batches touch dozens of files. Indexing them one by one costs more than copying the rows does; in one array
`numpy.take` gathers a batch at a large memory map's own speed. Python's `mmap` cannot map a file at a chosen address,
so the one call that does is made to the C library. A map made this way also holds no file descriptor.
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
"""Bytes that x86-64 and 64-bit Arm map by one entry, where address and offset in the file agree to the multiple."""
_MAP_FIXED = 0x10  # the same on Linux and macOS
_FAILED = ctypes.c_void_p(-1).value


class Window:
    """Address space for some files of equal size, each of whole rows and a few bytes more.

    Attributes:
        rows: uint8, shape (num_slots · rows_per_slot, row_bytes), read-only; zeros where nothing was mapped.
        rows_per_slot: from the first row of one file to that of the next.
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
        """Map a file read-only in place of what was there; the descriptor may be closed afterwards.

        Raises:
            OSError: the system refuses, for it allows no more maps.
        """
        address = self._address + slot * self._stride
        found = _libc().mmap(address, self._file_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        if found == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"can't map a file ({os.strerror(number)})")
        # Rows are wanted at random: what the system would read around one would mostly not be wanted.
        self._reserved.madvise(mmap.MADV_RANDOM, self._begin + slot * self._stride, self._stride)

    def will_need(self, slot: int, start: int, num_bytes: int) -> None:
        """Let the system begin to read part of a mapped file, without waiting for it."""
        self._ask(slot * self._stride + start, min(num_bytes, self._file_bytes - start))

    def will_need_rows(self, index: npt.NDArray[np.int64]) -> None:
        """The same for some rows, so that the disk serves them all at once; waiting for each in turn is far slower."""
        row_bytes = self.rows.shape[1]
        for start in (np.sort(index) * row_bytes).tolist():
            self._ask(start, row_bytes)

    def _ask(self, start: int, num_bytes: int) -> None:
        begin = start & -mmap.PAGESIZE
        self._reserved.madvise(mmap.MADV_WILLNEED, self._begin + begin, start + num_bytes - begin)

    def file(self, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of a mapped file. A later `put` changes what it shows: look, and let go."""
        start = slot * self._stride
        return self.rows.reshape(-1)[start : start + self._file_bytes]


class ReadAhead:
    """Asks for rows before they are copied, while they are not in memory.

    Asking costs more than copying does where everything is in memory already, so it begins when a gather had to wait
    for the disk, and from time to time one goes without to see whether that is still so.
    """

    ASKED = 128
    """Gathers that ask between two that don't."""

    def __init__(self) -> None:
        self._left = 0
        self._waits = 0

    def before(self, window: Window, index: npt.NDArray[np.int64]) -> None:
        """Ask for rows of a window that will be copied, if need be."""
        if self._left:
            window.will_need_rows(index)
        else:
            self._waits = _num_waits()

    def after(self) -> None:
        """See whether copying them had to wait."""
        if self._left:
            self._left -= 1
        elif _num_waits() != self._waits:
            self._left = self.ASKED


def _num_waits() -> int:
    """How often this thread had to wait for the disk to bring a page that it touched."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_majflt


def _slot_unit(file_bytes: int, row_bytes: int) -> int:
    """What a slot's size is a multiple of: whole rows, and huge pages if that costs no more addresses than the file's.

    The system maps a file that it holds in large pieces by huge pages then. Rows of hundreds of kilobytes come out up
    to half as fast again: else the processor looks up a page for every four kilobytes.
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
