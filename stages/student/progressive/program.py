"""Training the progressive student stage by stage, as the published code does (Adv-KD, arXiv 2405.20675).

Stage k trains submodules 0…k, none frozen, with a new discriminator and new optimizers: D = softplus(−real) +
softplus(fake) + 10 · (‖∇D‖ − 1)², then weights clamped; G = softplus(−D(fake, noise)). No regression term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from advkd.stages.student.geometry import Geometry
from advkd.stages.student.progressive.config import ProgressiveTraining
from advkd.stages.student.progressive.network import ConditionalDiscriminator, ProgressiveStudent, resize
from advkd.stages.student.training.data import Batch
from advkd.stages.student.training.descent import Descent
from advkd.stages.student.training.losses import (
    non_saturating_discriminator,
    non_saturating_generator,
    unit_gradient_penalty,
)
from advkd.stages.student.training.protocol import Metrics, Phase
from advkd.stages.student.training.rng import generator_of


def value_of(values: Sequence[int], stage: int) -> int:
    """The value for a stage; the last one holds for the stages that follow."""
    return values[min(stage, len(values) - 1)]


def as_eight_bit(states: Tensor) -> Tensor:
    """States as 8-bit image files keep them: 256 values in [−1, 1]."""
    return ((states.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0


class ProgressiveProgram:
    """One phase per submodule."""

    def __init__(
        self,
        config: ProgressiveTraining,
        student: ProgressiveStudent,
        geometry: Geometry,
        accelerator: Accelerator,
        num_seeds: int,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.geometry = geometry
        self.student: nn.Module = student
        self._progressive = student
        self.phases = []
        for stage in range(len(student.submodules)):
            batch_size = min(value_of(config.stages.batch_sizes, stage), num_seeds)
            num_steps = value_of(config.stages.epochs, stage) * (num_seeds // batch_size)
            states = (geometry.steps[0], geometry.steps[stage + 1])
            self.phases.append(Phase(num_steps=num_steps, batch_size=batch_size, states=states))

    def begin(self, phase: int) -> None:
        """Create the stage's discriminator and both optimizers."""
        config = self.config.stages
        channels = self.geometry.item_shape[0]
        # The discriminator's initial weights depend on (seed, stage) alone, so that a resumed run has the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed * 1_000_003 + phase + 1)
            discriminator = ConditionalDiscriminator(channels, self._progressive.sizes[phase])
        self.discriminator = discriminator.to(self.accelerator.device)
        parts = [*self._progressive.submodules[: phase + 1], self._progressive.output_heads[phase]]
        self.trained = [parameter for part in parts for parameter in part.parameters()]
        betas = (config.betas[0], config.betas[1])
        self.optimizer = torch.optim.Adam(self.trained, lr=config.learning_rate, betas=betas, fused=True)
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.learning_rate, betas=betas, fused=True
        )
        self._descent = Descent(self.accelerator, self.trained, [self.optimizer])
        self._critic_descent = Descent(
            self.accelerator, self.discriminator.parameters(), [self.discriminator_optimizer]
        )

    def step(self, batch: Batch, phase: int, step: int) -> Metrics:
        """Train the discriminator, then the student."""
        config = self.config.stages
        noise_step, target_step = self.phases[phase].states
        noise, target = batch.states[noise_step], batch.states[target_step]
        if config.eight_bit:
            noise, target = as_eight_bit(noise), as_eight_bit(target)
        real = resize(target, self._progressive.sizes[phase])
        fake = self.student(noise, stage=phase)
        real_logits, fake_logits = self.discriminator(real, noise), self.discriminator(fake.detach(), noise)
        critic_loss = non_saturating_discriminator(real_logits, fake_logits)
        metrics: Metrics = {
            "critic": critic_loss.detach(),
            "ahead": (real_logits > fake_logits).float().mean().detach(),
        }
        if config.gradient_penalty:
            mix = self._mixing(len(real), phase, step).to(real.device)
            between = (mix * real + (1 - mix) * fake.detach()).requires_grad_(True)
            penalty = unit_gradient_penalty(self.discriminator(between, noise), between)
            critic_loss = critic_loss + config.gradient_penalty * penalty
        self._critic_descent.backward(critic_loss)
        self._critic_descent.step()
        if config.weight_clip:
            with torch.no_grad():
                for parameter in self.discriminator.parameters():
                    parameter.clamp_(-config.weight_clip, config.weight_clip)
        self.discriminator.requires_grad_(False)
        loss = non_saturating_generator(real_logits, self.discriminator(fake, noise))
        self.discriminator.requires_grad_(True)
        self._descent.backward(loss)
        self._descent.step()
        return {
            **metrics,
            "generator": loss.detach(),
            "loss": loss.detach(),
            "mse": (fake - real).detach().square().mean(),
        }

    def _mixing(self, batch_size: int, phase: int, step: int) -> Tensor:
        """Uniform weights that interpolate real and fake images, a function of (seed, phase, step) alone."""
        return torch.rand(batch_size, 1, 1, 1, generator=generator_of(self.config.seed, phase, step))

    def modules(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds."""
        return {"student": self.student, "critic": self.discriminator}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers that a checkpoint holds."""
        return {"student-optimizer": self.optimizer, "critic-optimizer": self.discriminator_optimizer}
