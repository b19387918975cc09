"""float16 to float32 and back by integer arithmetic: the results of NumPy's conversions in half their time.

No step produces subnormal float32 numbers, which a library that sets flush-to-zero would turn into zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_BIAS = np.int32(112 << 23)
"""Difference of the exponent biases of float32 and float16, in float32's place."""
_FIRST_NORMAL = 0x400
_SMALLEST_NORMAL = np.float32(2.0**-14)
_UNIT = np.float32(2.0**-24)
"""Spacing of subnormal float16 numbers."""
_NOWHERE = np.empty(0, dtype=np.intp)


def to_float32(values: npt.NDArray[Any]) -> Floats:
    """Finite float16 values as float32; float32 values are copied."""
    if values.dtype.itemsize == 4:
        return values.astype(np.float32)
    bits = values.view(np.int16).astype(np.int32)
    sign = bits & np.int32(-0x80000000)
    bits &= np.int32(0x7FFF)
    small = _below(bits, _FIRST_NORMAL)
    units = bits.reshape(-1)[small]
    bits <<= np.int32(13)
    bits += _BIAS
    floats = bits.view(np.float32)
    floats.reshape(-1)[small] = units.astype(np.float32) * _UNIT
    bits |= sign
    return floats


def to_float16(values: Floats) -> npt.NDArray[np.float16]:
    """float32 values as the nearest float16, ties to even; too large ones become infinite."""
    bits = values.view(np.int32)
    rounded = magnitudes(values)
    rounded |= (bits >> np.int32(16)) & np.int32(-0x8000)
    return rounded.astype(np.int16).view(np.float16)


def magnitudes(values: Floats) -> npt.NDArray[np.int32]:
    """Bits of the float16 nearest to each absolute value, at most those of infinity."""
    found = values.view(np.int32) & np.int32(0x7FFFFFFF)
    small = _below(found, int(_SMALLEST_NORMAL.view(np.int32)))
    units = np.rint(found.reshape(-1)[small].view(np.float32) / _UNIT).astype(np.int32)
    odd = found >> np.int32(13)
    odd &= np.int32(1)
    found += odd
    found += np.int32(0xFFF) - _BIAS
    found >>= np.int32(13)
    found.reshape(-1)[small] = units
    np.minimum(found, np.int32(0x7C00), out=found)
    return found


def _below(bits: npt.NDArray[np.int32], limit: int) -> npt.NDArray[np.intp]:
    """Flat indices of the numbers below a limit; usually none."""
    if bits.size == 0 or bits.min() >= limit:
        return _NOWHERE
    return (bits.reshape(-1) < limit).nonzero()[0]
