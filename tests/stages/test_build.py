"""Building: resumes, extends, repeats bit for bit, and stops before it writes nonsense."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from advkd.cache.errors import LockedError, MismatchError, TeacherError
from advkd.cache.format.noise import standard_normal
from advkd.cache.format.store_paths import chunk_path
from advkd.cache.read.compare import block_distances, tolerance_of, within
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.writer import CacheWriter
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.build import build as building
from advkd.stages.teacher.build.block import SampledBlock
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import SamplerConfig, TeacherConfig
from advkd.stages.teacher.sample.sampling import initial_noise, record_states
from tests.cache.labels import add_arrays
from tests.stages.plans import CACHE, plan_for
from tests.stores import tree


def test_a_cache_holds_the_noise_that_the_teacher_started_from(pipeline_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    built = build(plan_for(pipeline_folder, store))
    cache = TrajectoryCache.open(store)
    assert (built.num_blocks, cache.blocks, sorted(cache.states)) == (3, (0, 1, 2), [0, 2, 4])
    noise = standard_normal(0, range(24), cache.item_shape).astype(np.float16)
    np.testing.assert_array_equal(cache.rows(0, range(24)), noise)
    assert cache.recipe.deterministic
    assert built.preview is not None and built.preview.stat().st_size > 100
    assert json.loads((store / "provenance/store.json").read_text())["teacher"]["source"] == str(pipeline_folder)


def test_resuming_and_extending_give_the_bytes_of_one_build(pipeline_folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.zarr", tmp_path / "parts.zarr"
    build(plan_for(pipeline_folder, whole))
    for seeds in ("16:20", "0:8", "0:24"):
        build(plan_for(pipeline_folder, parts, seeds=seeds))
    assert tree(parts) == tree(whole)
    again = build(plan_for(pipeline_folder, parts))
    assert (again.num_blocks, again.num_present) == (0, 3)


def check_equivalent(store: Path, reference: Path) -> None:
    """The same noise to the bit, and the same states within what the reference says of other machines."""
    one, other = TrajectoryCache.open(store), TrajectoryCache.open(reference)
    assert (one.recipe, one.layout, one.blocks) == (other.recipe, other.layout, other.blocks)
    for block in one.blocks:
        noise = chunk_path("states/0000", block, 3)
        assert (store / noise).read_bytes() == (reference / noise).read_bytes()
        assert within(block_distances(one, other, block), tolerance_of(other))


def test_batch_size_moves_states_by_rounding_only(pipeline_folder: Path, tmp_path: Path) -> None:
    build(plan_for(pipeline_folder, tmp_path / "eight.zarr", batch_size=8, dtype="float32"))
    for batch_size in (1, 3, 5, 100):
        build(plan_for(pipeline_folder, tmp_path / f"{batch_size}.zarr", batch_size=batch_size, dtype="float32"))
        check_equivalent(tmp_path / f"{batch_size}.zarr", tmp_path / "eight.zarr")
    # A batch never reaches beyond its block, so that more is the same.
    assert tree(tmp_path / "100.zarr") == tree(tmp_path / "eight.zarr")


def test_threads_move_states_by_rounding_only(pipeline_folder: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name in ("a", "b"):
                build(plan_for(pipeline_folder, tmp_path / f"{name}{threads}.zarr", dtype="float32"))
            assert tree(tmp_path / f"a{threads}.zarr") == tree(tmp_path / f"b{threads}.zarr")
            check_equivalent(tmp_path / f"a{threads}.zarr", tmp_path / "a1.zarr")
    finally:
        torch.set_num_threads(before)


def test_another_machines_arithmetic_moves_states_by_rounding_only(pipeline_folder: Path, tmp_path: Path) -> None:
    """A process without this CPU's vector instructions, and with other threads, as an older machine has."""
    old = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "3"}
    settings = ("--seeds", "0:24", "--record", "2", "--block-size", "8", "--steps", "4", "--dtype", "float32")
    command = (Path(sys.executable).parent / "advkd-cache", "build", "--teacher", pipeline_folder, *settings)
    subprocess.run([*command, "--out", tmp_path / "old.zarr"], env=os.environ | old, capture_output=True, check=True)
    build(plan_for(pipeline_folder, tmp_path / "new.zarr", dtype="float32"))
    check_equivalent(tmp_path / "old.zarr", tmp_path / "new.zarr")


