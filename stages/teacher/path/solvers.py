"""The supported samplers: for each diffusers scheduler, at what level of noise its states are, and how it steps.

A solver's state after j steps is x = alpha · x_0 + sigma · ε. Which (alpha, sigma) that is differs between
schedulers and can't be derived from their options: Euler and Heun work with alpha = 1 and sigma up to 157, Heun
evaluates the network twice per step. So each class has an explicit entry here, and an unknown one is refused by name.
A new solver is one entry of `SOLVERS`, and its class's options in `advkd.cache.format.equivalence`. This module imports
no diffusers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from advkd.cache.errors import ConfigError
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.path.levels import Scheduler, alpha_bars, sigmas

Level = tuple[float, float]
"""(alpha, sigma)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """How advkd uses one diffusers scheduler class."""

    scheduler: str
    """Name of the class in diffusers."""
    levels: Callable[[Scheduler, Sequence[int]], list[Level]]
    """(scheduler, landing) → levels of the states after 0, 1, …, `steps` steps. `landing` holds the timestep that each
    step ends at, −1 for x_0."""
    ancestral: bool = False
    """Whether each step draws fresh noise."""
    evaluations_per_step: int = 1
    """Network evaluations per step; the last step takes one less where this is two."""
    own_x0_rules: tuple[str, ...] = ()
    """Kinds of `X0Rule` that the class applies itself; the others are applied to the prediction that it is given."""
    strides: bool = False
    """Whether a step of the class ends at t − T // n, whatever its next timestep is."""
    flow: bool = False
    """Whether it integrates the velocity of flow matching, instead of a variance-preserving diffusion."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Options that make the class this solver."""

    def num_evaluations(self, steps: int) -> int:
        """Network evaluations of a whole trajectory."""
        return self.evaluations_per_step * steps - (self.evaluations_per_step - 1)

    def steps_done(self, evaluations: int, steps: int) -> int | None:
        """Solver steps completed after so many evaluations; None in the middle of a step."""
        if evaluations == self.num_evaluations(steps):
            return steps
        steps_done, inside = divmod(evaluations, self.evaluations_per_step)
        return None if inside else steps_done

    def step(
        self, scheduler: Scheduler, call: int, prediction: Tensor, x: Tensor, eta: float, fresh: Tensor | None
    ) -> Tensor:
        """The state after one more evaluation.

        Args:
            scheduler: in the middle of a trajectory.
            call: evaluations before this one.
            prediction: the network's, shape (B, C, H, W).
            x: the state that it was made from, in the solver's own units, the same shape.
            eta: of DDIM.
            fresh: the noise that the step adds, the same shape; None for a deterministic one.
        """
        timestep = scheduler.timesteps[call]
        if self.strides:
            return scheduler.step(prediction, timestep, x, eta=eta, variance_noise=fresh).prev_sample  # type: ignore[no-any-return]
        if fresh is None:
            return scheduler.step(prediction, timestep, x).prev_sample  # type: ignore[no-any-return]
        with _drawing(scheduler, fresh):
            return scheduler.step(prediction, timestep, x).prev_sample  # type: ignore[no-any-return]


def _variance_preserving(alpha_bar: float) -> Level:
    return alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5


def _ddim_levels(scheduler: Scheduler, landing: Sequence[int]) -> list[Level]:
    """DDIM (Song et al. 2021, eq. 12) ends at `final_alpha_cumprod`: ᾱ of x_0, or of timestep 0."""
    bars = alpha_bars(scheduler)
    last = 1.0 if scheduler.config.set_alpha_to_one else bars[0]
    visited = [bars[int(scheduler.timesteps[0])], *(bars[t] if t >= 0 else last for t in landing)]
    return [_variance_preserving(float(alpha_bar)) for alpha_bar in visited]


def _ddpm_levels(scheduler: Scheduler, landing: Sequence[int]) -> list[Level]:
    """DDPM (Ho et al. 2020, eq. 7) lands at the next timestep, and after the last one at x_0."""
    bars = alpha_bars(scheduler)
    return [_variance_preserving(alpha_bar) for alpha_bar in [*(float(bars[int(t)]) for t in scheduler.timesteps), 1.0]]


