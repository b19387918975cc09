"""What a prediction leaves over, as integers: quantised, or exact; and these integers as bytes.

Both kinds are + and × on float32 or integer arithmetic, the same on every machine. The integers go through PCodec
(numcodecs), whose bins fit themselves to each phase's distribution.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numcodecs.pcodec import PCodec

from advkd.cache.codec.float16 import Floats, magnitudes, to_float32
from advkd.cache.errors import CacheError

Integers = npt.NDArray[np.int32]
_LARGEST = 2.0**31 - 256
"""As a float32, the last one that int32 takes."""
_CODEC = PCodec(level=8, mode_spec="classic", delta_spec="none")


class Residual(Protocol):
    """A map between values and integers, given what was predicted."""

    def integers(self, values: Floats, predicted: Floats) -> Integers:
        """What to code of values."""

    def values(self, integers: Integers, predicted: Floats) -> Floats:
        """The values that a decoder finds, before they are rounded to the stored dtype."""


class Quantised:
    """Multiples of a step."""

    def __init__(self, step: float) -> None:
        self._step = np.float32(step)

    def integers(self, values: Floats, predicted: Floats) -> Integers:
        """The nearest multiple."""
        scaled = np.rint((values - predicted) / self._step)
        if not np.all(np.abs(scaled) <= _LARGEST):
            raise CacheError("the largest values are too large for so small an error: use `--codec lossless`")
        integers: Integers = scaled.astype(np.int32)
        return integers

    def values(self, integers: Integers, predicted: Floats) -> Floats:
        """p + q · step."""
        found = integers.astype(np.float32)
        found *= self._step
        found += predicted
        return found


class Exact:
    """How many floating-point numbers of the stored dtype lie between value and prediction, with sign."""

    def __init__(self, dtype: str) -> None:
        self._is_half = dtype == "float16"

    def integers(self, values: Floats, predicted: Floats) -> Integers:
        """The difference of their places in the order of numbers; in float32 it may wrap around."""
        return self._place(values) - self._place(predicted)

    def values(self, integers: Integers, predicted: Floats) -> Floats:
        """The number at that place."""
        place = self._place(predicted)
        place += integers
        if self._is_half:
            return to_float32(_turned(place.astype(np.int16)).view(np.float16))
        return _turned(place).view(np.float32)

    def _place(self, values: Floats) -> Integers:
        """0 of +0, 1 of the smallest positive number; −1 of −0, −2 of the largest negative one."""
        if not self._is_half:
            return _turned(values.view(np.int32))
        place = magnitudes(values)
        place ^= values.view(np.int32) >> np.int32(31)
        return place


def _turned(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sign and magnitude to two's complement, or back."""
    width = 8 * bits.itemsize - 1
    turned: npt.NDArray[Any] = bits ^ ((bits >> width) & bits.dtype.type((1 << width) - 1))
    return turned


def integers_to_bytes(integers: Integers) -> bytes:
    """Code some integers."""
    return bytes(_CODEC.encode(np.ascontiguousarray(integers.reshape(-1))))


def integers_from_bytes(data: bytes, count: int) -> Integers:
    """Decode that many integers; memory is bounded by `count`, whatever the bytes say.

    Raises:
        ValueError: the bytes are no such code.
    """
    integers = np.zeros(count, dtype=np.int32)
    try:
        _CODEC.decode(data, integers)
    except Exception as error:
        raise ValueError(f"no PCodec stream of {count} integers ({str(error)[:80]})") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a Rust library raises on data that it never expected
            raise
        raise ValueError("no PCodec stream") from None
    return integers
