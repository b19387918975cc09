"""The path of a pipeline's states: read from its scheduler once a call has begun, since many shift their noise levels
by the image's size, and checked against what the scheduler then does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from advkd.cache.errors import ConfigError, TeacherError
from advkd.cache.format.equivalence import SCHEDULER_OPTIONS
from advkd.cache.format.layout import State
from advkd.cache.format.recipe import Recipe
from advkd.stages.teacher.config import AUTO, SamplerConfig
from advkd.stages.teacher.diffusers_api import diffusers, json_config, recorded_config
from advkd.stages.teacher.path.solver_path import SolverPath, own_landing, states_of
from advkd.stages.teacher.path.solvers import SOLVERS, Solver, find_solver

_FIRST_ORDER = ("ddim", "euler", "flow-euler")
"""Solvers each of whose steps follows from one prediction; the others' first one does."""
TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest root mean square difference between a scheduler's step and the jump between the table's levels, relative to
the state, by the precision of the pipeline."""


def choose_scheduler(pipe: Any, sampler: SamplerConfig) -> str:
    """Give a pipeline the scheduler that is asked for, its own with `auto`; the solver's name.

    Raises:
        ConfigError: the solver is unknown, or its steps add noise.
        TeacherError: advkd has no table for the pipeline's own scheduler.
    """
    own = type(pipe.scheduler).__name__
    if sampler.name == AUTO:
        fitting = [name for name, solver in SOLVERS.items() if solver.scheduler == own and _is(solver, pipe.scheduler)]
        if not fitting:
            raise TeacherError(
                f"a {type(pipe).__name__} with a {own}: advkd has no table of its noise levels; --sampler replaces it "
                f"by one of {', '.join(SOLVERS)}"
            )
        name = fitting[0]
    else:
        name = sampler.name
        solver = find_solver(name)
        flows = own.startswith("FlowMatch")
        if solver.flow != flows:
            others = ", ".join(other for other, entry in SOLVERS.items() if entry.flow == flows)
            raise ConfigError(f"sampler {name!r} can't follow the pipeline's {own}: choose one of {others}")
        spacing = {} if sampler.spacing in (AUTO, "teacher") else {"timestep_spacing": sampler.spacing}
        kind = getattr(diffusers(), solver.scheduler)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **spacing, **solver.fixed)
    if find_solver(name).ancestral or sampler.eta:
        raise ConfigError(
            f"sampler {name!r} adds noise at each step, and a pipeline draws it by itself; expected one that doesn't: "
            "--sampler dpmsolver++, unipc, ddim, euler"
        )
    return name


def _is(solver: Solver, scheduler: Any) -> bool:
    """Whether a scheduler has the options that make its class this solver."""
    return all(scheduler.config.get(key) == value for key, value in solver.fixed.items()) or not solver.fixed


@dataclass(frozen=True, kw_only=True)
class PipelinePath:
    """A pipeline's way from x_T to x_0."""

    sampler: SamplerConfig
    """With the name of the solver."""
    scheduler: str
    """Its class in diffusers."""
    options: dict[str, Any]
    """Of that class, as JSON."""
    timesteps: tuple[float, ...]
    """Of each evaluation."""
    states: tuple[State, ...]
    """Every state, x_T first."""

    @classmethod
    def of(cls, scheduler: Any, sampler: SamplerConfig, name: str) -> PipelinePath:
        """The path of a scheduler whose pipeline's call has begun.

        Raises:
            ConfigError: its noise levels are not finite.
            TeacherError: the pipeline takes other steps than were asked for.
        """
        solver, found = find_solver(name), len(scheduler.timesteps)
        if found != solver.num_evaluations(sampler.steps):
            raise TeacherError(
                f"the pipeline makes {found} evaluations in {sampler.steps} steps; expected "
                f"{solver.num_evaluations(sampler.steps)} of a {solver.scheduler}"
            )
        given = {"_class_name": solver.scheduler, **scheduler.config}
        known = SCHEDULER_OPTIONS[solver.scheduler]
        return cls(
            sampler=replace(sampler, name=name),
            scheduler=solver.scheduler,
            options=known | json_config(recorded_config(given, known)),
            timesteps=tuple(float(t) for t in scheduler.timesteps),
            states=states_of(scheduler, name, sampler.steps, own_landing(scheduler, sampler.steps)),
        )

    @property
    def solver(self) -> Solver:
        """Its entry in the table."""
        return find_solver(self.sampler.name)

    @property
    def evaluations(self) -> int:
        """Predictions of a trajectory."""
        return len(self.timesteps)

    def identity(self) -> dict[str, Any]:
        """What the recipe records of the sampler."""
        sizes = {key: getattr(self.sampler, key) for key in ("height", "width")}
        call = {key: value for key, value in sizes.items() if value is not None} | self.sampler.call
        return {
            "name": self.sampler.name,
            "steps": self.sampler.steps,
            "eta": 0.0,
            "deterministic": True,
            "scheduler": self.scheduler,
            "config": self.options,
            "timesteps": list(self.timesteps),
            **({"call": call} if call else {}),
        }

    def jump_error(self, call: int, output: Tensor, state: Tensor, reached: Tensor) -> float | None:
        """How far a step is from the jump between the levels of the table: root mean square, relative to the state.

        x̂_0 and ε̂ follow from the state and the prediction, so that α' x̂_0 + σ' ε̂ must be the next state.

        Args:
            call: evaluations before this one.
            output: the prediction, of any shape.
            state: in the solver's own units, of the same shape.
            reached: the next state.

        Returns:
            None where a step doesn't follow from this prediction alone.
        """
        if call and self.sampler.name not in _FIRST_ORDER:
            return None
        before, after = self.states[call], self.states[call + 1]
        x, predicted, radius = state.float(), output.float(), (before.alpha**2 + before.sigma**2) ** 0.5
        alpha, sigma, kind = before.alpha / radius, before.sigma / radius, self.options.get("prediction_type")
        if self.solver.flow or kind == "flow_prediction":
            x0, noise = x - before.sigma * predicted, x + before.alpha * predicted
        elif kind == "v_prediction":
            x0, noise = alpha * x / radius - sigma * predicted, sigma * x / radius + alpha * predicted
        elif kind == "sample":
            x0, noise = predicted, (x / radius - alpha * predicted) / sigma
        else:
            x0, noise = (x / radius - sigma * predicted) / alpha, predicted
        expected = after.alpha * x0 + after.sigma * noise
        apart, size = (expected - reached.float()).square().mean(), reached.float().square().mean()
        return float((apart / size.clamp_min(1e-12)).sqrt())


def recorded_sampler(recipe: Recipe) -> SamplerConfig:
    """The sampler that made a cache."""
    if recipe.prompts is None:
        return SolverPath.recorded(recipe).sampler
    call = dict(recipe.sampler.get("call", {}))
    sizes = {key: call.pop(key, None) for key in ("height", "width")}
    return SamplerConfig(
        name=str(recipe.sampler["name"]),
        steps=int(recipe.sampler["steps"]),
        spacing=str(recipe.sampler["config"].get("timestep_spacing", AUTO)),
        guidance=recipe.prompts.guidance,
        call=call,
        **sizes,
    )