def _vp_sigma_levels(scheduler: Scheduler, landing: Sequence[int]) -> list[Level]:
    """DPM-Solver++ (Lu et al. 2022) and UniPC (Zhao et al. 2023) keep sigma/alpha ratios; their states are variance
    preserving. UniPC's are those that its predictor gives, which the network sees. Both also follow flow matching, as
    Sana's scheduler does."""
    if scheduler.config.get("use_flow_sigmas"):
        return _flow_euler_levels(scheduler, landing)
    return [_variance_preserving(1.0 / (1.0 + float(ratio) ** 2)) for ratio in sigmas(scheduler)]


def _euler_levels(scheduler: Scheduler, landing: Sequence[int]) -> list[Level]:
    """Euler's method on the variance-exploding ODE (Karras et al. 2022, eq. 1): x = x_0 + sigma · ε."""
    return [(1.0, float(sigma)) for sigma in sigmas(scheduler)]


def _heun_levels(scheduler: Scheduler, landing: Sequence[int]) -> list[Level]:
    """Heun (Karras et al. 2022, algorithm 1): as Euler, each inner sigma held twice, once for either evaluation."""
    return [(1.0, sigma) for sigma in _once(sigmas(scheduler))]


def _flow_euler_levels(scheduler: Scheduler, landing: Sequence[int]) -> list[Level]:
    """Flow matching (Lipman et al. 2023, eq. 22, with time reversed): x = (1 − σ) · x_0 + σ · ε."""
    return [(1.0 - float(sigma), float(sigma)) for sigma in scheduler.sigmas]


def _flow_heun_levels(scheduler: Scheduler, landing: Sequence[int]) -> list[Level]:
    return [(1.0 - sigma, sigma) for sigma in _once(scheduler.sigmas)]


def _once(sigmas: Iterable[Any]) -> list[float]:
    """The sigmas of Heun's states: the list has each inner one twice."""
    first, *twice, last = (float(sigma) for sigma in sigmas)
    return [first, *twice[::2], last]


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(scheduler="DDIMScheduler", levels=_ddim_levels, own_x0_rules=("clip", "threshold"), strides=True),
    "ddpm": Solver(scheduler="DDPMScheduler", levels=_ddpm_levels, ancestral=True, own_x0_rules=("clip", "threshold")),
    "dpmsolver++": Solver(
        scheduler="DPMSolverMultistepScheduler", levels=_vp_sigma_levels, own_x0_rules=("threshold",)
    ),
    "euler": Solver(scheduler="EulerDiscreteScheduler", levels=_euler_levels),
    "heun": Solver(
        scheduler="HeunDiscreteScheduler", levels=_heun_levels, evaluations_per_step=2, own_x0_rules=("clip",)
    ),
    "unipc": Solver(scheduler="UniPCMultistepScheduler", levels=_vp_sigma_levels, own_x0_rules=("threshold",)),
    "dpmsolver++sde": Solver(
        scheduler="DPMSolverMultistepScheduler",
        levels=_vp_sigma_levels,
        ancestral=True,
        own_x0_rules=("threshold",),
        fixed={"algorithm_type": "sde-dpmsolver++"},
    ),
    "flow-euler": Solver(scheduler="FlowMatchEulerDiscreteScheduler", levels=_flow_euler_levels, flow=True),
    "flow-heun": Solver(
        scheduler="FlowMatchHeunDiscreteScheduler", levels=_flow_heun_levels, evaluations_per_step=2, flow=True
    ),
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


_replacing = threading.Lock()


@contextmanager
def _drawing(scheduler: Any, fresh: Tensor) -> Iterator[None]:
    """Let an ancestral scheduler add this noise: its `step` takes a generator, but no noise."""
    module: Any = sys.modules[type(scheduler).__module__]
    with _replacing:  # another thread that samples would draw this one's noise
        original = module.randn_tensor
        module.randn_tensor = lambda shape, **_: fresh.reshape(shape)
        try:
            yield
        finally:
            module.randn_tensor = original
