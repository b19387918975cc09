"""The supported samplers: for each diffusers scheduler, at what level of noise its states are.

A solver's state after j steps is x = alpha · x_0 + sigma · ε. Which (alpha, sigma) that is differs between
schedulers and can't be guessed: DDIM jumps to `t − T // n` whatever its next timestep is, Euler and Heun work with
alpha = 1 and sigma up to 157, Heun evaluates the network twice a step. So each class has an explicit entry here, and
an unknown one is refused by name. This module holds the tables; it imports no diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from advkd.cache.errors import ConfigError
from advkd.cache.format.layout import State
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.path.levels import Scheduler, alpha_bars, rounded, sigmas


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """How advkd uses one diffusers scheduler class."""

    scheduler: str
    """Name of the class in diffusers."""
    levels: Callable[[Scheduler, int], list[tuple[float, float]]]
    """(scheduler, steps) → (alpha, sigma) of the states after 0, 1, …, `steps` steps."""
    ancestral: bool = False
    """Whether each step draws fresh noise."""
    evaluations_per_step: int = 1
    """Network evaluations of a step; the last step takes one less where this is two."""

    def num_evaluations(self, steps: int) -> int:
        """Network evaluations of a whole trajectory."""
        return self.evaluations_per_step * steps - (self.evaluations_per_step - 1)

    def steps_done(self, evaluations: int, steps: int) -> int | None:
        """Solver steps completed after so many evaluations; None in the middle of a step."""
        if evaluations == self.num_evaluations(steps):
            return steps
        steps_done, inside = divmod(evaluations, self.evaluations_per_step)
        return None if inside else steps_done


def _variance_preserving(alpha_bar: float) -> tuple[float, float]:
    return alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5


def _ddim_levels(scheduler: Scheduler, steps: int) -> list[tuple[float, float]]:
    """DDIM (Song et al. 2021, eq. 12) lands at t − T // n, and after the last step at `final_alpha_cumprod`."""
    stride = scheduler.config.num_train_timesteps // steps
    bars = alpha_bars(scheduler)
    last = 1.0 if scheduler.config.set_alpha_to_one else bars[0]
    landing = [int(t) - stride for t in scheduler.timesteps]
    after = [bars[t] if t >= 0 else last for t in landing]
    start = bars[int(scheduler.timesteps[0])]
    return [_variance_preserving(float(alpha_bar)) for alpha_bar in [start, *after]]


def _ddpm_levels(scheduler: Scheduler, steps: int) -> list[tuple[float, float]]:
    """DDPM (Ho et al. 2020, eq. 7) lands at the next timestep, and after the last one at x_0."""
    bars = alpha_bars(scheduler)
    return [_variance_preserving(alpha_bar) for alpha_bar in [*(float(bars[int(t)]) for t in scheduler.timesteps), 1.0]]


def _vp_sigma_levels(scheduler: Scheduler, steps: int) -> list[tuple[float, float]]:
    """DPM-Solver++ (Lu et al. 2022) keeps sigma/alpha ratios; its states are variance preserving."""
    return [_variance_preserving(1.0 / (1.0 + float(ratio) ** 2)) for ratio in sigmas(scheduler)]


def _euler_levels(scheduler: Scheduler, steps: int) -> list[tuple[float, float]]:
    """Euler's method on the variance-exploding ODE (Karras et al. 2022, eq. 1): x = x_0 + sigma · ε."""
    return [(1.0, float(sigma)) for sigma in sigmas(scheduler)]


def _heun_levels(scheduler: Scheduler, steps: int) -> list[tuple[float, float]]:
    """Heun (Karras et al. 2022, algorithm 1): as Euler, each inner sigma held twice, once for either evaluation."""
    first, *twice, last = (float(sigma) for sigma in sigmas(scheduler))
    return [(1.0, sigma) for sigma in [first, *twice[::2], last]]


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(scheduler="DDIMScheduler", levels=_ddim_levels),
    "ddpm": Solver(scheduler="DDPMScheduler", levels=_ddpm_levels, ancestral=True),
    "dpmsolver++": Solver(scheduler="DPMSolverMultistepScheduler", levels=_vp_sigma_levels),
    "euler": Solver(scheduler="EulerDiscreteScheduler", levels=_euler_levels),
    "heun": Solver(scheduler="HeunDiscreteScheduler", levels=_heun_levels, evaluations_per_step=2),
}


def find_solver(name: str) -> Solver:
    """Look a sampler up.

    Raises:
        ConfigError: advkd has no table for it.
    """
    if name not in SOLVERS:
        raise ConfigError(f"sampler {name!r} is unknown; advkd has tables for: {', '.join(SOLVERS)}")
    return SOLVERS[name]


def is_deterministic(sampler: SamplerConfig) -> bool:
    """Whether x_T alone determines x_0."""
    return not find_solver(sampler.name).ancestral and sampler.eta == 0.0


def trajectory_states(sampler: SamplerConfig, scheduler: Scheduler) -> tuple[State, ...]:
    """Every state that the solver passes through, x_T first.

    The scale of x_T is the scheduler's `init_noise_sigma`; the solver starts from stored noise · scale.
    """
    solver = find_solver(sampler.name)
    levels = solver.levels(scheduler, sampler.steps)
    evaluated = [float(t) for t in scheduler.timesteps]
    # Where a step takes two evaluations, every later timestep stands twice.
    evaluated = [*evaluated[:1], *evaluated[1 :: solver.evaluations_per_step]]
    timesteps = [*evaluated, -1.0]
    if len(levels) != sampler.steps + 1 or len(timesteps) != sampler.steps + 1:
        raise ConfigError(
            f"sampler {sampler.name!r}: diffusers made {len(evaluated)} timesteps for steps {sampler.steps} "
            f"with spacing {sampler.spacing!r}; choose another number of steps or spacing"
        )
    if not all(math.isfinite(value) for level in levels for value in level) or any(a == s == 0 for a, s in levels):
        raise ConfigError(f"sampler {sampler.name!r}: the teacher's betas give noise levels that are not finite")
    states = []
    for step, (timestep, (alpha, sigma)) in enumerate(zip(timesteps, levels, strict=True)):
        scale = _initial_scale(scheduler, sigma) if step == 0 else (alpha**2 + sigma**2) ** 0.5
        numbers = {"alpha": rounded(alpha), "sigma": rounded(sigma), "scale": rounded(scale)}
        states.append(State(step=step, timestep=timestep, **numbers))
    return tuple(states)


def _initial_scale(scheduler: Scheduler, sigma: float) -> float:
    """The scheduler's `init_noise_sigma`: 1, σ or √(σ² + 1), whichever it is to float32's rounding."""
    theirs = float(scheduler.init_noise_sigma)
    ours = min((1.0, sigma, (sigma**2 + 1.0) ** 0.5), key=lambda value: abs(value - theirs))
    return ours if math.isclose(ours, theirs, rel_tol=1e-4) else theirs
