"""Discriminators of what the unrolled student makes, without normalisation (Huang et al. 2024, §3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

_SLOPE = 0.2
_LAST_SIDE = 4


class Critic(nn.Module):
    """A small convolutional critic that judges images at one or more resolutions.

    Args:
        channels: of an image.
        width: of the first layer, which sees patches of 2×2 pixels; each further scale has twice as many.
        scales: how many resolutions it judges at.
        conditional: whether it sees the noise too.
        num_times: how many points of the denoising it tells apart.
    """

    def __init__(self, channels: int, width: int, scales: int = 1, *, conditional: bool, num_times: int = 1) -> None:
        super().__init__()
        self.conditional = conditional
        self.unshuffle = nn.PixelUnshuffle(2)
        self.enter = nn.Conv2d(4 * channels * (2 if conditional else 1), width, 3, padding=1)
        self.time = nn.Embedding(num_times, width) if num_times > 1 else None
        if self.time is not None:
            nn.init.zeros_(self.time.weight)
        self.scales = nn.ModuleList()
        for scale in range(scales):
            inside, outside = width << scale, width << (scale + 1)
            self.scales.append(
                nn.ModuleList(
                    [
                        nn.Conv2d(inside, inside, 3, padding=1),
                        nn.Conv2d(inside, outside, 3, stride=2, padding=1),
                        nn.Conv2d(outside, outside, 3, padding=1),
                    ]
                )
            )
        self.judges = nn.ModuleList(nn.Linear((width << (scale + 1)) * _LAST_SIDE**2, 1) for scale in range(scales))

    def features(self, images: Tensor, noise: Tensor, time: Tensor | None = None) -> list[Tensor]:
        """The activations of every layer, (N, …) each.

        Args:
            images: (N, C, H, W).
            noise: what they came from, the same shape; looked at only by a conditional critic.
            time: which point of the denoising each is of, int64, (N,).
        """
        hidden = self.enter(self.unshuffle(torch.cat([images, noise], dim=1) if self.conditional else images))
        if self.time is not None and time is not None:
            hidden = hidden + self.time(time)[:, :, None, None]
        activations = [F.leaky_relu(hidden, _SLOPE)]
        for scale in self.scales:
            for convolution in scale:  # type: ignore[attr-defined]
                activations.append(F.leaky_relu(convolution(activations[-1]), _SLOPE))
        return activations

    def forward(self, images: Tensor, noise: Tensor, time: Tensor | None = None) -> Tensor:
        """Logits, (N, scales)."""
        ends = self.features(images, noise, time)[3::3]
        pooled = (F.adaptive_avg_pool2d(end, _LAST_SIDE).flatten(1) for end in ends)
        return torch.cat([judge(end) for judge, end in zip(self.judges, pooled, strict=True)], dim=1)


class CriticOfEach(nn.Module):
    """A critic of its own for every point of the denoising, as in Adv-KD, called as one that is told the time."""

    def __init__(self, critics: list[Critic]) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)

    def forward(self, images: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Logits, (N, scales); images of one time lie together, in the order of times, equally many of each."""
        parts = zip(self.critics, images.chunk(len(self.critics)), noise.chunk(len(self.critics)), strict=True)
        return torch.cat([critic(image, origin) for critic, image, origin in parts])
