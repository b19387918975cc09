"""What a benchmark reports: methods side by side, their medians and ratios, and targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method's figures: median and quartiles over rounds."""

    name: str
    median: float
    low: float
    high: float
    ratio: float | None = None
    """Median over rounds of this method's figure divided by the baseline's in the same round."""
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A figure and the limit it must keep."""

    what: str
    found: float
    limit: float
    at_most: bool = True
    headline: str = ""
    """What the README calls this figure; empty where the README leaves it out."""

    @property
    def met(self) -> bool:
        """Whether the figure keeps its limit."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit


@dataclass(kw_only=True, slots=True)
class Comparison:
    """Several methods for the same task."""

    title: str
    unit: str
    baseline: str | None
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    agreement: str = ""
    """How the program checked that all methods give the same result."""
    note: str = ""
    """The physical limit and the distance from it, or where the time goes."""


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """25th, 50th and 75th percentile."""
    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return low, middle, high


def row_of(name: str, values: list[float], base: list[float] | None = None) -> Row:
    """One method's row; `base` holds the baseline's figures of the same rounds."""
    low, median, high = quartiles(values)
    ratio_low, ratio, ratio_high = (
        (None, None, None) if base is None else quartiles([a / b for a, b in zip(values, base, strict=True)])
    )
    return Row(name=name, median=median, low=low, high=high, ratio=ratio, ratio_low=ratio_low, ratio_high=ratio_high)


def rows_of(figures: Mapping[str, list[float]], baseline: str | None) -> list[Row]:
    """A row per method from figures that were taken in rounds."""
    base = None if baseline is None else figures[baseline]
    return [row_of(name, values, base) for name, values in figures.items()]


def ratio_between(figures: Mapping[str, list[float]], name: str, other: str) -> float:
    """Median over rounds of one method's figure divided by another's."""
    return statistics.median(a / b for a, b in zip(figures[name], figures[other], strict=True))
