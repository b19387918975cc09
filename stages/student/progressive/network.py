"""The paper's student: a generator that grows along the trajectory (Adv-KD, arXiv 2405.20675).

x_T enters at 4×4. Submodule k of K adds layers, some with an upsampling, and has its own head that predicts the k-th
recorded state at the resolution reached there. Stage k trains submodules 0…k against a fresh
conditional discriminator; the last head's image is the sample. With K = 11 and 256×256 it has the reference's
2,429,937 parameters, 1,721,235 of them deployed (trunk and last head).

As in the published code: layers, widths, heads, BatchNorm, tanh. Different: inputs aren't rounded to 8 bits, and x_T is
averaged over areas to 4×4 and multiplied by H/4, so that it stays unit normal in training and test alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import TrainingError
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.training.protocol import StudentNetwork, check_condition

INPUT_SIZE = 4


def upsampling_submodules(num_submodules: int, size: int) -> tuple[int, ...]:
    """The submodules that double the resolution: log2(size / 4) of them, spread evenly, including the last.

    Raises:
        TrainingError: the size is not 4·2ⁿ, or there are fewer submodules than doublings.
    """
    doublings = (size // INPUT_SIZE).bit_length() - 1
    if size != INPUT_SIZE << doublings or doublings < 1:
        raise TrainingError(
            f"progressive needs square items of 8, 16, 32, … pixels, not {size}: use student.kind unrolled"
        )
    if num_submodules < doublings:
        raise TrainingError(
            f"progressive needs at least {doublings} states after x_T to grow from 4 to {size} pixels; "
            f"this cache has {num_submodules}"
        )
    if doublings == 1:
        return (num_submodules - 1,)
    return tuple(round(j * (num_submodules - 1) / (doublings - 1)) for j in range(doublings))


def resize(images: Tensor, size: int) -> Tensor:
    """Average images (N, C, H, W) over areas down to size × size."""
    return images if images.shape[-1] == size else F.adaptive_avg_pool2d(images, size)


def reduce_noise(noise: Tensor) -> Tensor:
    """x_T (N, C, H, W), unit normal, to 4×4 of unit variance: the mean over areas times H / 4."""
    return resize(noise, INPUT_SIZE) * (noise.shape[-1] / INPUT_SIZE)


def _block(in_channels: int, out_channels: int, upsample: bool) -> nn.Sequential:
    layer: nn.Module = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    if upsample:
        layer = nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2))


class ProgressiveStudent(StudentNetwork):
    """Submodules with growing resolution, one head each.

    Args:
        geometry: item shape and noise levels of the cache.
        base_channels: width of the first submodule; doubles at each doubling of the resolution but the first.
        max_channels: where the width stops growing.
    """

    def __init__(self, geometry: Geometry, base_channels: int = 16, max_channels: int = 128) -> None:
        super().__init__()
        channels, size, width = geometry.item_shape
        if size != width:
            raise TrainingError(f"progressive needs square items, not {size}×{width}: use student.kind unrolled")
        num_submodules = len(geometry.levels) - 1
        doubling = upsampling_submodules(num_submodules, size)
        self.submodules = nn.ModuleList()
        self.output_heads = nn.ModuleList()
        self.sizes: list[int] = []
        width_in, width, resolution = channels, base_channels, INPUT_SIZE
        for k in range(num_submodules):
            upsample = k in doubling
            if upsample:
                width = width if resolution == INPUT_SIZE else min(2 * width, max_channels)
                resolution *= 2
            layers = [_block(width_in, width, upsample and k == 0)]
            if k > 1 or (k == 1 and upsample):
                layers.append(_block(width, width, upsample))
            self.submodules.append(nn.Sequential(*layers))
            head = nn.Sequential(_block(width, width, False), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh())
            self.output_heads.append(head)
            self.sizes.append(resolution)
            width_in = width

    def forward(self, noise: Tensor, condition: Tensor | None = None, *, stage: int | None = None) -> Tensor:
        """Predict with the head of one submodule, the last if not given.

        Args:
            noise: x_T, shape (N, C, H, W), unit normal.
            condition: None, since this kind is told nothing.
            stage: index of the submodule.

        Returns:
            Shape (N, C, h, h) with h = `sizes[stage]`, in [−1, 1]; x_0 for the last stage.
        """
        check_condition(noise, condition)
        last = len(self.submodules) - 1 if stage is None else stage
        features = reduce_noise(noise)
        for submodule in self.submodules[: last + 1]:
            features = submodule(features)
        image: Tensor = self.output_heads[last](features)
        return image

    def heads(self, noise: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """One prediction per recorded state after x_T; only the last head matches the final trunk's weights."""
        check_condition(noise, condition)
        features, predictions = reduce_noise(noise), []
        for submodule, head in zip(self.submodules, self.output_heads, strict=True):
            features = submodule(features)
            predictions.append(head(features))
        return predictions

    def deployed_parameters(self) -> int:
        """Parameters that a sample needs: those of the trunk and the last head."""
        return sum(p.numel() for part in (self.submodules, self.output_heads[-1]) for p in part.parameters())


class ConditionalDiscriminator(nn.Module):
    """The published discriminator of one stage, of an image of size h × h and x_T at 4×4.

    4×4 convolutions of stride 2, width 32 → 128, with BatchNorm except in the first, down to 4×4; two 3×3 convolutions
    for the noise; both concatenated go through Linear 128 → BatchNorm → LeakyReLU → Linear 1.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in, width = channels, 32
        while size > INPUT_SIZE:
            layers.append(nn.Conv2d(width_in, width, 4, stride=2, padding=1))
            if len(layers) > 1:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.LeakyReLU(0.2))
            width_in, width, size = width, min(2 * width, 128), size // 2
        self.image_branch = nn.Sequential(*layers)
        self.noise_branch = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.decision = nn.Sequential(
            nn.Linear((width_in + 32) * INPUT_SIZE**2, 128),
            nn.BatchNorm1d(128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 1),
        )

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Logits, shape (N,), for images (N, C, h, h) given x_T (N, C, H, W)."""
        joined = torch.cat([self.image_branch(images), self.noise_branch(reduce_noise(noise))], dim=1)
        logits: Tensor = self.decision(joined.flatten(1))
        return logits.squeeze(1)
