"""The feature network that a configuration names."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from advkd.cache.errors import UsageError
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.metrics import classifier, inception
from advkd.stages.metrics.features import FeatureNetwork


def load_features(
    config: EvaluateConfig, item_shape: tuple[int, ...], device: torch.device | None = None
) -> FeatureNetwork:
    """Load it, ready to look at images.

    Args:
        config: its name or folder.
        item_shape: of an image, (C, H, W).
        device: to compute on; the CPU if not given.

    Raises:
        UsageError: it does not fit the images, or its weights are missing.
    """
    device = device or torch.device("cpu")
    shape = "×".join(map(str, item_shape))
    if config.features != inception.NAME:
        small = classifier.load_classifier(Path(config.features)).to(device)
        channels, size = small.options["channels"], small.options["size"]
        if (channels, size) != tuple(item_shape[:2]):
            raise UsageError(f"features {config.features}: made for {channels}×{size}×{size} images, these are {shape}")
        return FeatureNetwork(name=classifier.NAME, network=small, look=small.look)
    if item_shape[0] != 3 or item_shape[1] < inception.MIN_SIDE:
        raise UsageError(
            f"features inception: needs colour images of at least {inception.MIN_SIDE} pixels, these are {shape}; "
            "give --features FOLDER of a small classifier (docs/evaluation.md says how to make one)"
        )
    network = inception.load_inception(config.inception_weights).to(device)
    return FeatureNetwork(name=inception.NAME, network=network, look=partial(inception.look_with_inception, network))
