"""The whole path through a real `dvc repro` on a clone, with the experiment `smoke`."""

import json
from pathlib import Path

import pytest

from tests.pipeline.clones import edit_config, new_clone, repro, run
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
    assert repro(clone) == ["evaluate"]
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
