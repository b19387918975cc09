"""Training of the unrolled student: all submodules together, by regression first and critics later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from advkd.cache.errors import UsageError
from advkd.stages.metrics.lpips import Lpips
from advkd.stages.schedules import one_cycle
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.training.data import Batch
from advkd.stages.student.training.descent import Descent
from advkd.stages.student.training.optimizers import OPTIMIZERS
from advkd.stages.student.training.protocol import Metrics, Phase, UnrollingNetwork, mean_metrics
from advkd.stages.student.unrolled.adversary import Adversary, CriticInput
from advkd.stages.student.unrolled.config import UnrolledTraining
from advkd.stages.student.unrolled.regression import Regression, head_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What one forward pass of the student gives for a micro-batch and for fresh noise."""

    predictions: list[Tensor]
    """x̂_0 of every submodule for the micro-batch."""
    states: list[Tensor]
    """State of every submodule for the micro-batch."""
    real: CriticInput
    fake: CriticInput


@dataclass(frozen=True, kw_only=True, slots=True)
class Fresh:
    """Noise that is in no cache, with labels or prompts where there are any; none in steps without critics."""

    noise: Tensor
    condition: Tensor | None

    def micro_batch(self, index: int, count: int) -> Fresh:
        """Every `count`-th row, from row `index` on."""
        condition = None if self.condition is None else self.condition[index::count]
        return Fresh(noise=self.noise[index::count], condition=condition)


