"""Each solver ends at x_0, converges, and treats the predicted image as the teacher's own scheduler does."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advkd.cache.errors import ConfigError, TeacherError
from advkd.stages.evaluate.samplers import Sampler, all_samplers
from advkd.stages.teacher.config import SPACINGS, SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.schedulers import VP_SCHEDULERS
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.path.solvers import SOLVERS
from advkd.stages.teacher.path.x0 import X0Rule
from advkd.stages.teacher.sample.sampling import initial_noise, record_states
from tests.stores import make_recipe

T = 1000
SHAPE = (1, 4, 4)
DDPM = dict(diffusers.DDPMScheduler(num_train_timesteps=T, clip_sample=False).config) | {"_class_name": "DDPMScheduler"}
MEAN = torch.linspace(-0.9, 0.9, 16).reshape(SHAPE)
VP_SOLVERS = [name for name, solver in SOLVERS.items() if not solver.flow]
STEPS = (1, 2, 7, 13, 50, 61, 103, 300, 333, 600, 700, 997, 999, T)
"""Divisors, primes, others, 1 and T; at 61 and 103 diffusers makes one timestep too many for trailing."""


class Normal(nn.Module):
    """The exact denoiser of images that are normal: N(mean, sd²) per pixel, for any kind of prediction."""

    def __init__(self, mean: Tensor = MEAN, sd: float = 0.5, prediction_type: str = "epsilon") -> None:
        super().__init__()
        self.mean = nn.Parameter(mean, requires_grad=False)
        self.sd = sd
        self.prediction_type = prediction_type
        bars = np.asarray(diffusers.DDPMScheduler(num_train_timesteps=T).alphas_cumprod, dtype=np.float64)
        self.ratios = np.sqrt((1.0 - bars) / bars)

    def forward(self, x: Tensor, timestep: Tensor) -> SimpleNamespace:
        ratio = np.interp(float(timestep[0]), np.arange(T), self.ratios)  # as Euler and Heun do between timesteps
        alpha = (1.0 + ratio**2) ** -0.5
        sigma = ratio * alpha
        epsilon = sigma * (x - alpha * self.mean) / (alpha**2 * self.sd**2 + sigma**2)
        x0 = (x - sigma * epsilon) / alpha
        return SimpleNamespace(
            sample={"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}[
                self.prediction_type
            ]
        )


def oracle(unet: Normal | None = None, **options: object) -> Teacher:
    unet = unet or Normal()
    config = DDPM | {"prediction_type": unet.prediction_type} | options
    return Teacher(network=unet, scheduler_config=config, item_shape=SHAPE, source="oracle", commit=None)


def run(teacher: Teacher, sampler: SamplerConfig, num_seeds: int = 3) -> tuple[SolverPath, dict[int, Tensor]]:
    """All states, in the solver's own units."""
    path, seeds = SolverPath.of(teacher.scheduler_config, sampler), range(num_seeds)
    noise = initial_noise(0, seeds, teacher.item_shape, "float32")
    kept = record_states(teacher, path, noise, seeds=seeds, root_seed=0, record=range(sampler.steps + 1))
    return path, {step: values * path.states[step].scale for step, values in kept.items()}


def exact_x0(path: SolverPath, x_T: Tensor) -> Tensor:
    """Where the probability-flow ODE of `Normal` ends: a state keeps its distance from the mean in deviations."""
    first = path.states[0]
    deviation = (first.alpha**2 * 0.25 + first.sigma**2) ** 0.5
    return MEAN + 0.5 * (x_T - first.alpha * MEAN) / deviation


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", VP_SOLVERS)
def test_every_path_falls_to_x0_or_is_refused(name: str, spacing: str) -> None:
    refused = []
    for steps in STEPS:
        try:
            path = SolverPath.of(DDPM, SamplerConfig(name=name, steps=steps, spacing=spacing))
        except ConfigError:
            refused.append(steps)
            continue
        ratios = [state.sigma / state.alpha for state in path.states]
        assert len(path.states) == steps + 1
        assert ratios[-1] == 0.0
        assert all(late < early for early, late in itertools.pairwise(ratios))
        assert len(path.timesteps) == path.evaluations == len(path.new_scheduler().timesteps)
    # One timestep at 0 removes no noise; DPM-Solver++ and UniPC want one timestep more than there are.
    few, many = ([T], []) if name in ("dpmsolver++", "dpmsolver++sde", "unipc") else ([], [1])
    assert refused == ([] if spacing == "trailing" else [*many, *few])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", [name for name in VP_SOLVERS if not SOLVERS[name].ancestral])
