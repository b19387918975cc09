"""The unrolled student: one network of submodules, each a step of the sampler, with features passed along.

Submodule k gets the features so far and the state x_{k−1}, predicts x̂_0, and computes its state by the DDIM step
between recorded noise levels (Song et al. 2021, eq. 12 with η = 0), whichever solver made the cache:

    ε = (x_{k−1} − α_{k−1} x̂_0) / σ_{k−1},    x_k = α_k x̂_0 + σ_k ε.

The last submodule returns x̂_0. A conditional student embeds the class label or the prompt once; the embedding scales
and shifts the features of every residual block (FiLM, Perez et al. 2018), and every submodule attends to the prompt's
tokens. All (α, σ) are in the cache's stored units, where states have unit variance.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import TrainingError
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.prompts import PromptForm
from advkd.stages.student.training.protocol import UnrollingNetwork, check_condition
from advkd.stages.student.unrolled.prompts import CrossAttention, PromptTokens

Level = tuple[float, float]
"""(alpha, sigma) of a state, in stored units."""


def jump(state: Tensor, x0: Tensor, before: Level, after: Level) -> Tensor:
    """The DDIM step from a state at one level to another level, given x̂_0."""
    ratio = after[1] / before[1]
    return after[0] * x0 + ratio * (state - before[0] * x0)


MIN_REACH = 0.02
"""Below this weight of x̂_0 in a jump, the rounding of stored states dominates `jump_target`."""


def reach(before: Level, after: Level) -> float:
    """Weight of x̂_0 in the jump between two levels."""
    return after[0] - after[1] / before[1] * before[0]


def jump_target(state: Tensor, reached: Tensor, before: Level, after: Level) -> Tensor:
    """The x̂_0 whose `jump` leads from one state to another: the prediction that reproduces the cached state."""
    return (reached - after[1] / before[1] * state) / reach(before, after)


class ResidualBlock(nn.Module):
    """GroupNorm → SiLU → 3×3 convolution, twice, around a skip; starts as the identity.

    Args:
        width: channels.
        num_times: submodules that share the convolutions; if more than one, each has its own scale and shift.
        embedded: width of the classes' embedding, from which a further scale and shift follow; 0 without classes.
    """

    def __init__(self, width: int, num_times: int = 1, embedded: int = 0) -> None:
        super().__init__()
        groups, shared = math.gcd(8, width), num_times > 1
        self.norm_in, self.norm_out = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width, affine=not shared)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Parameter(torch.zeros(num_times, 2, width)) if shared else None
        nn.init.zeros_(self.conv_out.weight)
        self.film = nn.Linear(embedded, 2 * width) if embedded else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, time: int = 0, embedding: Tensor | None = None) -> Tensor:
        """Shape (N, width, h, w) in and out; the classes' embedding is (N, embedded)."""
        hidden = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        if self.modulation is not None:
            scale, shift = self.modulation[time, :, :, None, None]
            hidden = hidden * (1.0 + scale) + shift
        if self.film is not None:
            scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
            hidden = hidden * (1.0 + scale) + shift
        return x + self.conv_out(F.silu(hidden))  # type: ignore[no-any-return]


class CoarsePath(nn.Module):
    """Residual blocks at half the resolution with twice the channels, around a skip; starts as the identity.

    A quarter of the positions with twice the channels costs as much as a block at full resolution, and its receptive
    field is twice as wide.
    """

    def __init__(self, width: int, depth: int, num_times: int = 1, embedded: int = 0) -> None:
        super().__init__()
        self.enter = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(2 * width, num_times, embedded) for _ in range(depth))
        self.leave = nn.Conv2d(2 * width, 4 * width, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: int = 0, embedding: Tensor | None = None) -> Tensor:
        """Shape (N, width, h, w) in and out; h and w are even."""
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden, time, embedding)
        return x + F.pixel_shuffle(self.leave(hidden), 2)


class SelfAttention(nn.Module):
    """Single-head attention over positions around a skip; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, width, h, w) in and out."""
        batch, width, height, breadth = x.shape
        query, key, value = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        # The ONNX exporter requires an axis of heads.
        mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return x + self.out(mixed.transpose(1, 2).reshape(batch, width, height, breadth))  # type: ignore[no-any-return]


