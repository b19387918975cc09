"""How sharp images are: a blurred student has weaker edges and less power at high frequencies than its teacher.

Both are compared with the teacher's own; noise raises them as detail does, so that more is no better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advkd.stages.metrics.base import Measure, mean_of_set

UPPER_OCTAVE = 0.25
"""In cycles per pixel: half of the highest frequency that an axis can hold."""


def gradient_magnitudes(images: Tensor) -> Tensor:
    """Mean magnitude of the differences of neighbouring pixels, from shape (N, C, H, W) to (N,)."""
    corner = images[..., :-1, :-1]
    across, down = images[..., :-1, 1:] - corner, images[..., 1:, :-1] - corner
    return (across.square() + down.square()).sqrt().mean((1, 2, 3))


def upper_octave_power(images: Tensor) -> Tensor:
    """Mean power of the frequencies whose larger component is in the upper octave, from shape (N, C, H, W) to (N,)."""
    power = torch.fft.fft2(images.float(), norm="ortho").abs().square()
    down, across = (torch.fft.fftfreq(side, device=images.device).abs() for side in images.shape[-2:])
    upper = torch.maximum(down[:, None], across[None]) >= UPPER_OCTAVE
    means: Tensor = power[..., upper].mean((1, 2))
    return means


GRADIENT = Measure(
    name="gradient",
    title="gradient magnitude",
    label="mean magnitude of the differences of neighbouring pixels",
    better="as teacher",
    observed="gradients",
    prepare=mean_of_set,
)
FINE_POWER = Measure(
    name="fine_power",
    title="power in the upper octave",
    label="mean power of the frequencies in the upper octave",
    better="as teacher",
    observed="fine_power",
    prepare=mean_of_set,
)
