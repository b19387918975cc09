"""Kernel inception distance (KID): the unbiased squared maximum mean discrepancy (MMD) with a cubic kernel.

With k(x, y) = (x·y / D + 1)³ and samples x of P, y of Q (Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, sec. 4):

    MMD²(P, Q) = Σ_{i≠j} k(xᵢ, xⱼ) / m(m−1) + Σ_{i≠j} k(yᵢ, yⱼ) / n(n−1) − 2 Σ_{i,j} k(xᵢ, yⱼ) / mn

It is unbiased at any number of samples (0 on average for equal distributions, so it may be negative), whereas a Fréchet
distance grows as samples get fewer. Bińkowski et al. average it over random subsets, which overlap. Here neither the
evaluation's sets nor the parts of the reference that they are compared with overlap, so that sd / √(number of sets) is
the standard error: a reference shared by all sets would shift all of them alike.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from advkd.stages.metrics.base import Floats, Measure, Reference, Score

DEGREE = 3
MAX_REFERENCE = 10_000
"""Rows of a part of the reference that are used: the cost of its own term is quadratic in them."""
BLOCK_ENTRIES = 1 << 21
"""Entries of the kernel matrix at one time: 16 MB."""


def kid(features: Floats, reference: Floats, reference_term: float | None = None) -> float:
    """Unbiased MMD² between features of shape (N, D) and a reference of shape (M, D); N, M ≥ 2.

    Args:
        features: of samples.
        reference: to compare with.
        reference_term: `own_term(reference)`, where it is known.
    """
    values, others = features.astype(np.float64), reference.astype(np.float64)
    theirs = own_term(others) if reference_term is None else reference_term
    return own_term(values) + theirs - 2.0 * (kernel_sum(values, others) / (len(values) * len(others)))


def own_term(values: npt.NDArray[np.float64]) -> float:
    """Σ_{i≠j} k(xᵢ, xⱼ) / N(N−1), from one triangle of the matrix."""
    count, dimension = values.shape
    rows = max(1, BLOCK_ENTRIES // count)
    total = 0.0
    for start in range(0, count, rows):
        block, later = values[start : start + rows], values[start + rows :]
        total += kernel_sum(block, block) + 2.0 * kernel_sum(block, later)
    diagonal = float(((np.square(values).sum(1) / dimension + 1.0) ** DEGREE).sum())
    return (total - diagonal) / float(count * (count - 1))


def kernel_sum(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Σ_{i,j} k(xᵢ, yⱼ) over shapes (N, D) and (M, D), in blocks of rows."""
    if not len(second):
        return 0.0
    rows = max(1, BLOCK_ENTRIES // len(second))
    total = 0.0
    for start in range(0, len(first), rows):
        base = first[start : start + rows] @ second.T
        base /= first.shape[1]
        base += 1.0
        total += float(np.vdot(base * base, base))  # the sum of cubes, without a call of power
    return total


def _prepare(reference: Reference) -> Score:
    """Each set is compared with a part of the reference of its own.

    Parts are runs of seeds, not every n-th one, which could be of one class: labels follow the seeds in turn.
    """
    parts, size = [], len(reference.features) // reference.num_sets
    for start in range(0, size * reference.num_sets, max(1, size)):
        values = reference.features[start : start + min(size, MAX_REFERENCE)].astype(np.float64)
        if len(values) > 1:
            parts.append((values, own_term(values)))
    return lambda features, index: kid(features, *parts[index]) if index < len(parts) else None


KID = Measure(
    name="kid",
    title="KID",
    label="kernel inception distance (KID) to the teacher's cached x_0",
    better="lower",
    observed="features",
    prepare=_prepare,
    spread="standard_error",
    column_decimals=4,
)
