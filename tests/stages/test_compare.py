"""Runs side by side: paired differences on the same seeds, and nothing compared that can't be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from advkd.cache.errors import TrainingError, UsageError
from advkd.pipeline.cli.compare import main as compare_command
from advkd.pipeline.config import load_experiment
from advkd.stages.evaluate.compare import read_runs, table_lines
from advkd.stages.student.train import train
from tests.conftest import Invoke
from tests.stores import write_store

LADDER = Path("configs/ablation")


def write_scores(run: Path, distances: list[float], **protocol: Any) -> Path:
    value = {
        "student": {"cache": {"fingerprint": "ab" * 32}},
        "protocol": {"features": "small-cnn", "num_sets": 3, "set_size": 64, "num_reference": 900} | protocol,
        "held_out_mse": 0.0123,
        "samplers": {"student": {"frechet": distances}, "teacher (ddim 50)": {"frechet": [3.0, 4.0, 5.0]}},
        "cost": {"student": {"deployed_parameters": 1234, "macs": 2.5e6}},
    }
    (run / "evaluation").mkdir(parents=True)
    (run / "evaluation/scores.json").write_text(json.dumps(value))
    return run


def test_differences_are_paired(tmp_path: Path, invoke: Invoke) -> None:
    """Sets differ by far more than the runs do, and still the second is ahead."""
    one = write_scores(tmp_path / "one", [10.0, 20.0, 30.0])
    two = write_scores(tmp_path / "two", [8.9, 19.0, 29.1])
    first, second = read_runs([one, two])
    assert first.gain is None and second.gain is not None
    assert second.gain.mean == pytest.approx(-1.0)
    assert second.gain.excludes_zero
    lines = table_lines([first, second])
    assert "| one | 20.0 ± 10.0 |  | 0.0123 | 1,234 | 2.5 |" in lines
    assert "| two | 19.0 ± 10.1 | -1.0 [-1.2, -0.8] | 0.0123 | 1,234 | 2.5 |" in lines
    assert "| the teacher itself | 4.0 ± 1.0 | | | | |" in lines
    result = invoke(compare_command, one, two, "--out", tmp_path / "ladder")
    assert result.exit_code == 0
    assert (tmp_path / "ladder.md").read_text().splitlines() == lines
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    one = write_scores(tmp_path / "one", [1.0, 2.0, 3.0])
    other = write_scores(tmp_path / "other", [1.0, 2.0, 3.0], set_size=128)
    with pytest.raises(UsageError, match=r"one and .*other .*\(set_size: 64 → 128\)"):
        read_runs([one, other])
    otherwise = write_scores(tmp_path / "otherwise", [1.0, 2.0, 3.0], features_sha256="ab" * 32)
    with pytest.raises(UsageError, match="features_sha256: "):
        read_runs([one, otherwise])
    (other / "student").mkdir()
    (other / "student/model.safetensors").write_bytes(b"weights of a later step")
    with pytest.raises(TrainingError, match=r"other .*`advkd-evaluate --run .*other"):
        read_runs([other])
    with pytest.raises(TrainingError, match=r"none was not evaluated .*`advkd-evaluate --run"):
        read_runs([tmp_path / "none"])
    again = write_scores(tmp_path / "again", [1.0, 2.0, 3.0], seed=1)
    with pytest.raises(UsageError, match="seed: 0 → 1"):
        read_runs([one, again])
    for malformed in ('{"protocol": 3}', "[]", '{"protocol": [], "samplers": []}'):
        (one / "evaluation/scores.json").write_text(malformed)
        with pytest.raises(TrainingError, match="is not what advkd-evaluate writes"):
            read_runs([one])
    (other / "evaluation/scores.json").write_text("[]")
    with pytest.raises(TrainingError, match="is not what advkd-evaluate writes"):
        read_runs([other])


def test_caches_are_compared_by_another_command(tmp_path: Path, invoke: Invoke) -> None:
    for name in ("a.zarr", "b.zarr"):
        write_store(tmp_path / name, "0:16")
    result = invoke(compare_command, "a.zarr", "b.zarr")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "a.zarr is a trajectory cache" in result.stderr and "advkd-cache diff" in result.stderr


def test_every_rung_of_the_ladder_trains(tmp_path: Path) -> None:
    """Each says one thing more than the one before; a few steps of each on a tiny cache."""
    store = tmp_path / "toy.zarr"
    write_store(store, "0:128")
    ladder = yaml.safe_load((LADDER / "dvc.yaml").read_text())["stages"]
    rungs = ladder["train"]["matrix"]["rung"]
    assert rungs == ladder["evaluate"]["matrix"]["rung"] == sorted(path.stem for path in LADDER.glob("[0-9]*.yaml"))
    for rung in rungs:
        assert f"runs/ablation/{rung} " in ladder["compare"]["cmd"]
        assert f"runs/ablation/{rung}/evaluation" in ladder["compare"]["deps"]
        experiment = load_experiment(LADDER / f"{rung}.yaml")
        assert experiment.name == f"ablation-{rung}"
        settings = dataclasses.replace(experiment.train, seeds=None)
        assert train(store, settings, tmp_path / rung, max_steps=2).step == 2
