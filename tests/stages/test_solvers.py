"""Recorded states are what diffusers' own loop passes through, at the noise levels that the table says."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from advkd.cache.errors import ConfigError
from advkd.cache.format.noise import standard_normal
from advkd.stages.teacher.config import SamplerConfig, TeacherConfig, recorded_steps
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.load.network import Teacher
from advkd.stages.teacher.path.levels import alpha_bars, sigmas
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.path.solvers import SOLVERS, is_deterministic
from advkd.stages.teacher.sample.sampling import initial_noise, record_states

SAMPLERS = [
    sampler.resolved()
    for sampler in (
        SamplerConfig(name="ddim", steps=10),
        SamplerConfig(name="ddim", steps=7, spacing="leading"),
        SamplerConfig(name="ddim", steps=7),
        SamplerConfig(name="ddim", steps=6, spacing="linspace"),
        SamplerConfig(name="ddim", steps=8, eta=1.0),
        SamplerConfig(name="ddpm", steps=10),
        SamplerConfig(name="dpmsolver++", steps=10),
        SamplerConfig(name="dpmsolver++", steps=1),
        SamplerConfig(name="euler", steps=10),
        SamplerConfig(name="euler", steps=10, spacing="linspace"),
        SamplerConfig(name="euler", steps=10, spacing="leading"),
        SamplerConfig(name="heun", steps=10),
        SamplerConfig(name="heun", steps=1),
        SamplerConfig(name="unipc", steps=10),
        SamplerConfig(name="unipc", steps=1),
        SamplerConfig(name="dpmsolver++sde", steps=10),
        SamplerConfig(name="flow-euler", steps=10),
        SamplerConfig(name="flow-euler", steps=10, spacing="linspace"),
        SamplerConfig(name="flow-heun", steps=10, spacing="linspace"),
        SamplerConfig(name="flow-heun", steps=10),
        SamplerConfig(name="flow-heun", steps=1),
    )
]
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
BETWEEN = SAMPLERS[2:4]
"""Where diffusers' steps of T // n don't end at the next timestep of the list."""
AS_DIFFUSERS = [
    sampler
    for sampler in SAMPLERS
    if sampler not in BETWEEN and not (sampler.name == "flow-heun" and sampler.spacing == "trailing")
]
"""diffusers' Heun for flow matching has no trailing spacing."""
DETERMINISTIC = [sampler for sampler in SAMPLERS if is_deterministic(sampler)]


def label(sampler: SamplerConfig) -> str:
    return f"{sampler.name}-{sampler.steps}-{sampler.spacing}-{sampler.eta:g}"


@pytest.fixture(scope="module")
def teacher(pipeline_folder: Path) -> Teacher:
    return load_teacher(TeacherConfig(source=str(pipeline_folder)), torch.device("cpu"))


def run(teacher: Teacher, sampler: SamplerConfig, seeds: range, root_seed: int = 3) -> dict[int, Tensor]:
    noise = initial_noise(root_seed, seeds, teacher.item_shape, "float16")
    path = SolverPath.of(teacher.scheduler_config, sampler)
    return record_states(teacher, path, noise, seeds=seeds, root_seed=root_seed, record=range(sampler.steps + 1))


def follows(teacher: Teacher, sampler: SamplerConfig) -> Teacher:
    """The same network with a scheduler that the sampler can follow."""
    return dataclasses.replace(teacher, scheduler_config=FLOW) if SOLVERS[sampler.name].flow else teacher


def with_options(teacher: Teacher, **options: object) -> Teacher:
    return dataclasses.replace(teacher, scheduler_config=teacher.scheduler_config | options)


