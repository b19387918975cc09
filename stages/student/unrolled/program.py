"""Training the unrolled student: all submodules together, by regression first and critics later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from advkd.stages.schedules import one_cycle
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.training.descent import Descent
from advkd.stages.student.training.optimizers import make_optimizers
from advkd.stages.student.training.protocol import Metrics, Phase, mean_metrics
from advkd.stages.student.unrolled.adversary import Adversary, Judged
from advkd.stages.student.unrolled.network import UnrolledStudent
from advkd.stages.student.unrolled.perceptual import PerceptualDistance
from advkd.stages.student.unrolled.regression import Regression, head_targets

States = Mapping[int, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What one pass of the student made of a part of the batch, and of fresh noise."""

    predictions: list[Tensor]
    """x̂_0 of every submodule, of the part."""
    states: list[Tensor]
    """The state that every submodule reached, of the part."""
    real: Judged
    fake: Judged


class UnrolledProgram:
    """One phase."""

    def __init__(
        self, config: TrainConfig, student: UnrolledStudent, geometry: Geometry, accelerator: Accelerator
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
        wants_all = objective.adversarial.weight and objective.adversarial.judged != "last"
        states = geometry.steps if wants_all else self.regression.states
        self.phases = [Phase(num_steps=config.steps, batch_size=config.batch_size, states=tuple(states))]
        self.perceptual = None
        if objective.perceptual and objective.perceptual_features == "lpips":
            self.perceptual = PerceptualDistance(geometry.item_shape, accelerator.device)

    def begin(self, phase: int) -> None:
        """Make the optimisers."""
        self.adversary.begin()
        self._optimizers = make_optimizers(self.student, self.config)
        self.descent = Descent(
            self.accelerator, self.student.parameters(), list(self._optimizers.values()), self.config.gradient_clip
        )

    def step(self, batch: States, phase: int, step: int) -> Metrics:
        """Train the critics on what the student makes of a batch, then the student against them.

        In turns, not both from where they stood: such steps circle each other (Gidel et al. 2019), and here they did.
        """
        passes, metrics = self.config.accumulate, []
        # Every so-manieth row, as processes take theirs: what a pass sees first is what the whole batch has first.
        parts = [{at: states[index::passes] for at, states in batch.items()} for index in range(passes)]
        fresh = self._fresh_noise(parts[0][self.geometry.steps[0]], step)
        made: Made | None = None
        if self.adversary.learns(step):
            for index, part in enumerate(parts):
                with torch.set_grad_enabled(passes == 1):  # one pass serves both; several graphs would fill the memory
                    made = self._make(part, fresh[index::passes])
                metrics.append(self.adversary.learn(made.real, made.fake.detached(), step, index, passes))
            self.adversary.descent.step()
        for index, part in enumerate(parts):
            if made is None or passes > 1:
                made = self._make(part, fresh[index::passes])
            loss, readings = self._loss(part, made, step, index)
            self.descent.backward(loss / passes)
            metrics.append(readings)
        self.descent.step(one_cycle(step, self.config.steps, self.config.warmup))
        return mean_metrics(metrics)

    def _fresh_noise(self, like: Tensor, step: int) -> Tensor:
        passes, wanted = self.config.accumulate, self.config.objective.adversarial.fresh
        if not wanted or not self.adversary.learns(step):
            return like[:0]
        return self.adversary.fresh_noise(step, passes * min(-(-wanted // passes), len(like)), like)

    def _make(self, batch: States, fresh: Tensor) -> Made:
        noise = batch[self.geometry.steps[0]]
        with self.accelerator.autocast():
            predictions, states = self._unroll(torch.cat([noise, fresh]))
        predictions, count = [x0.float() for x0 in predictions], len(noise)
        real, fake = self._judged(predictions, noise, fresh, batch)
        return Made(
            predictions=[x0[:count] for x0 in predictions],
            states=[state[:count].float() for state in states],
            real=real,
            fake=fake,
        )

    def _loss(self, batch: States, made: Made, step: int, index: int) -> tuple[Tensor, Metrics]:
        objective, adversary = self.config.objective, self.adversary
        loss, metrics = self.regression(made.predictions, made.states, batch)
        weight = adversary.weight(step)
        if weight:
            gain = adversary.student_loss(made.real, made.fake, step, index)
            metrics["generator"] = gain.detach()
            loss = loss + weight * gain
        if objective.perceptual:
            distance = self._perceptual(made.predictions, batch, batch[self.geometry.steps[0]], step)
            if distance is not None:
                metrics["perceptual"] = distance.detach()
                loss = loss + objective.perceptual * distance
        return loss, {**metrics, "loss": loss.detach()}

    def _judged(self, predictions: list[Tensor], noise: Tensor, fresh: Tensor, batch: States) -> tuple[Judged, Judged]:
        """What the critics see: images from fresh noise where there are any, so that knowing the cache is no help."""
        last = self.adversary.num_judged == 1
        made = predictions[-1:] if last else predictions
        truth = [batch[self.geometry.steps[-1]]]
        if not last:
            truth = [*head_targets(batch, self.geometry.steps, self.geometry.levels, "jump"), *truth]
        origin, shown = (fresh, [x0[len(noise) :] for x0 in made]) if len(fresh) else (noise, made)
        return Judged.of(truth, noise, len(origin)), Judged.of(shown, origin, len(origin))

    def _perceptual(self, predictions: list[Tensor], batch: States, noise: Tensor, step: int) -> Tensor | None:
        made, truth = predictions[-1], batch[self.geometry.steps[-1]]
        if self.perceptual is not None:
            return self.perceptual(made, truth)
        if not self.adversary.is_heard(step):  # a critic that has learnt nothing yet has no features
            return None
        return self.adversary.feature_distance(made, truth, noise)

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint must hold."""
        return {"student": self.student, "critic": self.adversary.critic}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The same for optimisers."""
        return {**self._optimizers, "critic-optimizer": self.adversary.optimizer}
