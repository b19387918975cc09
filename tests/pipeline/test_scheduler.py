"""`--scheduler`: a dask cluster that is there already builds the same bytes, and what it dies of is named."""

import dataclasses
import errno
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from advkd.cache import errors
from advkd.cache.errors import MismatchError
from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.teacher.build import cluster as clusters
from advkd.stages.teacher.build import tasks
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import Plan
from advkd.stages.teacher.build.workers import build_with_workers
from advkd.stages.teacher.config import TeacherConfig
from tests.cache.labels import add_arrays
from tests.conftest import ROOT, Invoke
from tests.pipeline.plans import SETTINGS, Listener, plan_for, with_other_weights
from tests.pipeline.processes import BIN, ENVIRONMENT, committed, makers, wait_until
from tests.stores import tree

pytestmark = pytest.mark.usefixtures("one_thread")


class DaskProcesses:
    """A dask cluster by dask's own commands."""

    def __init__(self, folder: Path, *threads: str) -> None:
        self.folder = folder
        self.threads = threads
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> str:
        file = self.folder / "scheduler.json"
        self._start("scheduler", "--scheduler-file", file, "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        for number in self.threads:
            options = ("--nthreads", number, "--memory-limit", "0", "--no-nanny", "--no-dashboard")
            self._start("worker", "--scheduler-file", file, *options)
        wait_until(file.exists)
        self.address = str(json.loads(file.read_text())["address"])
        return self.address

    def _start(self, *command: object) -> None:
        with (self.folder / "log").open("ab") as log:
            environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
            self.running.append(
                subprocess.Popen(
                    [BIN / "dask", *map(str, command)], cwd=self.folder, env=environment, stdout=log, stderr=log
                )
            )

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.running):
            process.kill()
            process.wait(60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("cluster")
    with DaskProcesses(folder, "1", "2") as address:
        yield address


def count_samples() -> None:
    """Runs in a worker: from now on, teachers that are loaded and blocks that are sampled are counted."""
    tasks._plans.clear()
    tasks.counted = counted = []  # type: ignore[attr-defined]
    for name in ("make_plan", "sample_block"):
        original = getattr(tasks, name)
        original = getattr(original, "original", original)

        def counting(*args: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            counted.append("loaded" if name == "make_plan" else f"{args[0].store.stem} {args[1]}")
            return original(*args)

        counting.original = original  # type: ignore[attr-defined]
        setattr(tasks, name, counting)


def samples() -> list[str]:
    """Runs in a worker."""
    return list(tasks.counted)  # type: ignore[attr-defined]


def test_a_cluster_builds_the_same_bytes_and_loads_each_teacher_once(
    cluster: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    build(plan_for(pipeline_folder, tmp_path / "whole.zarr"))
    reporter = Listener()
    with Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2)
        client.run(count_samples)
        store = tmp_path / "toy.zarr"
        built = build_with_workers(
            plan_for(pipeline_folder, store),
            TeacherConfig(source=str(pipeline_folder)),
            scheduler=cluster,
            reporter=reporter,
            command="a cluster",
        )
        counted = client.run(samples).values()
    assert (built.num_blocks, built.num_present, built.preview) == (10, 0, tmp_path / "toy.png")
    assert tree(store) == tree(tmp_path / "whole.zarr")
    assert [seen.count("loaded") for seen in counted] == [1, 1]
    made = [entry for seen in counted for entry in seen if entry != "loaded"]
    assert sorted(made) == [f"toy {block}" for block in range(1, 10)]  # the first is made by a build of its own
    assert {maker["command"] for maker in makers(store).values()} == {"a cluster"}
    assert len({maker["pid"] for maker in makers(store).values()}) == 2
    assert reporter.heard[0] == "start cache 0 of 240"
    assert reporter.heard[1].startswith("first block, seeds 0:4: x_0 mean")
    assert (reporter.heard[2:], reporter.done, reporter.most) == (["finish"], 240, 240)


def test_two_commands_on_one_cluster_divide_the_blocks(cluster: str, pipeline_folder: Path, tmp_path: Path) -> None:
    """Each has its own tasks, though they ask the same."""
    build(plan_for(pipeline_folder, tmp_path / "whole.zarr"))
    plans = [plan_for(pipeline_folder, tmp_path / "toy.zarr") for _ in range(2)]
    teacher = TeacherConfig(source=str(pipeline_folder))
    with ThreadPoolExecutor() as executor:
        running = [executor.submit(build_with_workers, plan, teacher, scheduler=cluster) for plan in plans]
    assert sum(future.result().num_blocks for future in running) == 10
    assert tree(tmp_path / "toy.zarr") == tree(tmp_path / "whole.zarr")


def test_errors_in_workers_are_told_as_in_one_process(
    cluster: str, pipeline_folder: Path, tmp_path: Path, invoke: Invoke
) -> None:
    def zero(weights: dict[str, Any]) -> None:
        weights["conv_out.weight"].zero_()
        weights["conv_out.bias"].zero_()

    constant = with_other_weights(pipeline_folder, tmp_path / "constant", zero)
    scheduler = constant / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"sample"'))
    store = tmp_path / "toy.zarr"
    build(plan_for(pipeline_folder, store, steps=10))
    before = tree(store)
    arguments = ("build", "--teacher", constant, *SETTINGS, "--steps", 10, "--seeds", "0:40", "--out", store)
    moving = (*arguments, "--on-mismatch", "set-aside")
    here, there = invoke(cache_command, *moving), invoke(cache_command, *moving, "--scheduler", cluster)
    assert here.output == there.output
    assert there.output.startswith(f"error: teacher {constant}: x_0 is constant over 4 seeds (mean +0.000")
    assert (here.exit_code, there.exit_code) == (1, 1)
    assert tree(store) == before
    shutil.rmtree(store)
    assert invoke(cache_command, *arguments, "--scheduler", cluster).exit_code == 1
    assert not list(tmp_path.glob("toy.zarr*"))


def test_an_error_that_would_come_again_is_not_tried_again(cluster: str, pipeline_folder: Path, tmp_path: Path) -> None:
    def fail(kind: str) -> None:
        count_samples()
        original = tasks.sample_block

        def failing(plan: Plan, block: int, *rest: Any) -> Any:
            states = original(plan, block, *rest)
            if block == 5:
                if kind == "full":
                    raise OSError(errno.ENOSPC, "No space left on device", "states/0002")
                if kind == "useless":
                    raise errors.TeacherError("a useless block")
                if kind == "flaky" and not tmp_path.joinpath("failed").exists():
                    tmp_path.joinpath("failed").touch()
                    raise RuntimeError("a hiccup")
            return states

        failing.original = original.original  # type: ignore[attr-defined]
        tasks.sample_block = failing

    def attempt(kind: str) -> None:
        client.run(fail, kind)
        plan = plan_for(pipeline_folder, tmp_path / f"{kind}.zarr", seeds="0:32")
        build_with_workers(plan, TeacherConfig(source=str(pipeline_folder)), scheduler=cluster)

    def tries(kind: str) -> int:
        return sum(seen.count(f"{kind} 5") for seen in client.run(samples).values())

    with Client(cluster, set_as_default=False) as client:
        with pytest.raises(errors.TeacherError, match=r"^a useless block$"):
            attempt("useless")
        assert tries("useless") == 1
        with pytest.raises(OSError, match="No space left on device: 'states/0002'"):
            attempt("full")
        assert tries("full") == 1
        attempt("flaky")
        assert tries("flaky") == 2
        assert committed(tmp_path / "flaky.zarr") == list(range(8))
        client.run(count_samples)


def test_a_cluster_with_another_teacher_is_refused(cluster: str, pipeline_folder: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(pipeline_folder, tmp_path / "teacher")
    plan = plan_for(teacher, tmp_path / "toy.zarr")
    with_other_weights(pipeline_folder, teacher, lambda weights: weights["conv_out.bias"].add_(0.1))
    with pytest.raises(MismatchError, match=f"a worker's teacher .* expected {plan.recipe.fingerprint[:12]}"):
        build_with_workers(plan, TeacherConfig(source=str(teacher)), scheduler=cluster)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_scheduler_that_goes_away_is_one_line(
    tmp_path: Path, pipeline_folder: Path, invoke: Invoke, begun: bool
) -> None:
    if begun:
        build(plan_for(pipeline_folder, tmp_path / "toy.zarr", seeds="0:4"))
    alone = DaskProcesses(tmp_path)
    with alone as address:
        arguments = ("build", "--teacher", pipeline_folder, *SETTINGS, "--steps", 6, "--seeds", "0:40")

        def stop() -> None:
            with Client(address, set_as_default=False) as watching:
                wait_until(lambda: watching.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))
            alone.running[0].kill()

        killer = threading.Thread(target=stop)
        killer.start()
        result = invoke(cache_command, *arguments, "--out", tmp_path / "toy.zarr", "--scheduler", address)
        killer.join()
    assert result.exit_code == 1
    assert result.output == (
        f"no worker has joined the cluster at {address} yet; the build begins when one does\n"
        "error: the dask scheduler went away; what was committed is kept: run the command again once it is back\n"
    )
    assert committed(tmp_path / "toy.zarr") == ([0] if begun else [])


def test_an_address_where_no_scheduler_answers_is_named(
    pipeline_folder: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 0.5)
    arguments = ("build", "--teacher", pipeline_folder, *SETTINGS, "--steps", 6, "--scheduler")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls and says nothing
        taken = silent.getsockname()[1]
        addresses = [f"tcp://127.0.0.1:{taken}", "tcp://127.0.0.1:9", "nowhere", "foo://127.0.0.1:8786"]
        for address in addresses:
            began = time.monotonic()
            result = invoke(cache_command, *arguments, address)
            assert result.exit_code == 2
            assert result.output.startswith(f"error: no dask scheduler answers at {address} (")
            assert result.output.count("\n") == 1
            assert time.monotonic() - began < 5


def test_a_device_that_only_the_workers_have_is_theirs_to_find(
    cluster: str, pipeline_folder: Path, tmp_path: Path, invoke: Invoke
) -> None:
    arguments = ("build", "--teacher", pipeline_folder, *SETTINGS, "--steps", 6, "--device", "cuda:7", "--out", "a")
    here, there = invoke(cache_command, *arguments), invoke(cache_command, *arguments, "--scheduler", cluster)
    assert (here.exit_code, there.exit_code) == (2, 2)
    assert "device 'cuda:7'" in here.output
    assert here.output == there.output  # said by a worker


def test_a_store_of_older_rules_is_extended_by_workers_with_one_warning(
    cluster: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    build(plan_for(pipeline_folder, tmp_path / "toy.zarr", seeds="0:4"))
    plan = dataclasses.replace(plan_for(pipeline_folder, tmp_path / "toy.zarr"), older_rules=("it rounds",))
    for num_blocks in (9, 0):
        reporter = Listener()
        built = build_with_workers(
            plan, TeacherConfig(source=str(pipeline_folder)), scheduler=cluster, reporter=reporter
        )
        assert built.num_blocks == num_blocks
        assert sum("it rounds" in line for line in reporter.heard) == 1


def test_workers_set_a_store_aside_that_differs_in_further_arrays_alone(
    cluster: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    build(plan_for(pipeline_folder, tmp_path / "toy.zarr", seeds="0:16"))
    before = tree(tmp_path / "toy.zarr")
    plan = plan_for(pipeline_folder, tmp_path / "toy.zarr", seeds="0:16")
    add_arrays(tmp_path / "toy.zarr")
    built = build_with_workers(
        plan, TeacherConfig(source=str(pipeline_folder)), scheduler=cluster, on_mismatch="set-aside"
    )
    assert built.num_blocks == 4 and built.set_aside is not None
    assert tree(tmp_path / "toy.zarr") == before
