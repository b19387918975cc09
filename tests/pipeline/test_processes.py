"""Real processes, really killed: what was committed stays, and the same command goes on to the same bytes.

A kill comes at a random moment after a process has begun to write, so that it hits commits and not only imports. After
each, what is there must be sound, and a copy of it is resumed; the store itself stays as it is for the next kill.
"""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from advkd.cache.care.verify import verify
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from tests.conftest import MEMORY, ROOT
from tests.pipeline.clones import edit_config, new_clone, repro
from tests.pipeline.processes import BIN, DEADLINE, Process, finish, start, stop, wait_until
from tests.stores import tree, write_store

Resume = Callable[[Path], object]
Start = Callable[[], Process]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_here(teacher: Path, seeds: str, store: Path, sampler: SamplerConfig, record: int, block_size: int) -> None:
    config = CacheConfig(seeds=seeds, record=record, block_size=block_size, batch_size=block_size, device="cpu")
    build(make_plan(TeacherConfig(source=str(teacher)), sampler, config, store))


class Builds:
    """Builds of a tiny teacher, of which commits are the larger part."""

    def __init__(self, folder: Path, teacher: Path, seeds: str = "0:480") -> None:
        self.folder = folder
        self.store = folder / "toy.zarr"
        self.resume: Resume = functools.partial(
            build_here, teacher, seeds, sampler=SamplerConfig(steps=6), record=6, block_size=4
        )
        settings = ("--steps", 6, "--record", 6, "--block-size", 4, "--batch-size", 4, "--out", self.store)
        self.command = ("advkd-cache", "build", "--teacher", teacher, "--seeds", seeds, *settings)
        self.whole = whole_of(folder, self.resume)

    def start(self) -> Process:
        return start(self.folder, *self.command)


def whole_of(folder: Path, resume: Resume) -> dict[str, bytes]:
    """What nobody interrupted."""
    resume(folder / "whole.zarr")
    return tree(folder / "whole.zarr")


def check_survivor(store: Path, whole: dict[str, bytes], resume: Resume) -> None:
    """What a killed writer leaves is sound, and going on from it ends with the bytes of one that nobody interrupted."""
    if store.exists():
        left = verify(TrajectoryCache.open(store)).findings
        assert all(found.kind == "stray" or "another array" in found.problem for found in left), left
    copy = store.with_name("resumed.zarr")
    if store.exists():
        shutil.copytree(store, copy)
    resume(copy)
    check(copy, whole)
    shutil.rmtree(copy)


def check(store: Path, whole: dict[str, bytes]) -> None:
    """The same bytes, nothing wrong, no litter."""
    assert tree(store) == whole
    assert verify(TrajectoryCache.open(store)).findings == ()
    assert not list(store.rglob("*.partial")) and not list(store.parent.glob(f"{store.name}.*"))


