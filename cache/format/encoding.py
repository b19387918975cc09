"""How a packed store codes its states: the codec, its parameters, and the error that they allow.

    lossless    predicts states from x_T and from each other and codes the rest; x_T is drawn again; no error
    archive     the same, with the rest quantised so that no stored value is off by more than `max_error`
    zstd, blosc, pcodec   standard Zarr codecs; `keep_bits` rounds mantissas first

`docs/packing.md` explains `lossless` and `archive`; `docs/cache-format.md` specifies the bytes of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from advkd.cache.errors import NotACacheError, UsageError

PREDICTIVE = ("lossless", "archive")
"""Codecs that predict states and draw x_T again."""
STANDARD = ("zstd", "blosc", "pcodec")
CODECS = (*PREDICTIVE, *STANDARD)
_PREFIX = "packed-"
PACKED_ENCODINGS = (*(_PREFIX + codec for codec in PREDICTIVE), *STANDARD, *PREDICTIVE)
"""Values of a packed layout's `encoding`. Older stores have `lossless` and `archive` without the prefix and are read
and extended: their arrays list a codec, `advkd.chain`, to which Zarr can't give the earlier states that it needs."""
DEFAULT_LEVELS = {"zstd": 9, "blosc": 9, "pcodec": 8}
MAX_LEVELS = {"zstd": 22, "blosc": 9, "pcodec": 12}
MIN_ERROR, MAX_ERROR = 2.0**-20, 0.5
MANTISSA_BITS = {"float16": 10, "float32": 23}
MAX_PACKED_BLOCK_BYTES = 1 << 28
"""Of the values of one block of one state before packing: decoding takes several times as much memory."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """An encoding of packed stores and its parameters."""

    encoding: str
    """One of `PACKED_ENCODINGS`."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """`max_error` of archive; `level` and, where values are rounded, `keep_bits` of a standard codec."""

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
        """Check the parameters that a user gave and fill in defaults.

        Args:
            codec: one of `CODECS`.
            dtype: of the stored states.
            max_error: largest allowed difference of an unpacked value, stored units; for `archive`.
            keep_bits: bits of the mantissa to keep; for a standard codec. x_T is never rounded.
            level: compression level of a standard codec.

        Raises:
            UsageError: parameters that don't go together or are out of range.
        """
        if codec not in CODECS:
            raise UsageError(f"codec {codec!r} is unknown: choose among {', '.join(CODECS)}")
        if (max_error is not None) != (codec == "archive"):
            raise UsageError("--max-error and --codec archive go together: give both or neither")
        if codec in PREDICTIVE and (keep_bits is not None or level is not None):
            raise UsageError(f"--keep-bits and --level are for {', '.join(STANDARD)}, not for {codec}")
        if max_error is not None and not MIN_ERROR <= max_error <= MAX_ERROR:
            raise UsageError(f"--max-error {max_error:g}: expected {MIN_ERROR:.1e} to {MAX_ERROR:g}, in stored units")
        if keep_bits is not None and not 1 <= keep_bits <= MANTISSA_BITS[dtype]:
            raise UsageError(f"--keep-bits {keep_bits}: {dtype} has 1 to {MANTISSA_BITS[dtype]}")
        if level is not None and not 1 <= level <= MAX_LEVELS[codec]:
            raise UsageError(f"--level {level}: {codec} has 1 to {MAX_LEVELS[codec]}")
        if codec in PREDICTIVE:
            return cls(encoding=_PREFIX + codec, parameters={} if max_error is None else {"max_error": max_error})
        kept = {} if keep_bits in (None, MANTISSA_BITS[dtype]) else {"keep_bits": keep_bits}
        return cls(encoding=codec, parameters={"level": level or DEFAULT_LEVELS[codec], **kept})

    @classmethod
    def read(cls, encoding: str, parameters: Any, dtype: str) -> Self:
        """Read the `encoding` and `packing` members of a layout.

        Raises:
            NotACacheError: no advkd writes such a packing, or only a newer one does.
        """
        kinds = {"max_error": float, "keep_bits": int, "level": int}
        try:
            if not all(type(value) is kinds[key] for key, value in parameters.items()):
                raise ValueError("a parameter of another type")
            packing = cls.of(encoding.removeprefix(_PREFIX), dtype, **parameters)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            packing = None
        if packing is None or packing.parameters != parameters:
            raise NotACacheError("the layout's packing is invalid or of a newer advkd: upgrade advkd")
        return replace(packing, encoding=encoding)

    @property
    def codec(self) -> str:
        """One of `CODECS`."""
        return self.encoding.removeprefix(_PREFIX)

    @property
    def is_predictive(self) -> bool:
        """Whether states are predicted from one another, and x_T is drawn again instead of stored."""
        return self.codec in PREDICTIVE

    def as_first_written(self) -> Self:
        """The same coding under the encoding that `lossless` and `archive` stores had at first."""
        return replace(self, encoding=self.codec)

    @property
    def error_bound(self) -> float | None:
        """Largest possible error of a value, stored units; None where mantissas are rounded instead."""
        if self.codec == "archive":
            return float(self.parameters["max_error"])
        return None if "keep_bits" in self.parameters else 0.0

    def __str__(self) -> str:
        """In words."""
        return ", ".join([self.codec, *(f"{key} {value:g}" for key, value in self.parameters.items())])


def quantisation_step(max_error: float, dtype: str) -> float:
    """The largest quantisation step that keeps every value within `max_error` after rounding to `dtype`.

    A stored value x lies on the dtype's grid, of spacing u in its binade. With v = x + e, |e| ≤ step/2, v rounded to
    that grid is off by at most ⌊|e|/u + 1/2⌋ · u, which is within max_error if and only if
    step/2 < (⌊max_error/u⌋ + 1/2) · u. The minimum over the binades below |x| = 16 holds, far beyond what unit
    variance reaches; u → 0 bounds the step by max_error. The packer checks each written chunk anyway.
    """
    finest, coarsest = (-24, -7) if dtype == "float16" else (-40, -20)
    spacings = 2.0 ** np.arange(finest, coarsest + 1)
    spacings = spacings[spacings <= 2 * max_error]
    half = float(np.min((np.floor(max_error / spacings) + 0.5) * spacings, initial=max_error))
    return float(np.float32(2 * half * (1 - 2.0**-9)))
