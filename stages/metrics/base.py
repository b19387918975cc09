"""What a measure is: one number per set of samples, from what was observed of that set and of a reference.

A new measure is one file here that defines a `Measure`, and one line in `registry.py`: measuring, tables, scores.json
and the CSV iterate over the registry. The model card shows the few of `COLUMNS` in `stages/student/card.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from advkd.cache.format.condition import Labels
from advkd.stages.metrics.intervals import Interval

Floats = npt.NDArray[np.floating[Any]]

Observed = Literal[
    "features",
    "probabilities",
    "agreement",
    "squared_errors",
    "perceptual_distances",
    "clip_scores",
    "gradients",
    "fine_power",
    "training_distances",
]
"""What can be observed of a set of N samples, float32:

    features              (N, D), of the feature network
    probabilities         (N, K), of the classes, where that network is a classifier
    agreement             (N,), 1 where the most probable class is the label that was asked, else 0
    squared_errors        (N,), to the teacher's image from the same noise
    perceptual_distances  (N,), to the teacher's image from the same noise
    clip_scores           (N,), how well each image fits its prompt; of text-to-image students, where CLIP is given
    gradients             (N,), mean magnitude of an image's gradient
    fine_power            (N,), of an image's highest frequencies
    training_distances    (N,), to the nearest cached training image; of student and teacher only
"""

Score = Callable[[Floats, int], float | None]
"""(observed values of a set, index of that set) → its score; None where too few samples allow none."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What sets of samples are compared with."""

    features: Floats
    """Of the teacher's cached x_0, shape (N, D)."""
    class_shares: Floats | None
    """Of the classes in it, shape (K,); None without a classifier."""
    real_features: Floats | None
    """Of real images, shape (M, D); None without any."""
    num_sets: int
    """Sets that will be scored."""
    labels: Labels | None = None
    """Of the teacher's cached x_0, shape (N,); None if it is unconditional."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One way to score a set of samples."""

    name: str
    """Its key in scores.json, and its column in the CSV."""
    title: str
    """What a table calls it, in at most 37 characters."""
    label: str
    """What it measures, in one phrase."""
    better: Literal["lower", "higher", "as teacher"]
    """Which value is better; `as teacher`: the one nearer to the teacher's own."""
    observed: Observed
    """What it is computed from."""
    prepare: Callable[[Reference], Score | None]
    """Computes what depends on the reference alone, once for all sets; None where that reference allows no score."""
    spread: Literal["sd", "standard_error"] = "sd"
    """The spread over the sets that a table shows."""
    share: bool = False
    """Whether it is a share in [0, 1], which tables show in percent."""
    column_decimals: int | None = None
    """The most decimals in the table of all samplers; None if that table has no column for it."""

    @property
    def paired(self) -> bool:
        """Whether it compares each image with the teacher's from the same noise."""
        return self.observed in ("squared_errors", "perceptual_distances")

    def shown(self, value: float) -> float:
        """A value in the unit of tables."""
        return 100.0 * value if self.share else value

    def verdict(self, difference: Interval | None) -> str:
        """`ahead` or `behind`, from the student's scores minus another's; empty where the interval includes zero."""
        if difference is None or not difference.excludes_zero or self.better == "as teacher":
            return ""
        return "ahead" if (difference.mean < 0.0) == (self.better == "lower") else "behind"


def mean_of_set(_: Reference) -> Score:
    """The mean of what was observed, whatever the reference."""
    return lambda values, _: float(values.mean())
