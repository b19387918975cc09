"""`--workers`: many processes, the same bytes; what happens to them costs one block at most."""

import copy
import os
import signal
import socket
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
import torch

from advkd.cache.care.verify import verify
from advkd.cache.format.store_paths import record_path
from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.teacher.build import cluster, tasks, workers
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.config import TeacherConfig
from tests.conftest import Invoke
from tests.pipeline.plans import SETTINGS, plan_for, with_other_weights
from tests.pipeline.processes import committed, finish, makers, num_built, start, wait_until, without_progress
from tests.stores import tree

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ctrl_c_and_a_killed_worker_cost_only_blocks_in_flight(tmp_path: Path, pipeline_folder: Path) -> None:
    store, steps, seeds = tmp_path / "toy.zarr", 100, "0:32"
    command = ("advkd-cache", "build", "--teacher", pipeline_folder, *SETTINGS, "--steps", steps, "--seeds", seeds)
    command += ("--workers", 2, "--out", store)
    process = start(tmp_path, *command, session=True)
    wait_until(lambda: len(committed(store)) >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert time.monotonic() - began < 10
    first, blank, stopped = without_progress(error)
    assert first.startswith("first block, seeds 0:4: x_0 mean") and not blank
    assert stopped.startswith("stopped; what was committed is kept. To resume: advkd-cache build --teacher")
    kept = committed(store)
    assert 2 <= len(kept) < 8

    process = start(tmp_path, *command)
    victim: list[psutil.Process] = []
    wait_until(lambda: victim.extend(making(process.pid, store)) or victim, process)
    victim[0].kill()
    before = {block: os.stat(store / record_path(block)).st_ino for block in committed(store)}
    assert len(before) < 8
    output, error = finish(process)
    assert without_progress(error) == []
    assert output.startswith(f"{store}: seeds {seeds}; built ")
    assert num_built(output) >= 8 - len(kept) - 1  # the killed one may have committed, and not said so
    assert before.items() <= {block: os.stat(store / record_path(block)).st_ino for block in range(8)}.items()
    assert process.pid not in {maker["pid"] for maker in makers(store).values()}
    build(plan_for(pipeline_folder, tmp_path / "whole.zarr", steps=steps, seeds=seeds))
    assert tree(store) == tree(tmp_path / "whole.zarr")
    assert verify(TrajectoryCache.open(store)).findings == ()


def making(pid: int, store: Path) -> list[psutil.Process]:
    """Workers that hold a block: they have the lock file open twice, for being there and for the block."""
    lock = str(store / "provenance/writer.lock")
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if sum(os.readlink(entry) == lock for entry in Path(f"/proc/{child.pid}/fd").iterdir()) >= 2:
                found.append(child)
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_while_workers_start_leaves_nothing_behind(
    tmp_path: Path, pipeline_folder: Path, number: signal.Signals
) -> None:
    for tenths in range(0, 10, 2):
        command = ("advkd-cache", "build", "--teacher", pipeline_folder, *SETTINGS, "--seeds", "0:40", "--workers", 2)
        process = start(tmp_path, *command, session=True)
        family = psutil.Process(process.pid)
        wait_until(lambda family=family: family.children(recursive=True), process)
        time.sleep(tenths / 10)
        children = family.children(recursive=True)
        os.killpg(process.pid, number)
        _, error = process.communicate(timeout=30)
        assert process.returncode == 130
        assert error.startswith("\nstopped; what was committed is kept.") and error.count("\n") == 2
        assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_useless_teacher_is_one_line_and_nothing_is_made(tmp_path: Path, pipeline_folder: Path) -> None:
    """One line also where dask's default port is in use."""
    with_other_weights(pipeline_folder, tmp_path / "nan", lambda weights: weights["conv_in.bias"].fill_(float("nan")))
    command = ("advkd-cache", "build", "--teacher", "nan", *SETTINGS, "--steps", 6, "--seeds", "0:40")
    with socket.socket() as other:
        with suppress(OSError):  # somebody has it already
            other.bind(("", 8787))
        process = start(tmp_path, *command, "--workers", 1, "--out", "toy.zarr")
        output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert error == (
        f"error: teacher {tmp_path / 'nan'}: x_0 of seeds 0:4 is not finite (NaN or infinite); check the checkpoint\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan"]


def test_workers_and_scheduler_are_given_one_at_a_time(invoke: Invoke) -> None:
    result = invoke(cache_command, "build", "--workers", 2, "--scheduler", "tcp://127.0.0.1:9")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "give one of them" in result.output


def test_local_workers_take_turns_at_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [tasks.worker_device(None, name) for name in range(6)] == [f"cuda:{n}" for n in (0, 1, 2, 3, 0, 1)]
    assert tasks.worker_device("cuda:2", 3) == "cuda:2"
    assert tasks.worker_device(None, "tcp://10.0.0.7:41235") is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert tasks.worker_device(None, 3) is None


def test_threads_are_shared_as_this_process_may_use_them(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, teacher = plan_for(pipeline_folder, tmp_path / "a.zarr"), TeacherConfig(source=str(pipeline_folder))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert [workers._request(plan, teacher, n, "", n).threads for n in (1, 4, 5, 40)] == [12, 3, 2, 1]
    assert workers._request(plan, teacher, None, "", 1000).threads is None


def test_workers_keep_memory_and_are_left_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask's settings cost over half of the time, and nobody else's workers are changed."""
    config: dict[str, Any] = {}

    def local_cluster(**options: Any) -> AbstractContextManager[None]:
        config.update(copy.deepcopy(dask.config.config["distributed"]))
        return nullcontext()

    monkeypatch.setattr("distributed.LocalCluster", local_cluster)
    before = copy.deepcopy(dask.config.config["distributed"])
    with cluster._local_cluster(2):
        environment = config["nanny"]["pre-spawn-environ"]
        assert environment == before["nanny"]["pre-spawn-environ"] | cluster._KEEP_MEMORY
    assert environment["MALLOC_TRIM_THRESHOLD_"] >= 1 << 30 and environment["OMP_NUM_THREADS"] == 1
    assert (config["admin"]["tick"]["interval"], config["worker"]["profile"]["enabled"]) == ("500ms", False)
    assert dask.config.config["distributed"] == before
