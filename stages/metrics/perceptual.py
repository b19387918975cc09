"""Perceptual distance of paired images in a feature network's layers (Zhang et al. 2018, eq. 1), or LPIPS itself.

    d(x, y) = Σ_layers mean_{h,w} ‖ ŷ_hw − x̂_hw ‖²,  features scaled to unit length along the channels

which is LPIPS with all of its learned weights at 1, in the network that scores. The package `lpips` has the learned
weights, for colour images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from advkd.cache.errors import UsageError

TINY = 1e-10
MIN_LPIPS_SIDE = 32
"""AlexNet's last layers have no position left below it."""


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


class LpipsDistance:
    """LPIPS (AlexNet) through its package.

    Args:
        item_shape: of an image, (C, H, W).
        device: to compute on.

    Raises:
        UsageError: the package or its AlexNet is not here, or the images are not for it.
    """

    def __init__(self, item_shape: tuple[int, ...], device: torch.device, **options: Any) -> None:
        if item_shape[0] != 3 or min(item_shape[1:]) < MIN_LPIPS_SIDE:
            raise UsageError(
                f"perceptual lpips: needs colour images of at least {MIN_LPIPS_SIDE} pixels, these are "
                f"{'×'.join(map(str, item_shape))}; `features` compares in the layers of the network that scores"
            )
        try:
            import lpips
        except ImportError as error:
            raise UsageError(
                f"perceptual lpips: the package is not here ({error}): pip install 'advkd[lpips]'"
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it calls torchvision in a way that is deprecated
                network: nn.Module = lpips.LPIPS(net="alex", verbose=False, **options)
        except (OSError, URLError) as error:
            raise UsageError(
                f"perceptual lpips: torchvision's AlexNet is not here and can't be fetched ({error}); `features` "
                "compares in the layers of the network that scores"
            ) from None
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of image pairs in [−1, 1], both of shape (N, 3, H, W); shape (N,)."""
        distance: Tensor = self.network(first.to(self.device), second.to(self.device))
        return distance.flatten().float().cpu()
