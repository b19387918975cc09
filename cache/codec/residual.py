"""Residuals of a prediction as integers, quantised or exact, and these integers as bytes.

Both kinds use + and × on float32 or integer arithmetic, the same on every machine. PCodec (numcodecs) codes the
integers, because its bins adapt to each phase's distribution.
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
"""Largest float32 that fits int32."""
_CODEC = PCodec(level=8, mode_spec="classic", delta_spec="try_consecutive", delta_encoding_order=0)
"""No differences: residuals are uncorrelated. Not `delta_spec="none"`, which numcodecs 0.17 renames."""


class Residual(Protocol):
    """A map between values and integers, given a prediction."""

    def integers(self, values: Floats, predicted: Floats) -> Integers:
        """The integers to code."""

    def values(self, integers: Integers, predicted: Floats) -> Floats:
        """The values that a decoder reconstructs, not yet rounded to the stored dtype."""


class Quantised:
    """Multiples of a step."""

    def __init__(self, step: float) -> None:
        self._step = np.float32(step)

    def integers(self, values: Floats, predicted: Floats) -> Integers:
        """The nearest multiple."""
        scaled = np.rint((values - predicted) / self._step)
        if not np.all(np.abs(scaled) <= _LARGEST):
            raise CacheError("the values are too large for an error this small: use `--codec lossless`")
        integers: Integers = scaled.astype(np.int32)
        return integers

    def values(self, integers: Integers, predicted: Floats) -> Floats:
        """p + q · step."""
        found = integers.astype(np.float32)
        found *= self._step
        found += predicted
        return found


class Exact:
    """Signed count of floating-point numbers of the stored dtype between prediction and value."""

    def __init__(self, dtype: str) -> None:
        self._is_float16 = dtype == "float16"

    def integers(self, values: Floats, predicted: Floats) -> Integers:
        """The difference of their ranks among the numbers of the dtype; in float32 it may wrap around."""
        return self._rank(values) - self._rank(predicted)

    def values(self, integers: Integers, predicted: Floats) -> Floats:
        """The number of that rank."""
        rank = self._rank(predicted)
        rank += integers
        if self._is_float16:
            return to_float32(_flip_negative(rank.astype(np.int16)).view(np.float16))
        return _flip_negative(rank).view(np.float32)

    def _rank(self, values: Floats) -> Integers:
        """0 for +0, 1 for the smallest positive number; −1 for −0, −2 for the largest negative one."""
        if not self._is_float16:
            return _flip_negative(values.view(np.int32))
        rank = magnitudes(values)
        rank ^= values.view(np.int32) >> np.int32(31)
        return rank


def _flip_negative(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sign and magnitude to ranks in two's complement, or back."""
    width = 8 * bits.itemsize - 1
    flipped: npt.NDArray[Any] = bits ^ ((bits >> width) & bits.dtype.type((1 << width) - 1))
    return flipped


def integers_to_bytes(integers: Integers) -> bytes:
    """Code some integers."""
    return bytes(_CODEC.encode(np.ascontiguousarray(integers.reshape(-1))))


def integers_from_bytes(data: bytes, count: int) -> Integers:
    """Decode `count` integers, which bounds memory, whatever the bytes say.

    Raises:
        ValueError: the bytes are no such code.
    """
    integers = np.zeros(count, dtype=np.int32)
    try:
        _CODEC.decode(data, integers)
    except Exception as error:
        raise ValueError(f"no PCodec stream of {count} integers ({str(error)[:80]})") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust library's assertion
            raise
        raise ValueError("no PCodec stream") from None
    return integers
