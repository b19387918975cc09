"""Distances of two images from the same noise: squared error, and perceptual distance in a network's layers.

The perceptual distance is that of Zhang et al. 2018, eq. 1, with all learned weights at 1, in the network that scores:

    d(x, y) = Σ_layers mean_{h,w} ‖ ŷ_hw − x̂_hw ‖²,  features scaled to unit length along the channels

`lpips.py` has the learned weights, for colour images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advkd.stages.metrics.base import Measure, mean_of_set

TINY = 1e-10


def squared_errors(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of image pairs; from shape (N, C, H, W) to (N,)."""
    return (images - others).square().flatten(1).mean(1)


def perceptual_distances(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Distance of image pairs by their feature maps.

    Args:
        maps: one per layer, each of shape (N, C, H, W).
        others: of the images to compare with, in the same order.

    Returns:
        Shape (N,), in [0, 4 · layers]; 0 for equal images.
    """
    layers = [
        (_unit(one.float()) - _unit(other.float())).square().sum(1).mean(dim=(1, 2))
        for one, other in zip(maps, others, strict=True)
    ]
    return torch.stack(layers).sum(0)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + TINY).sqrt()


MSE_TO_TEACHER = Measure(
    name="mse_to_teacher",
    title="squared error to teacher, same noise",
    label="mean squared error to the teacher from the same noise",
    better="lower",
    observed="squared_errors",
    prepare=mean_of_set,
)
PERCEPTUAL_TO_TEACHER = Measure(
    name="perceptual_to_teacher",
    title="perceptual distance to teacher",
    label="perceptual distance to the teacher from the same noise",
    better="lower",
    observed="perceptual_distances",
    prepare=mean_of_set,
)