@pytest.mark.parametrize(
    ("sampler", "rule"),
    [(sampler, rule) for rule in ("none", "clip", "threshold") for sampler in AS_DIFFUSERS
     if rule == "none" or rule in SOLVERS[sampler.name].own_x0_rules],
    ids=lambda value: value if isinstance(value, str) else label(value),
)  # fmt: skip
@torch.no_grad()
def test_states_equal_diffusers_own_loop(
    teacher: Teacher, sampler: SamplerConfig, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of diffusers' documentation, from the cached noise, with nothing of ours in it."""
    seeds = range(4)
    teacher = with_options(teacher, clip_sample=rule == "clip", thresholding=rule == "threshold", sample_max_value=1.5)
    teacher = follows(teacher, sampler)
    ours = run(teacher, sampler, seeds)
    spacing = {} if SOLVERS[sampler.name].flow else {"timestep_spacing": sampler.spacing}
    sde = {"algorithm_type": "sde-dpmsolver++"} if sampler.name == "dpmsolver++sde" else {}
    scheduler = getattr(diffusers, SOLVERS[sampler.name].scheduler).from_config(
        teacher.scheduler_config, **spacing, **sde
    )
    if sampler.name == "flow-euler" and sampler.spacing == "trailing":  # as Flux's pipeline does
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / sampler.steps, sampler.steps))
    else:
        scheduler.set_timesteps(sampler.steps)
    drawn = [torch.from_numpy(standard_normal(3, seeds, teacher.item_shape, 1 + i)) for i in range(sampler.steps)]
    options: dict[str, Any] = {"eta": sampler.eta} if sampler.name == "ddim" else {}
    flow = SOLVERS[sampler.name].flow
    x = ours[0] if flow else ours[0] * scheduler.init_noise_sigma
    calls = [x]
    for call, timestep in enumerate(scheduler.timesteps):
        prediction = teacher.network(x if flow else scheduler.scale_model_input(x, timestep), timestep).sample
        if sampler.eta or sde:
            options["variance_noise"] = drawn[call]
        module = f"{type(scheduler).__module__}.randn_tensor"
        if sampler.name == "ddpm":
            monkeypatch.setattr(module, lambda *_, noise=drawn[call], **__: noise)
        x = scheduler.step(prediction, timestep, x, **options).prev_sample
        calls.append(x)
    per_step = [calls[0], *calls[2::2], calls[-1]] if SOLVERS[sampler.name].evaluations_per_step == 2 else calls
    states = SolverPath.of(teacher.scheduler_config, sampler).states
    assert len(per_step) == len(states) == sampler.steps + 1
    for state, expected in zip(states, per_step, strict=True):
        torch.testing.assert_close(ours[state.step] * state.scale, expected, rtol=1e-5, atol=1e-5)


class PointMass(nn.Module):
    """The exact denoiser of a distribution that is a single image μ: ε = (x − α μ) / σ, or the velocity (x − μ) / σ."""

    def __init__(self, mu: Tensor, alphas_cumprod: Tensor | None) -> None:
        super().__init__()
        self.mu = nn.Parameter(mu, requires_grad=False)
        self.alphas_cumprod = alphas_cumprod

    def forward(self, x: Tensor, timestep: Tensor) -> SimpleNamespace:
        if self.alphas_cumprod is None:
            return SimpleNamespace(sample=(x - self.mu) / (timestep[0] / 1000))
        alpha_bar = self.alphas_cumprod[int(timestep[0])]
        return SimpleNamespace(sample=(x - alpha_bar.sqrt() * self.mu) / (1 - alpha_bar).sqrt())


def point_mass_teacher(sampler: SamplerConfig) -> tuple[Teacher, Tensor]:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, clip_sample=False)
    mu = torch.linspace(-0.9, 0.9, 16).reshape(1, 4, 4)
    unet = PointMass(mu, None if SOLVERS[sampler.name].flow else scheduler.alphas_cumprod)
    teacher = Teacher(
        network=unet, scheduler_config=dict(scheduler.config), item_shape=(1, 4, 4), source="oracle", commit=None
    )
    return follows(teacher, sampler), mu


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=label)
def test_every_state_lies_at_the_recorded_level(sampler: SamplerConfig) -> None:
    """For a single image every ODE solver is exact: x = alpha · μ + sigma · ε, with one ε along the whole path."""
    teacher, mu = point_mass_teacher(sampler)
    kept = run(teacher, sampler, range(3))
    states = SolverPath.of(teacher.scheduler_config, sampler).states
    first = states[0]
    epsilon = (kept[0] * first.scale - first.alpha * mu) / first.sigma
    for state in states:
        x = kept[state.step] * state.scale
        expected = state.alpha * mu + state.sigma * epsilon
        torch.testing.assert_close(x, expected, rtol=2e-3, atol=2e-3 * max(1.0, state.sigma))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_noise_only_falls_and_stored_states_have_unit_variance(teacher: Teacher, sampler: SamplerConfig) -> None:
    states = SolverPath.of(follows(teacher, sampler).scheduler_config, sampler).states
    ratios = [state.alpha / state.sigma if state.sigma else np.inf for state in states]
    assert ratios == sorted(ratios)
    assert len(set(ratios)) == len(ratios)
    for state in states[1:]:
        assert state.stored_alpha**2 + state.stored_sigma**2 == pytest.approx(1.0)
    assert states[-1].timestep == -1.0


BETAS: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained": {"trained_betas": [0.001 + 0.00001 * t for t in range(1000)]},
    "zero_snr": {"rescale_betas_zero_snr": True},
}


def has_levels(sampler: SamplerConfig, betas: str) -> bool:
    """diffusers has the sigmoid for DDPM only, no x_T without any signal for Heun; flows have no betas."""
    if SOLVERS[sampler.name].flow:
        return False
    if betas == "zero_snr":
        return sampler.name != "heun"
    return betas != "sigmoid" or sampler.name == "ddpm"


