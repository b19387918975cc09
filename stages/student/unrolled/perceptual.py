"""LPIPS (Zhang et al. 2018), through its own package: how unlike two colour images look."""

from __future__ import annotations

import torch
from torch import Tensor

from advkd.cache.errors import UsageError

MIN_SIZE = 32


class PerceptualDistance:
    """The mean LPIPS distance of pairs; AlexNet's features.

    Args:
        item_shape: (C, H, W) of the images.
        device: where to compute.

    Raises:
        UsageError: the images have no three channels or are too small, or the package is not installed.
    """

    def __init__(self, item_shape: tuple[int, int, int], device: torch.device) -> None:
        if item_shape[0] != 3 or item_shape[1] < MIN_SIZE:
            raise UsageError(
                f"objective.perceptual_features: lpips is for colour images of at least {MIN_SIZE} pixels, these are "
                f"{'×'.join(map(str, item_shape))}: choose critic"
            )
        try:
            from lpips import LPIPS
        except ImportError:
            raise UsageError(
                "objective.perceptual_features: lpips needs its package: pip install 'advkd[lpips]', or choose critic"
            ) from None
        self._network = LPIPS(net="alex", verbose=False).to(device).eval().requires_grad_(False)

    def __call__(self, made: Tensor, truth: Tensor) -> Tensor:
        """Images in [−1, 1], (N, 3, H, W) each; a mean."""
        distance: Tensor = self._network(made, truth).mean()
        return distance
