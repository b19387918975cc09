"""How a packed store holds its states: which codec, with what parameters, and what error these allow.

    raw         a chunk is its values (the store that one trains from)
    lossless    states predicted from x_T and each other, the rest coded; x_T is drawn again, not stored; no error
    archive     the same, the rest quantised so that no stored value is off by more than `max_error`
    zstd, blosc, pcodec   standard Zarr codecs, any Zarr reader opens them; `keep_bits` rounds mantissas first

`docs/packing.md` explains `lossless` and `archive`; `docs/cache-format.md` says exactly what a chunk holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from advkd.cache.errors import NotACacheError, UsageError

REDRAWN = ("lossless", "archive")
"""Codecs that predict states and draw x_T again."""
PLAIN = ("zstd", "blosc", "pcodec")
CODECS = (*REDRAWN, *PLAIN)
DEFAULT_LEVELS = {"zstd": 9, "blosc": 9, "pcodec": 8}
MAX_LEVELS = {"zstd": 22, "blosc": 9, "pcodec": 12}
MIN_ERROR, MAX_ERROR = 2.0**-20, 0.5
MANTISSA_BITS = {"float16": 10, "float32": 23}
MAX_PACKED_BLOCK_BYTES = 1 << 28
"""Of the values of one block of one state, before packing: decoding takes some times as much memory."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A codec and its parameters."""

    codec: str
    parameters: dict[str, Any] = field(default_factory=dict)
    """`max_error` of archive; `level` and, where values are rounded, `keep_bits` of a plain codec."""

    @classmethod
    def of(
        cls,
        codec: str,
        dtype: str,
        *,
        max_error: float | None = None,
        keep_bits: int | None = None,
        level: int | None = None,
    ) -> Self:
        """Settle on parameters that a person gave.

        Args:
            codec: one of `CODECS`.
            dtype: that states are stored in.
            max_error: the largest difference that a value may have afterwards, stored units; for `archive`.
            keep_bits: of the mantissa; for a plain codec. x_T is never rounded.
            level: of a plain codec.

        Raises:
            UsageError: they don't go together, or are out of range.
        """
        if codec not in CODECS:
            raise UsageError(f"codec {codec!r} is unknown: choose among {', '.join(CODECS)}")
        if (max_error is not None) != (codec == "archive"):
            raise UsageError("--max-error and --codec archive go together: give both or neither")
        if codec in REDRAWN and (keep_bits is not None or level is not None):
            raise UsageError(f"--keep-bits and --level are for {', '.join(PLAIN)}, not for {codec}")
        if max_error is not None and not MIN_ERROR <= max_error <= MAX_ERROR:
            raise UsageError(f"--max-error {max_error:g}: expected {MIN_ERROR:.1e} to {MAX_ERROR:g}, in stored units")
        if keep_bits is not None and not 1 <= keep_bits <= MANTISSA_BITS[dtype]:
            raise UsageError(f"--keep-bits {keep_bits}: {dtype} has 1 to {MANTISSA_BITS[dtype]}")
        if level is not None and not 1 <= level <= MAX_LEVELS[codec]:
            raise UsageError(f"--level {level}: {codec} has 1 to {MAX_LEVELS[codec]}")
        if codec == "archive":
            return cls(codec=codec, parameters={"max_error": max_error})
        if codec == "lossless":
            return cls(codec=codec)
        kept = {} if keep_bits in (None, MANTISSA_BITS[dtype]) else {"keep_bits": keep_bits}
        return cls(codec=codec, parameters={"level": level or DEFAULT_LEVELS[codec], **kept})

    @classmethod
    def read(cls, codec: str, parameters: Any, dtype: str) -> Self:
        """Read what a store says of itself.

        Raises:
            NotACacheError: it can't be.
        """
        kinds = {"max_error": float, "keep_bits": int, "level": int}
        try:
            if not all(type(value) is kinds[key] for key, value in parameters.items()):
                raise ValueError("a parameter of another kind")
            packing = cls.of(codec, dtype, **parameters)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            packing = None
        if packing is None or packing.parameters != parameters:
            raise NotACacheError("its packing can't be, or is of a newer version: upgrade advkd")
        return packing

    @property
    def redraws(self) -> bool:
        """Whether x_T is drawn again instead of stored, and states are predicted from one another."""
        return self.codec in REDRAWN

    @property
    def error_bound(self) -> float | None:
        """The largest error that a value may have; None where bits of the mantissa are dropped instead."""
        if self.codec == "archive":
            return float(self.parameters["max_error"])
        return None if "keep_bits" in self.parameters else 0.0

    def __str__(self) -> str:
        """For a person."""
        return ", ".join([self.codec, *(f"{key} {value:g}" for key, value in self.parameters.items())])


def quantisation_step(max_error: float, dtype: str) -> float:
    """The largest step of quantisation that keeps every value within `max_error` after rounding to `dtype`.

    A stored value x lies on the dtype's grid, spacing u in its binade. With v = x + e, |e| ≤ step/2, what is stored
    again is v rounded to that grid, off by ⌊|e|/u + 1/2⌋ · u at most: within max_error if and only if
    step/2 < (⌊max_error/u⌋ + 1/2) · u. The smallest bound of the binades below |x| = 16 counts, far beyond what unit
    variance reaches; u → 0 bounds it by max_error. What a packer writes is checked anyway.
    """
    finest, coarsest = (-24, -7) if dtype == "float16" else (-40, -20)
    spacings = 2.0 ** np.arange(finest, coarsest + 1)
    spacings = spacings[spacings <= 2 * max_error]
    half = float(np.min((np.floor(max_error / spacings) + 0.5) * spacings, initial=max_error))
    return float(np.float32(2 * half * (1 - 2.0**-9)))
