"""The whole path through a real `dvc repro` on a clone, with the experiment `smoke`."""

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.pipeline.clones import edit_config, new_clone, refused, repro, run, select_experiment
from tests.stores import tree


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = new_clone(tmp_path_factory.mktemp("clone") / "advkd")
    assert repro(folder) == ["teacher", "cache", "train", "evaluate"]
    return folder


def test_the_run_leaves_scores_pictures_and_a_clean_tree(clone: Path) -> None:
    assert run(clone, "git", "status", "--porcelain").split() == ["??", "dvc.lock"]
    metrics = json.loads(run(clone, "dvc", "metrics", "show", "--json"))[""]["data"]
    evaluation = metrics["runs/smoke/evaluation/metrics.json"]["data"]
    assert evaluation["frechet"]["student"] > 0 and evaluation["held_out_mse"] > 0
    for name in ("samples.png", "trajectory.png", "scores.png"):
        assert (clone / "runs/smoke/evaluation" / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((clone / "teachers/smoke/report.json").read_text())
    assert report["frechet_to_real"] > 0 and 0.5 < report["classifier_accuracy"] <= 1.0


def test_a_second_run_does_nothing(clone: Path) -> None:
    assert repro(clone) == []


def test_each_change_reruns_only_what_depends_on_it(clone: Path) -> None:
    edit_config(clone, "evaluate", set_size=48)
    assert repro(clone, "--dry") == ["evaluate"]
    store = tree(clone / "cache/smoke.zarr")
    edit_config(clone, "train", learning_rate=1.5e-3)
    assert repro(clone) == ["train", "evaluate"]
    assert tree(clone / "cache/smoke.zarr") == store
    assert json.loads((clone / "runs/smoke.old-1/run.json").read_text())["status"] == "complete"
    edit_config(clone, "cache", seeds="0:512")
    assert repro(clone) == ["cache", "train", "evaluate"]
    extended = tree(clone / "cache/smoke.zarr")
    assert {name for name in store if "/c/" in name or "blocks" in name} <= {
        name for name in extended if extended[name] == store.get(name)
    }


def test_a_changed_teacher_reruns_everything_and_sets_the_stale_store_aside(clone: Path) -> None:
    before = tree(clone / "cache/smoke.zarr")
    edit_config(clone, "pretrain", seed=7)
    assert repro(clone) == ["teacher", "cache", "train", "evaluate"]
    (stale,) = (clone / "cache").glob("smoke.stale-*.zarr")
    assert tree(stale) == before
    assert run(clone, "git", "status", "--porcelain").split() == ["M", "configs/smoke.yaml", "??", "dvc.lock"]
    assert repro(clone) == []


def test_an_experiment_whose_teacher_comes_from_elsewhere(clone: Path) -> None:
    """Stage 0 writes down where from, and then nothing is made twice."""
    experiment = yaml.safe_load((clone / "configs/smoke.yaml").read_text())
    experiment |= {"name": "other", "pretrain": None}
    (clone / "configs/elsewhere.yaml").write_text(yaml.safe_dump(experiment))
    select_experiment(clone, "elsewhere", "other")
    try:
        assert repro(clone) == ["teacher", "cache", "train", "evaluate"]
        note = json.loads((clone / "teachers/other/teacher.json").read_text())
        assert note["source"] == experiment["teacher"]["source"] == "teachers/smoke/pipeline"
        assert repro(clone) == []
    finally:
        select_experiment(clone, "smoke", "smoke")


def test_a_name_that_differs_from_the_files_is_said_at_once(clone: Path) -> None:
    select_experiment(clone, "smoke", "smoky")
    try:
        line = refused(clone, "dvc", "repro")
    finally:
        select_experiment(clone, "smoke", "smoke")
    assert "name: smoky" in line and "configs/smoke.yaml" in line and "`name: smoke`" in line
    assert not (clone / "teachers/smoky").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_can_be_selected(path: Path) -> None:
    """A section that DVC asks for and doesn't find ends `dvc repro`, even where a default would do."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    asked = {key for stage in stages for params in stage["params"] for keys in params.values() for key in keys}
    assert asked == {"name", "pretrain", "teacher", "sampler", "cache", "train", "evaluate"}
    assert asked == set(yaml.safe_load(path.read_text()))
