"""Guards for stages that DVC starts: nothing expensive runs twice because its output is missing here.

On a clone that pulled only part of what a team shares, DVC finds outputs missing or changed and reruns the stages that
made them: hours of sampling. If dvc.lock records an output for an equivalent request, the stage stops and says how to
fetch it. `rebuild: true` in the experiment's configuration overrides this; a request that differs from the recorded one
runs as usual.
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
from advkd.cache.format.seeds import blocks_of, seeds_of
from advkd.cache.format.store_paths import record_path
from advkd.pipeline.config import Experiment, from_dict
from advkd.stages.teacher.config import recorded_steps
from advkd.stages.teacher.pipelines.prompt_list import requested_seeds

YES = "`rebuild: true` in the experiment's configuration makes it again"


def runs_under_dvc() -> bool:
    """Whether DVC started this command as a stage."""
    return {"DVC_ROOT", "DVC_STAGE"} <= os.environ.keys()


def check_name(experiment: Experiment) -> None:
    """Refuse an experiment if dvc.yaml expects its files under another name.

    Raises:
        ConfigError: the `name` in dvc.yaml's first lines differs from the one in the experiment's file.
    """
    root = Path(os.environ.get("DVC_ROOT", "."))
    for variables in _read_yaml(root / "dvc.yaml").get("vars") or []:
        selected = variables.get("experiment") if isinstance(variables, dict) else None
        if isinstance(selected, dict) and selected.get("name", experiment.name) != experiment.name:
            raise ConfigError(
                f"dvc.yaml selects name: {selected['name']}, but configs/{selected.get('config')}.yaml says "
                f"name: {experiment.name}; write `name: {experiment.name}` in the first lines of dvc.yaml"
            )


def check_teacher_not_again(folder: Path, experiment: Experiment) -> None:
    """Refuse to retrain a teacher that dvc.lock records for an equivalent request, whether it is here or not.

    Raises:
        UsageError: dvc.lock records it, and the experiment doesn't set `rebuild`.
    """
    made = _made_before(folder, experiment)
    if made is None:
        return
    _check_here(made, made.lacks_files(folder))
    raise UsageError(
        f"dvc.lock says that {made.path} was made before; it is here: `dvc checkout {made.path}` restores the "
        f"recorded version, `dvc commit --force {made.path}` keeps later changes, or {YES}"
    )


def check_cache_not_again(store: Path, experiment: Experiment) -> bool:
    """Refuse to sample a cache that dvc.lock records for an equivalent request and that is not complete here.

    Returns:
        Whether dvc.lock records the cache and it is here. Seeds may be added to it; a store of another recipe in its
        place must not be replaced.

    Raises:
        UsageError: it is not complete here, and the experiment doesn't set `rebuild`.
        ConfigError: as `check_name`.
    """
    check_name(experiment)
    made = _made_before(store, experiment)
    if made is None:
        return False
    _check_here(made, made.lacks_files(store) or made.lacks_blocks(store))
    return True


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """An output that dvc.lock records for a request equivalent to the present one."""

    path: str
    num_files: int
    request: Experiment

    def lacks_files(self, out: Path) -> str | None:
        """What is missing here, in words, by DVC's count of files; None if nothing is."""
        present = _num_files(out)
        if present == 0:
            return "it is not here"
        absent = self.num_files - present
        return f"{absent} of its {self.num_files} files are not here" if absent > 0 else None

    def lacks_blocks(self, store: Path) -> str | None:
        """Which of its blocks the store here lacks, in words; it may be another extension of the recorded one."""
        cache = self.request.cache
        blocks = blocks_of(requested_seeds(cache), cache.block_size)
        absent = [block for block in blocks if not (store / record_path(block)).is_file()]
        if not absent:
            return None
        first = seeds_of(absent[0], cache.block_size)
        return f"{len(absent)} of its blocks (the first: seeds {first.start}:{first.stop}) are not here"


def _check_here(made: _Made, lack: str | None) -> None:
    if lack:
        raise UsageError(
            f"dvc.lock says that {made.path} was made before; {lack}: `dvc pull {made.path}` fetches it (training "
            f"needs only the cache: `dvc repro -s train`), or {YES}"
        )


def _made_before(out: Path, experiment: Experiment) -> _Made | None:
    """dvc.lock's record of an output; None without one, if the request differs, or if the experiment sets `rebuild`."""
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
    """The experiment with the parameters that a stage ran with, if teacher and store are the same."""
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
    """What determines teacher and store, without the number of seeds and how they are computed."""
    cache, sampler = experiment.cache, experiment.sampler
    return (
        experiment.pretrain,
        experiment.teacher,
        sampler if cache.prompts else sampler.resolved(),
        recorded_steps(cache.record, sampler.steps),
        (cache.labels, cache.prompts, cache.seeds_per_prompt),
        (cache.block_size, cache.dtype, cache.precision, cache.root_seed),
    )


def _num_files(out: Path) -> int:
    """Number of an output's files, without those that .dvcignore excludes and without broken links."""
    if not out.is_dir():
        return int(out.exists())
    return sum(
        name not in (LOCK_FILE, NOTE_FILE) and not name.endswith(PARTIAL_SUFFIX) and Path(folder, name).exists()
        for folder, _, names in os.walk(out)
        for name in names
    )


def _stages(lock: Path) -> list[dict[str, Any]]:
    stages = _read_yaml(lock).get("stages")
    return [stage for stage in stages.values() if isinstance(stage, dict)] if isinstance(stages, dict) else []


def _read_yaml(path: Path) -> dict[str, Any]:
    """The content of one of DVC's files; empty if it is missing or malformed."""
    try:
        value = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
