"""How many steps a teacher needs: every solver's x_0 against a fine solve's, from the same noise.

A deterministic solver follows an ordinary differential equation from x_T to x_0 (Song et al. 2021, §4.3), so more steps
bring all of them to one x_0. The reference is a second-order solve in many steps; how far a first-order one in as many
as possible ends from it is the floor, below which errors mean nothing. What was tried is kept, so that an interrupted
call goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkd.cache.errors import ConfigError, TeacherError
from advkd.cache.files.durable import write_atomically, write_json
from advkd.cache.files.npy import npy_bytes
from advkd.cache.format.recipe import Recipe, digest
from advkd.stages.decoder import build_decoder
from advkd.stages.metrics.features import LOOK_BATCH, FeatureNetwork, see
from advkd.stages.metrics.frechet import Gaussian, frechet_distance
from advkd.stages.pictures import save_figure
from advkd.stages.reporter import Reporter
from advkd.stages.teacher.build.plan import Plan
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.load.identity import tensors_sha256
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.path.solvers import find_solver, is_deterministic
from advkd.stages.teacher.sample.sampling import initial_noise, record_states

FIRST_ORDER, SECOND_ORDER = ("ddim", "euler"), ("dpmsolver++", "unipc", "heun")
FLOW_FIRST_ORDER, FLOW_SECOND_ORDER = ("flow-euler",), ("flow-heun",)
STEPS = (5, 10, 15, 20, 25, 50, 100, 250, 1000)
MOST_OF_SECOND_ORDER = 100
"""Steps after which these have long converged."""
REFERENCE_STEPS = 250
FALLBACK_TOLERANCE = 0.05
"""Root mean square of x_0's values, where the configured sampler gives none."""
KNOWN, REFERENCE, PLOT = "tried.json", "reference.npy", "advice.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A solver in a number of steps."""

    name: str
    steps: int
    evaluations: int
    """Network evaluations per image; guidance takes two per prediction."""
    error: float
    """Root mean square difference of x_0 from the reference's, over all seeds and values."""
    seconds: float
    """Per image and evaluation, in batches of these seeds."""
    frechet: float | None = None
    """Fréchet distance from the reference's images of the same seeds; None without features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What was tried, and what is enough."""

    tried: tuple[Tried, ...]
    reference: str
    floor: float
    """How far the finest first-order solve ends from the reference."""
    tolerance: float
    enough: Tried | None
    """The cheapest within the tolerance."""
    plot: Path


def advise(
    plan: Plan,
    num_seeds: int,
    tolerance: float | None,
    folder: Path,
    reporter: Reporter,
    network: FeatureNetwork | None = None,
) -> Advice:
    """Try every deterministic solver in 5 to 1000 steps.

    Args:
        plan: of a build; its sampler sets the spacing, and the tolerance if none is given.
        num_seeds: to sample, in one batch.
        tolerance: of the root mean square error of x_0; the configured sampler's own error if None.
        folder: keeps what was tried, and the plot.
        reporter: shows progress.
        network: whose features to compare, too; None for none.

    Raises:
        TeacherError: no solver can be followed, or x_0 is not finite.
    """
    trial = _Trial(plan, range(num_seeds), folder, reporter, network)
    tried = trial.run()
    flow, configured = plan.path.solver.flow, plan.sampler
    first_order = [one for one in tried if one.name in (*FIRST_ORDER, *FLOW_FIRST_ORDER)]
    floor = max(first_order, key=lambda one: one.steps).error if first_order else 0.0
    if tolerance is None:
        own = [one.error for one in tried if (one.name, one.steps) == (configured.name, configured.steps)]
        tolerance = own[0] if own else FALLBACK_TOLERANCE
    within = [one for one in tried if one.error <= tolerance]
    return Advice(
        tried=tuple(tried),
        reference=f"{_reference(flow).name} {trial.reference_steps}",
        floor=floor,
        tolerance=tolerance,
        enough=min(within, key=lambda one: (one.evaluations, one.error), default=None),
        plot=_plot(folder / PLOT, tried, floor, tolerance),
    )


def _reference(flow: bool) -> SamplerConfig:
    return SamplerConfig(name=FLOW_SECOND_ORDER[0] if flow else SECOND_ORDER[0], steps=REFERENCE_STEPS)


