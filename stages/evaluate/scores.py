"""What an evaluation found: per sampler and measure one value a set, and what was measured once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from advkd.stages.evaluate.config import FULL_NUM_SETS, FULL_REFERENCE, FULL_SET_SIZE
from advkd.stages.evaluate.cost import Cost
from advkd.stages.metrics.classes import Shares
from advkd.stages.metrics.intervals import Interval, paired_difference, standard_error

MEASURES = {
    "frechet": "Fréchet distance to the teacher's cached x_0",
    "kid": "kernel distance (KID) to the teacher's cached x_0",
    "precision": "share of samples inside the reference's manifold",
    "recall": "share of the reference inside the samples' manifold",
    "frechet_to_real": "Fréchet distance to the real images",
    "mse_to_teacher": "mean squared error to the teacher from the same noise",
    "perceptual_to_teacher": "perceptual distance to the teacher from the same noise",
    "class_overlap": "overlap of the class shares with the reference's",
    "rarest_class": "the rarest class's share, of the reference's share of it",
    "confidence": "the classifier's mean confidence",
    "nearest_training": "distance to the nearest training image, mean",
    "nearest_training_closest": "distance to the nearest training image, the closest hundredth",
}
"""Every measure, by its name in scores.json. All of them are one value a set of fresh seeds."""


@dataclass(kw_only=True)
class Row:
    """One sampler's scores."""

    name: str
    evaluations: int
    values: dict[str, list[float]] = field(default_factory=dict)
    """By measure, one value a set; absent where it was not measured."""
    class_shares: Shares | None = None
    """Over all sets, shape (K,), where there is a classifier."""

    def add(self, measured: dict[str, float]) -> None:
        """What one more set gave."""
        for measure, value in measured.items():
            self.values.setdefault(measure, []).append(value)

    def mean(self, measure: str) -> float | None:
        """Mean over the sets."""
        return float(np.mean(self.values[measure])) if measure in self.values else None

    def deviation(self, measure: str) -> float | None:
        """Standard deviation over the sets."""
        return float(np.std(self.values[measure], ddof=1)) if measure in self.values else None

    def standard_error(self, measure: str) -> float | None:
        """Of the mean."""
        return standard_error(self.values[measure]) if measure in self.values else None


def difference(first: Row, second: Row, measure: str) -> Interval | None:
    """First minus second over the same sets, where both were measured."""
    if measure not in first.values or measure not in second.values:
        return None
    return paired_difference(first.values[measure], second.values[measure])


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The student against the cache on seeds that no training used."""

    num_seeds: int
    mse: Interval
    perceptual: Interval


@dataclass(kw_only=True)
class Evaluation:
    """Everything that was measured."""

    rows: list[Row]
    """The student first, the teacher second."""
    features: str
    features_sha256: str
    """Of that network's weights: only what was scored by the same ones can be compared."""
    perceptual: str
    num_sets: int
    set_size: int
    num_reference: int
    num_training: int
    """Cached training images that nearest neighbours were looked for among."""
    held_out: HeldOut | None
    student: Cost
    teacher: Cost | None
    deployed_parameters: int
    without_teacher: str
    """Why the teacher's rows were not measured; empty if they were."""
    real_source: str | None
    reference_shares: Shares | None
    """Of the classes in the reference, shape (K,), where there is a classifier."""
    pictures: dict[str, Tensor]
    """The first seeds' images by sampler, for a picture."""
    weights_sha256: str | None
    """Of the student's file: scores are of these weights, whatever is trained later."""
    identity: dict[str, Any]
    """Of the run: its configuration, and the cache it was trained from."""
    device: str

    @property
    def full(self) -> bool:
        """Whether sets and reference are at least the whole protocol's, however that was asked for."""
        enough = self.num_sets >= FULL_NUM_SETS and self.set_size >= FULL_SET_SIZE
        return enough and self.num_reference >= FULL_REFERENCE

    def latency_ratio(self, batch: int) -> float | None:
        """Seconds of one pass of the student in evaluations of the teacher."""
        return self.student.latency[batch] / self.teacher.latency[batch] if self.teacher else None

    def student_minus(self, row: Row, measure: str) -> Interval | None:
        """The student's values minus a sampler's, where both were measured."""
        return difference(self.rows[0], row, measure)
