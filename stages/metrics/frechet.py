"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Mean, shape (D,), and covariance, shape (D, D), of features, float64."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, features: Features) -> Self:
        """Fit features of shape (N, D), N ≥ 2."""
        values = features.astype(np.float64)
        return cls(mean=values.mean(0), covariance=np.atleast_2d(np.cov(values, rowvar=False)))

    @cached_property
    def root(self) -> npt.NDArray[np.float64]:
        """The symmetric root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: npt.NDArray[np.float64] = (vectors * _roots(values)) @ vectors.T
        return root


def frechet_distance(first: Gaussian, reference: Gaussian) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), in squared feature units.

    The trace of the root is the sum of the roots of the eigenvalues of Σ₂^½ Σ₁ Σ₂^½, which is symmetric: no matrix
    root of a non-symmetric product, no imaginary part to discard, and the reference's root is found only once.
    """
    cross = np.linalg.eigvalsh(reference.root @ first.covariance @ reference.root)
    trace = np.trace(first.covariance) + np.trace(reference.covariance) - 2.0 * _roots(cross).sum()
    return float(np.square(first.mean - reference.mean).sum() + trace)


def _roots(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Square roots of what can only be negative by rounding."""
    return np.sqrt(np.clip(np.asarray(values, dtype=np.float64), 0.0, None))