def test_x0_converges_to_the_exact_solution(name: str, spacing: str) -> None:
    errors = []
    for steps in (7, 13, 31, 61, 103, 307, 700, 997):
        path, states = run(oracle(), SamplerConfig(name=name, steps=steps, spacing=spacing))
        errors.append(float((states[steps] - exact_x0(path, states[0])).square().mean().sqrt()))
    assert errors[0] < 0.2 and errors[-1] < 2e-3
    rounding = 3e-4 if name == "unipc" else 2e-4  # its corrector repeats float32's at every step
    for earlier, later in itertools.pairwise(errors):
        assert later < earlier + rounding


def test_ddim_keeps_its_recipe_where_the_steps_divide() -> None:
    for steps, spacing in ((50, "trailing"), (T, "trailing"), (7, "leading"), (100, "leading")):
        assert "landing" not in SolverPath.of(DDPM, SamplerConfig(steps=steps, spacing=spacing)).identity()
    for steps, spacing in ((7, "trailing"), (600, "trailing"), (10, "linspace")):
        assert SolverPath.of(DDPM, SamplerConfig(steps=steps, spacing=spacing)).identity()["landing"] == "next"


def test_ddim_ends_at_the_teachers_own_last_level() -> None:
    """Without `set_alpha_to_one` that is timestep 0, however many steps lead there."""
    for steps in (7, 50):
        path = SolverPath.of(DDPM | {"set_alpha_to_one": False}, SamplerConfig(steps=steps))
        assert path.states[-1].sigma == pytest.approx(0.01, rel=1e-3)
        last = SolverPath.of(DDPM | {"set_alpha_to_one": False}, SamplerConfig(steps=T)).states[-1]
        assert (path.states[-1].alpha, path.states[-1].sigma) == (last.alpha, last.sigma)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", ["clip", "threshold"])
@pytest.mark.parametrize("name", VP_SOLVERS)
def test_every_solver_ends_at_the_constrained_image(name: str, kind: str, prediction_type: str) -> None:
    """For a single image μ every x̂_0 is μ; where it exceeds the range, x_0 is what the rule makes of it."""
    mean = 1.8 * MEAN
    teacher = oracle(
        Normal(mean, sd=0.0, prediction_type=prediction_type),
        clip_sample=kind == "clip",
        clip_sample_range=1.25,
        thresholding=kind == "threshold",
        dynamic_thresholding_ratio=0.9,
        sample_max_value=1.4,
    )
    path, states = run(teacher, SamplerConfig(name=name, steps=7))
    threshold = float(torch.quantile(mean.abs().flatten(), 0.9).clamp(1.0, 1.4))
    expected = mean.clamp(-1.25, 1.25) if kind == "clip" else mean.clamp(-threshold, threshold) / threshold
    torch.testing.assert_close(states[7], expected.expand_as(states[7]), rtol=0, atol=5e-3)
    applied = kind not in SOLVERS[name].own_x0_rules
    assert path.identity().get("x0") == (kind if applied else None)


@pytest.mark.parametrize("name", ["dpmsolver++", "euler"])
def test_clipping_changes_no_bit_where_images_stay_in_range(name: str) -> None:
    sampler = SamplerConfig(name=name, steps=20)
    _, with_clipping = run(oracle(Normal(sd=0.0), clip_sample=True), sampler)
    _, without = run(oracle(Normal(sd=0.0)), sampler)
    for step, states in with_clipping.items():
        torch.testing.assert_close(states, without[step], rtol=0, atol=0)


@pytest.fixture(scope="module")
def teacher(pipeline_folder: Path) -> Teacher:
    """Random weights: its x̂_0 leaves the range at every step."""
    return load_teacher(TeacherConfig(source=str(pipeline_folder)), torch.device("cpu"))


def diffusers_loop(teacher: Teacher, scheduler: Any, x: Tensor) -> Tensor:
    for timestep in scheduler.timesteps:
        prediction = teacher.network(scheduler.scale_model_input(x, timestep), timestep).sample
        x = scheduler.step(prediction, timestep, x).prev_sample
    return x


@torch.no_grad()
def test_clipped_dpmsolver_is_diffusers_own_with_a_static_threshold(teacher: Teacher) -> None:
    assert teacher.scheduler_config["clip_sample"]
    _, ours = run(teacher, SamplerConfig(name="dpmsolver++", steps=10))
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        teacher.scheduler_config, timestep_spacing="trailing", thresholding=True, sample_max_value=1.0
    )
    scheduler.set_timesteps(10)
    theirs = diffusers_loop(teacher, scheduler, ours[0])
    torch.testing.assert_close(ours[10], theirs, rtol=1e-4, atol=1e-4)
    assert ours[10].abs().max() <= 1.0 + 1e-4


