"""What a feature network sees in images: the common form of Inception, a classifier and a self-supervised network.

A feature network from someone else is a named architecture plus safetensors weights; no code comes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

LOOK_BATCH = 64
"""Images at one time, so that the layers of two looks fit into memory."""
MAX_SIDE = 32
"""`shrunk` averages larger images down to it, which bounds the cost of training and of pixel distances."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a network sees in N images."""

    features: Tensor
    """Shape (N, D), to compare distributions with."""
    maps: list[Tensor]
    """Earlier layers, each of shape (N, C, H, W), to compare image pairs with."""
    probabilities: Tensor | None
    """Of the classes, shape (N, K), where the network is a classifier of such images."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network, and how it looks at images."""

    name: str
    network: nn.Module
    look: Callable[[Tensor], Look]
    """Images in [−1, 1], shape (N, C, H, W), on `device` → what the network sees."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.network.parameters(), torch.empty(0)).device


def clipped(images: Tensor) -> Tensor:
    """Images as a viewer shows them: values clipped to [−1, 1]."""
    return images.clamp(-1.0, 1.0)


def shrunk(images: Tensor) -> Tensor:
    """Images of at most `MAX_SIDE` pixels per side, by averaging; shape (N, C, H, W)."""
    height, width = (min(length, MAX_SIDE) for length in images.shape[-2:])
    return images if images.shape[-2:] == (height, width) else F.adaptive_avg_pool2d(images, (height, width))


@torch.no_grad()
def observe(network: FeatureNetwork, images: Tensor) -> Iterator[tuple[slice, Look]]:
    """What a network sees in images (N, C, H, W), clipped, in parts."""
    for start in range(0, len(images), LOOK_BATCH):
        part = slice(start, min(start + LOOK_BATCH, len(images)))
        yield part, network.look(clipped(images[part]).to(network.device))


def see(
    network: FeatureNetwork, batches: Iterable[Tensor]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Features (N, D) and, of a classifier, probabilities (N, K) of all images (n, C, H, W) of some batches."""
    features, probabilities = [], []
    for batch in batches:
        for _, look in observe(network, batch):
            features.append(to_numpy(look.features))
            if look.probabilities is not None:
                probabilities.append(to_numpy(look.probabilities))
    return np.concatenate(features), np.concatenate(probabilities) if probabilities else None


def to_numpy(values: Tensor) -> npt.NDArray[np.float32]:
    """As float32 on the CPU."""
    array: npt.NDArray[np.float32] = values.to("cpu", torch.float32).numpy()
    return array
