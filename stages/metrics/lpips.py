"""LPIPS (Zhang et al. 2018) through its package, for training and for scoring.

LPIPS compares image pairs in the layers of AlexNet, weighted by what people judged to look alike. It is for colour
images of at least 32 pixels.
"""

from __future__ import annotations

import warnings
from typing import Any
from urllib.error import URLError

from torch import Tensor, nn

from advkd.cache.errors import UsageError

MIN_SIDE = 32
"""AlexNet's last layers have no position left below it."""


class Lpips(nn.Module):
    """LPIPS distance of image pairs, differentiable in both images; its own weights are frozen.

    Args:
        item_shape: of an image, (C, H, W).
        setting: the configuration key that asked for it, for messages.
        otherwise: the value of that key that needs no package.

    Raises:
        UsageError: the images are not for it, or the package or its AlexNet is not installed.
    """

    def __init__(self, item_shape: tuple[int, ...], *, setting: str, otherwise: str, **options: Any) -> None:
        super().__init__()
        if item_shape[0] != 3 or min(item_shape[1:]) < MIN_SIDE:
            raise UsageError(
                f"{setting}: lpips needs colour images of at least {MIN_SIDE} pixels, these are "
                f"{'×'.join(map(str, item_shape))}; choose `{otherwise}`"
            )
        try:
            import lpips
        except ImportError as error:
            raise UsageError(
                f"{setting}: the package lpips is not installed ({error}): pip install 'advkd[lpips]', or choose "
                f"`{otherwise}`"
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it calls torchvision in a way that is deprecated
                self.network: nn.Module = lpips.LPIPS(net="alex", verbose=False, **options)
        except (OSError, URLError) as error:
            raise UsageError(
                f"{setting}: torchvision's AlexNet is not on this machine and can't be downloaded ({error}); choose "
                f"`{otherwise}`"
            ) from None
        self.network.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of image pairs in [−1, 1], both of shape (N, 3, H, W); shape (N,), 0 for equal images."""
        distance: Tensor = self.network(first, second)
        return distance.flatten()
