"""The whole path through a real `dvc repro` on a clone, with the experiment `smoke`."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.pipeline.readme import readme_commands
from tests.stores import tree

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}
SHIPPED = ("cache", "configs", "pipeline", "stages", ".dvc", ".dvcignore", ".gitignore", "dvc.yaml")


def run(folder: Path, *command: object) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def repro(folder: Path) -> list[str]:
    """Run `dvc repro`; the stages that ran."""
    output = run(folder, "dvc", "repro")
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def edit_config(clone: Path, section: str, key: str, value: object) -> None:
    path = clone / "configs/smoke.yaml"
    config = yaml.safe_load(path.read_text())
    config[section][key] = value
    path.write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has after `git clone` and choosing the experiment: the files that git tracks."""
    folder = tmp_path_factory.mktemp("clone") / "advkd"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SHIPPED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, tracked.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    dvc_yaml = folder / "dvc.yaml"
    text = dvc_yaml.read_text()
    assert text.count("config: digits\n") == text.count("name: digits\n") == 1
    dvc_yaml.write_text(text.replace("config: digits\n", "config: smoke\n").replace("name: digits\n", "name: smoke\n"))
    run(folder, "git", "init", "-q")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "start")
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
    edit_config(clone, "evaluate", "set_size", 48)
    assert repro(clone) == ["evaluate"]
    store = tree(clone / "cache/smoke.zarr")
    edit_config(clone, "train", "learning_rate", 1.5e-3)
    assert repro(clone) == ["train", "evaluate"]
    assert tree(clone / "cache/smoke.zarr") == store
    assert json.loads((clone / "runs/smoke.old-1/run.json").read_text())["status"] == "complete"
    edit_config(clone, "cache", "seeds", "0:512")
    assert repro(clone) == ["cache", "train", "evaluate"]
    extended = tree(clone / "cache/smoke.zarr")
    assert {name for name in store if "/c/" in name or "blocks" in name} <= {
        name for name in extended if extended[name] == store.get(name)
    }


def test_a_changed_teacher_reruns_everything_and_sets_the_stale_store_aside(clone: Path) -> None:
    before = tree(clone / "cache/smoke.zarr")
    edit_config(clone, "pretrain", "seed", 7)
    assert repro(clone) == ["teacher", "cache", "train", "evaluate"]
    (stale,) = (clone / "cache").glob("smoke.stale-*.zarr")
    assert tree(stale) == before
    assert run(clone, "git", "status", "--porcelain").split() == ["M", "configs/smoke.yaml", "??", "dvc.lock"]
    assert repro(clone) == []


def test_a_team_shares_the_cache_as_the_readme_says(clone: Path, tmp_path: Path) -> None:
    """One pushes; another clones, pulls only the cache, and trains without the teacher's files."""
    publish, use = readme_commands("Sharing a cache")
    (tmp_path / "remote").mkdir()
    run(clone, "git", "add", "-A")
    run(clone, "git", "commit", "-qm", "built")
    for command in publish:
        run(clone, *shlex.split(command.replace("/mnt/shared/advkd", str(tmp_path / "remote"))))
    run(clone, "git", "commit", "-qam", "shared")
    run(tmp_path, "git", "clone", "-q", clone, "colleague")
    colleague = tmp_path / "colleague"
    assert use[0] == "dvc pull cache/digits.zarr"
    run(colleague, *shlex.split(use[0].replace("digits", "smoke")))
    assert tree(colleague / "cache/smoke.zarr") == tree(clone / "cache/smoke.zarr")
    assert not (colleague / "teachers").exists()
    output = run(colleague, "advkd-train", "--cache", "cache/smoke.zarr", "--config", "smoke", "--max-steps", "5")
    assert output.startswith("runs/smoke: step 5 of 40")
    shutil.rmtree(colleague / "runs")
    for command in use[1:]:
        run(colleague, *shlex.split(command))
    assert json.loads((colleague / "runs/smoke/run.json").read_text())["status"] == "complete"
