"""Means with Student's t intervals (Student 1908): of independent values, and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
Values = Sequence[float] | npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is more than chance."""
        return self.low > 0.0 or self.high < 0.0

    def text(self, decimals: int) -> str:
        """With signs, as a difference: `+0.2 [-2.0, +2.5]`."""
        return f"{self.mean:+.{decimals}f} [{self.low:+.{decimals}f}, {self.high:+.{decimals}f}]"


def standard_error(values: Values) -> float:
    """Of the mean of independent values, at least two: sd / √N."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def mean_interval(values: Values) -> Interval:
    """Mean of independent values, shape (N,), N ≥ 2, and its interval with N − 1 degrees of freedom."""
    from scipy import stats

    mean = float(np.mean(values))
    reach = float(stats.t.ppf(0.5 + LEVEL / 2.0, len(values) - 1)) * standard_error(values)
    return Interval(mean=mean, low=mean - reach, high=mean + reach)


def paired_difference(ours: Values, theirs: Values) -> Interval:
    """Mean of ours − theirs over the same sets."""
    return mean_interval(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))
