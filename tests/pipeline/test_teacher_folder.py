"""A teacher's folder is made by one process, and never in place of something else."""

from pathlib import Path

import pytest
from filelock import FileLock

from advkd.cache.errors import UsageError
from advkd.pipeline.cli.teacher import main as teacher_command
from advkd.stages.pretrain.run import check_folder
from tests.conftest import Invoke

TEACHER = "teachers/smoke"


def test_a_teacher_is_made_by_one_process_at_a_time(tmp_path: Path, invoke: Invoke) -> None:
    """One that a killed `dvc repro` left behind is not disturbed, nor what it makes mixed with another's."""
    lock = tmp_path / f"{TEACHER}.partial/writer.lock"
    lock.parent.mkdir(parents=True)
    (lock.parent / "pipeline").mkdir()
    with FileLock(lock):
        result = invoke(teacher_command, "--config", "smoke")
    assert result.exit_code == 1 and f"another process is making {TEACHER}: wait for it" in result.stderr
    assert (lock.parent / "pipeline").is_dir()


def test_only_the_note_of_a_teacher_from_elsewhere_gives_way(tmp_path: Path) -> None:
    """Where DVC no longer clears the folder: somebody's own pipeline beside the note stays."""
    (tmp_path / "teacher.json").touch()
    check_folder(tmp_path)
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(UsageError, match="something other than an earlier teacher"):
        check_folder(tmp_path)
