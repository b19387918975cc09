"""Stores made by other versions of diffusers, or by older rules: extended, merged and recomputed as what they are."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from advkd.cache.care.verify import verify
from advkd.cache.errors import MismatchError
from advkd.cache.format.equivalence import NETWORK_OPTIONS, SCHEDULER_OPTIONS, equivalent
from advkd.cache.format.recipe import Recipe
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge
from advkd.cache.write.writer import CacheWriter
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.build.recompute import plan_of, recompute
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.diffusers_api import json_config
from advkd.stages.teacher.load.loader import load_teacher
from advkd.stages.teacher.path.solver_path import SolverPath
from advkd.stages.teacher.path.solvers import SOLVERS
from tests.stores import tree

ROOT = Path(__file__).resolve().parents[2]
CACHE = CacheConfig(
    seeds="0:16", record=1, block_size=8, batch_size=8, dtype="float32", device="cpu",
    accept_range=True,  # without clipping, a network of random weights makes values far beyond those of images
)  # fmt: skip
THRESHOLD = {"thresholding": True, "sample_max_value": 3.0}
Sampler = dict[str, Any]


class Listening(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def teacher_with(pipeline_folder: Path, folder: Path, **scheduler: object) -> Path:
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return folder


def plan_for(teacher: Path, sampler: SamplerConfig, store: Path, **changes: object) -> Plan:
    config = dataclasses.replace(CACHE, **changes)  # type: ignore[arg-type]
    return make_plan(TeacherConfig(source=str(teacher)), sampler, config, store)


def build_as(plan: Plan, edit: Callable[[Sampler], None]) -> Recipe:
    """Build a store as a version that wrote another recipe did: what the recipe says is what is sampled."""
    value = copy.deepcopy(plan.recipe.to_json())
    edit(value["sampler"])
    recipe = Recipe.from_json(value)
    path = SolverPath.recorded(recipe)
    layout = dataclasses.replace(plan.layout, states=tuple(path.states[s.step] for s in plan.layout.states))
    build(dataclasses.replace(plan, path=path, writer=CacheWriter(plan.store, recipe, layout)))
    return recipe


def without_newer_options(sampler: Sampler) -> None:
    """As diffusers 0.33 described DPM-Solver++."""
    del sampler["config"]["use_dynamic_shifting"], sampler["config"]["time_shift_type"]


def without_landing(sampler: Sampler) -> None:
    del sampler["landing"]


def without_x0(sampler: Sampler) -> None:
    del sampler["x0"]


def clipping(sampler: Sampler) -> None:
    sampler["config"]["clip_sample"] = True


def without_offset(sampler: Sampler) -> None:
    sampler["config"]["steps_offset"] = 0
    sampler["timesteps"] = [timestep - 1 for timestep in sampler["timesteps"]]


def test_a_store_of_another_diffusers_is_extended_merged_and_recomputed(pipeline_folder: Path, tmp_path: Path) -> None:
    sampler = SamplerConfig(name="dpmsolver++", steps=4)
    older, newer, reporter = tmp_path / "older.zarr", tmp_path / "newer.zarr", Listening()
    recipe = build_as(plan_for(pipeline_folder, sampler, older, seeds="0:8"), without_newer_options)
    plan = plan_for(pipeline_folder, sampler, older)
    assert plan.recipe == recipe
    built = build(plan, reporter=reporter)
    assert (built.num_blocks, built.num_present, reporter.lines[0][:5]) == (1, 1, "first")
    build(plan_for(pipeline_folder, sampler, newer, seeds="8:24"))
    caches = [TrajectoryCache.open(path) for path in (older, newer)]
    assert caches[0].recipe.fingerprint != caches[1].recipe.fingerprint
    for name, sources in (("a.zarr", caches), ("b.zarr", caches[::-1])):
        merged = merge(sources, tmp_path / name)
        assert (merged.num_added, merged.num_present) == (3, 0)
        cache = TrajectoryCache.open(tmp_path / name)
        assert cache.recipe == sources[0].recipe
        assert not verify(cache).findings
        for step in cache.states:
            np.testing.assert_array_equal(cache.rows(step, range(16)), caches[0].rows(step, range(16)))
            np.testing.assert_array_equal(cache.rows(step, range(16, 24)), caches[1].rows(step, range(16, 24)))
        merge(sources[::-1], tmp_path / name)  # whichever comes first, the target keeps its recipe
        assert TrajectoryCache.open(tmp_path / name).recipe == sources[0].recipe
        [result] = recompute(cache, plan_of(cache, None, 8, "cpu"), [1])
        assert result.within and not result.apart


@pytest.mark.parametrize(
    ("sampler", "scheduler", "edit", "rule"),
    [
        (SamplerConfig(steps=7), {}, without_landing, "t − T // n"),
        (SamplerConfig(name="euler", steps=4), {"clip_sample": True}, without_x0, r"x̂_0 \(clip\)"),
        (SamplerConfig(name="dpmsolver++", steps=4), {"clip_sample": True}, without_x0, r"x̂_0 \(clip\)"),
        (
            SamplerConfig(name="heun", steps=4),
            {"thresholding": True, "sample_max_value": 3.0},
            without_x0,
            r"x̂_0 \(threshold\)",
        ),
        (SamplerConfig(steps=5), {"_class_name": "PNDMScheduler", "clip_sample": None}, clipping, "it clips"),
        (SamplerConfig(steps=5, spacing="leading"), {"steps_offset": 1}, without_offset, "steps_offset of 1"),
    ],
)
def test_a_store_keeps_the_rule_it_was_made_by(
    pipeline_folder: Path,
    tmp_path: Path,
    sampler: SamplerConfig,
    scheduler: dict[str, object],
    edit: Callable[[Sampler], None],
    rule: str,
) -> None:
    teacher, older, reporter = tmp_path / "teacher", tmp_path / "older.zarr", Listening()
    teacher_with(pipeline_folder, teacher, **scheduler)
    if scheduler.get("clip_sample", 0) is None:
        path = teacher / "scheduler/scheduler_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "clip_sample"}))
    recipe = build_as(plan_for(teacher, sampler, older, seeds="0:8"), edit)
    build(plan_for(teacher, sampler, tmp_path / "newer.zarr"))
    old, new = TrajectoryCache.open(older), TrajectoryCache.open(tmp_path / "newer.zarr")
    last = sampler.steps
    assert np.abs(old.rows(last, range(8)) - new.rows(last, range(8))).max() > 0.01
    plan = plan_for(teacher, sampler, older)
    build(plan, reporter=reporter)
    assert plan.recipe == recipe
    assert re.search(rule, reporter.lines[0]) and str(older) in reporter.lines[0]
    old = TrajectoryCache.open(older)
    assert old.blocks == (0, 1)
    reporter = Listening()
    results = recompute(old, plan_of(old, None, 8, "cpu"), old.blocks, reporter)
    assert not any(result.apart for result in results)
    assert re.search(rule, reporter.lines[0])
    with pytest.raises(MismatchError):
        merge([old, new], tmp_path / "merged.zarr")


@torch.no_grad()
def test_the_older_landing_is_diffusers_own(pipeline_folder: Path, tmp_path: Path) -> None:
    plan = plan_for(pipeline_folder, SamplerConfig(steps=7), tmp_path / "older.zarr", seeds="0:8")
    build_as(plan, without_landing)
    cache, teacher = TrajectoryCache.open(tmp_path / "older.zarr"), plan.teacher
    scheduler = diffusers.DDIMScheduler.from_config(teacher.scheduler_config, timestep_spacing="trailing")
    scheduler.set_timesteps(7)
    x = torch.from_numpy(cache.rows(0, range(8)))
    for timestep in scheduler.timesteps:
        x = scheduler.step(teacher.network(x, timestep).sample, timestep, x).prev_sample
    np.testing.assert_allclose(cache.rows(7, range(8)) * cache.state(7).scale, x.numpy(), rtol=1e-5, atol=1e-5)
    assert cache.state(7).sigma > 0.006


def test_what_is_no_older_rule_is_another_recipe(pipeline_folder: Path, tmp_path: Path) -> None:
    """A newer store is never continued by an older rule, nor one with other steps, weights or levels."""
    build(plan_for(pipeline_folder, SamplerConfig(steps=7), tmp_path / "a.zarr"))
    for sampler in (SamplerConfig(steps=6), SamplerConfig(steps=7, spacing="leading"), SamplerConfig(steps=7, eta=0.5)):
        with pytest.raises(MismatchError):
            build(plan_for(pipeline_folder, sampler, tmp_path / "a.zarr"))
    teacher = teacher_with(pipeline_folder, tmp_path / "teacher", beta_end=0.03)
    with pytest.raises(MismatchError):
        build(plan_for(teacher, SamplerConfig(steps=7), tmp_path / "a.zarr"))


def test_tables_are_what_the_oldest_and_the_installed_diffusers_have() -> None:
    """An option of the installed version that the tables lack must be neutral, and none may have another default."""
    tables = SCHEDULER_OPTIONS | NETWORK_OPTIONS
    for name, table in tables.items():
        installed = json_config(getattr(diffusers, name)().config)
        assert {key: installed[key] for key in table} == table
    assert {solver.scheduler for solver in SOLVERS.values()} == set(SCHEDULER_OPTIONS)


def test_a_teacher_saved_by_another_diffusers_is_the_same(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one leaves options out, a newer one adds options at their defaults; other values are another teacher."""
    sampler = SamplerConfig(steps=5)
    plan = plan_for(pipeline_folder, sampler, tmp_path / "a.zarr")
    build(plan)
    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    configs = {name: folder / name for name in ("unet/config.json", "scheduler/scheduler_config.json")}
    saved = {name: json.loads(path.read_text()) for name, path in configs.items()}
    for name, path in configs.items():
        left_out = {"dropout", "norm_eps", "sample_max_value", "rescale_betas_zero_snr"}
        path.write_text(json.dumps({key: value for key, value in saved[name].items() if key not in left_out}))
    older = plan_for(folder, sampler, tmp_path / "b.zarr")
    assert older.recipe != plan.recipe and equivalent(older.recipe, plan.recipe)
    assert plan_for(folder, sampler, tmp_path / "a.zarr").recipe == plan.recipe

    class Newer:
        def __init__(self, new_option: str = "neutral") -> None:
            """A class of a later diffusers."""

    def resaved(value: str) -> Recipe:
        for name, path in configs.items():
            path.write_text(json.dumps(saved[name] | {"new_option": value}))
        loaded = load_teacher(TeacherConfig(source=str(folder)), torch.device("cpu"))
        with monkeypatch.context() as patched:
            patched.setattr(diffusers, "UNet2DModel", Newer)
            patched.setattr(diffusers, "DDPMScheduler", Newer)
            return dataclasses.replace(plan.recipe, teacher=loaded.identity())

    assert resaved("neutral") == plan.recipe
    assert not equivalent(resaved("other"), plan.recipe)


