"""Kernel distance (KID): the unbiased squared maximum mean discrepancy with a cubic kernel (Bińkowski et al. 2018).

With k(x, y) = (x·y / D + 1)³ and samples x of P, y of Q (Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, sec. 4):

    MMD²(P, Q) = Σ_{i≠j} k(xᵢ, xⱼ) / m(m−1) + Σ_{i≠j} k(yᵢ, yⱼ) / n(n−1) − 2 Σ_{i,j} k(xᵢ, yⱼ) / mn

It is unbiased at any number of samples – 0 on average for equal distributions, so it may be negative –, where a Fréchet
distance grows as samples get fewer. Bińkowski et al. average it over random subsets that overlap; here neither the
evaluation's sets of seeds overlap nor the parts of the reference that each is held against, so that
sd / √(number of sets) is an honest standard error: a reference that all sets shared would err alike for all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.floating[Any]]
DEGREE = 3
MAX_REFERENCE = 10_000
"""Rows of the reference that are used, spread evenly: the cost of its own term is quadratic in them."""
BLOCK_ENTRIES = 1 << 21
"""Entries of the kernel matrix at one time: 16 MB."""


class KernelReference:
    """The reference's features and their own term, which is found once for all samplers.

    Args:
        features: shape (N, D), N ≥ 2.
    """

    def __init__(self, features: Features) -> None:
        chosen = np.linspace(0, len(features) - 1, min(len(features), MAX_REFERENCE)).round().astype(np.int64)
        self.features: npt.NDArray[np.float64] = features[chosen].astype(np.float64)
        self.own_term = own_term(self.features)


def kernel_distance(features: Features, reference: KernelReference) -> float:
    """Unbiased MMD² between features of shape (N, D), N ≥ 2, and a reference."""
    values = features.astype(np.float64)
    cross = kernel_sum(values, reference.features) / (len(values) * len(reference.features))
    return own_term(values) + reference.own_term - 2.0 * cross


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
        total += float(np.vdot(base * base, base))  # the cube and its sum, without a power
    return total
