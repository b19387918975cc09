"""Families of teachers beyond square images, plain predictions and variance-preserving noise."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advkd.cache.errors import ConfigError, TeacherError
from advkd.cache.format.encoding import Packing
from advkd.cache.format.noise import standard_normal
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.pack import pack
from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.evaluate.samplers import Sampler, all_samplers
from advkd.stages.pretrain.config import PretrainConfig
from advkd.stages.pretrain.run import sample_pipeline
from advkd.stages.pretrain.teacher import diffusion_loss, make_scheduler, save_untrained
from advkd.stages.reporter import SilentReporter
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.student import build_student, load_student
from advkd.stages.student.train import train
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig
from advkd.stages.student.unrolled.network import jump, jump_target
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.build.recompute import plan_of
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.path.schedulers import check_scheduler
from advkd.stages.teacher.path.solver_path import SolverPath
from tests.conftest import Invoke

CPU = torch.device("cpu")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
SHORT = TrainConfig(
    student=StudentConfig(width=8, depth=1, coarse=1),
    objective=ObjectiveConfig(adversarial=AdversarialConfig(width=4, start=0.4, penalty_every=2)),
    steps=6,
    batch_size=8,
    log_every=2,
    preview_every=6,
    checkpoint_every=6,
)


def save_teacher(folder: Path, scheduler: dict[str, Any], **unet: Any) -> TeacherConfig:
    """A folder with only a UNet of random weights and a scheduler's configuration."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            **unet,
        }
    )
    network.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return TeacherConfig(source=str(folder))


def cached(teacher: TeacherConfig, sampler: SamplerConfig, store: Path, *seeds: str, batch_size: int = 8) -> Any:
    """The store after a build per range of seeds."""
    for some in seeds:
        config = CacheConfig(seeds=some, record=sampler.steps, block_size=8, batch_size=batch_size, dtype="float32",
                             device="cpu", accept_range=True)  # fmt: skip
        build(make_plan(teacher, sampler, config, store))
    return TrajectoryCache.open(store)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++"])
