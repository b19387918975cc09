"""Improved precision and recall (Kynkäänniemi et al. 2019).

The support of a distribution is estimated from a set of features Φ as a union of balls, one around each feature, that
reaches to its k-th nearest other feature of the same set (eq. 1):

    f(φ, Φ) = 1 if ‖φ − φ'‖ ≤ ‖φ' − NN_k(φ', Φ)‖ for any φ' in Φ, else 0
    precision = mean of f(φ_sample, Φ_reference),  recall = mean of f(φ_reference, Φ_sample)      (eq. 2)

As there, both sets should be of one size and k = 3: either score depends on how dense a set is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from advkd.stages.metrics.base import Floats, Measure, Reference, Score

NEIGHBOURS = 3
WORKING_MEMORY = 64
"""MiB of distances at one time."""


def precision(samples: Floats, reference: Floats, neighbours: int = NEIGHBOURS) -> float:
    """Share of samples (N, D) within the support of a reference (M, D), in [0, 1]; M > `neighbours`."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    points, centres = samples.astype(np.float64), reference.astype(np.float64)
    distances, _ = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(centres).kneighbors()
    radii = distances[:, -1]

    def inside(distances: Floats, _: int) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = np.any(distances <= radii, axis=1)
        return found

    parts = pairwise_distances_chunked(points, centres, reduce_func=inside, working_memory=WORKING_MEMORY)
    return float(np.concatenate(list(parts)).mean())


def recall(samples: Floats, reference: Floats, neighbours: int = NEIGHBOURS) -> float:
    """Share of a reference (M, D) within the support of samples (N, D), in [0, 1]; N > `neighbours`."""
    return precision(reference, samples, neighbours)


def _with(share: Callable[[Floats, Floats], float]) -> Callable[[Reference], Score]:
    """As many reference seeds as samples, others for each set."""

    def prepare(reference: Reference) -> Score:
        wanted = reference.features

        def score(features: Floats, index: int) -> float | None:
            count = min(len(features), len(wanted))
            if count <= NEIGHBOURS:
                return None
            return share(features[:count], wanted[(np.arange(count) + index * count) % len(wanted)])

        return score

    return prepare


PRECISION = Measure(
    name="precision",
    title="precision",
    label="share of samples within the reference's estimated support",
    better="higher",
    observed="features",
    prepare=_with(precision),
    share=True,
    column_decimals=0,
)
RECALL = Measure(
    name="recall",
    title="recall",
    label="share of the reference within the samples' estimated support",
    better="higher",
    observed="features",
    prepare=_with(recall),
    share=True,
    column_decimals=0,
)
