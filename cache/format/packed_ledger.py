"""The ledger of a packed store: one sealed record per block, like a raw store's (`advkd.cache.format.ledger`).

For each state it has the packed chunk file's size and sha256; the sha256 of the chunk that was packed; `raw`, the
entry that the unpacked store's ledger will have; and the error, measured on what was decoded from the written file.
Arrays besides the states are not packed, and their entries are those of a raw store.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from advkd.cache.format.array_record import ArrayRecord
from advkd.cache.format.layout import State
from advkd.cache.format.ledger import LedgerRecord
from advkd.cache.format.store_paths import states_path

_HEX64 = re.compile(r"[0-9a-f]{64}")
_PIECE = 1 << 18
SPARE_BYTES = 1 << 20
HOW_TO_FIX = "pull the block anew, or run `advkd-cache pack` again where the raw store is"


def max_packed_bytes(raw_bytes: int) -> int:
    """Upper bound of a packed chunk's size, whatever its record says: no codec here doubles the size."""
    return 2 * raw_bytes + SPARE_BYTES


def error_of(decoded: npt.NDArray[Any], stored: npt.NDArray[Any]) -> tuple[float, float]:
    """Root mean square and largest absolute difference of two arrays, computed piecewise to bound memory."""
    squares, largest = 0.0, 0.0
    one, other = decoded.reshape(-1), stored.reshape(-1)
    for start in range(0, one.size, _PIECE):
        piece = slice(start, start + _PIECE)
        difference = one[piece].astype(np.float32) - other[piece].astype(np.float32)
        squares += float(np.dot(difference, difference))
        largest = max(largest, float(np.abs(difference).max(initial=0.0)))
    return math.sqrt(squares / max(1, one.size)), largest


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedArray:
    """The ledger's entry for one block of one state, packed and unpacked."""

    num_bytes: int
    """Size of the packed chunk file with its trailing CRC; 0 if x_T is drawn again and has no file."""
    sha256: str
    """Of that file, or of no bytes."""
    packed_from: str
    """sha256 of the raw chunk file that was packed."""
    error_rms: float
    """Root mean square of unpacked minus packed values, stored units, to three digits."""
    error_max: float
    """The largest such difference, exact."""
    raw: ArrayRecord
    """The unpacked chunk's entry."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `asdict` wrote.

        Raises:
            ValueError: a part is invalid.
        """
        record = cls(**{**value, "raw": ArrayRecord.from_json(value["raw"])})
        fitting = type(record.num_bytes) is int and 0 <= record.num_bytes <= max_packed_bytes(record.raw.num_bytes)
        fitting = fitting and all(_HEX64.fullmatch(digits) for digits in (record.sha256, record.packed_from))
        errors = (record.error_rms, record.error_max)
        if not fitting or not all(type(error) is float and 0 <= error < math.inf for error in errors):
            raise ValueError("a number is out of range, or a hash is none")
        return record

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "raw": self.raw.to_json()}


class PackedRecord(LedgerRecord[PackedArray | ArrayRecord]):
    """The record of one block of a packed store, whose layout is the packed one; arrays besides states are raw."""

    __slots__ = ()
    maker = "pack"
    how_to_fix = HOW_TO_FIX

    @classmethod
    def entry(cls, value: dict[str, Any]) -> PackedArray | ArrayRecord:
        """Of a state or a further array."""
        return PackedArray.from_json(value) if "raw" in value else ArrayRecord.from_json(value)

    def of(self, state: State) -> PackedArray:
        """The entry of a recorded state."""
        array = self.arrays[states_path(state)]
        assert isinstance(array, PackedArray)
        return array
