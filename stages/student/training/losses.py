"""Losses, one small function each, and their registries: a new loss is a function and a line in a registry.

Images are (N, C, H, W); every loss is a mean over the batch. Importing this module doesn't import torch, so that a
configuration can be checked against the names alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pseudo_huber(prediction: Tensor, target: Tensor, width: float) -> Tensor:
    """√((p − t)² + c²) − c averaged over values: a smooth absolute error, quadratic below c (Charbonnier et al. 1997).

    Args:
        prediction: any shape.
        target: the same shape.
        width: c, in units of the values.
    """
    return (((prediction - target).square() + width**2).sqrt() - width).mean()


def mean_square(prediction: Tensor, target: Tensor, width: float = 0.0) -> Tensor:
    """(p − t)² averaged over values; `width` has no effect."""
    return (prediction - target).square().mean()


def relativistic_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(real) − D(fake)): a fake should look more real than its pair (R3GAN, Huang et al. 2024, eq. 2)."""
    return _softplus(real_logits - fake_logits).mean()


def relativistic_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(D(fake) − D(real)), the discriminator's side of `relativistic_generator`."""
    return _softplus(fake_logits - real_logits).mean()


def non_saturating_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(−D(fake)) (Goodfellow et al. 2014, §3); the real logits play no part."""
    return _softplus(-fake_logits).mean()


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(−D(real)) + softplus(D(fake))."""
    return _softplus(-real_logits).mean() + _softplus(fake_logits).mean()


def hinge_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−D(fake) (Lim and Ye 2017, eq. 12); the real logits play no part."""
    return -fake_logits.mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """max(0, 1 − D(real)) + max(0, 1 + D(fake)) (Lim and Ye 2017, eq. 11)."""
    return (1.0 - real_logits).relu().mean() + (1.0 + fake_logits).relu().mean()


def squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """‖∇D‖² averaged over the batch: R1 on real images, R2 on fakes (Mescheder et al. 2018, eq. 9).

    Args:
        logits: shape (N,), computed from `images`.
        images: shape (N, …), requiring grad.
    """
    return _gradient(logits, images).square().sum(1).mean()


def unit_gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """(‖∇D‖ − 1)² averaged over the batch (Gulrajani et al. 2017, eq. 3), as the reference uses it."""
    norm: Tensor = _gradient(logits, images).norm(dim=1)
    return (norm - 1.0).square().mean()


def _gradient(logits: Tensor, images: Tensor) -> Tensor:
    """∇D, shape (N, values), differentiable."""
    import torch

    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    flat: Tensor = gradient.flatten(1)
    return flat


def _softplus(values: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.softplus(values)


REGRESSIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"huber": pseudo_huber, "mse": mean_square}
"""By the name in `objective.regression`: a loss of (prediction, target, `objective.huber_width`)."""
ADVERSARIAL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relativistic": (relativistic_generator, relativistic_discriminator),
    "hinge": (hinge_generator, hinge_discriminator),
    "non-saturating": (non_saturating_generator, non_saturating_discriminator),
}
"""By the name in `objective.adversarial.loss`: the generator's and the discriminator's loss of (real, fake) logits."""
