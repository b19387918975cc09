"""The feature network that a configuration names."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from advkd.cache.errors import UsageError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.config import SELF, EvaluateConfig
from advkd.stages.evaluate.measure import cached_batches
from advkd.stages.evaluate.samplers import Decode, as_they_are
from advkd.stages.metrics import dinov2, inception
from advkd.stages.metrics.classifier import SmallClassifier
from advkd.stages.metrics.features import FeatureNetwork, clipped, shrunk
from advkd.stages.metrics.pretrained import model_type
from advkd.stages.metrics.saved import load_network, save_network
from advkd.stages.metrics.self_supervised import NUM_STEPS, SelfSupervisedCnn, train_self_supervised
from advkd.stages.reporter import Reporter

ARCHITECTURES = {network.architecture: network for network in (SmallClassifier, SelfSupervisedCnn)}
MAX_TRAINING = 8192
"""Cached images that a self-supervised network is trained on, chosen at random."""
TRAINING_SEED = 0


def load_features(
    config: EvaluateConfig, image_shape: tuple[int, ...], device: torch.device | None = None
) -> FeatureNetwork:
    """Load it, ready to look at images.

    Args:
        config: its name or folder.
        image_shape: of an image, (C, H, W).
        device: to compute on; the CPU if not given.

    Raises:
        UsageError: it does not fit the images, or its weights are missing.
    """
    device = device or torch.device("cpu")
    shape = "×".join(map(str, image_shape))
    if config.features == SELF:
        raise UsageError(
            "features self: expected a network's folder; give RUN/evaluation/features, which `advkd-evaluate "
            "--features self` writes"
        )
    if config.features != inception.NAME:
        folder = Path(os.path.expanduser(config.features))
        if model_type(folder) == dinov2.MODEL_TYPE:
            if image_shape[0] not in (1, 3):
                raise UsageError(f"features {config.features}: needs grey or colour images, these are {shape}")
            large = dinov2.load_dinov2(folder).to(device)
            return FeatureNetwork(name=dinov2.MODEL_TYPE, network=large, look=partial(dinov2.look_with_dinov2, large))
        small = load_network(folder, ARCHITECTURES).to(device)
        channels, size = small.options["channels"], small.options["size"]
        square = image_shape[1] == image_shape[2] or not isinstance(small, SmallClassifier)
        if (channels, size) != tuple(image_shape[:2]) or not square:
            raise UsageError(f"features {config.features}: made for {channels}×{size}×{size} images, these are {shape}")
        return FeatureNetwork(name=small.architecture, network=small, look=small.look)
    if image_shape[0] != 3 or min(image_shape[1:]) < inception.MIN_SIDE:
        raise UsageError(
            f"features inception: needs colour images of at least {inception.MIN_SIDE} pixels, these are {shape}; "
            "give a classifier's folder, or RUN/evaluation/features, which `advkd-evaluate --features self` writes "
            "(docs/evaluation.md explains both)"
        )
    network = inception.load_inception(config.inception_weights).to(device)
    return FeatureNetwork(name=inception.NAME, network=network, look=partial(inception.look_with_inception, network))


def with_own_features(
    config: EvaluateConfig,
    cache: TrajectoryCache,
    folder: Path,
    reporter: Reporter,
    device: torch.device,
    decode: Decode = as_they_are,
) -> EvaluateConfig:
    """The configuration with `self` replaced by a folder, where a network trained on the cache's x_0 is or comes to be.

    Args:
        config: returned as it is if its features are not `self`.
        cache: whose x_0 to train on.
        folder: kept if it holds the network of these very images.
        reporter: reports progress.
        device: to train on.
        decode: makes images of the cache's x_0.
    """
    if config.features != SELF:
        return config
    own = dataclasses.replace(config, features=str(folder))
    trained_on = {"cache": cache.recipe.fingerprint, "digest": cache.digest, "seed": TRAINING_SEED, "steps": NUM_STEPS}
    if _trained_on(folder) == trained_on:
        return own
    seeds = cache.seeds()
    order = np.random.default_rng(TRAINING_SEED).permutation(len(seeds))  # every n-th seed could be of one class
    chosen = seeds[np.sort(order[:MAX_TRAINING])]
    batches = cached_batches(cache, list(cache.states)[-1], chosen, config.batch_size, decode)
    images = torch.cat([shrunk(clipped(x_0)) for x_0 in batches])
    network = train_self_supervised(images, cache.recipe.image_shape[1], TRAINING_SEED, reporter, device=device)
    save_network(folder, network, {"trained_on": trained_on})
    return own


def _trained_on(folder: Path) -> object:
    try:
        return json.loads((folder / "config.json").read_bytes())["trained_on"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
