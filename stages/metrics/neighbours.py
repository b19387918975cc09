"""How near fresh samples are to the training images: a student that memorises them is nearer than its teacher.

Distances are Euclidean in pixels, divided by √D: the root mean square difference of two images in [−1, 1]. Images
larger than 32 pixels are averaged down to 32, which bounds the cost; a memorised image is still near.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from advkd.stages.metrics.base import Floats, Measure, mean_of_set
from advkd.stages.metrics.features import shrunk, to_numpy

CLOSEST = 0.01


def to_rows(images: Tensor) -> npt.NDArray[np.float32]:
    """Images (N, C, H, W) as rows of at most C · 32 · 32 values, shape (N, D)."""
    return to_numpy(shrunk(images).flatten(1))


def nearest_images(
    samples: Floats, training: Iterable[Tensor], num_kept: int
) -> tuple[npt.NDArray[np.float64], list[Tensor]]:
    """The nearest training image of each sample.

    Args:
        samples: as `to_rows` makes them, shape (N, D).
        training: images in [−1, 1], shape (M, C, H, W), in parts, read once.
        num_kept: how many nearest images to return.

    Returns:
        The root mean square differences, shape (N,), in the images' units, infinite where there are no training
        images; and the nearest images of the first samples, each (C, H, W), empty without training images.
    """
    from sklearn.metrics import pairwise_distances_argmin_min

    nearest, kept = np.full(len(samples), np.inf), {}
    for part in training:
        found, distances = pairwise_distances_argmin_min(samples, to_rows(part))
        for index in np.flatnonzero(distances[:num_kept] < nearest[:num_kept]):
            kept[index] = part[found[index]].clone()
        nearest = np.minimum(nearest, distances)
    result: npt.NDArray[np.float64] = nearest / samples.shape[1] ** 0.5
    return result, [kept[index] for index in sorted(kept)]


NEAREST_TRAINING = Measure(
    name="nearest_training",
    title="rms to the nearest training image",
    label="distance to the nearest training image, mean",
    better="as teacher",
    observed="training_distances",
    prepare=mean_of_set,
)
NEAREST_TRAINING_CLOSEST = Measure(
    name="nearest_training_closest",
    title="… of the closest hundredth",
    label="distance to the nearest training image, the closest hundredth",
    better="as teacher",
    observed="training_distances",
    prepare=lambda _: lambda distances, _: float(np.quantile(distances, CLOSEST)),
)
