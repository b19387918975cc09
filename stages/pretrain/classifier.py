"""Training the small classifier that scores samples."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import ConfigError
from advkd.stages.images.datasets import LabelledImages
from advkd.stages.metrics.classifier import SmallClassifier
from advkd.stages.pretrain.config import ClassifierConfig
from advkd.stages.reporter import Reporter
from advkd.stages.schedules import one_cycle

ROTATION = 10.0
SCALING = 0.1
SHIFT = 1.0


def jitter(images: Tensor, generator: torch.Generator, background: float = -1.0) -> Tensor:
    """Rotate by up to 10°, scale by up to 10 %, shift by up to a pixel; outside is background."""
    count = len(images)

    def uniform(reach: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2.0 - 1.0) * reach

    angle, scale = uniform(math.radians(ROTATION)), 1.0 + uniform(SCALING)
    reach = 2.0 * SHIFT / images.shape[-1]
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), uniform(reach)], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(reach)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


def split_drawings(data: LabelledImages, held_out: int) -> tuple[Tensor, Tensor]:
    """Indices to learn from and held-out ones, stratified by label; a drawing's variants are on one side.

    Args:
        data: to split.
        held_out: drawings to hold out.

    Raises:
        ConfigError: too few drawings are left to learn from.
    """
    distinct, first = np.unique(data.drawings.numpy(), return_index=True)
    if 2 * held_out > len(distinct):
        raise ConfigError(f"classifier.held_out: {held_out} of {len(distinct)} images leaves too few to learn from")
    split = train_test_split(distinct, test_size=held_out, stratify=data.labels.numpy()[first], random_state=0)
    train, test = (_images_of(torch.from_numpy(part), data.drawings) for part in split)
    return train, test


def _images_of(chosen: Tensor, drawings: Tensor) -> Tensor:
    """Indices of the images of some drawings, in the drawings' order."""
    variants = torch.argsort(drawings, stable=True).split(torch.bincount(drawings).tolist())  # type: ignore[no-untyped-call]
    return torch.cat([variants[number] for number in chosen])


def train_classifier(
    data: LabelledImages, config: ClassifierConfig, seed: int, reporter: Reporter, background: float = -1.0
) -> tuple[SmallClassifier, float]:
    """Train on jittered images; the same seed gives the same classifier on a CPU.

    Args:
        data: what to learn and to test on.
        config: epochs, batch size, rate, size of the held-out split.
        seed: of weights, order and jitter.
        reporter: shows progress.
        background: of the images.

    Returns:
        The classifier and its accuracy on the held-out split, of which no drawing was learnt in any variant.

    Raises:
        ConfigError: the held-out split or a batch is larger than the remaining images.
    """
    images, labels, _ = data
    train, test = split_drawings(data, config.held_out)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = SmallClassifier(images.shape[1], images.shape[2], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.learning_rate, weight_decay=0.01)
    batches = len(train) // config.batch_size
    if not batches:
        raise ConfigError(f"classifier.batch_size: {config.batch_size} is more than the {len(train)} training images")
    num_steps = config.epochs * batches
    reporter.start("classifier", num_steps, "steps")
    for step in range(num_steps):
        if step % batches == 0:
            order = train[torch.randperm(len(train), generator=generator)]
        chosen = order[step % batches * config.batch_size :][: config.batch_size]
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * one_cycle(step, num_steps, 0.2)
        loss = F.cross_entropy(classifier(jitter(images[chosen], generator, background)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        reporter.advance()
    reporter.finish()
    classifier.eval().requires_grad_(False)
    correct = classifier(images[test]).argmax(1) == labels[test]
    return classifier, float(correct.float().mean())