class UnrolledProgram:
    """One phase, with all submodules."""

    def __init__(
        self, config: UnrolledTraining, student: UnrollingNetwork, geometry: Geometry, accelerator: Accelerator
    ) -> None:
        objective = config.objective
        self.config = config
        self.accelerator = accelerator
        self.geometry = geometry
        self.student: nn.Module = student
        self._unroll: Any = torch.compile(student.unroll) if config.compile else student.unroll
        self.regression = Regression(objective, geometry)
        self.adversary = Adversary(
            objective.adversarial, geometry, config.steps, config.seed, accelerator, compiled=config.compile
        )
        needs_all = objective.adversarial.weight and objective.adversarial.judged != "last"
        states = geometry.steps if needs_all else self.regression.states
        self.phases = [Phase(num_steps=config.steps, batch_size=config.batch_size, states=tuple(states))]
        self._lpips: Lpips | None = None
        if objective.perceptual and objective.perceptual_features == "lpips":
            if geometry.space is not None:
                raise UsageError("objective.perceptual_features: lpips compares pixels, not latents; choose `critic`")
            lpips = Lpips(geometry.item_shape, setting="objective.perceptual_features", otherwise="critic")
            self._lpips = lpips.to(accelerator.device)

    def begin(self, phase: int) -> None:
        """Create the optimizers."""
        config = self.config
        self.adversary.begin()
        self._optimizers = OPTIMIZERS[config.optimizer](
            self.student, config.learning_rate, config.kernel_learning_rate, config.weight_decay
        )
        self.descent = Descent(
            self.accelerator, self.student.parameters(), list(self._optimizers.values()), config.gradient_clip
        )

    def step(self, batch: Batch, phase: int, step: int) -> Metrics:
        """Train the critics on the student's images, then the student against the updated critics.

        The updates alternate: simultaneous ones cycle (Gidel et al. 2019), as they did here.
        """
        count, metrics = self.config.accumulate, []
        micro_batches = batch.micro_batches(count)
        fresh = self._fresh(batch, len(micro_batches[0].states[self.geometry.steps[0]]), step)
        outputs: Outputs | None = None
        if self.adversary.trains_at(step):
            for index, part in enumerate(micro_batches):
                # A single forward pass serves critics and student; the graphs of several would fill the memory.
                with torch.set_grad_enabled(count == 1):
                    outputs = self._forward(part, fresh.micro_batch(index, count))
                metrics.append(self.adversary.accumulate(outputs.real, outputs.fake.detached(), step, index, count))
            self.adversary.descent.step()
        for index, part in enumerate(micro_batches):
            if outputs is None or count > 1:
                outputs = self._forward(part, fresh.micro_batch(index, count))
            loss, readings = self._loss(part, outputs, step, index)
            self.descent.backward(loss / count)
            metrics.append(readings)
        self.descent.step(one_cycle(step, self.config.steps, self.config.warmup))
        return mean_metrics(metrics)

    def _fresh(self, batch: Batch, num_seeds: int, step: int) -> Fresh:
        """Fresh x_T and what goes with it for a step's micro-batches of `num_seeds` seeds: equally many for each, no
        more than it has seeds."""
        count, wanted = self.config.accumulate, self.config.objective.adversarial.fresh
        noise = batch.states[self.geometry.steps[0]]
        if not wanted or not self.adversary.trains_at(step):
            noise = noise[:0]
        else:
            noise = self.adversary.fresh_noise(step, count * min(-(-wanted // count), num_seeds), noise)
        return Fresh(noise=noise, condition=self.adversary.fresh_condition(step, noise, batch.condition))

    def _forward(self, batch: Batch, fresh: Fresh) -> Outputs:
        noise, condition = batch.states[self.geometry.steps[0]], batch.condition
        if condition is not None and fresh.condition is not None:
            condition = torch.cat([condition, fresh.condition])
        with self.accelerator.autocast():
            predictions, states = self._unroll(torch.cat([noise, fresh.noise]), condition)
        predictions, count = [x0.float() for x0 in predictions], len(noise)
        real, fake = self._critic_inputs(predictions, noise, fresh, batch)
        return Outputs(
            predictions=[x0[:count] for x0 in predictions],
            states=[state[:count].float() for state in states],
            real=real,
            fake=fake,
        )

    def _loss(self, batch: Batch, outputs: Outputs, step: int, micro_batch: int) -> tuple[Tensor, Metrics]:
        objective, adversary = self.config.objective, self.adversary
        loss, metrics = self.regression(outputs.predictions, outputs.states, batch.states)
        weight = adversary.weight(step)
        if weight:
            adversarial = adversary.student_loss(outputs.real, outputs.fake, step, micro_batch)
            metrics["generator"] = adversarial.detach()
            loss = loss + weight * adversarial
        if objective.perceptual:
            distance = self._perceptual(outputs.predictions[-1], batch, step)
            if distance is not None:
                metrics["perceptual"] = distance.detach()
                loss = loss + objective.perceptual * distance
        return loss, {**metrics, "loss": loss.detach()}

    def _critic_inputs(
        self, predictions: list[Tensor], noise: Tensor, fresh: Fresh, batch: Batch
    ) -> tuple[CriticInput, CriticInput]:
        """Real images, and the student's: those from fresh noise where there are any, which it can't have memorised."""
        last = self.adversary.num_judged == 1
        made = predictions[-1:] if last else predictions
        real = [batch.states[self.geometry.steps[-1]]]
        if not last:
            real = [*head_targets(batch.states, self.geometry.steps, self.geometry.levels, "jump"), *real]
        origin, condition = noise, batch.condition
        if len(fresh.noise):
            origin, condition, made = fresh.noise, fresh.condition, [x0[len(noise) :] for x0 in made]
        count = len(origin)
        return CriticInput.of(real, noise, count, batch.condition), CriticInput.of(made, origin, count, condition)

    def _perceptual(self, made: Tensor, batch: Batch, step: int) -> Tensor | None:
        noise, real = (batch.states[at] for at in (self.geometry.steps[0], self.geometry.steps[-1]))
        if self._lpips is not None:
            distance: Tensor = self._lpips(made, real).mean()
            return distance
        # An untrained critic has no useful features.
        return self.adversary.feature_distance(made, real, noise) if self.adversary.has_begun(step) else None

    def modules(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds."""
        return {"student": self.student, "critic": self.adversary.critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers that a checkpoint holds."""
        return {**self._optimizers, "critic-optimizer": self.adversary.optimizer}
