"""Perceptual distance of paired images in a feature network's layers (Zhang et al. 2018, eq. 1).

    d(x, y) = Σ_layers mean_{h,w} ‖ ŷ_hw − x̂_hw ‖²,  features scaled to unit length along the channels

which is LPIPS with all of its learned weights at 1, in the network that scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-10


def perceptual_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Distance of image pairs by their layers.

    Args:
        first: a feature map a layer, each of shape (N, C, H, W).
        second: of the images to compare with, in the same order.

    Returns:
        Shape (N,), in [0, 4 · layers]; 0 for equal images.
    """
    layers = [
        (_unit(one.float()) - _unit(other.float())).square().sum(1).mean(dim=(1, 2))
        for one, other in zip(first, second, strict=True)
    ]
    return torch.stack(layers).sum(0)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + TINY).sqrt()
