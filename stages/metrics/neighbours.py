"""How near fresh samples come to what was trained on: a student that remembers images stands nearer than its teacher.

Distances are Euclidean in pixels, divided by √D: the root mean square difference of two images in [−1, 1]. Images
larger than 32 pixels are averaged down to it: that bounds the cost, and what was learned by heart is near even so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import pairwise_distances_argmin_min
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MAX_SIDE = 32
Rows = npt.NDArray[np.floating[Any]]


def to_rows(images: Tensor) -> npt.NDArray[np.float32]:
    """Images (N, C, H, W) as rows of at most C · 32 · 32 values, shape (N, D)."""
    height, width = (min(side, MAX_SIDE) for side in images.shape[-2:])
    small = images if images.shape[-2:] == (height, width) else F.adaptive_avg_pool2d(images, (height, width))
    rows: npt.NDArray[np.float32] = small.flatten(1).float().cpu().numpy()
    return rows


def nearest_distances(samples: Rows, training: Iterable[Rows]) -> npt.NDArray[np.float64]:
    """Root mean square difference to the nearest training image.

    Args:
        samples: shape (N, D).
        training: rows of shape (M, D), in parts, each gone through once.

    Returns:
        Shape (N,), in the images' units.
    """
    nearest = np.full(len(samples), np.inf)
    for part in training:
        nearest = np.minimum(nearest, pairwise_distances_argmin_min(samples, part)[1])
    result: npt.NDArray[np.float64] = nearest / samples.shape[1] ** 0.5
    return result
