"""Gaussian noise as a pure function of (root seed, stream, seed), the same bits on every machine.

`torch.randn` depends on the CPU's vector instructions and on the GPU's SM count; NumPy promises its raw bit
streams but not its distributions. So: raw 64-bit words from Philox4x64-10 (Salmon et al., SC 2011), a counter-based
generator whose stream NumPy guarantees, and Wichura's PPND16 (Algorithm AS 241, 1988) to turn each word into a
normal value. The transform uses only IEEE-754 double + − × ÷ √, each correctly rounded and never contracted,
and a logarithm built from them; nothing here calls libm.

The rule, version "philox4x64-as241-v1": value j of row `seed` in `stream` comes from word j of Philox with key
(root_seed, 0) and initial counter (0, 0, seed, stream); u = (⌊word / 2¹²⌋ + ½) · 2⁻⁵² lies strictly inside (0, 1);
z = Φ⁻¹(u); then rounded to float32. Stream 0 is x_T; stream 1 + i is what an ancestral sampler adds at step i.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

NOISE_RULE = "philox4x64-as241-v1"
INITIAL_STREAM = 0

_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_WORD_LIMIT = 1 << 63
_DROPPED = np.uint64(12)
"""Bits of a word that are not used."""
_PIECE = 1 << 13
"""Values that are transformed at once."""

# AS 241, PPND16: numerator and denominator, highest power first, for |q| ≤ 0.425, 1.6 < r ≤ 5 and r > 5.
_CENTRAL = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_MIDDLE = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip

Array = npt.NDArray[np.float64]


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total *= x
        total += coefficient
    return total


def _log(x: Array) -> Array:
    """ln(x) for positive normal doubles, from + − × ÷ alone: ln(m·2ᵉ) = e·ln 2 + 2·artanh((m − 1)/(m + 1))."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    odd_powers = tuple(1.0 / k for k in range(23, 0, -2))
    return exponent * _LN2 + 2.0 * s * _horner(odd_powers, s * s)


def inverse_normal_cdf(u: Array) -> Array:
    """Φ⁻¹(u) for u in (0, 1), to about 1e-15 relative (AS 241, PPND16)."""
    q = u - 0.5
    # The central formula for all, and the others' values after that: picking 85 % out would cost more.
    r = 0.180625 - q * q
    z: Array = q * _horner(_CENTRAL[0], r)
    z /= _horner(_CENTRAL[1], r)
    outer = np.flatnonzero(np.abs(q) > 0.425)
    q, u = q[outer], u[outer]
    root = np.sqrt(-_log(np.minimum(u, 1.0 - u)))
    r = root - 1.6
    values = _horner(_MIDDLE[0], r) / _horner(_MIDDLE[1], r)
    tail = np.flatnonzero(root > 5.0)
    if tail.size:
        r = root[tail] - 5.0
        values[tail] = _horner(_TAIL[0], r) / _horner(_TAIL[1], r)
    z[outer] = np.where(q < 0.0, -values, values)
    return z


def standard_normal(
    root_seed: int, seeds: Iterable[int], item_shape: tuple[int, ...], stream: int = INITIAL_STREAM
) -> npt.NDArray[np.float32]:
    """Draw the noise of some seeds.

    Args:
        root_seed: the recipe's root seed, 0 ≤ root_seed < 2⁶³.
        seeds: row indices, each 0 ≤ seed < 2⁶³, in any order.
        item_shape: shape of one row, such as (C, H, W).
        stream: 0 for x_T; 1 + i for the noise that step i of an ancestral sampler adds.

    Returns:
        float32, shape (len(seeds), *item_shape), independent of how the seeds are grouped into calls.
    """
    rows = [int(seed) for seed in seeds]
    wanted = (root_seed, stream, *rows)
    if min(wanted) < 0 or max(wanted) >= _WORD_LIMIT:
        raise ValueError("root seed, stream and seeds must lie in [0, 2^63)")
    size = int(np.prod(item_shape))
    values = np.empty((len(rows), size), dtype=np.float32)
    if size == 0:
        return values.reshape(len(rows), *item_shape)
    # Moving one generator costs a fifth of making another; pieces that stay in the processor's cache halve the rest.
    generator = np.random.Philox(key=root_seed, counter=[0, 0, 0, stream])
    position, blocks_drawn, rows_at_once = 0, -(-size // 4), max(1, _PIECE // size)
    for start in range(0, len(rows), rows_at_once):
        piece = rows[start : start + rows_at_once]
        words = np.empty((len(piece), size), dtype=np.uint64)
        for row, seed in enumerate(piece):
            generator.advance(((seed << 128) - position) % (1 << 256))
            words[row] = generator.random_raw(size)
            position = (seed << 128) + blocks_drawn
        flat, out = words.reshape(-1), values[start : start + len(piece)].reshape(-1)
        for first in range(0, flat.size, _PIECE):
            part = flat[first : first + _PIECE]
            out[first : first + _PIECE] = inverse_normal_cdf(((part >> _DROPPED).astype(np.float64) + 0.5) * 2.0**-52)
    return values.reshape(len(rows), *item_shape)
