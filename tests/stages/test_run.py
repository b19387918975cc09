"""A run's folder: whose it is, and what is refused in it."""

import dataclasses
import json
from pathlib import Path

import pytest

from advkd.cache.errors import TrainingError, UsageError
from advkd.stages.student.run import Run
from advkd.stages.student.train import train
from tests.stages.test_train import UNROLLED
from tests.stores import write_store


def test_another_run_in_the_folder_is_left_alone(store: Path, tmp_path: Path) -> None:
    train(store, UNROLLED, tmp_path / "run", max_steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = dataclasses.replace(UNROLLED, learning_rate=1.0)
    with pytest.raises(UsageError, match=r"another run \(config.learning_rate: 0.001 → 1.0\)"):
        train(store, other, tmp_path / "run")
    write_store(tmp_path / "other.zarr", "0:128", noise={"rule": "philox4x64-as241-v1", "root_seed": 9})
    with pytest.raises(UsageError, match=r"another run \(cache"):
        train(tmp_path / "other.zarr", UNROLLED, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    train(store, other, tmp_path / "run", max_steps=1, on_mismatch="set-aside")
    assert json.loads((tmp_path / "run.old-1/run.json").read_text())["identity"]["config"]["learning_rate"] == 0.001
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    for on_mismatch in ("stop", "set-aside"):
        with pytest.raises(UsageError, match=r"mine holds files but no run\.json"):
            train(store, UNROLLED, tmp_path / "mine", on_mismatch=on_mismatch)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no run"):
        train(store, UNROLLED, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_that_strayed_in_is_refused(store: Path, tmp_path: Path) -> None:
    train(store, UNROLLED, tmp_path / "run", max_steps=4)
    train(store, dataclasses.replace(UNROLLED, seed=3), tmp_path / "other", max_steps=4)
    Run(tmp_path / "run").checkpoint.write_bytes(Run(tmp_path / "other").checkpoint.read_bytes())
    with pytest.raises(TrainingError, match="is the checkpoint of another run"):
        train(store, UNROLLED, tmp_path / "run")


def test_a_second_trainer_is_told(store: Path, tmp_path: Path) -> None:
    train(store, UNROLLED, tmp_path / "run", max_steps=2)
    with Run(tmp_path / "run")._held(), pytest.raises(TrainingError, match="another process is training"):
        train(store, UNROLLED, tmp_path / "run")


@pytest.mark.parametrize("text", ["{}", '{"format": 1, "identity": {}}', "[" * 10_000, "[1]", "null"])
def test_a_foreign_run_json_is_refused(store: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(text)
    with pytest.raises(TrainingError, match="is no run"):
        train(store, UNROLLED, tmp_path / "run", on_mismatch="set-aside")


def test_a_checkpoint_of_another_structure_is_refused(store: Path, tmp_path: Path) -> None:
    train(store, UNROLLED, tmp_path / "run", max_steps=4)
    run = Run(tmp_path / "run")
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:500])
    with pytest.raises(TrainingError, match="can't be read as a checkpoint"):
        train(store, UNROLLED, tmp_path / "run")