def writing_since(store: Path) -> int | None:
    """Changes when a process begins to write."""
    try:
        return (store / "provenance/writer.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def start_writing(begin: Start, store: Path) -> Process:
    """Start a process and wait until it writes, or ends."""
    before, process = writing_since(store), begin()
    deadline = time.monotonic() + 120
    while writing_since(store) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def kill_somewhere(begin: Start, store: Path, moment: float, number: int = signal.SIGKILL) -> tuple[int, str]:
    """Signal a process some seconds after it began to write, unless it ends before; its exit code and errors."""
    process = start_writing(begin, store)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        return stop(process, number)
    _, error = process.communicate()
    assert process.returncode == 0, error
    return 0, error


def campaign(
    begin: Start, store: Path, whole: dict[str, bytes], resume: Resume, kills: int, span: float, seed: int = 0
) -> None:
    """Kill so many processes, each up to `span` seconds after it began to write; restart where one came through."""
    generator = random.Random(seed)
    while kills:
        code, _ = kill_somewhere(begin, store, generator.uniform(0, span))
        if code == 0:
            check(store, whole)
            shutil.rmtree(store)
        else:
            assert code == -signal.SIGKILL
            kills -= 1
            check_survivor(store, whole, resume)


def test_stopped_and_killed_builds_resume_to_the_same_bytes(tmp_path: Path, pipeline_folder: Path) -> None:
    builds, generator = Builds(tmp_path, pipeline_folder, "0:160"), random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        code, error = kill_somewhere(builds.start, builds.store, generator.uniform(0, 0.3), number)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code == 130
            assert "what was committed is kept. To resume: advkd-cache build --teacher" in error
        check_survivor(builds.store, builds.whole, builds.resume)
    kept = len(TrajectoryCache.open(builds.store).blocks)
    output, _ = finish(builds.start())
    assert f"built {40 - kept} blocks, {kept} were there" in output
    check(builds.store, builds.whole)


@pytest.mark.slow
def test_builds_killed_at_fifty_moments(tmp_path: Path, pipeline_folder: Path) -> None:
    builds = Builds(tmp_path, pipeline_folder)
    campaign(builds.start, builds.store, builds.whole, builds.resume, kills=50, span=2.0)


@pytest.mark.slow
def test_extending_builds_killed_at_twenty_five_moments(tmp_path: Path, pipeline_folder: Path) -> None:
    """A second range on a store that is there: what it held is never touched."""
    begun = Builds(tmp_path / "first", pipeline_folder, "0:160")
    builds = Builds(tmp_path, pipeline_folder, "160:480")
    shutil.rmtree(tmp_path / "whole.zarr")
    shutil.copytree(tmp_path / "first/whole.zarr", tmp_path / "whole.zarr")
    whole = whole_of(tmp_path, builds.resume)

    def begin() -> Process:
        if not builds.store.exists():
            shutil.copytree(tmp_path / "first/whole.zarr", builds.store)
        return builds.start()

    campaign(begin, builds.store, whole, builds.resume, kills=25, span=1.5)
    assert begun.whole.items() - whole.items() == {
        (name, data) for name, data in begun.whole.items() if name.endswith("/zarr.json") and "/0" in name
    }  # all that changed is how many seeds the arrays declare


# Merging needs no teacher, so that a kill takes a second.


def kill_merges(folder: Path, out: Path, kills: int) -> None:
    for name, seeds in (("north", "0:1024"), ("south", "768:2048")):
        write_store(folder / f"{name}.zarr", seeds)
    sources = [folder / "north.zarr", folder / "south.zarr"]

    def resume(store: Path) -> None:
        merge([TrajectoryCache.open(source) for source in sources], store)

    def begin() -> Process:
        return start(folder, "advkd-cache", "merge", *sources, "--out", out)

    began = time.monotonic()
    whole = whole_of(out.parent, resume)
    campaign(begin, out, whole, resume, kills, span=time.monotonic() - began, seed=kills)


def test_killed_merges_resume_to_the_same_bytes(tmp_path: Path) -> None:
    kill_merges(tmp_path, tmp_path / "all.zarr", kills=8)


@pytest.mark.slow
def test_merges_killed_at_fifty_moments(tmp_path: Path) -> None:
    kill_merges(tmp_path, tmp_path / "all.zarr", kills=50)


@pytest.mark.slow
def test_merges_across_file_systems_killed_at_thirty_moments(tmp_path: Path) -> None:
    """No hard links there: files are copied."""
    folders = [folder for folder in (ROOT, MEMORY) if folder.is_dir()]
    others = [folder for folder in folders if folder.stat().st_dev != tmp_path.stat().st_dev]
    if not others:
        pytest.skip("one file system only")
    with tempfile.TemporaryDirectory(dir=others[0], prefix=".campaign-") as folder:
        kill_merges(tmp_path, Path(folder) / "all.zarr", kills=30)


@pytest.mark.slow
def test_builds_with_workers_killed_at_twenty_four_moments(tmp_path: Path, pipeline_folder: Path) -> None:
    """In each build two workers die, one after the other, and then the command itself."""
    builds, generator, kills = Builds(tmp_path, pipeline_folder), random.Random(0), 0
    while kills < 24:
        process = start_writing(lambda: start(tmp_path, *builds.command, "--workers", 2), builds.store)
        children = psutil.Process(process.pid).children(recursive=True)
        for victim in (*children[-2:], process):
            try:
                process.wait(generator.uniform(0, 1.5))
                break
            except subprocess.TimeoutExpired:
                children += psutil.Process(process.pid).children(recursive=True)
                victim.kill()
                kills += 1
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        if process.returncode == 0:
            check(builds.store, builds.whole)
            shutil.rmtree(builds.store)
        else:
            assert process.returncode == -signal.SIGKILL
            check_survivor(builds.store, builds.whole, builds.resume)


# dvc repro starts the builder as its child.


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a user has, with a teacher, and an experiment of many small blocks."""
    folder = new_clone(tmp_path / "clone")
    edit_config(folder, "cache", seeds="0:960", block_size=8, batch_size=8)
    repro(folder, "teacher")
    return folder


@pytest.mark.slow
def test_dvc_repro_killed_at_twenty_four_moments(clone: Path, tmp_path: Path) -> None:
    """Alone, which leaves the builder behind as an orphan, or with all its children."""
    store, generator = clone / "cache/smoke.zarr", random.Random(0)
    resume = functools.partial(
        build_here, clone / "teachers/smoke/pipeline", "0:960", sampler=SamplerConfig(steps=10), record=5, block_size=8
    )
    whole = whole_of(tmp_path, resume)
    before = (clone / "dvc.lock").read_text()
    kills = 0
    while kills < 24:
        process = start_writing(lambda: start(clone, "dvc", "repro", "cache", session=True), store)
        children = psutil.Process(process.pid).children(recursive=True)
        try:
            process.wait(generator.uniform(0, 2.0))
        except subprocess.TimeoutExpired:
            kills += 1
            if kills % 3:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                psutil.wait_procs(children, timeout=10)
                check_survivor(store, whole, resume)
            else:
                process.kill()  # and start another beside the orphan: they divide what is left
            (clone / ".dvc/tmp/rwlock").unlink(missing_ok=True)
            if kills % 3 == 1:
                continue
            finish(start(clone, "dvc", "repro", "cache"))
        psutil.wait_procs(children, timeout=60)
        process.communicate()
        check(store, whole)
        shutil.rmtree(store)
        (clone / "dvc.lock").write_text(before)


def toy_training(folder: Path, *, steps: int, checkpoint_every: int) -> tuple[str, ...]:
    """A small store and a configuration; the command that trains from them."""
    write_store(folder / "toy.zarr", "0:256")
    (folder / "toy.yaml").write_text(
        f"name: toy\nteacher: {{source: none}}\ntrain: {{student: {{width: 8, depth: 1}}, steps: {steps},\n"
        f"  batch_size: 16, log_every: 10, preview_every: {steps}, checkpoint_every: {checkpoint_every},\n"
        "  objective: {adversarial: {width: 4}}}\n"
    )
    return ("advkd-train", "--cache", "toy.zarr", "--config", "toy.yaml")


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    command = toy_training(tmp_path, steps=300, checkpoint_every=50)
    finish(start(tmp_path, *command, "--run", "whole"))
    checkpoint = tmp_path / "runs/toy/checkpoint/last.safetensors"
    process = start(tmp_path, *command)
    wait_until(checkpoint.exists, process)
    stop(process, signal.SIGKILL)
    process = start(tmp_path, *command)
    wait_until(lambda: _logged(tmp_path) > 60, process)
    code, error = stop(process, signal.SIGTERM)
    assert code == 130
    assert "checkpoint saved. To resume: advkd-train --cache toy.zarr --config toy.yaml" in error
    process = start(tmp_path, *command, "--resume")
    output, error = finish(process)
    assert "step 300 of 300" in output
    assert re.search(r"runs/toy from step \d+", error)
    weights = "student/model.safetensors"
    assert (tmp_path / "runs/toy" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_stop_that_reaches_launcher_and_processes_saves_first(tmp_path: Path) -> None:
    """As SLURM sends it: to all at once, and the launcher passes on what it got itself."""
    _, *options = toy_training(tmp_path, steps=100_000, checkpoint_every=100_000)
    launch = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2", BIN / "advkd-train")
    process = start(tmp_path, *launch, *options, CUDA_VISIBLE_DEVICES="")
    wait_until(lambda: _logged(tmp_path) > 20, process)
    launcher = psutil.Process(process.pid)
    for part in (*launcher.children(recursive=True), launcher):
        part.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=DEADLINE)
    assert "checkpoint saved" in error, error
    assert (tmp_path / "runs/toy/checkpoint/last.safetensors").is_file()


def _logged(folder: Path) -> int:
    try:
        return int(json.loads((folder / "runs/toy/log/metrics.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return 0
