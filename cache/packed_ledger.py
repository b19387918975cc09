"""The ledger of a packed store: one sealed record per block, like a raw store's (`advkd.cache.ledger`).

For each state it has the packed chunk file's size and sha256; the sha256 of the chunk that was packed; `raw`, the
entry that the unpacked store's ledger will have; and the error, measured on what was decoded from the written file.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from advkd.cache.durable import write_atomically
from advkd.cache.errors import DamagedError, NotCachedError
from advkd.cache.layout import CRC_BYTES, FORMAT, record_path, states_path
from advkd.cache.ledger import ArrayRecord, BlockRecord, num_segments, torn
from advkd.cache.recipe import Layout, Recipe
from advkd.cache.records import MAX_RECORDS
from advkd.cache.seal import seal, unseal
from advkd.cache.source import Source

_HEX64 = re.compile(r"[0-9a-f]{64}")
_PIECE = 1 << 18
SPARE_BYTES = 1 << 20


def max_packed_bytes(raw_bytes: int) -> int:
    """What a packed chunk can have at most, whatever its record says: no codec here doubles anything."""
    return 2 * raw_bytes + SPARE_BYTES


def error_of(decoded: npt.NDArray[Any], stored: npt.NDArray[Any]) -> tuple[float, float]:
    """Root mean square and largest absolute difference of two arrays, in pieces."""
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
    """What one block of one state must look like, packed and unpacked."""

    num_bytes: int
    """Size of the packed chunk file, its trailing CRC included; 0 where x_T is drawn again and there is none."""
    sha256: str
    """Of that file; of nothing where there is none."""
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
            ValueError: a part can't be.
        """
        record = cls(**{**value, "raw": ArrayRecord.from_json(value["raw"])})
        fitting = type(record.num_bytes) is int and 0 <= record.num_bytes <= max_packed_bytes(record.raw.num_bytes)
        fitting = fitting and all(_HEX64.fullmatch(digits) for digits in (record.sha256, record.packed_from))
        errors = (record.error_rms, record.error_max)
        if not fitting or not all(type(error) is float and 0 <= error < math.inf for error in errors):
            raise ValueError("a number or hash can't be")
        return record


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRecord:
    """The ledger's entry for one block of a packed store."""

    block: int
    fingerprint: str
    layout_hash: str
    """Of the packed layout."""
    arrays: dict[str, PackedArray]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without the record's own hash."""
        return {
            "format": FORMAT,
            "block": self.block,
            "fingerprint": self.fingerprint,
            "layout_hash": self.layout_hash,
            "arrays": {name: asdict(array) for name, array in self.arrays.items()},
        }

    def write(self, store: Path) -> None:
        """Commit the block."""
        write_atomically(store / record_path(self.block), [seal(self.to_json())])

    def raw(self, layout: Layout) -> BlockRecord:
        """The record of the unpacked block in a layout."""
        return BlockRecord(
            block=self.block,
            fingerprint=self.fingerprint,
            layout_hash=layout.layout_hash,
            arrays={name: array.raw for name, array in self.arrays.items()},
        )

    @classmethod
    def parse(cls, raw: bytes, block: int, recipe: Recipe, layout: Layout, where: str) -> Self:
        """Read a record's bytes.

        Raises:
            DamagedError: it is torn or altered, or belongs to another block or store.
        """
        try:
            value = unseal(raw)
            if value["block"] != block or value["format"] != FORMAT:
                raise ValueError("it is of another block or format")
            names = {states_path(state) for state in layout.states}
            if value["arrays"].keys() != names:
                raise ValueError("it is of other states")
            record = cls(
                block=block,
                fingerprint=str(value["fingerprint"]),
                layout_hash=str(value["layout_hash"]),
                arrays={name: PackedArray.from_json(array) for name, array in value["arrays"].items()},
            )
            if seal(record.to_json()) != raw:
                raise ValueError("it is not written as records are")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise torn(where, block, error, "pack") from None
        if (record.fingerprint, record.layout_hash) != (recipe.fingerprint, layout.layout_hash):
            raise DamagedError(f"{where}: the ledger record of block {block} belongs to another cache")
        body_bytes = layout.block_bytes(recipe.item_shape)
        expected = (body_bytes + CRC_BYTES, 8 * num_segments(body_bytes))
        if any((array.raw.num_bytes, len(array.raw.segments)) != expected for array in record.arrays.values()):
            raise DamagedError(f"{where}: the ledger record of block {block} doesn't fit the layout")
        return record


class PackedRecords:
    """Ledger records of a packed store by block, read when they are asked for."""

    def __init__(self, files: Source, recipe: Recipe, layout: Layout) -> None:
        self._files, self._recipe, self._layout = files, recipe, layout
        self._kept: OrderedDict[int, PackedRecord] = OrderedDict()

    def __getitem__(self, block: int) -> PackedRecord:
        """The record of a committed block.

        Raises:
            NotCachedError: the block is not there.
            DamagedError: its record is torn, altered or of another cache.
        """
        if block not in self._kept:
            path = record_path(block)
            try:
                raw = self._files.read(path)
            except FileNotFoundError:
                raise NotCachedError(f"{self._files.address} does not hold block {block}") from None
            where = f"{self._files.address}/{path}"
            self._kept[block] = PackedRecord.parse(raw, block, self._recipe, self._layout, where)
            if len(self._kept) > MAX_RECORDS:
                self._kept.popitem(last=False)
        return self._kept[block]