class _Trial:
    def __init__(
        self, plan: Plan, seeds: range, folder: Path, reporter: Reporter, network: FeatureNetwork | None
    ) -> None:
        self._plan = plan
        self._seeds = seeds
        self._folder = folder
        self._reporter = reporter
        self._network = network
        num_timesteps = plan.network.num_timesteps
        self.reference_steps = min(REFERENCE_STEPS, num_timesteps)
        limits = dict.fromkeys((*FIRST_ORDER, *FLOW_FIRST_ORDER), num_timesteps)
        limits |= {name: min(MOST_OF_SECOND_ORDER, num_timesteps) for name in (*SECOND_ORDER, *FLOW_SECOND_ORDER)}
        flow, own = plan.path.solver.flow, plan.sampler
        wanted = {(name, steps) for name, most in limits.items() if find_solver(name).flow == flow
                  for steps in STEPS if steps <= most}  # fmt: skip
        if is_deterministic(own):
            wanted.add((own.name, own.steps))
        self._paths = dict(self._path(name, steps) for name, steps in sorted(wanted))
        seen = [] if network is None else [tensors_sha256(network.network.state_dict())]
        self._identity = digest([self._recipe().to_json() | {"sampler": own.spacing}, len(seeds), *seen])

    def _recipe(self) -> Recipe:
        return self._plan.recipe

    def _path(self, name: str, steps: int) -> tuple[tuple[str, int], SolverPath | None]:
        config = replace(self._plan.sampler, name=name, steps=steps, eta=0.0)
        try:
            return (name, steps), SolverPath.of(self._plan.network.scheduler_config, config)
        except (TeacherError, ConfigError):
            return (name, steps), None

    def run(self) -> list[Tried]:
        """All that can be tried, in the order of solvers and steps."""
        known = self._known()
        reference = self._path(_reference(self._plan.path.solver.flow).name, self.reference_steps)[1]
        if reference is None:
            raise TeacherError(f"teacher {self._plan.network.source}: no fine solve follows its scheduler")
        left = {key: path for key, path in self._paths.items() if path is not None and _label(*key) not in known}
        work = [path.evaluations for path in left.values()]
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = self._folder / REFERENCE
        is_known = bool(known) and kept.is_file()
        if not is_known:
            known = {}
            left = {key: path for key, path in self._paths.items() if path is not None}
            work = [reference.evaluations, *(path.evaluations for path in left.values())]
        self._reporter.start("advise", sum(work), "steps")
        wanted = torch.from_numpy(np.load(kept, allow_pickle=False)) if is_known else self._solve(reference)[0]
        if not is_known:
            write_atomically(kept, [npy_bytes(wanted.numpy())])
        like = self._gaussian(wanted)
        for (name, steps), path in left.items():
            made, seconds = self._solve(path)
            fitted = self._gaussian(made)
            error = float((made - wanted).double().square().mean().sqrt())
            evaluations = path.evaluations * self._recipe().evaluations_at_once
            one = Tried(
                name=name,
                steps=steps,
                evaluations=evaluations,
                error=error,
                seconds=seconds,
                frechet=None if fitted is None or like is None else frechet_distance(fitted, like),
            )
            known[_label(name, steps)] = asdict(one)
            write_json(self._folder / KNOWN, {"identity": self._identity, "tried": known})
        self._reporter.finish()
        return [Tried(**known[_label(*key)]) for key in self._paths if _label(*key) in known]

    def _known(self) -> dict[str, Any]:
        """What an earlier call tried of this very teacher, by solver and steps."""
        try:
            value = json.loads((self._folder / KNOWN).read_bytes())
            known = {name: asdict(Tried(**one)) for name, one in value["tried"].items()}
            return known if value["identity"] == self._identity else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _solve(self, path: SolverPath) -> tuple[Tensor, float]:
        """x_0, float32, shape (N, C, H, W), and seconds per image and evaluation."""
        plan, steps = self._plan, path.sampler.steps
        noise = initial_noise(plan.recipe.root_seed, self._seeds, plan.recipe.item_shape, plan.layout.dtype)
        began = time.perf_counter()
        kept = record_states(
            plan.network,
            path,
            noise,
            seeds=self._seeds,
            root_seed=plan.recipe.root_seed,
            record=[steps],
            condition=plan.recipe.condition,
            evaluated=self._advanced(f"{path.sampler.name} {steps}"),
        )
        evaluations = path.evaluations * plan.recipe.evaluations_at_once
        return kept[steps], (time.perf_counter() - began) / (evaluations * len(self._seeds))

    def _gaussian(self, x0: Tensor) -> Gaussian | None:
        """Of the images' features."""
        if self._network is None:
            return None
        teacher = self._plan.network
        images = x0 if teacher.space is None else build_decoder(teacher.space, teacher.decoder)(x0)
        batches = torch.split(images.to(self._network.device), LOOK_BATCH)
        return Gaussian.fit(see(self._network, batches)[0])

    def _advanced(self, note: str) -> Callable[[], None]:
        return lambda: self._reporter.advance(1, note)


def _label(name: str, steps: int) -> str:
    return f"{name} {steps}"


def _plot(path: Path, tried: list[Tried], floor: float, tolerance: float) -> Path:
    """Error by evaluations, both logarithmic, a line per solver."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(one.name for one in tried):
        points = sorted((one.evaluations, max(one.error, 1e-9)) for one in tried if one.name == name)
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(tolerance, color="black", linewidth=0.8, label=f"tolerance {tolerance:.2g}")
    axes.axhline(floor, color="grey", linewidth=0.8, linestyle="--", label=f"floor {floor:.2g}")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per image")
    axes.set(ylabel="root mean square error of x_0")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save_figure(path, figure)
