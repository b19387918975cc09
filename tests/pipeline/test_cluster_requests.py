"""What goes to a cluster's workers and comes back, without a cluster: requests, devices, errors."""

import dataclasses
import pickle
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import KilledWorker

from advkd.cache import errors
from advkd.cache.errors import AdvkdError, CacheError
from advkd.stages.teacher.build import tasks, workers
from advkd.stages.teacher.build.plan import Plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from tests.pipeline.plans import plan_for


class UntravelledError(Exception):
    """A cause that can't be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_every_error_travels(name: str) -> None:
    kind = getattr(errors, name)

    @tasks.without_retry
    def failing() -> None:
        raise kind("what was found") from UntravelledError()

    told = pickle.loads(pickle.dumps(failing()))
    assert (type(told), str(told)) == (kind, "what was found")
    assert isinstance(told, AdvkdError)


def test_a_clusters_workers_use_the_device_that_they_were_given(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dask-cuda lets each of its workers, named 0, 1, …, see its own GPU first: taking turns again would double up."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(tasks, "_worker_name", lambda: 1)
    wanted: list[str | None] = []

    def planned(teacher: TeacherConfig, sampler: SamplerConfig, config: CacheConfig, store: Path) -> Plan:
        wanted.append(config.device)
        return plan

    monkeypatch.setattr(tasks, "make_plan", planned)
    plan = plan_for(pipeline_folder, tmp_path / "a.zarr")
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, device=None))
    for local in (None, 1):
        tasks._plans.clear()
        request = workers._request(plan, TeacherConfig(source=str(pipeline_folder)), local, "", 4)
        assert tasks._plan(request) is plan
    assert wanted == [None, "cuda:1"]


def test_accepting_the_range_later_reaches_a_worker_that_has_loaded_the_teacher(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_plans", {})
    teacher = TeacherConfig(source=str(pipeline_folder))
    before, after = (
        tasks._plan(
            workers._request(plan_for(pipeline_folder, tmp_path / "a.zarr", accept_range=accept), teacher, None, "", 1)
        )
        for accept in (False, True)
    )
    assert (before.config.accept_range, after.config.accept_range) == (False, True)
    assert before.teacher is after.teacher


def test_workers_get_absolute_paths(pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(pipeline_folder, tmp_path / "a.zarr")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("mine", "~/mine"):
        teacher = workers._request(plan, TeacherConfig(source=path, scheduler=path), None, "", 1).teacher
        assert (teacher.source, teacher.scheduler) == (str(tmp_path / "mine"),) * 2
    assert workers._request(plan, TeacherConfig(source="some/teacher"), None, "", 1).teacher.source == "some/teacher"


def test_a_large_cluster_does_not_drown_in_progress(pipeline_folder: Path, tmp_path: Path) -> None:
    plan, teacher = plan_for(pipeline_folder, tmp_path / "a.zarr"), TeacherConfig(source=str(pipeline_folder))
    seconds = {n: workers._request(plan, teacher, None, "", n).report_seconds for n in (0, 2, 50, 1000)}
    assert seconds == {0: 0.5, 2: 0.5, 50: 0.5, 1000: 10.0}


class Broken:
    """A future that ends badly."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def result(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            KilledWorker("block-1", SimpleNamespace(address="tcp://a:1"), 3),
            "workers died repeatedly while making block 1 .out of memory",
        ),
        (CancelledError("block-1"), "the dask scheduler went away"),
        (ModuleNotFoundError("No module named 'advkd'"), "a worker lacks a package .No module named 'advkd'"),
    ],
)
def test_what_a_cluster_dies_of_is_named(error: BaseException, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        workers._result(Broken(error), 1)