def test_builds_in_threads_of_one_process_keep_their_noise_apart(pipeline_folder: Path, tmp_path: Path) -> None:
    """An ancestral sampler draws in every step; what one thread draws never reaches another's states."""
    sampler = SamplerConfig(name="ddpm", steps=25)
    config = dataclasses.replace(CACHE, batch_size=8, seeds="0:64")

    def run(name: str) -> dict[str, bytes]:
        build(make_plan(TeacherConfig(source=str(pipeline_folder)), sampler, config, tmp_path / name))
        return tree(tmp_path / name)

    alone = run("alone")
    with ThreadPoolExecutor() as executor:
        together = [executor.submit(run, name) for name in ("one", "other", "one")]
    assert [future.result() for future in together] == [alone] * 3


def test_a_block_is_written_while_the_next_is_sampled(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first block, which somebody waits to see; never more than one, and all with the claim held."""
    plan = plan_for(pipeline_folder, tmp_path / "a.zarr", seeds="0:40")
    original_sample, original_commit = building.sample_block, building.commit_block
    sampling, writing, overlapped = threading.Event(), threading.Event(), []

    def sample_block(plan: Plan, block: int, *rest: object) -> SampledBlock:
        sampling.set()
        if block > 1:
            assert writing.wait(30), "nothing is written while a block is sampled"
            writing.clear()
        sampled = original_sample(plan, block, *rest)  # type: ignore[arg-type]
        sampling.clear()
        return sampled

    def commit_block(plan: Plan, sampled: SampledBlock, command: str) -> None:
        if 0 < sampled.number < 4:
            assert sampling.wait(30), "nothing is sampled while a block is written"
            overlapped.append(sampled.number)
        writing.set()
        with plan.writer.claim(sampled.number) as claimed:
            assert not claimed
        original_commit(plan, sampled, command)

    monkeypatch.setattr(building, "sample_block", sample_block)
    monkeypatch.setattr(building, "commit_block", commit_block)
    assert build(plan).num_blocks == 5
    assert overlapped == [1, 2, 3]
    monkeypatch.undo()
    build(plan_for(pipeline_folder, tmp_path / "b.zarr", seeds="0:40", batch_size=5))
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr")


def test_a_full_disk_stops_the_sampling_of_the_next_block(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(pipeline_folder, tmp_path / "a.zarr", batch_size=1, seeds="0:40")
    original, failed, advanced = building.commit_block, threading.Event(), 0

    def commit_block(plan: Plan, sampled: SampledBlock, command: str) -> None:
        if sampled.number == 1:
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        original(plan, sampled, command)

    class Counting(SilentReporter):
        def advance(self, amount: int = 1, note: str = "") -> None:
            nonlocal advanced
            if note == "block 2":
                assert failed.wait(30)
                advanced += amount

    monkeypatch.setattr(building, "commit_block", commit_block)
    with pytest.raises(OSError, match="No space left"):
        build(plan, reporter=Counting())
    assert advanced < 8 * 4, "block 2 was sampled to its end"
    monkeypatch.undo()
    assert TrajectoryCache.open(tmp_path / "a.zarr").blocks == (0,)
    assert build(plan).num_blocks == 4


def test_another_teacher_is_recognised_by_its_weights(pipeline_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    store = tmp_path / "a.zarr"
    build(plan_for(pipeline_folder, store))
    other = tmp_path / "other"
    shutil.copytree(pipeline_folder, other)
    weights = load_file(other / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] = weights["conv_out.bias"] + 1e-3
    save_file(weights, other / "unet/diffusion_pytorch_model.safetensors")
    before = tree(store)
    with pytest.raises(MismatchError, match=r"teacher\.tensors_sha256"):
        build(plan_for(other, store))
    assert tree(store) == before
    built = build(plan_for(other, store), on_mismatch="set-aside")
    assert built.set_aside is not None
    assert tree(built.set_aside) == before


def test_the_same_teacher_elsewhere_is_the_same_recipe(pipeline_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(pipeline_folder, copy)
    one, other = plan_for(pipeline_folder, tmp_path / "a"), plan_for(copy, tmp_path / "b", batch_size=3)
    assert one.recipe.fingerprint == other.recipe.fingerprint
    assert one.recipe.fingerprint != plan_for(copy, tmp_path / "b", root_seed=1).recipe.fingerprint
    assert one.recipe.fingerprint == plan_for(copy, tmp_path / "b", record=4).recipe.fingerprint
    assert one.layout.layout_hash != plan_for(copy, tmp_path / "b", record=4).layout.layout_hash


def test_a_store_that_differs_in_further_arrays_alone_is_set_aside(pipeline_folder: Path, tmp_path: Path) -> None:
    build(plan_for(pipeline_folder, tmp_path / "a.zarr"))
    before = tree(tmp_path / "a.zarr")
    add_arrays(tmp_path / "a.zarr")
    built = build(plan_for(pipeline_folder, tmp_path / "a.zarr"), on_mismatch="set-aside")
    assert built.num_blocks == 3 and built.set_aside is not None
    assert TrajectoryCache.open(built.set_aside).further_names and tree(tmp_path / "a.zarr") == before


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_ledger_is_that_of_the_values_as_they_were_computed(
    pipeline_folder: Path, tmp_path: Path, batch_size: int
) -> None:
    """States are kept in the stored dtype; what rounding changed is counted batch by batch."""
    plan = plan_for(pipeline_folder, tmp_path / "a.zarr", seeds="0:8", batch_size=batch_size)
    build(plan)
    computed: dict[int, list[np.ndarray]] = {}  # type: ignore[type-arg]
    for start in range(0, 8, batch_size):
        seeds = range(start, min(start + batch_size, 8))
        noise = initial_noise(0, seeds, plan.recipe.item_shape, "float16")
        kept = record_states(plan.teacher, plan.path, noise, seeds=seeds, root_seed=0, record=[0, 2, 4])
        for step, values in kept.items():
            computed.setdefault(step, []).append(values.numpy())
    other = CacheWriter.open(tmp_path / "b.zarr", plan.recipe, plan.layout)
    with other.writing():
        other.grow(plan.seeds)
        record = other.commit(0, {step: np.concatenate(parts) for step, parts in computed.items()})
    assert {array.rounding_max > 0.0 for name, array in record.arrays.items() if name != "states/0000"} == {True}
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr")


def test_half_precision_states_are_recorded_as_such(pipeline_folder: Path, tmp_path: Path) -> None:
    one = plan_for(pipeline_folder, tmp_path / "a", precision="bfloat16")
    assert one.recipe.precision["compute"] == "bfloat16"
    build(one)
    exact = plan_for(pipeline_folder, tmp_path / "b")
    build(exact)
    caches = [TrajectoryCache.open(tmp_path / name) for name in "ab"]
    difference = caches[0].rows(4, range(24)).astype(np.float32) - caches[1].rows(4, range(24)).astype(np.float32)
    assert 0.0 < float(np.sqrt(np.square(difference).mean())) < 0.2
    assert one.recipe.teacher == exact.recipe.teacher


def test_the_teachers_scheduler_cannot_make_a_solver_stochastic(pipeline_folder: Path, tmp_path: Path) -> None:
    """A teacher saved with an SDE solver still gives the ODE's trajectories, twice the same."""
    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler/scheduler_config.json"
    options = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    sampler, config = SamplerConfig(name="dpmsolver++", steps=4), dataclasses.replace(CACHE, accept_range=True)
    digests = set()
    for name in "ab":
        build(make_plan(TeacherConfig(source=str(folder)), sampler, config, tmp_path / name))
        digests.add(TrajectoryCache.open(tmp_path / name).digest)
    assert len(digests) == 1


def test_a_useless_teacher_does_not_displace_a_good_store(pipeline_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    build(plan_for(pipeline_folder, store))
    before = tree(store)
    plan = plan_for(pipeline_folder, store, root_seed=5)
    torch.nn.init.constant_(next(plan.teacher.network.parameters()), float("nan"))
    with pytest.raises(TeacherError, match="not finite"):
        build(plan, on_mismatch="set-aside")
    assert tree(store) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.zarr"]


def test_a_store_in_use_is_not_set_aside(pipeline_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    plan = plan_for(pipeline_folder, store)
    build(plan)
    with CacheWriter.open(store, plan.recipe, plan.layout).writing(), pytest.raises(LockedError, match="another build"):
        build(plan_for(pipeline_folder, store, root_seed=5), on_mismatch="set-aside")
    assert TrajectoryCache.open(store).recipe.root_seed == 0


def test_provenance_tells_who_made_which_block(pipeline_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    build(plan_for(pipeline_folder, store, seeds="0:8"), command="first")
    build(plan_for(pipeline_folder, store), command="second")
    commands = [json.loads((store / f"provenance/block-{b:06d}.json").read_text())["command"] for b in range(3)]
    assert commands == ["first", "second", "second"]
