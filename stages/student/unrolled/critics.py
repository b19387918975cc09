"""Critics of the unrolled student, without normalisation layers (Huang et al. 2024, §3.2).

They see a class label or a prompt by projection (Miyato and Koyama 2018, eq. 3): the inner product of its embedding
with the pooled last features is added to a logit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from advkd.stages.student.prompts import PromptForm
from advkd.stages.student.unrolled.prompts import PromptSummary

_SLOPE = 0.2
_LAST_SIDE = 4


class Critic(nn.Module):
    """A small convolutional critic with one logit per resolution.

    Args:
        channels: of an image.
        width: channels of the first layer, which works on patches of 2×2 pixels; they double with each scale.
        scales: number of resolutions.
        conditional: whether it sees x_T too.
        num_times: submodules whose images it judges; if more than one, it is conditioned on the submodule's number.
        num_classes: rows of the table of class labels; 0 without labels.
        prompts: form of the prompts; None without prompts.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        scales: int = 1,
        *,
        conditional: bool,
        num_times: int = 1,
        num_classes: int = 0,
        prompts: PromptForm | None = None,
    ) -> None:
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
        self.classes = nn.ModuleList(
            nn.Embedding(num_classes, width << (scale + 1)) for scale in range(scales if num_classes else 0)
        )
        for table in self.classes:
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]
        self.prompts = nn.ModuleList(
            [] if prompts is None else [PromptSummary(prompts, width << (scale + 1)) for scale in range(scales)]
        )

    def features(self, images: Tensor, noise: Tensor, time: Tensor | None = None) -> list[Tensor]:
        """The activations of every layer, shape (N, …).

        Args:
            images: shape (N, C, H, W), about [−1, 1].
            noise: x_T of each image, the same shape; ignored unless the critic is conditional.
            time: submodule of each image, int64, shape (N,).
        """
        hidden = self.enter(self.unshuffle(torch.cat([images, noise], dim=1) if self.conditional else images))
        if self.time is not None and time is not None:
            hidden = hidden + self.time(time)[:, :, None, None]
        activations = [F.leaky_relu(hidden, _SLOPE)]
        for scale in self.scales:
            for convolution in scale:  # type: ignore[attr-defined]
                activations.append(F.leaky_relu(convolution(activations[-1]), _SLOPE))
        return activations

    def forward(
        self, images: Tensor, noise: Tensor, time: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Logits, shape (N, scales); the condition is that of each image, as the student is told it."""
        ends = self.features(images, noise, time)[3::3]
        pooled = (F.adaptive_avg_pool2d(end, _LAST_SIDE).flatten(1) for end in ends)
        logits = torch.cat([judge(end) for judge, end in zip(self.judges, pooled, strict=True)], dim=1)
        if condition is None:
            return logits
        told = zip([*self.classes, *self.prompts], ends, strict=True)
        return logits + torch.stack([(embed(condition) * end.mean(dim=(2, 3))).sum(1) for embed, end in told], dim=1)


class CriticPerSubmodule(nn.Module):
    """One critic per submodule, as in Adv-KD, called like a single one."""

    def __init__(self, critics: list[Critic]) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)

    def forward(self, images: Tensor, noise: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits, shape (N, scales); images are grouped by submodule, in order, equally many of each."""
        count = len(self.critics)
        told = [None] * count if condition is None else condition.chunk(count)
        parts = zip(self.critics, images.chunk(count), noise.chunk(count), told, strict=True)
        return torch.cat([critic(image, origin, condition=some) for critic, image, origin, some in parts])
