"""A student's provenance: `provenance.json` beside its weights, and the scores of its run.

Training writes it, so a student that is copied or published keeps it: the teacher and its licence, the cache's
fingerprint and the digest of the blocks that were used, seeds, configuration, versions. It is for people; a student
runs without it.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

from advkd.cache.care.summary import ORIGIN_PATHS, origin_of
from advkd.cache.errors import TrainingError
from advkd.cache.files.durable import write_json
from advkd.cache.format.recipe import Recipe
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.provenance import versions
from advkd.stages.student.run import Run, SeedSplit
from advkd.stages.student.student import weights_sha256

FORMAT = 1
FILE = "provenance.json"
MAX_BYTES = 4_000_000
Provenance = dict[str, Any]


def describe(cache: TrajectoryCache, identity: dict[str, Any], split: SeedSplit) -> Provenance:
    """The provenance of a run's student, as JSON.

    Args:
        cache: the cache that it learns from.
        identity: of the run, as in run.json: configuration, fingerprint, digest of the blocks used.
        split: its seeds.
    """
    sampler = {key: cache.recipe.sampler.get(key) for key in ("name", "steps", "eta")}
    return {
        "teacher": {"tensors_sha256": cache.recipe.teacher.get("tensors_sha256"), **_without_paths(origin_of(cache))},
        "sampler": sampler,
        **({} if cache.recipe.condition is None else {"condition": cache.recipe.condition.to_json()}),
        **({} if cache.recipe.prompts is None else {"prompts": _prompts(cache.recipe)}),
        **({} if cache.recipe.space is None else {"space": cache.recipe.space.to_json()}),
        **identity,
        "seeds": {
            "first": min(map(int, (*split.training[:1], *split.held_out[:1]))),
            "last": max(map(int, (*split.training[-1:], *split.held_out[-1:]))),
            "num_training": len(split.training),
            "num_held_out": len(split.held_out),
        },
        "versions": versions("accelerate"),
    }


def _prompts(recipe: Recipe) -> dict[str, Any]:
    """What the student's prompts are, and what encodes a new one in the same way."""
    assert recipe.prompts is not None
    return {
        **recipe.prompts.to_json(),
        "encoders": recipe.teacher.get("encoders", {}),
        "call": recipe.sampler.get("call", {}),
        "precision": recipe.precision["compute"],
    }


def _without_paths(origin: dict[str, Any]) -> dict[str, Any]:
    """The teacher's origin without absolute paths on the machine that built the cache."""
    hidden = {key for key in ORIGIN_PATHS if key in origin and PurePath(origin[key]).is_absolute()}
    origin = {key: value for key, value in origin.items() if key not in hidden}
    source = origin.get("source")
    if source is None or "commit" in origin or not PurePath(source).is_absolute():
        return origin
    return {**origin, "source": PurePath(source).name}


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Write provenance.json into a student's folder."""
    write_json(folder / FILE, {"format": FORMAT, **provenance})


def read_provenance(folder: Path) -> Provenance:
    """The provenance of the student in a folder, with its scores if the folder is in a run that was evaluated.

    Runs that predate provenance.json give the facts of run.json. Empty if nothing is known.

    Raises:
        TrainingError: provenance.json is malformed.
    """
    run = _run_of(folder)
    provenance: Provenance = {}
    if (folder / FILE).is_file():
        provenance = _read_own(folder / FILE)
    elif run is not None:
        record = run.read()
        provenance = {"format": FORMAT, **record["identity"], "versions": record.get("versions", {})}
    scores = _read_scores(run) if run is not None else None
    return {**provenance, "scores": scores} if scores else provenance


def _run_of(folder: Path) -> Run | None:
    """The run whose final student is in a folder; `advkd-evaluate` doesn't score the best step's."""
    run = Run(folder.absolute().parent)
    return run if folder.name == run.student.name and (run.path / "run.json").is_file() else None


def _read_own(path: Path) -> Provenance:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError("not written by advkd")
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: {error}; the student loads without this file") from None
    return value


def _read_scores(run: Run) -> dict[str, Any] | None:
    """The scores of exactly these weights; None if `advkd-evaluate` scored none or others."""
    try:
        value = json.loads((run.path / "evaluation" / "scores.json").read_bytes())
        if value["student"] != run.read()["identity"] or value["weights_sha256"] != weights_sha256(run.student):
            return None
        return {key: value[key] for key in ("protocol", "held_out_mse", "samplers", "cost") if key in value}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