@torch.no_grad()
def test_clipped_euler_is_heun_without_its_correction(teacher: Teacher) -> None:
    """Heun clips by itself; its first evaluations are Euler's."""
    _, euler = run(teacher, SamplerConfig(name="euler", steps=10))
    scheduler = diffusers.HeunDiscreteScheduler.from_config(teacher.scheduler_config, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    for step in range(10):
        scheduler.prev_derivative = scheduler.dt = None  # in the first stage, whatever came before
        scheduler._step_index = 2 * step
        timestep = scheduler.timesteps[2 * step]
        prediction = teacher.network(scheduler.scale_model_input(euler[step], timestep), timestep).sample
        x = scheduler.step(prediction, timestep, euler[step]).prev_sample
        torch.testing.assert_close(euler[step + 1], x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("class_name", VP_SCHEDULERS)
def test_a_configuration_that_does_not_mention_clipping_means_its_class_default(class_name: str) -> None:
    """As diffusers makes the teacher's own scheduler; under DDIM, whose own default is to clip."""
    own = getattr(diffusers, class_name)()
    config = {"_class_name": class_name, "num_train_timesteps": T}
    expected = bool(own.config.get("clip_sample", False))
    assert (X0Rule.of(config) is not None) == expected
    for name in ("ddim", "ddpm", "heun"):
        assert SolverPath.of(config, SamplerConfig(name=name, steps=5)).options["clip_sample"] == expected
    spacing = SolverPath.of(config, SamplerConfig(steps=5, spacing="teacher")).sampler.spacing
    assert spacing == own.config.get("timestep_spacing", "linspace")


def test_what_a_solver_cannot_follow_is_refused_by_name() -> None:
    zero_snr = DDPM | {"rescale_betas_zero_snr": True}
    with pytest.raises(TeacherError, match="HeunDiscreteScheduler has no rescale_betas_zero_snr"):
        SolverPath.of(zero_snr, SamplerConfig(name="heun", steps=5))
    assert SolverPath.of(zero_snr, SamplerConfig(name="euler", steps=5)).states[0].sigma == pytest.approx(
        4096, rel=1e-3
    )
    with pytest.raises(TeacherError, match=r"sigmoid.*choose ddpm"):
        SolverPath.of(DDPM | {"beta_schedule": "sigmoid"}, SamplerConfig(steps=5))
    offset = DDPM | {"steps_offset": 1, "timestep_spacing": "leading"}
    with pytest.raises(ConfigError, match=f"below {T}"):
        SolverPath.of(offset, SamplerConfig(steps=T, spacing="teacher"))


def test_a_solver_that_refuses_the_teacher_leaves_its_row_unmeasured() -> None:
    """Of a sigmoid schedule only ddpm can make images, which the other rows must not prevent."""
    teacher = oracle(beta_schedule="sigmoid")
    path = SolverPath.of(teacher.scheduler_config, SamplerConfig(name="ddpm", steps=5))
    recipe = make_recipe(teacher=teacher.identity(), sampler=path.identity(), item_shape=SHAPE)
    student, said = Sampler(name="student", evaluations=1, generate=None), list[str]()
    rows = all_samplers(student, teacher, recipe, "float32", [2, T + 1], said.append)
    assert [row.name for row in rows if row.generate] == ["teacher (ddpm 5)"]
    unmeasured = ["ddim 2", f"ddim {T + 1}", "dpmsolver++ 2", f"dpmsolver++ {T + 1}"]
    assert [row.name for row in rows[2:]] == [line.partition(" is not measured: ")[0] for line in said] == unmeasured
    all_samplers(student, oracle(), recipe, "float32", [2, T + 1], said.append)
    assert [line.partition(" is not measured: ")[0] for line in said[4:]] == [f"ddim {T + 1}", f"dpmsolver++ {T + 1}"]


@torch.no_grad()
def test_the_teachers_own_spacing_and_offset_are_taken(teacher: Teacher) -> None:
    """Stable Diffusion's habit: leading, one timestep later; then what diffusers' own pipeline passes through."""
    own = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    teacher = dataclasses.replace(teacher, scheduler_config=teacher.scheduler_config | own)
    path, ours = run(teacher, SamplerConfig(steps=5, spacing="teacher"))
    assert path.sampler.spacing == "leading"
    assert [int(t) for t in path.timesteps] == [801, 601, 401, 201, 1]
    scheduler = diffusers.DDIMScheduler.from_config(teacher.scheduler_config)
    scheduler.set_timesteps(5)
    torch.testing.assert_close(ours[5], diffusers_loop(teacher, scheduler, ours[0]), rtol=1e-5, atol=1e-5)
    trailing = SolverPath.of(teacher.scheduler_config, SamplerConfig(steps=5))
    assert trailing.options["steps_offset"] == 0
