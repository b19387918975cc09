"""Which classes samples fall into, by a classifier: a student that drops a mode shows here.

p is the share of samples in each class, q the reference's. All scores are plain shares of counts; with few samples both
the student's and the teacher's own deviate from q by chance, which is why they are shown side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Shares = npt.NDArray[np.float64]


def class_shares(probabilities: npt.NDArray[np.floating[Any]]) -> Shares:
    """Share of samples whose most probable class is k; from shape (N, K) to (K,)."""
    count, num_classes = probabilities.shape
    shares: Shares = np.bincount(probabilities.argmax(1), minlength=num_classes) / count
    return shares


def mean_confidence(probabilities: npt.NDArray[np.floating[Any]]) -> float:
    """Mean probability of the most probable class, in [1/K, 1]."""
    return float(probabilities.max(1).mean())


def overlap(shares: Shares, reference: Shares) -> float:
    """Σ_k min(p_k, q_k) in [0, 1]: one minus the total variation distance of the two histograms."""
    return float(np.minimum(shares, reference).sum())


def rarest_class(shares: Shares, reference: Shares) -> float:
    """min_k p_k / q_k over the classes that the reference has: 0 if one is missing, 1 at best."""
    present = reference > 0.0
    return float((shares[present] / reference[present]).min())
