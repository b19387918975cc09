"""Training the unrolled student: regression first, the adversarial term later."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from advkd.cache.noise import mix64
from advkd.stages.schedules import one_cycle
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.objectives import (
    pseudo_huber,
    relativistic_discriminator,
    relativistic_generator,
    squared_gradient,
)
from advkd.stages.student.programs import Metrics, Phase, descend
from advkd.stages.student.unrolled import MIN_REACH, Critic, UnrolledStudent, jump_target, reach


class UnrolledProgram:
    """One phase: all submodules together."""

    def __init__(
        self, config: TrainConfig, student: UnrolledStudent, geometry: Geometry, accelerator: Accelerator
    ) -> None:
        objective = config.objective
        self.config = config
        self.accelerator = accelerator
        self.steps = geometry.steps
        self.student: nn.Module = student
        self._unrolled = student
        self.levels = geometry.levels
        ends_suffice = not objective.state and (not objective.heads or objective.head_target == "x0")
        states = (geometry.steps[0], geometry.steps[-1]) if ends_suffice else geometry.steps
        self.phases = [Phase(num_steps=config.steps, batch_size=config.batch_size, states=tuple(states))]
        self.critic = Critic(geometry.item_shape[0], objective.critic_width, objective.conditional)

    def begin(self, phase: int) -> None:
        """Make the optimisers."""
        config = self.config
        self.critic = self.critic.to(self.accelerator.device)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(),
            lr=config.objective.critic_learning_rate,
            betas=(0.0, 0.99),
            weight_decay=0.0,
            fused=True,
        )

    def step(self, batch: Mapping[int, Tensor], phase: int, step: int) -> Metrics:
        """Train the student on one batch, then the critic on what the student made."""
        objective, factor = self.config.objective, one_cycle(step, self.config.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        noise, real = batch[self.steps[0]], batch[self.steps[-1]]
        weight = self._adversarial_weight(step)
        fresh = self._fresh_noise(step, noise) if weight else noise[:0]
        with self.accelerator.autocast():
            predictions, states = self._unrolled.unroll(torch.cat([noise, fresh]))
        count = len(noise)
        final = pseudo_huber(predictions[-1][:count].float(), real, objective.huber_width)
        loss = objective.x0 * final
        if objective.heads and len(predictions) > 1:
            pairs = zip(predictions[:-1], self._head_targets(batch), strict=True)
            errors = [pseudo_huber(x0[:count].float(), target, objective.huber_width) for x0, target in pairs]
            loss = loss + objective.heads * torch.stack(errors).sum()
        made = predictions[-1].float()
        metrics: Metrics = {"x0": final.detach(), "mse": (made[:count] - real).detach().square().mean()}
        if objective.state and len(states) > 1:
            reached = zip(states[:-1], self.steps[1:-1], strict=True)
            error = torch.stack([(state[:count].float() - batch[at]).square().mean() for state, at in reached]).sum()
            metrics["state"] = error.detach()
            loss = loss + objective.state * error
        # The critic judges images from fresh noise where there are any: it then can't learn which pairs are cached.
        fake, origin = (made[count:], fresh) if len(fresh) else (made, noise)
        if weight:
            self.critic.requires_grad_(False)
            with torch.no_grad():
                real_logits = self.critic(real[: len(fake)], noise[: len(fake)])
            gain = relativistic_generator(real_logits, self.critic(fake, origin))
            self.critic.requires_grad_(True)
            metrics["generator"] = gain.detach()
            loss = loss + weight * gain
        metrics["loss"] = loss.detach()
        descend(self.accelerator, loss, self.optimizer, list(self.student.parameters()), self.config.gradient_clip)
        if weight:
            metrics |= self._train_critic((real[: len(fake)], noise[: len(fake)]), (fake.detach(), origin), step)
        return metrics

    def _head_targets(self, batch: Mapping[int, Tensor]) -> list[Tensor]:
        """What the submodules before the last should predict."""
        if self.config.objective.head_target == "x0":
            return [batch[self.steps[-1]]] * (len(self.steps) - 2)
        states, targets = [batch[step] for step in self.steps[:-1]], []
        for k, (before, after) in enumerate(itertools.pairwise(self.levels[:-1])):
            close = reach(before, after) < MIN_REACH
            targets.append(batch[self.steps[-1]] if close else jump_target(states[k], states[k + 1], before, after))
        return targets

    def _adversarial_weight(self, step: int) -> float:
        objective, position = self.config.objective, (step + 1) / self.config.steps
        if position <= objective.adversarial_start:
            return 0.0
        ramp = (position - objective.adversarial_start) / max(objective.adversarial_ramp, 1e-9)
        return objective.adversarial * min(1.0, ramp)

    def _fresh_noise(self, step: int, noise: Tensor) -> Tensor:
        """Noise of this step, a function of (seed, step) alone; at most as many images as the batch has."""
        count = min(self.config.objective.fresh, len(noise))
        generator = torch.Generator().manual_seed(int(mix64(mix64(self.config.seed) ^ np.uint64(step)) >> np.uint64(1)))
        return torch.randn(count, *noise.shape[1:], generator=generator).to(noise.device)

    def _train_critic(self, real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], step: int) -> Metrics:
        """One step of the critic on (images, noise) of either kind."""
        objective = self.config.objective
        penalise = step % objective.penalty_every == 0 and objective.penalty > 0.0
        real_images = real[0].detach().requires_grad_(penalise)
        fake_images = fake[0].detach().requires_grad_(penalise)
        real_logits, fake_logits = self.critic(real_images, real[1]), self.critic(fake_images, fake[1])
        loss = relativistic_discriminator(real_logits, fake_logits)
        metrics = {"critic": loss.detach(), "ahead": (real_logits > fake_logits).float().mean().detach()}
        if penalise:
            penalty = squared_gradient(real_logits, real_images) + squared_gradient(fake_logits, fake_images)
            loss = loss + 0.5 * objective.penalty * objective.penalty_every * penalty
        descend(self.accelerator, loss, self.critic_optimizer, list(self.critic.parameters()), 0.0)
        return metrics

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint must hold."""
        return {"student": self.student, "critic": self.critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The same for optimisers."""
        return {"student-optimizer": self.optimizer, "critic-optimizer": self.critic_optimizer}
