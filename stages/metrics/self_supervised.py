"""Features without labels: a small network trained on the images themselves, by instance discrimination.

Training makes two views of one image, each by a small random rotation, scaling and shift, nearer to each other than to
the views of all other images of a batch (SimCLR, Chen et al. 2020, eq. 1). With projections z of unit length, 2N views
and temperature τ, the loss of a pair (i, j) of views of one image is

    ℓ_ij = −log( exp(z_i · z_j / τ) / Σ_{k ≠ i} exp(z_i · z_k / τ) )

Features are the layer before the projection. Each is divided by its standard deviation over the training images, so
that a Fréchet distance of 1 is a shift of one feature by one standard deviation.

What it measures: whatever distinguishes one image of the cache from another, and small rotations, scalings and shifts
less than anything else. It has no notion of classes, and has seen nothing but the cache's images: it shows how far
samples are from the teacher's, and nothing of how good the teacher is. Its distances compare samplers of one cache;
another cache has other features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from advkd.stages.metrics.features import Look, shrunk
from advkd.stages.metrics.saved import SmallNetwork, convolutions
from advkd.stages.reporter import Reporter

GRID = 4
"""Height and width of the last map."""
NUM_STEPS = 200
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
WEIGHT_DECAY = 0.01
TEMPERATURE = 0.2
ROTATION = math.radians(15.0)
SCALING = 0.2
SHIFT = 0.1
"""Of the images' height and width."""


class SelfSupervisedCnn(SmallNetwork):
    """A small convolutional network for images of any size.

    Args:
        channels: of an image.
        size: height and width of an image.
        width: of the first convolution.
        num_features: of the last layer.
    """

    architecture = "self-supervised-cnn"

    def __init__(self, channels: int, size: int, width: int = 32, num_features: int = 64) -> None:
        super().__init__(channels=channels, size=size, width=width, num_features=num_features)
        self.body = nn.Sequential(
            *convolutions(channels, width),
            nn.AdaptiveAvgPool2d(GRID),
            nn.Flatten(),
            nn.Linear(2 * width * GRID**2, num_features),
        )
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(num_features))

    def look(self, images: Tensor) -> Look:
        """Images in [−1, 1], shape (N, C, H, W) → scaled features and the four convolutions' outputs."""
        hidden, maps = shrunk(images), []
        for layer in self.body:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                maps.append(hidden)
        return Look(features=hidden / self.scale, maps=maps, probabilities=None)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [−1, 1], shape (N, C, H, W) → features, shape (N, num_features), not scaled."""
        features: Tensor = self.body(shrunk(images))
        return features


def train_self_supervised(
    images: Tensor,
    size: int,
    seed: int,
    reporter: Reporter,
    *,
    num_steps: int = NUM_STEPS,
    device: torch.device | None = None,
) -> SelfSupervisedCnn:
    """Train on images; the same images, seed and number of threads give the same network on a CPU.

    Args:
        images: in [−1, 1], shape (N, C, H, W), N ≥ 2; `shrunk` already, if they should take less memory.
        size: height and width of the images that the network is for.
        seed: of weights, batches and views.
        reporter: reports progress.
        num_steps: of training.
        device: to train on.
    """
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SelfSupervisedCnn(images.shape[1], size)
        width = int(network.options["num_features"])
        projection = nn.Sequential(nn.ReLU(), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
    network, projection, images = network.to(device), projection.to(device), shrunk(images).to(device)
    parameters = [*network.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(num_steps))
    reporter.start("features", num_steps, "steps")
    for _ in range(num_steps):
        chosen = images[torch.randperm(len(images), generator=generator)[:BATCH_SIZE].to(device)]
        loss = contrastive_loss(projection(network(torch.cat([view(chosen, generator), view(chosen, generator)]))))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        reporter.advance(note=f"loss {loss.item():.3f}")
    reporter.finish()
    with torch.no_grad():
        features = torch.cat([network(part) for part in torch.split(images, BATCH_SIZE)])
        network.scale.copy_(features.std(0).clamp(min=1e-6))
    return network.eval().requires_grad_(False)


def contrastive_loss(projections: Tensor) -> Tensor:
    """Mean ℓ over all views; `projections` of shape (2N, D), view i and view N + i of one image."""
    count = len(projections) // 2
    unit = F.normalize(projections, dim=1)
    itself = torch.eye(2 * count, dtype=torch.bool, device=unit.device)
    similarity = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -math.inf)
    other = torch.arange(2 * count, device=unit.device).roll(count)
    return F.cross_entropy(similarity, other)


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotated by up to 15°, scaled by up to a fifth, shifted by up to a tenth; borders are repeated outwards."""

    def uniform(reach: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2.0 - 1.0) * reach

    angle, scale = uniform(ROTATION), 1.0 + uniform(SCALING)
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), uniform(2.0 * SHIFT)], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), uniform(2.0 * SHIFT)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _rate(num_steps: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine."""
    return lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
