"""The ledger: one sealed JSON record per block, written last. A block without a valid record does not exist.

A record maps each array to its chunk file's size, sha256, a CRC-32C per MiB (so that readers check just the segments
that they touch), the range of its values, how many of them are not finite, and what rounding to the stored dtype
cost. It ends with its own hash (`advkd.cache.files.sealed_json`), so that a torn or edited record is recognised.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import Field, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from advkd.cache.errors import DamagedError
from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal, seal_of, unseal, unsealed
from advkd.cache.files.strict_json import canonical_json, in_line
from advkd.cache.format.recipe import digest
from advkd.cache.format.store_paths import record_path
from advkd.cache.format.zarr_metadata import CRC_BYTES, FORMAT

SEGMENT_BYTES = 1 << 20
HOW_TO_MEND = "pull the block anew, or run `advkd-cache verify --repair` and `advkd-cache build` with the same settings"
_ARRAY_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*")
_HEX = re.compile(r"[0-9a-f]*")
_LARGEST = float(np.finfo(np.float32).max)
_PIECE = 1 << 18


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of some bytes."""
    return int(google_crc32c.value(bytes(data)))


def num_segments(body_bytes: int) -> int:
    """How many segments a chunk's values have."""
    return -(-body_bytes // SEGMENT_BYTES)


def segment_crcs(body: memoryview) -> str:
    """CRC-32C of each MiB of a chunk's values, eight hex digits each, without the CRC that ends the file.

    With it the last one would be worthless: the CRC of any message followed by its own CRC is the same constant.
    """
    starts = range(0, len(body), SEGMENT_BYTES)
    return "".join(f"{crc32c(body[start : start + SEGMENT_BYTES]):08x}" for start in starts)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayRecord:
    """What one block of one array must look like."""

    num_bytes: int
    """Size of the chunk file, its trailing CRC included."""
    sha256: str
    """Of the chunk file."""
    segments: str
    """CRC-32C of each MiB of the values, eight hex digits each."""
    minimum: float
    maximum: float
    num_nonfinite: int
    rounding_rms: float
    """Root mean square of stored minus computed value, stored units; to three digits."""
    rounding_max: float
    """The largest such difference, to three digits."""

    @classmethod
    def of(
        cls,
        file_bytes: bytes,
        stored: npt.NDArray[np.floating[Any]],
        computed: npt.NDArray[np.floating[Any]],
    ) -> Self:
        """Describe a chunk file that holds `stored`, which was rounded from `computed`."""
        low, high, num_finite, squares, largest = math.inf, -math.inf, 0, 0.0, 0.0
        flat, exact = stored.reshape(-1), computed.reshape(-1)
        for start in range(0, flat.size, _PIECE):  # in pieces, so that a large block needs no large temporaries
            piece = flat[start : start + _PIECE].astype(np.float64)
            finite = np.isfinite(piece)
            difference = np.where(finite, piece, 0.0) - np.where(finite, exact[start : start + _PIECE], 0.0)
            num_finite += int(finite.sum())
            squares += float(np.dot(difference, difference))
            largest = max(largest, float(np.abs(difference).max(initial=0.0)))
            low, high = min(low, np.min(piece[finite], initial=low)), max(high, np.max(piece[finite], initial=high))
        return cls(
            num_bytes=len(file_bytes),
            sha256=hashlib.sha256(file_bytes).hexdigest(),
            segments=segment_crcs(memoryview(file_bytes)[:-CRC_BYTES]),
            minimum=float(low) if num_finite else 0.0,
            maximum=float(high) if num_finite else 0.0,
            num_nonfinite=int(flat.size - num_finite),
            # Three digits, so that another order of summation gives the same record.
            rounding_rms=float(f"{math.sqrt(squares / max(1, num_finite)):.2e}"),
            rounding_max=float(f"{largest:.2e}"),
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `asdict` wrote.

        Raises:
            ValueError: a part can't be.
        """
        record = cls(**value)
        integers = (record.num_bytes, record.num_nonfinite)
        floats = (record.minimum, record.maximum, record.rounding_rms, record.rounding_max)
        fitting = all(type(number) is int and 0 <= number < 1 << 63 for number in integers)
        fitting = fitting and all(type(number) is float and abs(number) <= _LARGEST for number in floats)
        fitting = fitting and all(_HEX.fullmatch(digits) for digits in (record.sha256, record.segments))
        if not fitting or len(record.sha256) != 64 or len(record.segments) % 8:
            raise ValueError("a number or hash can't be")
        return record

    @property
    def raw(self) -> ArrayRecord:
        """Itself: it is no packed array's."""
        return self

    def crcs(self) -> npt.NDArray[np.uint32]:
        """CRC of each segment, uint32."""
        return np.frombuffer(bytes.fromhex(self.segments), dtype=">u4").astype(np.uint32)


class ArrayEntry(Protocol):
    """What a record says of one array: an `ArrayRecord`, or what a packed store has around one."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def raw(self) -> ArrayRecord:
        """The array's entry in a raw store."""


Entry = TypeVar("Entry", bound=ArrayEntry)


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerRecord(Generic[Entry]):
    """The ledger's entry for one block: of a raw store (`BlockRecord`) or of a packed one."""

    maker: ClassVar[str]
    """The subcommand that makes a block again."""
    how_to_mend: ClassVar[str]
    """What to do about a block that is damaged."""
    block: int
    fingerprint: str
    layout_hash: str
    arrays: dict[str, Entry]
    """By array path, such as `states/0000`."""

    @classmethod
    def entry(cls, value: dict[str, Any]) -> Entry:
        """Read what `asdict` made of an array's entry.

        Raises:
            ValueError: a part can't be.
        """
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without the record's own hash."""
        return {
            "format": FORMAT,
            "block": self.block,
            "fingerprint": self.fingerprint,
            "layout_hash": self.layout_hash,
            "arrays": {name: asdict(array) for name, array in self.arrays.items()},
        }

    def unpacked(self, layout_hash: str) -> BlockRecord:
        """The block's record in the raw store of a layout."""
        return BlockRecord(
            block=self.block,
            fingerprint=self.fingerprint,
            layout_hash=layout_hash,
            arrays={name: array.raw for name, array in self.arrays.items()},
        )

    @property
    def record_hash(self) -> str:
        """sha256 over everything the record says."""
        return digest(self.to_json())

    def write(self, store: Path) -> None:
        """Commit the block: from here on it exists."""
        write_atomically(store / record_path(self.block), [seal(self.to_json())])

    @classmethod
    def parse(cls, raw: bytes, block: int, where: str) -> Self:
        """Read a record's bytes.

        Raises:
            DamagedError: the record is torn, edited, or belongs to another block.
        """
        try:
            value = unseal(raw)
            if value["block"] != block or value["format"] != FORMAT:
                raise ValueError("it is of another block or format")
            if not all(_ARRAY_NAME.fullmatch(name) for name in value["arrays"]):
                raise ValueError("it names an array outside the store")
            record = cls(
                block=block,
                fingerprint=str(value["fingerprint"]),
                layout_hash=str(value["layout_hash"]),
                arrays={name: cls.entry(array) for name, array in value["arrays"].items()},
            )
            if seal(record.to_json()) != raw:
                raise ValueError("it is not written as records are")
            return record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _torn(where, block, error, cls.maker) from None


class BlockRecord(LedgerRecord[ArrayRecord]):
    """The entry for one block of a raw store."""

    __slots__ = ()
    maker = "build"
    how_to_mend = HOW_TO_MEND

    @classmethod
    def entry(cls, value: dict[str, Any]) -> ArrayRecord:
        """`ArrayRecord.from_json`."""
        return ArrayRecord.from_json(value)


def checked_seal(raw: bytes, block: int, fingerprint: str, layout_hash: str, where: str) -> str:
    """The hash that a record carries, checked against its bytes and its place without parsing them.

    Canonical JSON sorts its keys, so what says where a record belongs stands right before the hash.

    Raises:
        DamagedError: the record is torn, edited, or belongs elsewhere.
    """
    try:
        stated = seal_of(raw)
    except ValueError as error:
        raise _torn(where, block, error, BlockRecord.maker) from None
    place = {"block": block, "fingerprint": fingerprint, "format": FORMAT, "layout_hash": layout_hash}
    if not unsealed(raw).endswith(b"," + canonical_json(place)[1:-1]):
        raise DamagedError(f"{where}: the ledger record of block {block} belongs to another block or cache")
    return stated


def _torn(where: str, block: int, error: Exception, maker: str) -> DamagedError:
    return DamagedError(
        f"{where}: the ledger record of block {block} is torn or altered ({in_line(error)}); "
        f"`advkd-cache {maker}` with the same settings makes the block again"
    )


def content_digest(seals: list[tuple[int, str]]) -> str:
    """One hash that names the content of some committed blocks, for a paper or a model card.

    Args:
        seals: (block, its record's hash), ascending.
    """
    return hashlib.sha256(canonical_json(seals)).hexdigest()