EXTEND = """
import sys
from pathlib import Path
import diffusers
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.config import SamplerConfig
from advkd.stages.teacher.path.solvers import SOLVERS
from tests.stages.test_older_stores import plan_for

vp, flow, folder, seeds, version = sys.argv[1:]
assert diffusers.__version__.startswith(version), diffusers.__version__
for name, solver in SOLVERS.items():
    sampler = SamplerConfig(name=name, steps=5)
    build(plan_for(Path(flow if solver.flow else vp), sampler, Path(folder, f"{name}.zarr"), seeds=seeds))
"""


@pytest.mark.slow
def test_stores_cross_from_the_oldest_diffusers_to_the_installed_one(pipeline_folder: Path, tmp_path: Path) -> None:
    """Begun by either and extended by the other: the same fingerprints, the same bytes."""
    [oldest] = re.findall(r'"diffusers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    packages = tmp_path / "packages"
    install = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages)
    subprocess.run([*install, f"diffusers=={oldest}.*"], check=True)

    flow = teacher_with(pipeline_folder, tmp_path / "flow")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(flow / "scheduler")

    def extend(version: str, folder: Path, seeds: str) -> None:
        paths = os.pathsep.join([*([str(packages)] if version == oldest else []), str(ROOT)])
        command = (sys.executable, "-c", EXTEND, pipeline_folder, flow, folder, seeds, version)
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    older, newer = tmp_path / "older", tmp_path / "newer"
    for folder, versions in ((older, (oldest, diffusers.__version__)), (newer, (diffusers.__version__, oldest))):
        for version, seeds in zip(versions, ("0:8", "0:16"), strict=True):
            extend(version, folder, seeds)
    for name in SOLVERS:
        assert tree(older / f"{name}.zarr") == tree(newer / f"{name}.zarr")
        cache = TrajectoryCache.open(older / f"{name}.zarr")
        results = recompute(cache, plan_of(cache, None, 8, "cpu"), cache.blocks)
        assert cache.blocks == (0, 1) and not any(result.apart for result in results)
