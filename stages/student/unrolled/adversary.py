"""The unrolled student's adversarial losses, and the training of the critics.

Critics judge denoised images: each submodule's x̂_0 against the x̂_0 that leads from one cached state to the next. Early
states themselves are nearly all noise, the same for both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from advkd.cache.errors import UsageError
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.prompts import PromptForm
from advkd.stages.student.training.descent import Descent
from advkd.stages.student.training.losses import ADVERSARIAL, squared_gradient
from advkd.stages.student.training.protocol import Metrics
from advkd.stages.student.training.rng import generator_of
from advkd.stages.student.unrolled.augment import augment
from advkd.stages.student.unrolled.config import COLOURS, AdversarialConfig
from advkd.stages.student.unrolled.critics import Critic, CriticPerSubmodule


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticInput:
    """Images grouped by the submodule that they belong to, equally many of each."""

    images: Tensor
    """Shape (N, C, H, W), float32; pixels are about [−1, 1]."""
    noise: Tensor
    """x_T of each image, the same shape."""
    time: Tensor
    """Submodule of each image, int64, shape (N,)."""
    condition: Tensor | None = None
    """What each image's teacher was told, as the student takes it; N rows, or None."""

    @classmethod
    def of(
        cls, by_submodule: Sequence[Tensor], noise: Tensor, count: int, condition: Tensor | None = None
    ) -> CriticInput:
        """The first `count` images of each submodule."""
        time = torch.arange(len(by_submodule), device=noise.device).repeat_interleave(count)
        return cls(
            images=torch.cat([images[:count].float() for images in by_submodule]),
            noise=noise[:count].repeat(len(by_submodule), 1, 1, 1),
            time=time,
            condition=None if condition is None else torch.cat([condition[:count]] * len(by_submodule)),
        )

    def detached(self) -> CriticInput:
        """The same images without their graph."""
        return replace(self, images=self.images.detach())


