"""Training the small classifier that scores samples."""

from __future__ import annotations

import math

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import ConfigError
from advkd.stages.metrics.classifier import SmallClassifier
from advkd.stages.pretrain.config import ClassifierConfig
from advkd.stages.reporter import Reporter
from advkd.stages.schedules import one_cycle

ROTATION = 10.0
SCALING = 0.1
SHIFT = 1.0


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 10°, scale by up to 10 %, shift by up to a pixel; outside is background (−1)."""
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
    return F.grid_sample(images + 1.0, grid, align_corners=False) - 1.0


def train_classifier(
    images: Tensor, labels: Tensor, config: ClassifierConfig, seed: int, reporter: Reporter
) -> tuple[SmallClassifier, float]:
    """Train on jittered images; the same seed gives the same classifier on a CPU.

    Args:
        images: in [−1, 1], shape (N, C, H, W).
        labels: int64, shape (N,).
        config: epochs, batch size, rate, size of the held-out split.
        seed: of weights, order and jitter.
        reporter: shows progress.

    Returns:
        The classifier and its accuracy on the held-out split.

    Raises:
        ConfigError: the held-out split or a batch is larger than the remaining images.
    """
    if 2 * config.held_out > len(images):
        raise ConfigError(
            f"classifier.held_out: {config.held_out} of {len(images)} images leaves too few to learn from"
        )
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, test = train_test_split(
        torch.arange(len(images)).numpy(), test_size=config.held_out, stratify=labels.numpy(), random_state=0
    )
    train, test = torch.from_numpy(train), torch.from_numpy(test)
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
        loss = F.cross_entropy(classifier(jitter(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        reporter.advance()
    reporter.finish()
    classifier.eval().requires_grad_(False)
    correct = classifier(images[test]).argmax(1) == labels[test]
    return classifier, float(correct.float().mean())
