"""One solver set up for one teacher: which scheduler it steps with, and which states it passes through."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkd.cache.errors import ConfigError, TeacherError, first_line
from advkd.cache.format.equivalence import SCHEDULER_OPTIONS
from advkd.cache.format.layout import State
from advkd.cache.format.recipe import Recipe
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.diffusers_api import diffusers
from advkd.stages.teacher.path.levels import Scheduler, rounded
from advkd.stages.teacher.path.schedulers import LEARNED, own_spacing, solver_options
from advkd.stages.teacher.path.solvers import SOLVERS, Solver, find_solver, is_deterministic
from advkd.stages.teacher.path.x0 import X0Rule


@dataclass(frozen=True, kw_only=True)
class SolverPath:
    """A solver's way from x_T to x_0."""

    sampler: SamplerConfig
    """With its spacing resolved."""
    options: dict[str, Any]
    """Of the scheduler's class, all of them, as JSON."""
    x0: X0Rule | None
    """How x̂_0 is constrained, by the scheduler's class or by advkd."""
    next_landing: bool = False
    """Whether DDIM's steps are made to end at the next timestep of its list. Otherwise they end at t − T // n, which
    is the same where n divides T."""

    @classmethod
    def of(cls, scheduler_config: Mapping[str, Any], sampler: SamplerConfig) -> SolverPath:
        """The path that a sampler takes for a teacher.

        Raises:
            ConfigError: the sampler is unknown, or its steps and spacing don't fit.
            TeacherError: the teacher's scheduler describes no diffusion that the sampler can follow.
        """
        sampler = sampler.resolved()
        solver = find_solver(sampler.name)
        if sampler.spacing == "teacher":
            sampler = replace(sampler, spacing=own_spacing(scheduler_config))
        options = solver_options(scheduler_config, solver, sampler.spacing)
        path = cls(sampler=sampler, options=options, x0=X0Rule.of(scheduler_config))
        path._check()
        if solver.strides and path._landing() != path._next_landing():
            path = replace(path, next_landing=True)
        path.states  # noqa: B018 — checks the levels
        return path

    @classmethod
    def recorded(cls, recipe: Recipe) -> SolverPath:
        """The path that made a cache, by the rules that its recipe records.

        Raises:
            ConfigError: its sampler is none that advkd has, or it follows a rule that this version doesn't know.
        """
        sampler = recipe.sampler
        solver = find_solver(str(sampler["name"]))
        config = SCHEDULER_OPTIONS[solver.scheduler] | sampler["config"]
        landing, kind = sampler.get("landing"), sampler.get("x0")
        rule = X0Rule.of(recipe.teacher["scheduler"] | config | {"_class_name": solver.scheduler})
        if kind is not None:
            rule = X0Rule.of(recipe.teacher["scheduler"] | {"thresholding": kind == "threshold", "clip_sample": True})
        elif rule is not None and rule.kind not in solver.own_x0_rules:
            rule = None
        if landing not in (None, "next") or (kind is not None and (rule is None or rule.kind != kind)):
            raise ConfigError(f"the recipe's sampler lands by {landing!r} and treats x_0 by {kind!r}: upgrade advkd")
        return cls(
            sampler=SamplerConfig(
                name=str(sampler["name"]),
                steps=int(sampler["steps"]),
                eta=float(sampler["eta"]),
                spacing=str(config["timestep_spacing"]),
                guidance=1.0 if recipe.condition is None else recipe.condition.guidance,
            ),
            options=config,
            x0=rule,
            next_landing=landing == "next",
        )

    @property
    def solver(self) -> Solver:
        """Its entry in the table."""
        return find_solver(self.sampler.name)

    @property
    def applied_x0(self) -> X0Rule | None:
        """The rule to apply to predictions, since the scheduler's class doesn't."""
        return None if self.x0 is None or self.x0.kind in self.solver.own_x0_rules else self.x0

    @property
    def prediction_type(self) -> str:
        """What the network predicts."""
        return str(self.options.get("prediction_type", "epsilon"))

    @property
    def uses_variance(self) -> bool:
        """Whether the solver takes the variance that the network may give besides its prediction."""
        return self.solver.scheduler == "DDPMScheduler" and self.options.get("variance_type") in LEARNED

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return not is_deterministic(self.sampler)

    @property
    def evaluations(self) -> int:
        """Network evaluations of a trajectory."""
        return self.solver.num_evaluations(self.sampler.steps)

    @cached_property
    def timesteps(self) -> Tensor:
        """The timestep of each evaluation; on the CPU, shape (evaluations,)."""
        timesteps: Tensor = self.original_scheduler().timesteps
        return timesteps

    @cached_property
    def states(self) -> tuple[State, ...]:
        """Every state that the solver passes through, x_T first.

        The scale of x_T is the scheduler's `init_noise_sigma`; the solver starts from stored noise · scale.

        Raises:
            ConfigError: their noise levels are not finite.
        """
        landing = self._next_landing() if self.next_landing else self._landing()
        return states_of(self.original_scheduler(), self.sampler.name, self.sampler.steps, landing)

    def identity(self) -> dict[str, Any]:
        """What the recipe records of the sampler; a rule that changes no numbers is left out."""
        return {
            "name": self.sampler.name,
            "steps": self.sampler.steps,
            "eta": self.sampler.eta,
            "deterministic": not self.stochastic,
            "scheduler": self.solver.scheduler,
            "config": self.options,
            "timesteps": [float(t) for t in self.timesteps],
            **({"landing": "next"} if self.next_landing else {}),
            **({"x0": self.applied_x0.kind} if self.applied_x0 else {}),
        }

    def new_scheduler(self) -> Scheduler:
        """A fresh diffusers scheduler with its timesteps set; multistep solvers keep history, so one per batch."""
        scheduler = self.original_scheduler()
        if self.next_landing:
            # Respaced (Nichol & Dhariwal 2021, section 4): only the visited timesteps remain, one apart.
            scheduler.alphas_cumprod = scheduler.alphas_cumprod[scheduler.timesteps.flip(0)]
            scheduler.num_inference_steps = scheduler.config.num_train_timesteps
            scheduler.timesteps = torch.arange(self.sampler.steps).flip(0)
        return scheduler

    def original_scheduler(self) -> Scheduler:
        """The scheduler as diffusers makes it, with exactly the path's number of evaluations."""
        cls = getattr(diffusers(), self.solver.scheduler)
        options = {key: -math.inf if value == "-inf" else value for key, value in self.options.items()}
        scheduler = cls.from_config(options)
        scheduler.set_timesteps(self.sampler.steps)
        if self.solver.flow and self.sampler.spacing == "trailing":
            self._space_trailing(scheduler)
        # By rounding, "trailing" has one timestep too many for some numbers of steps (61, 103 … of 1000).
        scheduler.timesteps = scheduler.timesteps[: self.evaluations]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[: self.evaluations], scheduler.sigmas[-1:]])
        scheduler.num_inference_steps = self.sampler.steps
        return scheduler

    def _space_trailing(self, scheduler: Scheduler) -> None:
        """σ = 1, 1 − 1/n, … 1/n before the shift, as Flux's and Sana's pipelines give them to flow matching's Euler."""
        steps = self.sampler.steps
        euler = diffusers().FlowMatchEulerDiscreteScheduler.from_config(self.options)
        euler.set_timesteps(steps, sigmas=np.linspace(1.0, 1.0 / steps, steps))
        scheduler.sigmas, scheduler.timesteps = euler.sigmas, euler.timesteps
        if self.solver.evaluations_per_step == 2:  # as Heun's own `set_timesteps` does
            first, inner, last = torch.split(euler.sigmas, [1, steps - 1, 1])
            scheduler.sigmas = torch.cat([first, inner.repeat_interleave(2), last])
            scheduler.timesteps = torch.cat([euler.timesteps[:1], euler.timesteps[1:].repeat_interleave(2)])

    def _landing(self) -> list[int]:
        return own_landing(self.original_scheduler(), self.sampler.steps)

    def _next_landing(self) -> list[int]:
        return [*(int(t) for t in self.timesteps[1:]), -1]

    def _check(self) -> None:
        """Refuse options that diffusers accepts but that give meaningless samples."""
        sampler, name = self.sampler, self.solver.scheduler
        if self.solver.flow and sampler.spacing == "leading":
            raise ConfigError(
                f"sampler {sampler.name!r}: spacing 'leading' is none of flow matching; choose trailing or linspace"
            )
        try:
            limit = int(self.options["num_train_timesteps"])
            if sampler.steps > limit:
                raise TeacherError(
                    f"steps {sampler.steps} don't fit the teacher: it was trained with {limit} timesteps"
                )
            scheduler = self.original_scheduler()
            timesteps = scheduler.timesteps.tolist()
            num_bars = limit if self.solver.flow else len(scheduler.alphas_cumprod)
        except TeacherError:
            raise
        except Exception as error:  # whatever a foreign configuration makes diffusers raise
            raise TeacherError(
                f"{name} can't be made from the teacher's scheduler with steps {sampler.steps} and spacing "
                f"{sampler.spacing!r} ({first_line(error)}){self._others()}"
            ) from error
        if num_bars != limit:
            raise TeacherError(f"the teacher has {num_bars} betas for {limit} timesteps")
        visited = [*timesteps[:1], *timesteps[1 :: self.solver.evaluations_per_step]]
        within = visited[0] <= limit if self.solver.flow else visited[0] < limit  # flow matching counts from 1
        fits = len(timesteps) == self.evaluations and within and visited[-1] >= 0
        if not fits or any(late >= early for early, late in itertools.pairwise(visited)):
            raise ConfigError(
                f"sampler {sampler.name!r}: {sampler.steps} steps with spacing {sampler.spacing!r} don't visit "
                f"{sampler.steps} different timesteps below {limit}; choose fewer steps or spacing 'trailing'"
            )
        if visited[0] < limit // 4:
            raise ConfigError(
                f"sampler {sampler.name!r}: with spacing {sampler.spacing!r} and {sampler.steps} steps x_T would be at "
                f"timestep {visited[0]:g}, which has almost no noise; choose more steps or spacing 'trailing'"
            )

    def _others(self) -> str:
        """Which other samplers know the teacher's schedule of betas."""
        fitting = []
        for name, solver in SOLVERS.items():
            if solver.flow:
                continue
            try:
                getattr(diffusers(), solver.scheduler).from_config(
                    {key: value for key, value in self.options.items() if key.startswith(("beta", "num_train"))}
                )
            except Exception:  # as above: this one doesn't
                continue
            fitting.append(name)
        return f"; choose {' or '.join(fitting)}" if 0 < len(fitting) < len(SOLVERS) else ""


