"""The unrolled student's adversarial losses, and the training of the critics that they ask.

What is judged is denoised: every submodule's x̂_0 against the x̂_0 that leads from one cached state to the next, since an
early state itself is nearly all noise and the same for both.
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
from advkd.stages.student.training.descent import Descent
from advkd.stages.student.training.losses import ADVERSARIAL, squared_gradient
from advkd.stages.student.training.rng import generator_of
from advkd.stages.student.unrolled.augment import augment
from advkd.stages.student.unrolled.config import AdversarialConfig
from advkd.stages.student.unrolled.critics import Critic, CriticOfEach

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What critics look at: images of one point of the denoising after another, equally many of each."""

    images: Tensor
    noise: Tensor
    """The x_T that each came from."""
    time: Tensor
    """Which submodule's each is, int64."""

    @classmethod
    def of(cls, by_time: Sequence[Tensor], noise: Tensor, count: int) -> Judged:
        """The first `count` images of each time."""
        time = torch.arange(len(by_time), device=noise.device).repeat_interleave(count)
        return cls(
            images=torch.cat([images[:count].float() for images in by_time]),
            noise=noise[:count].repeat(len(by_time), 1, 1, 1),
            time=time,
        )

    def detached(self) -> Judged:
        """Without the graph that made the images."""
        return replace(self, images=self.images.detach())


class Adversary:
    """The critics.

    Args:
        config: what is asked of them.
        geometry: of the cache.
        num_steps: of the training.
        seed: of every random draw.
        accelerator: device, precision and the other processes.
        compiled: whether torch.compile makes their passes faster.
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
        self._accelerator = accelerator
        self._generator_loss, self._critic_loss = ADVERSARIAL[config.loss]
        if config.weight and geometry.item_shape[1] % 2:
            raise UsageError(
                f"critics look at patches of 2×2 pixels, images of {geometry.item_shape[1]} don't divide into such: "
                "objective.adversarial.weight 0 leaves critics out"
            )
        # Critics that nobody hears ask for no states but x_0.
        self.num_judged = 1 if config.judged == "last" or not config.weight else len(geometry.levels) - 1
        channels, shared = geometry.item_shape[0], config.judged == "shared"

        def critic(num_times: int) -> Critic:
            return Critic(channels, config.width, config.scales, conditional=config.conditional, num_times=num_times)

        self.critic: nn.Module = (
            CriticOfEach([critic(1) for _ in range(self.num_judged)])
            if config.judged == "each"
            else critic(self.num_judged if shared else 1)
        )
        self._logits: Any = torch.compile(self.critic) if compiled else self.critic

    def begin(self) -> None:
        """Make the optimiser."""
        self.critic = self.critic.to(self._accelerator.device)
        self.optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=self.config.learning_rate, betas=(0.0, 0.99), weight_decay=0.0, fused=True
        )
        self.descent = Descent(self._accelerator, self.critic.parameters(), [self.optimizer])

    def weight(self, step: int) -> float:
        """What the student's adversarial loss counts at a step."""
        config = self.config
        if step % config.every or not self.is_heard(step):
            return 0.0
        since = (step + 1) / self._num_steps - config.start
        return config.weight * config.every * min(1.0, since / max(config.ramp, 1e-9))

    def is_heard(self, step: int) -> bool:
        """Whether the critics have learnt for long enough, by a step, for the student to hear them."""
        return self.config.weight > 0.0 and (step + 1) / self._num_steps > self.config.start

    def learns(self, step: int) -> bool:
        """Whether the critics are trained at a step."""
        config = self.config
        begun = (step + 1) / self._num_steps > config.start - config.lead
        return config.weight > 0.0 and begun and step % config.every == 0

    def fresh_noise(self, step: int, count: int, like: Tensor) -> Tensor:
        """x_T from no cache: a function of (seed, step) alone, this process's share of it."""
        return self._share(torch.randn, step)(count, *like.shape[1:]).to(like.device)

    def student_loss(self, real: Judged, fake: Judged, step: int, passed: int = 0) -> Tensor:
        """What the student hears in a step's pass number `passed`."""
        self.critic.requires_grad_(False)
        with torch.no_grad():
            real_logits = self._look(real, step, 4 * passed + 1)
        loss = self._generator_loss(real_logits, self._look(fake, step, 4 * passed + 2))
        self.critic.requires_grad_(True)
        return loss

    def feature_distance(self, made: Tensor, real: Tensor, noise: Tensor) -> Tensor:
        """Mean square distance of pairs of x_0 in every layer of their critic, in units of its own mean square."""
        critic = self.critic.critics[-1] if isinstance(self.critic, CriticOfEach) else self.critic
        assert isinstance(critic, Critic)
        last = self.num_judged - 1 if self.config.judged == "shared" else 0
        time = torch.full((len(noise),), last, device=noise.device)
        self.critic.requires_grad_(False)
        with torch.no_grad():
            theirs = critic.features(real, noise, time)
        ours = critic.features(made, noise, time)
        self.critic.requires_grad_(True)
        parts = [
            (one - other).square().mean() / (other.square().mean() + 1e-6)
            for one, other in zip(ours, theirs, strict=True)
        ]
        return torch.stack(parts).mean()

    def learn(self, real: Judged, fake: Judged, step: int, passed: int, passes: int) -> Metrics:
        """Add the critics' gradients of one of a step's passes."""
        config = self.config
        penalise = step // config.every % config.penalty_every == 0 and max(config.r1, config.r2) > 0.0
        real_images = real.images.detach().requires_grad_(penalise and config.r1 > 0.0)
        fake_images = fake.images.detach().requires_grad_(penalise and config.r2 > 0.0)
        real_logits = self._look(replace(real, images=real_images), step, 4 * passed + 3, twice=penalise)
        fake_logits = self._look(replace(fake, images=fake_images), step, 4 * passed + 4, twice=penalise)
        loss = self._critic_loss(real_logits, fake_logits)
        metrics = {"critic": loss.detach(), "ahead": (real_logits > fake_logits).float().mean().detach()}
        for gamma, logits, images in ((config.r1, real_logits, real_images), (config.r2, fake_logits, fake_images)):
            if images.requires_grad:
                loss = loss + 0.5 * gamma * config.penalty_every * squared_gradient(logits, images)
        self.descent.backward(loss / passes)
        return metrics

    def _look(self, judged: Judged, step: int, stream: int, *, twice: bool = False) -> Tensor:
        """Logits; with `twice` their gradients have gradients too, which a compiled pass's have not."""
        images, noise = judged.images, judged.noise
        if self.config.augment:
            images, noise = augment(self.config.augment, images, noise, self._share(torch.rand, step, stream))
        logits: Tensor = (self.critic if twice else self._logits)(images, noise, judged.time)
        return logits

    def _share(self, draw: Any, *parts: int) -> Callable[..., Tensor]:
        """Draws of (seed, *parts), of which every process takes its share as it does of the seeds."""
        generator = generator_of(self._seed, *parts)
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index

        def share(count: int, *shape: int) -> Tensor:
            drawn: Tensor = draw(count * processes, *shape, generator=generator)
            return drawn[rank::processes]

        return share
