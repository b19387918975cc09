"""Hashes of integers: orders, draws and splits that are pure functions of seeds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Seeds = npt.NDArray[np.int64]
"""Seeds of a cache, shape (N,)."""


def mix64(values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): a bijective hash of 64-bit integers."""
    with np.errstate(over="ignore"):
        x = np.asarray(values, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def mixed(*parts: int) -> int:
    """One 64-bit hash of several integers, such as (seed, phase, step)."""
    key = mix64(parts[0])
    for part in parts[1:]:
        key = mix64(key ^ np.uint64(part))
    return int(key)


def is_held_out(seeds: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which seeds are held out of training: one in sixteen, a pure function of the seed."""
    chosen: npt.NDArray[np.bool_] = mix64(seeds) % np.uint64(16) == np.uint64(0)
    return chosen