def states_of(scheduler: Scheduler, name: str, steps: int, landing: list[int]) -> tuple[State, ...]:
    """Every state that a scheduler passes through, x_T first.

    Args:
        scheduler: with its timesteps set.
        name: its entry in the table of solvers.
        steps: solver steps.
        landing: the timestep at which each step of DDIM ends, negative for x_0.

    Raises:
        ConfigError: their noise levels are not finite.
    """
    solver = find_solver(name)
    levels = solver.levels(scheduler, landing)
    # Where a step takes two evaluations, every later timestep stands twice.
    evaluated = [float(t) for t in scheduler.timesteps]
    timesteps = [*evaluated[:1], *evaluated[1 :: solver.evaluations_per_step], -1.0]
    if not all(math.isfinite(value) for level in levels for value in level) or any(a == s == 0 for a, s in levels):
        raise ConfigError(f"sampler {name!r}: the teacher's betas give noise levels that are not finite")
    states = []
    for step, timestep, (alpha, sigma) in zip(range(steps + 1), timesteps, levels, strict=True):
        scale = _exact_scale(scheduler, sigma) if step == 0 else (alpha**2 + sigma**2) ** 0.5
        numbers = {"alpha": rounded(alpha), "sigma": rounded(sigma), "scale": rounded(scale)}
        states.append(State(step=step, timestep=timestep, **numbers))
    return tuple(states)


def own_landing(scheduler: Scheduler, steps: int) -> list[int]:
    """The timestep at which each step of DDIM ends in diffusers; negative for x_0."""
    stride = int(scheduler.config.num_train_timesteps) // steps
    return [max(int(t) - stride, -1) for t in scheduler.timesteps]


def initial_scale(scheduler: Scheduler) -> float:
    """The scheduler's `init_noise_sigma`, by which it wants unit noise multiplied; flow matching's have none."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def _exact_scale(scheduler: Scheduler, sigma: float) -> float:
    """The scheduler's `init_noise_sigma`: 1, σ or √(σ² + 1), whichever it is to float32's rounding."""
    theirs = initial_scale(scheduler)
    ours = min((1.0, sigma, (sigma**2 + 1.0) ** 0.5), key=lambda value: abs(value - theirs))
    return ours if math.isclose(ours, theirs, rel_tol=1e-4) else theirs
