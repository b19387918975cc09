"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from advkd.cache.format.condition import Labels
from advkd.stages.metrics.base import Floats, Measure, Score

MIN_PER_DIMENSION = 2
"""Samples per feature below which a covariance says nothing about a class."""


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean, shape (D,), and covariance, shape (D, D), of features, float64."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, features: Floats, weights: Floats | None = None) -> Self:
        """Fit features of shape (N, D), N ≥ 2; the weight of each, shape (N,), equal ones by default."""
        values = features.astype(np.float64)
        covariance = np.cov(values, rowvar=False, aweights=weights)
        return cls(mean=np.average(values, axis=0, weights=weights), covariance=np.atleast_2d(covariance))

    @cached_property
    def root(self) -> npt.NDArray[np.float64]:
        """The symmetric root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: npt.NDArray[np.float64] = (vectors * _roots(values)) @ vectors.T
        return root


def frechet_distance(first: Gaussian, reference: Gaussian) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), in squared feature units.

    The trace of the root is the sum of the roots of the eigenvalues of Σ₂^½ Σ₁ Σ₂^½, which is symmetric: no matrix
    root of a non-symmetric product, no imaginary part to discard, and the reference's root is computed only once.
    """
    cross = np.linalg.eigvalsh(reference.root @ first.covariance @ reference.root)
    trace = np.trace(first.covariance) + np.trace(reference.covariance) - 2.0 * _roots(cross).sum()
    return float(np.square(first.mean - reference.mean).sum() + trace)


def _roots(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Square roots of values that are negative only by rounding."""
    return np.sqrt(np.clip(np.asarray(values, dtype=np.float64), 0.0, None))


def frechet_by_class(
    features: Floats, labels: Labels, reference: Floats, reference_labels: Labels
) -> dict[int, float | None]:
    """Fréchet distance within each class of the reference; None unless both sides have `MIN_PER_DIMENSION` per feature.

    Args:
        features: of samples, shape (N, D).
        labels: the classes that were asked, shape (N,).
        reference: features to compare with, shape (M, D).
        reference_labels: their classes, shape (M,).
    """
    distances: dict[int, float | None] = {}
    enough = MIN_PER_DIMENSION * features.shape[1]
    for label in np.unique(reference_labels).tolist():
        sides = features[labels == label], reference[reference_labels == label]
        distances[label] = frechet_distance(*map(Gaussian.fit, sides)) if min(map(len, sides)) >= enough else None
    return distances


def _distance_to(reference: Floats | None) -> Score | None:
    if reference is None:
        return None
    fitted = Gaussian.fit(reference)
    return lambda features, _: frechet_distance(Gaussian.fit(features), fitted)


FRECHET = Measure(
    name="frechet",
    title="Fréchet",
    label="Fréchet distance to the teacher's cached x_0",
    better="lower",
    observed="features",
    prepare=lambda reference: _distance_to(reference.features),
    column_decimals=1,
)
FRECHET_TO_REAL = Measure(
    name="frechet_to_real",
    title="Fréchet distance to the real images",
    label="Fréchet distance to the real images",
    better="lower",
    observed="features",
    prepare=lambda reference: _distance_to(reference.real_features),
)
