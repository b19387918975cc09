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
_SHA256, _CRCS = re.compile(r"[0-9a-f]{64}"), re.compile(r"([0-9a-f]{8})*")
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
        rounding = Rounding().add(stored, computed) if isinstance(computed, np.ndarray) else computed
        extremes: list[float] = []
        num_finite, flat, is_float = 0, stored.reshape(-1), stored.dtype.kind == "f"
        for start in range(0, flat.size, _PIECE):  # in pieces, so that a large block needs no large temporaries
            piece = flat[start : start + _PIECE]
            piece = piece.astype(np.float64) if is_float else piece  # NumPy compares float16 slowly
            piece = piece[np.isfinite(piece)]
            num_finite += piece.size
            extremes += [piece.min().item(), piece.max().item()] if piece.size else []
        of_kind = float if is_float else int
        return cls(
            num_bytes=len(file_bytes),
            sha256=hashlib.sha256(file_bytes).hexdigest(),
            segments=segment_crcs(memoryview(file_bytes)[:-CRC_BYTES]),
            minimum=of_kind(min(extremes, default=0)),
            maximum=of_kind(max(extremes, default=0)),
            num_nonfinite=int(flat.size - num_finite),
            # Three digits, so that another order of summation gives the same record.
            rounding_rms=None if rounding is None else float(f"{math.sqrt(rounding.squares / max(1, num_finite)):.2e}"),
            rounding_max=None if rounding is None else float(f"{rounding.largest:.2e}"),
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `asdict` wrote.

        Raises:
            ValueError: a number is out of range, or a hash is none.
        """
        record = cls(**value)
        numbers: list[float | None] = [record.minimum, record.maximum]
        kinds: tuple[type, ...] = (int, float)
        if "rounding_rms" in value or "rounding_max" in value:
            numbers, kinds = [*numbers, record.rounding_rms, record.rounding_max], (float,)
        fits = all(type(number) is int and 0 <= number < 1 << 63 for number in (record.num_bytes, record.num_nonfinite))
        fits = fits and all(type(number) in kinds and abs(number or 0) <= _LARGEST for number in numbers)
        if not (fits and _SHA256.fullmatch(record.sha256) and _CRCS.fullmatch(record.segments)):
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
