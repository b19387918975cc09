"""Clones as people have them: the files that git tracks, the experiment `smoke`, and the commands run for real."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import ROOT

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}
SHIPPED = ("cache", "configs", "pipeline", "stages", ".dvc", ".dvcignore", ".gitignore", "dvc.yaml")


def _finish(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def run(folder: Path, *command: object) -> str:
    """Run a command that must succeed; what it says."""
    result = _finish(folder, *command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refused(folder: Path, *command: object) -> str:
    """Run a command that must fail; its one line that begins with `error:`."""
    result = _finish(folder, *command)
    assert result.returncode != 0, result.stdout + result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line


def repro(folder: Path, *arguments: str) -> list[str]:
    """Run `dvc repro`; the stages that ran."""
    output = run(folder, "dvc", "repro", *arguments)
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def edit_config(clone: Path, section: str, **values: object) -> None:
    """Change keys of a section of the experiment."""
    path = clone / "configs/smoke.yaml"
    config = yaml.safe_load(path.read_text())
    config[section].update(values)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def select_experiment(clone: Path, config: str, name: str) -> None:
    """Name another experiment in dvc.yaml's first lines."""
    text = (clone / "dvc.yaml").read_text()
    for key, value in (("config", config), ("name", name)):
        text, count = re.subn(rf"^      {key}: \S+$", f"      {key}: {value}", text, flags=re.MULTILINE)
        assert count == 1
    (clone / "dvc.yaml").write_text(text)


def new_clone(folder: Path, *more: str) -> Path:
    """What a user has after `git clone` and choosing the experiment, in a git repository of its own; `more` files."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SHIPPED, *more]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    select_experiment(folder, "smoke", "smoke")
    run(folder, "git", "init", "-q", "--initial-branch", "main")
    commit(folder, "start")
    return folder


def commit(clone: Path, message: str) -> None:
    """Commit everything that git doesn't ignore."""
    run(clone, "git", "add", "-A")
    run(clone, "git", "commit", "-qm", message)
