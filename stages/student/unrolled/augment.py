"""Differentiable augmentation: what critics see, real or not, is changed at random (Zhao et al. 2020).

A cache is a small data set for a critic. Changing both sides alike keeps it from learning the real images by heart, and
the student isn't taught to make changed images, since they are the same for both. A noise that comes with an image
moves with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHIFT = 8
"""Images move by up to their size divided by this."""
CUT = 2
"""Squares of the size divided by this are cut out."""
Draw = Callable[..., Tensor]


def augment(kinds: Sequence[str], images: Tensor, noise: Tensor, uniform: Draw) -> tuple[Tensor, Tensor]:
    """Change every image by itself.

    Args:
        kinds: in this order; see `AdversarialConfig.augment`.
        images: (N, C, H, W), about [−1, 1].
        noise: that they came from, the same shape.
        uniform: draws numbers in [0, 1) of a shape, (N, …), on the CPU.
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
    """Shift by whole pixels; edges are repeated."""
    height, width = pairs.shape[-2:]
    reach_y, reach_x = max(1, height // SHIFT), max(1, width // SHIFT)
    shift_y = (draw(1) * (2 * reach_y + 1)).long() - reach_y
    shift_x = (draw(1) * (2 * reach_x + 1)).long() - reach_x
    rows = (torch.arange(height, device=pairs.device) + shift_y).clamp(0, height - 1)
    columns = (torch.arange(width, device=pairs.device) + shift_x).clamp(0, width - 1)
    moved = pairs.gather(-2, rows[:, None, None, :, None].expand(pairs.shape))
    return moved.gather(-1, columns[:, None, None, None, :].expand(pairs.shape))


def _cutout(pairs: Tensor, draw: Draw) -> Tensor:
    """A square becomes zero, wherever its centre is."""
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


_MOVES: dict[str, Callable[[Tensor, Draw], Tensor]] = {"flip": _flip, "translate": _translate, "cutout": _cutout}
_COLOURS: dict[str, Callable[[Tensor, Draw], Tensor]] = {"brightness": _brightness, "contrast": _contrast}