class Adversary:
    """The critics, their optimizer and their losses.

    Args:
        config: settings.
        geometry: of the cache.
        num_steps: of the training.
        seed: of all random draws.
        accelerator: device, precision and the other processes.
        compiled: whether torch.compile compiles the critics.

    Raises:
        UsageError: critics can't judge images of this size, or an augmentation is for pixels alone.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        geometry: Geometry,
        num_steps: int,
        seed: int,
        accelerator: Accelerator,
        *,
        compiled: bool = False,
    ) -> None:
        self.config = config
        self._num_steps = num_steps
        self._seed = seed
        self._known = torch.tensor(geometry.labels, dtype=torch.int64)
        self._accelerator = accelerator
        self._generator_loss, self._critic_loss = ADVERSARIAL[config.loss]
        sides = geometry.item_shape[1:]
        if config.weight and any(side % 2 for side in sides):
            raise UsageError(
                f"critics work on patches of 2×2 pixels, images of {'×'.join(map(str, sides))} don't divide into them: "
                "set objective.adversarial.weight to 0 to train without critics"
            )
        colours = [name for name in config.augment if name in COLOURS]
        if config.weight and colours and geometry.space is not None:
            raise UsageError(
                f"adversarial.augment: {', '.join(colours)} are changes of pixels, the cache has latents: leave them "
                "out"
            )
        # With weight 0 only x_0 is loaded.
        self.num_judged = 1 if config.judged == "last" or not config.weight else len(geometry.levels) - 1
        channels, shared = geometry.item_shape[0], config.judged == "shared"

        def critic(num_times: int) -> Critic:
            return Critic(
                channels,
                config.width,
                config.scales,
                conditional=config.conditional,
                num_times=num_times,
                num_classes=geometry.num_classes,
                prompts=None if geometry.prompts is None else PromptForm.of(geometry.prompts),
            )

        self.critic: nn.Module = (
            CriticPerSubmodule([critic(1) for _ in range(self.num_judged)])
            if config.judged == "each"
            else critic(self.num_judged if shared else 1)
        )
        self._logits: Any = torch.compile(self.critic) if compiled else self.critic

    def begin(self) -> None:
        """Create the optimizer."""
        self.critic = self.critic.to(self._accelerator.device)
        self.optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=self.config.learning_rate, betas=(0.0, 0.99), weight_decay=0.0, fused=True
        )
        self.descent = Descent(self._accelerator, self.critic.parameters(), [self.optimizer])

    def weight(self, step: int) -> float:
        """Weight of the student's adversarial loss at a step."""
        config = self.config
        if step % config.every or not self.has_begun(step):
            return 0.0
        since = (step + 1) / self._num_steps - config.start
        return config.weight * config.every * min(1.0, since / max(config.ramp, 1e-9))

    def has_begun(self, step: int) -> bool:
        """Whether the adversarial loss has begun (`start`)."""
        return self.config.weight > 0.0 and (step + 1) / self._num_steps > self.config.start

    def trains_at(self, step: int) -> bool:
        """Whether the critics are trained at a step."""
        config = self.config
        begun = (step + 1) / self._num_steps > config.start - config.lead
        return config.weight > 0.0 and begun and step % config.every == 0

    def fresh_noise(self, step: int, count: int, like: Tensor) -> Tensor:
        """`count` x_T from no cache for this rank; a function of (seed, step, rank, world size) alone."""
        return self._rank_draws(torch.randn, step)(count, *like.shape[1:]).to(like.device)

    def fresh_condition(self, step: int, noise: Tensor, condition: Tensor | None) -> Tensor | None:
        """What goes with this rank's fresh x_T: class labels, drawn alike, or the prompts of the batch's first images.

        Args:
            step: of the training.
            noise: the fresh x_T, no more than the batch has.
            condition: of the batch.
        """
        if condition is None or not len(self._known):
            return None if condition is None else condition[: len(noise)]
        places = self._rank_draws(torch.rand, step, 0)(len(noise)) * len(self._known)
        return self._known[places.long()].to(noise.device)

    def student_loss(self, real: CriticInput, fake: CriticInput, step: int, micro_batch: int = 0) -> Tensor:
        """The student's adversarial loss, for one micro-batch of a step."""
        self.critic.requires_grad_(False)
        with torch.no_grad():
            real_logits = self._augmented_logits(real, step, 4 * micro_batch + 1)
        loss = self._generator_loss(real_logits, self._augmented_logits(fake, step, 4 * micro_batch + 2))
        self.critic.requires_grad_(True)
        return loss

    def feature_distance(self, made: Tensor, real: Tensor, noise: Tensor) -> Tensor:
        """Mean square distance of paired x_0 in the critic's layers, each relative to its own mean square."""
        critic = self.critic.critics[-1] if isinstance(self.critic, CriticPerSubmodule) else self.critic
        assert isinstance(critic, Critic)
        last = self.num_judged - 1 if self.config.judged == "shared" else 0
        time = torch.full((len(noise),), last, device=noise.device)
        self.critic.requires_grad_(False)
        with torch.no_grad():
            real_features = critic.features(real, noise, time)
        made_features = critic.features(made, noise, time)
        self.critic.requires_grad_(True)
        parts = [
            (one - other).square().mean() / (other.square().mean() + 1e-6)
            for one, other in zip(made_features, real_features, strict=True)
        ]
        return torch.stack(parts).mean()

    def accumulate(
        self, real: CriticInput, fake: CriticInput, step: int, micro_batch: int = 0, num_micro_batches: int = 1
    ) -> Metrics:
        """Accumulate the critics' gradients of one micro-batch; `descent.step` applies them."""
        config = self.config
        penalise = step // config.every % config.penalty_every == 0 and max(config.r1, config.r2) > 0.0
        real_images = real.images.detach().requires_grad_(penalise and config.r1 > 0.0)
        fake_images = fake.images.detach().requires_grad_(penalise and config.r2 > 0.0)
        stream = 4 * micro_batch + 3
        real_logits = self._augmented_logits(replace(real, images=real_images), step, stream, double=penalise)
        fake_logits = self._augmented_logits(replace(fake, images=fake_images), step, stream + 1, double=penalise)
        loss = self._critic_loss(real_logits, fake_logits)
        metrics = {"critic": loss.detach(), "ahead": (real_logits > fake_logits).float().mean().detach()}
        for gamma, logits, images in ((config.r1, real_logits, real_images), (config.r2, fake_logits, fake_images)):
            if images.requires_grad:
                loss = loss + 0.5 * gamma * config.penalty_every * squared_gradient(logits, images)
        self.descent.backward(loss / num_micro_batches)
        return metrics

    def _augmented_logits(self, judged: CriticInput, step: int, stream: int, *, double: bool = False) -> Tensor:
        """Logits of augmented images; `double` allows gradients of gradients, which compiled modules don't support."""
        images, noise = judged.images, judged.noise
        if self.config.augment:
            uniform = self._rank_draws(torch.rand, step, stream)
            images, noise = augment(self.config.augment, images, noise, uniform)
        logits: Tensor = (self.critic if double else self._logits)(images, noise, judged.time, judged.condition)
        return logits

    def _rank_draws(self, draw: Any, *parts: int) -> Callable[..., Tensor]:
        """Random draws for the global batch, seeded by (seed, *parts), of which this rank takes its rows."""
        generator = generator_of(self._seed, *parts)
        world_size, rank = self._accelerator.num_processes, self._accelerator.process_index

        def rank_draw(count: int, *shape: int) -> Tensor:
            drawn: Tensor = draw(count * world_size, *shape, generator=generator)
            return drawn[rank::world_size]

        return rank_draw