@pytest.mark.parametrize(
    ("sampler", "betas"),
    [(sampler, betas) for betas in BETAS for sampler in SAMPLERS if has_levels(sampler, betas)],
    ids=lambda value: value if isinstance(value, str) else label(value),
)
def test_levels_are_diffusers_own_and_the_same_on_every_machine(
    teacher: Teacher, sampler: SamplerConfig, betas: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another CPU's torch rounds the levels otherwise, and what identifies a store must not notice."""
    path = SolverPath.of(teacher.scheduler_config | BETAS[betas], sampler)
    scheduler, states = path.original_scheduler(), path.states
    np.testing.assert_allclose(alpha_bars(scheduler), scheduler.alphas_cumprod, rtol=1e-3)
    if hasattr(scheduler, "sigmas"):
        np.testing.assert_allclose(sigmas(scheduler), scheduler.sigmas, rtol=1e-3)
    assert states[0].scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    if betas != "sigmoid":
        generator = torch.Generator().manual_seed(0)
        for name in ("alphas_cumprod", "sigmas"):
            if hasattr(scheduler, name):
                values = getattr(scheduler, name)
                noise = torch.rand(values.shape, generator=generator) - 0.5
                setattr(scheduler, name, values * (1 + 3e-7 * noise))
        monkeypatch.setattr(SolverPath, "original_scheduler", lambda path: scheduler)
        assert dataclasses.replace(path).states == states


def test_levels_keep_their_golden_values(teacher: Teacher) -> None:
    """√ᾱ of plain DDPM betas by exact decimal arithmetic; a change here would be another layout of every store."""
    sampler = SamplerConfig(name="ddim", steps=4)
    states = SolverPath.of(teacher.scheduler_config, sampler).states
    assert [state.alpha for state in states] == [0.006352818088, 0.05788393939, 0.2803341629, 0.7239374102, 1.0]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=label)
def test_a_trajectory_does_not_depend_on_its_company(teacher: Teacher, sampler: SamplerConfig) -> None:
    """Each seed has its own noise stream, for ancestral samplers too."""
    teacher = follows(teacher, sampler)
    together = run(teacher, sampler, range(4))
    apart = [run(teacher, sampler, range(seed, seed + 1)) for seed in range(4)]
    for step, states in together.items():
        alone = torch.cat([kept[step] for kept in apart])
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)


def test_ancestral_seeds_differ_and_root_seeds_too(teacher: Teacher) -> None:
    sampler = SamplerConfig(name="ddpm", steps=5)
    one, other = run(teacher, sampler, range(2))[5], run(teacher, sampler, range(2), root_seed=4)[5]
    assert not torch.allclose(one[0], one[1])
    assert not torch.allclose(one, other)
    torch.testing.assert_close(one, run(teacher, sampler, range(2))[5], rtol=0, atol=0)


def test_evaluations_are_counted_as_they_happen(teacher: Teacher) -> None:
    for sampler in SAMPLERS:
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1

        noise = initial_noise(0, range(1), teacher.item_shape, "float32")
        path = SolverPath.of(follows(teacher, sampler).scheduler_config, sampler)
        record_states(teacher, path, noise, seeds=range(1), root_seed=0, record=[], evaluated=count)
        assert calls == SOLVERS[sampler.name].num_evaluations(sampler.steps)


def test_an_unknown_sampler_is_refused_by_name(teacher: Teacher) -> None:
    with pytest.raises(ConfigError, match=r"'pndm' is unknown; advkd has tables for: ddim, ddpm"):
        SolverPath.of(teacher.scheduler_config, SamplerConfig(name="pndm", steps=5))


@pytest.mark.parametrize(
    ("record", "steps", "expected"),
    [
        (10, 1000, tuple(range(0, 1001, 100))),
        (1, 50, (0, 50)),
        (3, 7, (0, 2, 5, 7)),
        (7, 7, tuple(range(8))),
        ([10, 5], 20, (0, 5, 10, 20)),
        ([0, 1, 101, 1000], 1000, (0, 1, 101, 1000)),
    ],
)
def test_recorded_steps(record: int | list[int], steps: int, expected: tuple[int, ...]) -> None:
    assert recorded_steps(record, steps) == expected


@pytest.mark.parametrize(("record", "steps"), [(10, 7), (0, 5), (-1, 5), ([8], 7), ([-1], 7), ([3, 3], 7)])
def test_states_that_do_not_fit_are_refused(record: int | list[int], steps: int) -> None:
    with pytest.raises(ConfigError, match=f"doesn't fit steps {steps}"):
        recorded_steps(record, steps)


def test_storage_precision_is_fp16s(teacher: Teacher) -> None:
    """fp16 at unit variance costs about 2e-4 rms, whatever the solver's own scale."""
    for sampler in (SamplerConfig(name="ddim", steps=5), SamplerConfig(name="euler", steps=5)):
        for state in run(teacher, sampler, range(8)).values():
            values: npt.NDArray[np.float32] = state.numpy()
            error = values - values.astype(np.float16).astype(np.float32)
            assert float(np.sqrt(np.square(error).mean())) < 3e-4 * max(1.0, float(values.std()))
