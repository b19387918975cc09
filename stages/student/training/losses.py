"""Losses, one small function each. Images are (N, C, H, W); every loss is a mean over the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def pseudo_huber(prediction: Tensor, target: Tensor, width: float) -> Tensor:
    """√((p − t)² + c²) − c averaged over values: a smooth absolute error, quadratic below c (Charbonnier et al. 1997).

    Args:
        prediction: any shape.
        target: the same shape.
        width: c, in units of the values.
    """
    return (torch.sqrt((prediction - target).square() + width**2) - width).mean()


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """(p − t)² averaged over values."""
    return (prediction - target).square().mean()


def relativistic_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(real) − D(fake)): a fake should look more real than its pair (R3GAN, Huang et al. 2024, eq. 2)."""
    return F.softplus(real_logits - fake_logits).mean()


def relativistic_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(fake) − D(real)), the discriminator's side of `relativistic_generator`."""
    return F.softplus(fake_logits - real_logits).mean()


def non_saturating_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(−D(fake)) (Goodfellow et al. 2014, §3); the real logits play no part."""
    return F.softplus(-fake_logits).mean()


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(−D(real)) + softplus(D(fake))."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def hinge_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−D(fake) (Lim and Ye 2017, eq. 12); the real logits play no part."""
    return -fake_logits.mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """max(0, 1 − D(real)) + max(0, 1 + D(fake)) (Lim and Ye 2017, eq. 11)."""
    return F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean()


def squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """‖∇D‖² averaged over the batch: R1 on real images, R2 on fakes (Mescheder et al. 2018, eq. 9).

    Args:
        logits: shape (N,), computed from `images`.
        images: shape (N, …), requiring grad.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    squared: Tensor = gradient.flatten(1).square().sum(1)
    return squared.mean()


def unit_gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """(‖∇D‖ − 1)² averaged over the batch (Gulrajani et al. 2017, eq. 3), as the reference uses it."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    squared: Tensor = (gradient.flatten(1).norm(dim=1) - 1.0).square()
    return squared.mean()


Loss = Callable[[Tensor, Tensor], Tensor]
ADVERSARIAL: dict[str, tuple[Loss, Loss]] = {
    "relativistic": (relativistic_generator, relativistic_discriminator),
    "hinge": (hinge_generator, hinge_discriminator),
    "non-saturating": (non_saturating_generator, non_saturating_discriminator),
}
"""By name: the generator's and the discriminator's loss, of real and fake logits."""