class Submodule(nn.Module):
    """A small denoiser: (features, state) → (features, x̂_0)."""

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        coarse: int,
        patch: int,
        attention: bool,
        num_times: int = 1,
        embedded: int = 0,
        prompted: bool = False,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(channels * patch**2, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width, num_times, embedded) for _ in range(depth))
        self.coarse = CoarsePath(width, coarse, num_times, embedded) if coarse else None
        self.attention = SelfAttention(width) if attention else nn.Identity()
        self.cross = CrossAttention(width) if prompted else None
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.read = nn.Conv2d(width, channels * patch**2, 3, padding=1)

    def forward(
        self,
        features: Tensor | None,
        state: Tensor,
        time: int = 0,
        embedding: Tensor | None = None,
        tokens: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States are (N, C, H, W); features (N, width, H / patch, W / patch), None before the first submodule.

        The embedding of a label or prompt is (N, embedded); the tokens of prompts are (N, T, width), with which of them
        count, (N, T).
        """
        seen = self.embed(F.pixel_unshuffle(state, self.patch))
        features = seen if features is None else features + seen
        for block in self.blocks:
            features = block(features, time, embedding)
        if self.coarse is not None:
            features = self.coarse(features, time, embedding)
        features = self.attention(features)
        if self.cross is not None and tokens is not None:
            features = self.cross(features, *tokens)
        x0 = F.pixel_shuffle(self.read(F.silu(self.norm(features))), self.patch)
        return features, x0


class UnrolledStudent(UnrollingNetwork):
    """One submodule per recorded state after x_T.

    Args:
        geometry: item shape, noise levels, classes and prompts of the cache.
        width: channels of the trunk, of the classes' embedding and of the prompts' tokens.
        depth: residual blocks of a submodule.
        patch: side in pixels of the patches that are one position of the trunk.
        attention: whether each submodule has self-attention over positions.
        coarse: residual blocks at half the trunk's resolution, after those at full resolution.
        shared: whether submodules share their weights, except for a scale and a shift in every block.
    """

    def __init__(
        self,
        geometry: Geometry,
        width: int = 64,
        depth: int = 2,
        patch: int = 2,
        attention: bool = True,
        shared: bool = False,
        coarse: int = 0,
    ) -> None:
        super().__init__()
        channels, *sides = geometry.item_shape
        if any(side % patch for side in sides):
            size = "×".join(map(str, sides))
            raise TrainingError(f"items of {size} pixels don't divide into patches of {patch}: choose student.patch")
        if coarse and any(side // patch % 2 for side in sides):
            size = "×".join(str(side // patch) for side in sides)
            raise TrainingError(f"{size} positions can't be halved: choose student.coarse 0 or student.patch")
        self.levels = geometry.levels
        num_submodules = len(geometry.levels) - 1
        form = None if geometry.prompts is None else PromptForm.of(geometry.prompts)
        num_times, embedded = num_submodules if shared else 1, width if geometry.num_classes or form else 0
        self.submodules = nn.ModuleList(
            Submodule(channels, width, depth, coarse, patch, attention, num_times, embedded, form is not None)
            for _ in range(1 if shared else num_submodules)
        )
        self.num_classes = geometry.num_classes
        self.classes = nn.Embedding(self.num_classes, width) if self.num_classes else None
        self.prompt_shape = None if form is None else form.shape
        self.prompts = None if form is None else PromptTokens(form, width)

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """x_T (N, C, H, W), unit normal → x_0 of the same shape; pixels are about [−1, 1].

        Args:
            noise: x_T.
            condition: class labels, int64, shape (N,), or prompts as `PromptForm` has them, float32, shape (N, rows,
                columns); None of an unconditional student.

        Raises:
            UsageError: the condition is missing or surplus.
        """
        return self.unroll(noise, condition)[0][-1]

    def unroll(self, noise: Tensor, condition: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Every submodule's x̂_0, and every state after x_T, in stored units; the last state is the last x̂_0."""
        check_condition(noise, condition, self.num_classes, self.prompt_shape)
        embedding, tokens = None if self.classes is None else self.classes(condition), None
        if self.prompts is not None:
            *tokens, embedding = self.prompts(condition)
        features, state = None, noise
        predictions, states = [], []
        for k, (before, after) in enumerate(itertools.pairwise(self.levels)):
            features, x0 = self.submodules[k % len(self.submodules)](features, state, k, embedding, tokens)
            state = jump(state, x0, before, after)
            predictions.append(x0)
            states.append(state)
        states[-1] = predictions[-1]
        return predictions, states

    def heads(self, noise: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """One prediction per recorded state after x_T."""
        return self.unroll(noise, condition)[1]
