"""What dvc.lock says was made before: so that DVC is never tempted into making something expensive again.

On a clone that pulled only part of what a team shares, DVC finds outputs missing or changed and runs the stages that
made them: hours of sampling, again. A stage whose output was made before by a request that means the same says how to
fetch it instead. `rebuild: true` in the experiment's configuration is the yes that lets it go on; a request that
differs from the recorded one needs none.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from advkd.cache.errors import ConfigError, UsageError
from advkd.cache.files.durable import PARTIAL_SUFFIX
from advkd.cache.files.locks import LOCK_FILE, NOTE_FILE
from advkd.cache.format.seeds import blocks_of, parse_seed_range, seeds_of
from advkd.cache.format.store_paths import record_path
from advkd.pipeline.config import Experiment, from_dict
from advkd.stages.teacher.config import recorded_steps

YES = "`rebuild: true` in the experiment's configuration makes it again"


def runs_under_dvc() -> bool:
    """Whether DVC started this command as a stage."""
    return {"DVC_ROOT", "DVC_STAGE"} <= os.environ.keys()


def check_teacher_not_again(folder: Path, experiment: Experiment) -> None:
    """Refuse to train a teacher that was made before by the same request, whether it is here or not.

    Raises:
        UsageError: it was, and nobody said yes.
    """
    made = _made_before(folder, experiment)
    if made is None:
        return
    _check_here(made, made.lacks_files(folder))
    raise UsageError(
        f"dvc.lock says that {made.path} was made before; it is here: `dvc checkout {made.path}` brings back what was "
        f"recorded, `dvc commit --force {made.path}` keeps what was changed since, or {YES}"
    )


def check_cache_not_again(store: Path, experiment: Experiment) -> bool:
    """Refuse to sample a cache that was made before by the same request and isn't wholly here.

    Returns:
        Whether it was made before and is here: seeds may be added, but another recipe isn't what DVC was asked for.

    Raises:
        UsageError: it isn't here, and nobody said yes.
    """
    made = _made_before(store, experiment)
    if made is None:
        return False
    _check_here(made, made.lacks_files(store) or made.lacks_blocks(store))
    return True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """An output that dvc.lock records, made by a request that means the same as now."""

    path: str
    num_files: int
    request: Experiment

    def lacks_files(self, out: Path) -> str | None:
        """In words, what of it isn't here, as DVC counts files."""
        present = _num_files(out)
        if present == 0:
            return "it is merely not here"
        absent = self.num_files - present
        return f"{absent} of its {self.num_files} files are merely not here" if absent > 0 else None

    def lacks_blocks(self, store: Path) -> str | None:
        """In words, which of its seeds aren't in the store that is here, which may be another extension of it."""
        cache = self.request.cache
        blocks = blocks_of(parse_seed_range(cache.seeds), cache.block_size)
        absent = [block for block in blocks if not (store / record_path(block)).is_file()]
        if not absent:
            return None
        first = seeds_of(absent[0], cache.block_size)
        return f"{len(absent)} of its blocks (the first: seeds {first.start}:{first.stop}) are merely not here"


def _check_here(made: _Made, lack: str | None) -> None:
    if lack:
        raise UsageError(
            f"dvc.lock says that {made.path} was made before; {lack}: `dvc pull {made.path}` fetches it (training "
            f"needs only the cache: `dvc repro -s train`), or {YES}"
        )


def _made_before(out: Path, experiment: Experiment) -> _Made | None:
    """What dvc.lock says of an output; None where nothing was recorded, the request differs, or somebody said yes."""
    if experiment.rebuild:
        return None
    root = Path(os.environ.get("DVC_ROOT", "."))
    path = os.path.relpath(os.path.realpath(out.parent) + os.sep + out.name, os.path.realpath(root))
    path = path.replace(os.sep, "/")
    stages = _stages(root / "dvc.lock")
    for stage in stages:
        for entry in stage.get("outs") or []:
            if entry.get("path") == path:
                request = _request(stage, experiment)
                if request is None or _dependency_was_remade(stages, stage):
                    return None
                return _Made(path=path, num_files=int(entry.get("nfiles", 1)), request=request)
    return None


def _dependency_was_remade(stages: list[dict[str, Any]], made: dict[str, Any]) -> bool:
    """Whether a stage's dependency is another stage's output that has changed since."""
    outs = {entry.get("path"): entry.get("md5") for stage in stages for entry in stage.get("outs") or []}
    return any(outs.get(entry.get("path"), entry.get("md5")) != entry.get("md5") for entry in made.get("deps") or [])


def _request(made: dict[str, Any], experiment: Experiment) -> Experiment | None:
    """The experiment with the parameters that a stage ran with, if that means the same teacher or store."""
    known = {item.name for item in dataclasses.fields(Experiment)}
    recorded = {
        key: value for values in (made.get("params") or {}).values() for key, value in values.items() if key in known
    }
    try:
        then = from_dict(Experiment, {**dataclasses.asdict(experiment), **recorded}, "dvc.lock")
        return then if _identity(then) == _identity(experiment) else None
    except ConfigError:
        return None


def _identity(experiment: Experiment) -> tuple[Any, ...]:
    """What an experiment says of its teacher and store, but for how many seeds and how they are computed."""
    cache = experiment.cache
    return (
        experiment.pretrain,
        experiment.teacher,
        experiment.sampler,
        recorded_steps(cache.record, experiment.sampler.steps),
        (cache.block_size, cache.dtype, cache.precision, cache.root_seed),
    )


def _num_files(out: Path) -> int:
    """Files of an output, without those that .dvcignore leaves out and links that lead nowhere."""
    if not out.is_dir():
        return int(out.exists())
    return sum(
        name not in (LOCK_FILE, NOTE_FILE) and not name.endswith(PARTIAL_SUFFIX) and Path(folder, name).exists()
        for folder, _, names in os.walk(out)
        for name in names
    )


def _stages(lock: Path) -> list[dict[str, Any]]:
    try:
        stages = yaml.safe_load(lock.read_text())["stages"]
        return [stage for stage in stages.values() if isinstance(stage, dict)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return []
