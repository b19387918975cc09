"""Experiment trackers: real ones get what DVCLive gets, in one run however often training stops."""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from advkd.cache.errors import ConfigError, TrainingError, UsageError
from advkd.stages.reporter import SilentReporter
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.train import train
from advkd.stages.student.training.trackers import flat
from advkd.stages.student.unrolled.program import UnrolledProgram
from tests.stages.test_train import UNROLLED, outcome
from tests.stores import write_store

TRACKERS = ("tensorboard", "wandb", "trackio")


def tracked(*names: str) -> TrainConfig:
    return dataclasses.replace(UNROLLED, trackers=[*names])


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without trackers, and one with all of them that was killed at step 7 of 12; its checkpoint is of step 4."""
    folder = tmp_path_factory.mktemp("trackers")
    write_store(folder / "toy.zarr", "0:256")
    original = UnrolledProgram.step

    def crash(self: UnrolledProgram, batch: Any, phase: int, step: int) -> object:
        if step == 7:
            raise SystemError("killed")
        return original(self, batch, phase, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        train(folder / "toy.zarr", UNROLLED, folder / "plain")
        with pytest.MonkeyPatch.context() as killed:
            killed.setattr(UnrolledProgram, "step", crash)
            with pytest.raises(SystemError):
                train(folder / "toy.zarr", tracked(*TRACKERS), folder / "run")
        train(folder / "toy.zarr", tracked(*TRACKERS), folder / "run")
    return folder


def table(run: Path, name: str) -> dict[int, float]:
    with (run / f"log/plots/metrics/{name}.tsv").open() as file:
        return {int(row["step"]): float(row[name.split("/")[-1]]) for row in csv.DictReader(file, delimiter="\t")}


def test_trackers_change_nothing(runs: Path) -> None:
    assert outcome(runs / "run") == outcome(runs / "plain")
    ours, theirs = (json.loads((runs / name / "run.json").read_text()) for name in ("run", "plain"))
    assert ours["identity"] == theirs["identity"]


def test_tensorboard_has_one_run_without_gaps_or_repeated_rows(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "run/log/tensorboard"))
    events.Reload()
    for name in ("train/loss", "held_out/mse"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(step, pytest.approx(value)) for step, value in table(runs / "run", name).items()]
    assert [event.step for event in events.Images("preview")] == [6, 12]
    with Image.open(runs / "run/preview/step-000012.png") as preview:
        assert {(event.width, event.height) for event in events.Images("preview")} == {preview.size}
    settings = [path.read_text() for path in (runs / "run/log/tensorboard").rglob("hparams.yml")]
    assert len(settings) == 1 and "config.student.width: 8" in settings[0]


def test_wandb_goes_on_in_the_same_run(runs: Path) -> None:
    parts = sorted((runs / "run/log/wandb").glob("offline-run-*"))
    run_id = json.loads((runs / "run/log/trackers.json").read_text())["wandb"]
    assert len(parts) == 2 and all(part.name.endswith(f"-{run_id}") for part in parts)
    for part, step in zip(parts, (6, 12), strict=True):
        assert b"train/loss" in (part / f"run-{run_id}.wandb").read_bytes()
        assert [*(part / "files/media/images").glob(f"preview_{step}_*.png")]


def test_trackio_goes_on_in_the_same_run(runs: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("advkd")
    rows = SQLiteStorage.get_logs("advkd", name)
    logged = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert logged == pytest.approx(table(runs / "run", "train/loss"))
    assert {row["step"] for row in rows if "preview" in row} == {6, 12}
    assert SQLiteStorage.get_run_config("advkd", name)["config.student.width"] == 8


def test_a_tracker_that_is_not_installed_is_one_line_before_training(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UsageError, match=r"^train.trackers: wandb isn't installed: `pip install wandb`, or take it off"
    ):
        train(store, tracked("tensorboard", "wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"train.trackers: 'abacus' is none of tensorboard, wandb, trackio"):
        tracked("abacus")


def test_a_tracker_that_fails_ends_no_training(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say, at the second row."""
    from accelerate.tracking import TensorBoardTracker

    def fail(self: TensorBoardTracker, values: dict[str, float], step: int) -> None:
        if step > 2:
            raise OSError("no space left")

    train(store, UNROLLED, tmp_path / "plain")
    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    listener = Listener()
    assert train(store, tracked("tensorboard"), tmp_path / "run", reporter=listener).complete
    assert outcome(tmp_path / "run") == outcome(tmp_path / "plain")
    assert [line for line in listener.lines if "failed" in line] == [
        "tensorboard failed and gets nothing more (OSError: no space left); training goes on"
    ]


def test_a_tracker_that_refuses_to_start_stops_before_training(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wandb without a login, where there is no terminal to ask at."""
    from accelerate.tracking import TensorBoardTracker

    def refuse(self: TensorBoardTracker) -> None:
        raise PermissionError("log in first\nby some long text")

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, "start", refuse)
        with pytest.raises(
            TrainingError, match=r"tensorboard didn't start \(PermissionError: log in first\): set it up"
        ):
            train(store, tracked("tensorboard"), tmp_path / "run")
    assert train(store, UNROLLED, tmp_path / "run").complete  # without it, the same run goes on


def test_settings_are_flat_scalars() -> None:
    assert flat({"a": {"b": 1, "c": None}, "d": [1, "x"], "e": True}) == {
        "a.b": 1,
        "a.c": "null",
        "d": '[1, "x"]',
        "e": True,
    }