@torch.no_grad()
def test_learned_variance_four_channels_and_oblong_images(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ancestral sampling takes the variance as diffusers does; ODE solvers take the first C of 2C channels."""
    import diffusers

    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False}
    shape = {"sample_size": (8, 12), "in_channels": 4, "out_channels": 8}
    teacher = save_teacher(tmp_path / "teacher", scheduler, **shape)
    cache = cached(teacher, SamplerConfig(name=name, steps=5), tmp_path / "a.zarr", "0:8", "0:16", batch_size=3)
    assert cache.item_shape == (4, 8, 12)
    unet = diffusers.UNet2DModel.from_pretrained(f"{teacher.source}/unet")
    options = scheduler if name == "ddpm" else scheduler | {"variance_type": None}
    own = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}[name]
    solver = getattr(diffusers, own).from_config(options, timestep_spacing="trailing")
    solver.set_timesteps(5)
    seeds = range(16)
    x = torch.from_numpy(cache.rows(0, seeds)).float()
    for call, timestep in enumerate(solver.timesteps):
        drawn = torch.from_numpy(standard_normal(0, seeds, (4, 8, 12), 1 + call))
        if name == "ddpm":
            monkeypatch.setattr(f"{type(solver).__module__}.randn_tensor", lambda *_, noise=drawn, **__: noise)
        given = unet(x, timestep).sample
        x = solver.step(given if name == "ddpm" else given[:, :4], timestep, x).prev_sample
        state = cache.states[call + 1]
        found = torch.from_numpy(cache.rows(call + 1, seeds)) * state.scale
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_a_variance_that_nobody_learned_is_refused(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "t", {"_class_name": "DDPMScheduler", "variance_type": "learned_range"})
    with pytest.raises(TeacherError, match="variance_type 'learned_range', and its network gives no variance"):
        cached(teacher, SamplerConfig(name="ddpm", steps=5), tmp_path / "a.zarr", "0:8")
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("name", ["flow-euler", "flow-heun"])
def test_a_flow_matching_teacher_from_cache_to_student(tmp_path: Path, name: str) -> None:
    """Oblong too. The cached states are reached by the student's jump from the target that it is trained on."""
    teacher = save_teacher(tmp_path / "teacher", FLOW, sample_size=(8, 12))
    store = tmp_path / "a.zarr"
    sampler = SamplerConfig(name=name, steps=4)
    cache = cached(teacher, sampler, store, "0:24", "0:48")
    whole = cached(teacher, sampler, tmp_path / "b.zarr", "0:48", batch_size=3)
    assert [(state.alpha, state.sigma) for state in (cache.states[0], cache.states[4])] == [(0.0, 1.0), (1.0, 0.0)]
    for state in cache.states.values():
        assert state.alpha + state.sigma == pytest.approx(1.0)
        np.testing.assert_allclose(cache.rows(state.step, range(48)), whole.rows(state.step, range(48)), atol=1e-5)

    geometry = Geometry.of(cache)
    levels = list(itertools.pairwise(geometry.levels))
    for step, (before, after) in enumerate(levels[:-1]):
        state, reached = (torch.from_numpy(cache.rows(at, range(48))) for at in (step, step + 1))
        target = jump_target(state, reached, before, after)
        torch.testing.assert_close(jump(state, target, before, after), reached, rtol=1e-4, atol=1e-4)

    plan = plan_of(cache, teacher, 8, "cpu")
    assert plan.recipe.fingerprint == cache.recipe.fingerprint
    packed = pack(cache, tmp_path / "packed.zarr", Packing.of("lossless", "float32"))
    assert (packed.num_added, packed.error_max) == (6, 0.0)
    trained = train(store, SHORT, tmp_path / "run")
    assert trained.complete and np.isfinite(trained.held_out_mse)
    student, loaded = load_student(tmp_path / "run/student")
    assert loaded == geometry
    assert student(torch.zeros(2, 1, 8, 12)).shape == (2, 1, 8, 12)


def test_flow_matching_rows_are_flow_matching_solvers(tmp_path: Path) -> None:
    teacher = load_teacher(save_teacher(tmp_path / "teacher", FLOW), CPU)
    cache = cached(TeacherConfig(source=str(tmp_path / "teacher")), SamplerConfig(name="flow-euler", steps=4),
                   tmp_path / "a.zarr", "0:8")  # fmt: skip
    said: list[str] = []
    student = Sampler(name="student", evaluations=1, generate=None)
    rows = all_samplers(student, teacher, cache.recipe, "float32", [2, 4], said.append)
    names = ["teacher (flow-euler 4)", "flow-euler 2", "flow-heun 2", "flow-heun 4"]
    assert ([row.name for row in rows[1:]], [row.evaluations for row in rows[1:]], said) == (names, [4, 2, 3, 7], [])
    for row in rows[1:]:
        assert row.generate is not None and bool(torch.isfinite(row.generate(range(2))).all())


def test_a_solver_of_the_other_kind_is_refused_with_the_right_ones(tmp_path: Path, invoke: Invoke) -> None:
    save_teacher(tmp_path / "flow", FLOW)
    save_teacher(tmp_path / "vp", {"_class_name": "DDPMScheduler"})
    for teacher, sampler, expected in (("flow", "ddim", "flow-euler or flow-heun"), ("vp", "flow-euler", "ddim or")):
        options = ("--steps", 5, "--seeds", "0:8", "--device", "cpu", "--out", tmp_path / "a.zarr")
        result = invoke(cache_command, "build", "--teacher", tmp_path / teacher, "--sampler", sampler, *options)
        assert result.exit_code in (1, 2)
        assert expected in result.stderr and len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(
    ("options", "sampler", "message"),
    [
        ({"shift_terminal": 0.02}, SamplerConfig(name="flow-heun", steps=4), "has no shift_terminal.*flow-euler"),
        ({}, SamplerConfig(name="flow-euler", steps=4, spacing="leading"), "'leading' is none of flow matching"),
        ({}, SamplerConfig(name="flow-euler", steps=2000), "steps 2000 don't fit"),
    ],
)
def test_what_flow_solvers_cannot_do_is_refused(options: dict[str, Any], sampler: SamplerConfig, message: str) -> None:
    with pytest.raises((TeacherError, ConfigError), match=message):
        SolverPath.of(FLOW | options, sampler)
    as_teacher = SamplerConfig(name="flow-euler", steps=4, spacing="teacher")
    assert SolverPath.of(FLOW, as_teacher).sampler.spacing == "linspace"


@pytest.mark.parametrize("option", ["use_dynamic_shifting", "invert_sigmas"])
def test_levels_that_only_a_pipeline_knows_are_refused(option: str) -> None:
    check_scheduler(FLOW, "t")
    with pytest.raises(TeacherError, match=f"{option}.*teacher.scheduler"):
        check_scheduler(FLOW | {option: True}, "t")


def test_stage_0_trains_the_velocity_of_flow_matching(tmp_path: Path) -> None:
    """Where all images are μ, the velocity at x is (x − μ) / σ, and the loss of a network that knows it is 0."""
    config = PretrainConfig(path="flow", size=8, channels=[8, 16])
    scheduler, seen = make_scheduler(config), list[Tensor]()

    def unet(x: Tensor, timestep: Tensor) -> SimpleNamespace:
        seen.append(timestep)
        return SimpleNamespace(sample=(x - 0.5) / (timestep / 1000)[:, None, None, None])

    images = torch.full((64, 1, 8, 8), 0.5)
    loss = diffusion_loss(unet, scheduler, images, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert float(loss) < 1e-6
    quantiles = torch.special.ndtr(torch.logit(seen[0].double() / 1000)).sort().values * 64
    assert torch.equal(quantiles.floor(), torch.arange(64.0, dtype=torch.float64))  # logit-normal, a stratum per image
    save_untrained(tmp_path / "pipeline", config)
    assert sample_pipeline(tmp_path / "pipeline", 3, SilentReporter(), CPU).shape == (3, 1, 8, 8)
    with pytest.raises(ConfigError, match="'ot' is none of vp, flow"):
        PretrainConfig(path="ot")


def test_oblong_items_that_do_not_divide_are_refused() -> None:
    geometry = Geometry(item_shape=(1, 8, 12), levels=((0.0, 1.0), (1.0, 0.0)), timesteps=(1000.0, -1.0),
                        steps=(0, 1), root_seed=0, noise_dtype="float32")  # fmt: skip
    assert Geometry.from_json(json.loads(json.dumps(geometry.to_json()))) == geometry
    for config, message in (
        (StudentConfig(width=8, depth=1, patch=8), "items of 8×12 pixels don't divide into patches of 8"),
        (StudentConfig(width=8, depth=1, coarse=1, patch=4), "2×3 positions can't be halved"),
        (StudentConfig(kind="progressive"), "square items, not 8×12"),
    ):
        with pytest.raises(Exception, match=message):
            build_student(config, geometry)
