"""Differentiable augmentation: random changes of the images that critics see, real or not (Zhao et al. 2020).

A cache is a small data set for a critic. Augmentation keeps the critic from memorising the real images; since real and
fake images are changed alike, the student doesn't learn to make changed images. x_T moves with its image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from advkd.stages.student.unrolled.config import COLOURS, MOVES

SHIFT = 8
"""Translations reach up to the image size divided by this, as in the paper."""
CUT = 2
"""Cutout squares have the image size divided by this as their side, as in the paper."""
Draw = Callable[..., Tensor]


def augment(kinds: Sequence[str], images: Tensor, noise: Tensor, uniform: Draw) -> tuple[Tensor, Tensor]:
    """Change every image independently.

    Args:
        kinds: the changes, in order; see `AdversarialConfig.augment`.
        images: shape (N, C, H, W), about [−1, 1].
        noise: x_T of each image, the same shape.
        uniform: draws numbers in [0, 1) of a given shape (N, …), on the CPU.
    """

    def draw(*shape: int) -> Tensor:
        return uniform(len(images), *shape).to(images.device)

    for kind in kinds:
        if kind in _MOVES:
            images, noise = _MOVES[kind](torch.stack([images, noise], dim=1), draw).unbind(1)
        else:
            images = _COLOURS[kind](images, draw)
    return images, noise


def _flip(pairs: Tensor, draw: Draw) -> Tensor:
    turned = draw(1, 1, 1, 1) < 0.5
    return torch.where(turned, pairs.flip(-1), pairs)


def _translate(pairs: Tensor, draw: Draw) -> Tensor:
    """Shift by whole pixels; edge pixels are repeated."""
    height, width = pairs.shape[-2:]
    reach_y, reach_x = max(1, height // SHIFT), max(1, width // SHIFT)
    shift_y = (draw(1) * (2 * reach_y + 1)).long() - reach_y
    shift_x = (draw(1) * (2 * reach_x + 1)).long() - reach_x
    rows = (torch.arange(height, device=pairs.device) + shift_y).clamp(0, height - 1)
    columns = (torch.arange(width, device=pairs.device) + shift_x).clamp(0, width - 1)
    moved = pairs.gather(-2, rows[:, None, None, :, None].expand(pairs.shape))
    return moved.gather(-1, columns[:, None, None, None, :].expand(pairs.shape))


def _cutout(pairs: Tensor, draw: Draw) -> Tensor:
    """Set a square to zero; its centre is uniform over the image."""
    height, width = pairs.shape[-2:]
    centre_y, centre_x = draw(1) * height, draw(1) * width
    near_y = (torch.arange(height, device=pairs.device) + 0.5 - centre_y).abs() < height / CUT / 2
    near_x = (torch.arange(width, device=pairs.device) + 0.5 - centre_x).abs() < width / CUT / 2
    cut = (near_y[:, :, None] & near_x[:, None, :])[:, None, None]
    return pairs.masked_fill(cut, 0.0)


def _brightness(images: Tensor, draw: Draw) -> Tensor:
    return images + draw(1, 1, 1) - 0.5


def _contrast(images: Tensor, draw: Draw) -> Tensor:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (draw(1, 1, 1) + 0.5)


_MOVES = dict(zip(MOVES, (_flip, _translate, _cutout), strict=True))
_COLOURS = dict(zip(COLOURS, (_brightness, _contrast), strict=True))
