"""DINOv2 (Oquab et al. 2024), whose features see what people see better than Inception's do (Stein et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from advkd.stages.metrics.features import Look
from advkd.stages.metrics.pretrained import load_network, prepared

MODEL_TYPE = "dinov2"
SIDE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as DINOv2 was trained."""
_COMPARED = 4
"""Layers whose patches are compared in pairs of images, evenly spaced."""


def look_with_dinov2(network: Any, images: Tensor) -> Look:
    """Images in [−1, 1], shape (N, 1 or 3, H, W) → the normed class token (N, D), and layers of patches."""
    seen = network(prepared(images, SIDE, _MEAN, _STD), output_hidden_states=True)
    layers = seen.hidden_states[1:]
    chosen = [layers[(k + 1) * len(layers) // _COMPARED - 1] for k in range(_COMPARED)]
    side = SIDE // network.config.patch_size
    maps = [layer[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for layer in chosen]
    return Look(features=seen.last_hidden_state[:, 0], maps=maps, probabilities=None)


def load_dinov2(folder: Path) -> Any:
    """The network in a folder that transformers saved, such as a copy of `facebook/dinov2-large`.

    Raises:
        UsageError: transformers isn't installed, or it can't be loaded.
    """
    return load_network(folder, "Dinov2Model", "features")
