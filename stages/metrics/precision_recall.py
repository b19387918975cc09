"""Improved precision and recall (Kynkäänniemi et al. 2019).

A set's manifold is the union of balls around its features, each reaching to the k-th nearest other feature of the
same set (eq. 1). Precision is the share of samples inside the reference's manifold, recall the share of the
reference inside the samples' (eq. 2). As there, both sets should be of one size and k = 3: either score depends on how
dense a set is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

Features = npt.NDArray[np.floating[Any]]
NEIGHBOURS = 3
WORKING_MEMORY = 64
"""MiB of distances at one time."""


def precision_and_recall(samples: Features, reference: Features, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall, both in [0, 1], of samples (N, D) against a reference (M, D); N, M > `neighbours`."""
    made, wanted = samples.astype(np.float64), reference.astype(np.float64)
    precision = _share_inside(made, wanted, _radii(wanted, neighbours))
    return precision, _share_inside(wanted, made, _radii(made, neighbours))


def _radii(centres: npt.NDArray[np.float64], neighbours: int) -> npt.NDArray[np.float64]:
    """Distance of each centre to its k-th nearest other one, shape (N,)."""
    distances, _ = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(centres).kneighbors()
    radii: npt.NDArray[np.float64] = distances[:, -1]
    return radii


def _share_inside(
    points: npt.NDArray[np.float64], centres: npt.NDArray[np.float64], radii: npt.NDArray[np.float64]
) -> float:
    """Share of points within the radius of any centre."""

    def inside(distances: npt.NDArray[np.float64], _: int) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = np.any(distances <= radii, axis=1)
        return found

    parts = pairwise_distances_chunked(points, centres, reduce_func=inside, working_memory=WORKING_MEMORY)
    return float(np.concatenate(list(parts)).mean())
