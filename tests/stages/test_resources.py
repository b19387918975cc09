"""Memory and disk: a build says what it lacks before it begins, and keeps what is committed."""

import errno
import shutil
from pathlib import Path

import pytest

from advkd.cache.errors import UsageError
from advkd.cache.write.writer import CacheWriter
from advkd.stages.teacher.build import resources
from advkd.stages.teacher.build.build import build
from tests.stages.plans import plan_for


def test_blocks_that_do_not_fit_into_memory_are_refused_with_a_size_that_does(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million seeds of 8×8 in three states are 1.6 GB."""
    monkeypatch.setattr(resources, "memory_limit", lambda: resources.SPARE_MEMORY + 10**9)
    plan = plan_for(pipeline_folder, tmp_path / "a.zarr", block_size=1 << 20)
    with pytest.raises(UsageError, match=r"need \d+\.\d\d GB of memory .* 1\.00 GB are available") as refused:
        build(plan)
    assert not (tmp_path / "a.zarr").exists()
    size = int(str(refused.value).split("--block-size ")[1].split()[0])
    resources.check_memory(plan_for(pipeline_folder, tmp_path / "a.zarr", block_size=size))
    with pytest.raises(UsageError):
        resources.check_memory(plan_for(pipeline_folder, tmp_path / "a.zarr", block_size=2 * size))


def test_each_worker_needs_memory_for_a_block_and_its_copies(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(pipeline_folder, tmp_path / "a.zarr", block_size=1 << 20)
    one = resources.memory_bytes(plan, 1)
    assert resources.memory_bytes(plan) == one + plan.block_bytes
    assert resources.memory_bytes(plan, 8) == 8 * one
    monkeypatch.setattr(resources, "memory_limit", lambda: resources.SPARE_MEMORY + one)
    resources.check_memory(plan, 1)
    for workers in (None, 2):
        with pytest.raises(UsageError, match=r"--block-size \d+ would fit"):
            resources.check_memory(plan, workers)
    monkeypatch.setattr(resources, "memory_limit", lambda: resources.SPARE_MEMORY)
    with pytest.raises(UsageError, match=r"no --block-size would fit"):
        resources.check_memory(plan, 1)


def test_memory_is_what_this_process_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_LIMIT_FILES", (str(tmp_path / "absent"), str(tmp_path / "limit")))
    machine = resources.memory_limit()
    assert machine > 1 << 28
    for text, expected in (("max\n", machine), ("1048576\n", 1 << 20), (f"{1 << 62}\n", machine)):
        (tmp_path / "limit").write_text(text)
        assert resources.memory_limit() == expected


def test_a_full_disk_is_seen_before_anything_is_written(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UsageError, match=r"needs 0\.00 GB more, 0\.00 GB are free"):
        build(plan_for(pipeline_folder, tmp_path / "a.zarr"))
    assert not (tmp_path / "a.zarr").exists()


def test_a_disk_that_fills_up_keeps_what_is_committed(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "a.zarr"
    original = CacheWriter.commit

    def full(self: CacheWriter, block: int, *rest: object, **options: object) -> object:
        if block == 1:
            raise OSError(errno.ENOSPC, "No space left on device", "states/0002/c/1/0/0/0")
        return original(self, block, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "commit", full)
        with pytest.raises(OSError, match="No space left"):
            build(plan_for(pipeline_folder, store))
    plan = plan_for(pipeline_folder, store)
    assert plan.writer.missing(plan.seeds) == [1, 2]
