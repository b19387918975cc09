"""Training the unrolled student: regression first, the adversarial term later."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

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
from advkd.stages.student.unrolled import Critic, UnrolledStudent


class UnrolledProgram:
    """One phase: all submodules together."""

    def __init__(
        self, config: TrainConfig, student: UnrolledStudent, geometry: Geometry, accelerator: Accelerator
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.steps = geometry.steps
        self.student: nn.Module = student
        self._unrolled = student
        states = geometry.steps if config.objective.state else (geometry.steps[0], geometry.steps[-1])
        self.phases = [Phase(num_steps=config.steps, batch_size=config.batch_size, states=tuple(states))]
        self.critic = Critic(geometry.item_shape[0], config.objective.critic_width)

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
        """Train the student on one batch, then the critic on what the student made of it."""
        weights = self.config.objective
        noise, real = batch[self.steps[0]], batch[self.steps[-1]]
        factor = one_cycle(step, self.config.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        with self.accelerator.autocast():
            predictions, states = self._unrolled.unroll(noise)
        heads = [pseudo_huber(x0.float(), real, weights.huber_width) for x0 in predictions]
        loss = weights.x0 * torch.stack(heads).sum()
        metrics: Metrics = {
            "x0": heads[-1].detach(),
            "mse": (predictions[-1].float() - real).detach().square().mean(),
        }
        if weights.state:
            pairs = zip(states[:-1], self.steps[1:-1], strict=True)
            errors = [(state.float() - batch[at]).square().mean() for state, at in pairs]
            if errors:
                metrics["state"] = torch.stack(errors).sum().detach()
                loss = loss + weights.state * torch.stack(errors).sum()
        fake = predictions[-1].float()
        adversarial = weights.adversarial > 0.0 and step >= weights.adversarial_start * self.config.steps
        if adversarial:
            self.critic.requires_grad_(False)
            with torch.no_grad():
                real_logits = self.critic(real, noise)
            gain = relativistic_generator(real_logits, self.critic(fake, noise))
            self.critic.requires_grad_(True)
            metrics["generator"] = gain.detach()
            loss = loss + weights.adversarial * gain
        metrics["loss"] = loss.detach()
        parameters = list(self.student.parameters())
        descend(self.accelerator, loss, self.optimizer, parameters, self.config.gradient_clip)
        if adversarial:
            metrics |= self._train_critic(real, fake.detach(), noise, step)
        return metrics

    def _train_critic(self, real: Tensor, fake: Tensor, noise: Tensor, step: int) -> Metrics:
        weights = self.config.objective
        penalise = step % weights.penalty_every == 0 and weights.penalty > 0.0
        real, fake = real.detach().requires_grad_(penalise), fake.requires_grad_(penalise)
        real_logits, fake_logits = self.critic(real, noise), self.critic(fake, noise)
        loss = relativistic_discriminator(real_logits, fake_logits)
        metrics = {"critic": loss.detach(), "ahead": (real_logits > fake_logits).float().mean().detach()}
        if penalise:
            penalty = squared_gradient(real_logits, real) + squared_gradient(fake_logits, fake)
            loss = loss + 0.5 * weights.penalty * weights.penalty_every * penalty
        descend(self.accelerator, loss, self.critic_optimizer, list(self.critic.parameters()), 0.0)
        return metrics

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint must hold."""
        return {"student": self.student, "critic": self.critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The same for optimisers."""
        return {"student-optimizer": self.optimizer, "critic-optimizer": self.critic_optimizer}
