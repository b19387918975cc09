"""Decoding chunks of the standard Zarr codecs zstd, blosc and PCodec within bounded memory.

These are numcodecs' codecs with the settings that `zarr.json` names, called directly: zarr's pipeline gives a decoder
no output buffer, so that a chunk from someone else could unpack to as much memory as it claims.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache.format.encoding import MANTISSA_BITS, Packing

Values = npt.NDArray[Any]


def round_mantissas(values: Values, packing: Packing) -> Values:
    """Values with `keep_bits` bits of the mantissa, rounded to nearest, ties to even."""
    bits = packing.parameters.get("keep_bits", MANTISSA_BITS[values.dtype.name])
    if bits == MANTISSA_BITS[values.dtype.name]:
        return values
    from numcodecs.bitround import BitRound

    rounded: Values = np.asarray(BitRound(bits).encode(values)).view(values.dtype)
    return rounded


def encode(values: Values, packing: Packing) -> bytes:
    """A chunk's bytes, without the CRC that ends its file."""
    return bytes(_codec(packing, values.dtype.itemsize).encode(np.ascontiguousarray(values).reshape(-1)))


def decode(data: bytes, packing: Packing, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Values:
    """The values of a chunk.

    Raises:
        ValueError: the bytes are no such chunk.
    """
    values = np.zeros(shape, dtype=dtype)
    flat = values.reshape(-1)
    try:
        if packing.codec == "blosc":
            _check_blosc(data, values.nbytes)
        _codec(packing, dtype.itemsize).decode(data, flat if packing.codec == "pcodec" else flat.view(np.uint8))
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"no {packing.codec} of {values.nbytes} bytes ({str(error)[:80]})") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust library's assertion
            raise
        raise ValueError(f"no {packing.codec}") from None
    return values


def _check_blosc(data: bytes, num_bytes: int) -> None:
    """Compare the header's sizes: bytes 4 to 7 say how much it unpacks to, bytes 12 to 15 how long it is."""
    if len(data) < 16 or data[4:8] != num_bytes.to_bytes(4, "little") or data[12:16] != len(data).to_bytes(4, "little"):
        raise ValueError("its header has another size")


def _codec(packing: Packing, itemsize: int) -> Any:
    level = packing.parameters["level"]
    if packing.codec == "zstd":
        from numcodecs.zstd import Zstd

        return Zstd(level=level)
    if packing.codec == "blosc":
        from numcodecs.blosc import Blosc

        return Blosc(cname="zstd", clevel=level, shuffle=Blosc.BITSHUFFLE, typesize=itemsize)
    from numcodecs.pcodec import PCodec

    return PCodec(level=level)
