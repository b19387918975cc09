"""The ledger: one JSON record per block, written last. A block without a valid record does not exist.

A record maps each array to its chunk file's size, sha256, a CRC-32C per MiB (so that readers check just the segments
that they touch), the range of its values and how many of them are not finite. It carries its own hash, so that a
torn or edited record is recognised.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from advkd.cache.durable import write_json
from advkd.cache.errors import DamagedError
from advkd.cache.layout import CRC_BYTES, FORMAT, record_path
from advkd.cache.recipe import digest

SEGMENT_BYTES = 1 << 20


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of some bytes."""
    return int(google_crc32c.value(bytes(data)))


def segment_crcs(body: memoryview) -> tuple[int, ...]:
    """CRC-32C of each MiB of a chunk's values, without the CRC that ends the file.

    With it the last one would be worthless: the CRC of any message followed by its own CRC is the same constant.
    """
    return tuple(crc32c(body[start : start + SEGMENT_BYTES]) for start in range(0, len(body), SEGMENT_BYTES))


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayRecord:
    """What one block of one array must look like."""

    num_bytes: int
    """Size of the chunk file, its trailing CRC included."""
    sha256: str
    segments: tuple[int, ...]
    minimum: float
    maximum: float
    num_nonfinite: int

    @classmethod
    def of(cls, file_bytes: bytes, values: npt.NDArray[np.floating[Any]]) -> Self:
        """Describe a chunk file that holds these values."""
        finite = values[np.isfinite(values)]
        return cls(
            num_bytes=len(file_bytes),
            sha256=hashlib.sha256(file_bytes).hexdigest(),
            segments=segment_crcs(memoryview(file_bytes)[:-CRC_BYTES]),
            minimum=float(finite.min()) if finite.size else 0.0,
            maximum=float(finite.max()) if finite.size else 0.0,
            num_nonfinite=int(values.size - finite.size),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRecord:
    """The ledger's entry for one block."""

    block: int
    fingerprint: str
    layout_hash: str
    arrays: dict[str, ArrayRecord]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without the record's own hash."""
        arrays = {name: {**asdict(array), "segments": list(array.segments)} for name, array in self.arrays.items()}
        return {
            "format": FORMAT,
            "block": self.block,
            "fingerprint": self.fingerprint,
            "layout_hash": self.layout_hash,
            "arrays": arrays,
        }

    @property
    def record_hash(self) -> str:
        """sha256 over everything the record says."""
        return digest(self.to_json())

    def write(self, store: Path) -> None:
        """Commit the block: from here on it exists."""
        write_json(store / record_path(self.block), {**self.to_json(), "record_sha256": self.record_hash})


def read_record(store: Path, block: int) -> BlockRecord | None:
    """Read one record; None if the block was never committed.

    Raises:
        DamagedError: the record is torn, edited, or belongs to another block.
    """
    path = store / record_path(block)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        value = json.loads(raw)
        arrays = {
            str(name): ArrayRecord(
                num_bytes=int(array["num_bytes"]),
                sha256=str(array["sha256"]),
                segments=tuple(int(crc) for crc in array["segments"]),
                minimum=float(array["minimum"]),
                maximum=float(array["maximum"]),
                num_nonfinite=int(array["num_nonfinite"]),
            )
            for name, array in value["arrays"].items()
        }
        record = BlockRecord(
            block=int(value["block"]),
            fingerprint=str(value["fingerprint"]),
            layout_hash=str(value["layout_hash"]),
            arrays=arrays,
        )
        intact = record.record_hash == value["record_sha256"] and record.block == block
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(
            f"{path}: the ledger record of block {block} is torn or altered; "
            "`advkd-cache build` with the same settings makes the block again"
        )
    return record


def content_digest(records: list[BlockRecord]) -> str:
    """One hash that names the content of some committed blocks, for a paper or a model card."""
    return digest([[record.block, record.record_hash] for record in records])
