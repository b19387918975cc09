"""What the ledger says of one block of one array: its file's size and hashes, and the range of its values."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from advkd.cache.format.zarr_metadata import CRC_BYTES

SEGMENT_BYTES = 1 << 20
_HEX = re.compile(r"[0-9a-f]*")
_LARGEST = float(np.finfo(np.float32).max)
_PIECE = 1 << 18
Values = npt.NDArray[Any]


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of some bytes."""
    return int(google_crc32c.value(bytes(data)))


def with_crc(body: bytes) -> bytes:
    """A chunk's bytes with their CRC at the end, as in its file."""
    return body + crc32c(body).to_bytes(CRC_BYTES, "little")


def num_segments(body_bytes: int) -> int:
    """How many segments a chunk's values have."""
    return -(-body_bytes // SEGMENT_BYTES)


def segment_crcs(body: memoryview) -> str:
    """CRC-32C of each MiB of a chunk's values, eight hex digits each, without the CRC that ends the file.

    With it the last one would be worthless: the CRC of any message followed by its own CRC is the same constant.
    """
    starts = range(0, len(body), SEGMENT_BYTES)
    return "".join(f"{crc32c(body[start : start + SEGMENT_BYTES]):08x}" for start in starts)


@dataclass(slots=True)
class Rounding:
    """What rounding to the stored dtype has changed: sums over stored minus computed values, in stored units."""

    squares: float = 0.0
    largest: float = 0.0

    def add(self, stored: Values, computed: Values) -> Self:
        """Count values in, of any shape; differences that are not finite are left out."""
        flat, exact = stored.reshape(-1), computed.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            # float32 is exact here: a value and its rounding to float16 are close.
            difference = flat[start : start + _PIECE].astype(np.float32)
            with np.errstate(invalid="ignore"):
                difference -= exact[start : start + _PIECE]
                reach = max(float(difference.max(initial=0.0)), -float(difference.min(initial=0.0)))
            if not math.isfinite(reach):
                difference = difference[np.isfinite(difference)]
                reach = float(np.abs(difference).max(initial=0.0))
            self.largest = max(self.largest, reach)
            wide = difference.astype(np.float64)
            self.squares += float(np.dot(wide, wide))
        return self


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
    """Of the finite values; a whole number in an array of integers."""
    maximum: float
    num_nonfinite: int
    rounding_rms: float | None = None
    """Root mean square of stored minus computed value, stored units, to three digits; None where nothing is rounded."""
    rounding_max: float | None = None
    """The largest such difference, to three digits."""

    @classmethod
    def of(cls, file_bytes: bytes, stored: Values, computed: Values | Rounding | None = None) -> Self:
        """Describe a chunk file.

        Args:
            file_bytes: the whole file.
            stored: its values.
            computed: the values that were rounded to `stored`, or what that has changed; None if nothing was rounded.
        """
        if computed is None:
            return cls._unrounded(file_bytes, stored)
        rounding = computed if isinstance(computed, Rounding) else Rounding().add(stored, computed)
        low, high, num_finite = math.inf, -math.inf, 0
        flat = stored.reshape(-1)
        for start in range(0, flat.size, _PIECE):  # in pieces, so that a large block needs no large temporaries
            piece = flat[start : start + _PIECE].astype(np.float64)
            piece = piece[np.isfinite(piece)]
            num_finite += piece.size
            low, high = min(low, np.min(piece, initial=low)), max(high, np.max(piece, initial=high))
        return cls(
            num_bytes=len(file_bytes),
            sha256=hashlib.sha256(file_bytes).hexdigest(),
            segments=segment_crcs(memoryview(file_bytes)[:-CRC_BYTES]),
            minimum=float(low) if num_finite else 0.0,
            maximum=float(high) if num_finite else 0.0,
            num_nonfinite=int(flat.size - num_finite),
            # Three digits, so that another order of summation gives the same record.
            rounding_rms=float(f"{math.sqrt(rounding.squares / max(1, num_finite)):.2e}"),
            rounding_max=float(f"{rounding.largest:.2e}"),
        )

    @classmethod
    def _unrounded(cls, file_bytes: bytes, stored: npt.NDArray[Any]) -> Self:
        finite = stored[np.isfinite(stored)]
        of_kind = float if stored.dtype.kind == "f" else int
        return cls(
            num_bytes=len(file_bytes),
            sha256=hashlib.sha256(file_bytes).hexdigest(),
            segments=segment_crcs(memoryview(file_bytes)[:-CRC_BYTES]),
            minimum=of_kind(finite.min()) if finite.size else of_kind(0),
            maximum=of_kind(finite.max()) if finite.size else of_kind(0),
            num_nonfinite=int(stored.size - finite.size),
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `asdict` wrote.

        Raises:
            ValueError: a number is out of range, or a hash is none.
        """
        record = cls(**value)
        sizes, rounding = (record.num_bytes, record.num_nonfinite), (record.rounding_rms, record.rounding_max)
        extremes = (record.minimum, record.maximum)
        fits = all(type(number) is int and 0 <= number < 1 << 63 for number in sizes)
        if "rounding_rms" in value or "rounding_max" in value:
            fits = fits and all(type(number) is float and abs(number) <= _LARGEST for number in (*extremes, *rounding))
        else:
            fits = fits and all(type(number) in (int, float) and abs(number) <= _LARGEST for number in extremes)
        fits = fits and all(_HEX.fullmatch(digits) for digits in (record.sha256, record.segments))
        if not fits or len(record.sha256) != 64 or len(record.segments) % 8:
            raise ValueError("a number is out of range, or a hash is none")
        return record

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; without the rounding members where nothing is rounded."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def raw(self) -> ArrayRecord:
        """Itself: it is no packed array's."""
        return self

    def crcs(self) -> npt.NDArray[np.uint32]:
        """CRC of each segment, uint32."""
        return np.frombuffer(bytes.fromhex(self.segments), dtype=">u4").astype(np.uint32)
