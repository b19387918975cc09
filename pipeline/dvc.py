"""What dvc.lock says was made before: so that DVC is never tempted into making something expensive again.

On a clone that pulled only part of what a team shares, DVC finds outputs missing and runs the stages that made them:
hours of sampling, again. Under DVC, a stage whose output was made before by the very same request and is merely not
here says how to fetch it instead. `rebuild: true` in the experiment's configuration is the yes that lets it go on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml

from advkd.cache.durable import holds_something
from advkd.cache.errors import UsageError
from advkd.pipeline.config import Experiment

OnMismatch = Literal["stop", "set-aside"]


def check_not_again(stage: str, out: Path, experiment: Experiment, on_mismatch: OnMismatch) -> OnMismatch:
    """Whether a DVC stage may make its output, and what to do with one of another recipe; outside DVC, as asked.

    Args:
        stage: name of the stage, as in dvc.yaml.
        out: its output.
        experiment: what says yes.
        on_mismatch: as the command was told.

    Raises:
        UsageError: it was made before, is merely not here, and nobody said yes.
    """
    root = os.environ.get("DVC_ROOT")
    if root is None or os.environ.get("DVC_STAGE", "").split(":")[-1] != stage or experiment.rebuild:
        return on_mismatch
    lock = _read(Path(root) / "dvc.lock")
    name = os.path.relpath(out.absolute(), Path(root).absolute()).replace(os.sep, "/")
    made = lock.get(stage)
    if made is None or name not in {entry.get("path") for entry in made.get("outs", [])}:
        return on_mismatch
    deliberate = _teacher_was_remade(lock, made) or (stage == "teacher" and not _same_params(made, Path(root)))
    if deliberate:
        return on_mismatch
    if not holds_something(out):
        raise UsageError(
            f"dvc.lock says that {name} was made before; it is merely not here: `dvc pull {name}` fetches it "
            f"(training needs only the cache: `dvc repro -s train`), or `rebuild: true` in the experiment's "
            "configuration makes it again"
        )
    # It is here: missing seeds are added, but another recipe in its place isn't what DVC was asked for.
    return on_mismatch if not _same_params(made, Path(root)) else "stop"


def _teacher_was_remade(lock: dict[str, Any], made: dict[str, Any]) -> bool:
    """Whether a stage's dependency is another stage's output that has changed since."""
    outs = {entry.get("path"): entry.get("md5") for stage in lock.values() for entry in stage.get("outs", [])}
    return any(outs.get(entry.get("path"), entry.get("md5")) != entry.get("md5") for entry in made.get("deps", []))


def _same_params(made: dict[str, Any], root: Path) -> bool:
    """Whether the parameters that a stage ran with still stand in their files."""
    for file, recorded in made.get("params", {}).items():
        try:
            now = yaml.safe_load((root / file).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return False
        if not isinstance(now, dict) or any(now.get(key) != value for key, value in recorded.items()):
            return False
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text())
        stages = value["stages"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    return {str(name): stage for name, stage in stages.items() if isinstance(stage, dict)}
