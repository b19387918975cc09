"""Evaluated runs as their folders tell, and side by side: what each change was worth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.format.differences import differences
from advkd.stages.metrics.intervals import Interval
from advkd.stages.metrics.table import Row, ScoreTable, difference
from advkd.stages.student.run import Run
from advkd.stages.student.student import weights_sha256


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """One run's scores."""

    name: str
    path: Path
    table: ScoreTable
    student: Row
    teacher: Row | None
    """The teacher itself on the same seeds, where it was measured."""
    held_out_mse: float | None
    num_parameters: int
    """Of the deployed student."""
    macs: float
    cost: dict[str, Any]
    """Of student, teacher and decoder, as in scores.json."""
    protocol: dict[str, Any]
    """What must agree for scores to be comparable."""
    identity: dict[str, Any]
    """Of the run, as in run.json."""
    gain: Interval | None = None
    """Its distances minus those of the run before."""


def read_runs(folders: Sequence[Path]) -> list[EvaluatedRun]:
    """Read the scores of evaluated runs, each with its difference from the one before.

    Raises:
        TrainingError: a run was not evaluated.
        UsageError: they were not evaluated alike, so that their scores are not comparable; or a path is a cache.
    """
    runs: list[EvaluatedRun] = []
    for folder in folders:
        run = _read(folder)
        if runs and run.protocol != runs[0].protocol:
            raise UsageError(
                f"{folders[0]} and {folder} were evaluated differently "
                f"({'; '.join(differences(runs[0].protocol, run.protocol))}): evaluate all runs alike, on one cache"
            )
        runs.append(
            dataclasses.replace(run, gain=difference(run.student, runs[-1].student, "frechet")) if runs else run
        )
    return runs


def _read(run: Path) -> EvaluatedRun:
    path = run / "evaluation" / "scores.json"
    if (run / "zarr.json").is_file():
        raise UsageError(
            f"{run} is a trajectory cache; expected the folders of runs: `advkd-cache diff` compares two caches"
        )
    try:
        value = json.loads(path.read_bytes())
        trained = weights_sha256(Run(run).student)
        if trained is not None and value.get("weights_sha256") != trained:
            raise TrainingError(
                f"{run} was trained further after its evaluation: run `advkd-evaluate --run {run} --cache STORE` again"
            )
        known = value["protocol"]
        protocol = {key: known[key] for key in ("features", "num_sets", "set_size", "num_reference")} | {
            "features_sha256": known.get("features_sha256"),
            "seed": known.get("seed", 0),
            "cache": value["student"]["cache"]["fingerprint"][:12],
        }
        cost = value["cost"]["student"]
        table = ScoreTable.from_json(value["samplers"])
        student, *others = table.rows
        if student.mean("frechet") is None:
            raise ValueError("the student's Fréchet distance is missing")
        return EvaluatedRun(
            name=run.name,
            path=run,
            table=table,
            student=student,
            teacher=next((row for row in others if row.name.startswith("teacher") and row.values), None),
            held_out_mse=value["held_out_mse"],
            num_parameters=int(cost["deployed_parameters"]),
            macs=float(cost["macs"]),
            cost=value["cost"],
            protocol=protocol,
            identity=value["student"],
        )
    except FileNotFoundError:
        raise TrainingError(
            f"{run} was not evaluated (no {path}): run `advkd-evaluate --run {run} --cache STORE` first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} is not what advkd-evaluate writes ({type(error).__name__}: {error})") from None


def table_lines(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The comparison as Markdown."""
    protocol = runs[0].protocol
    columns, rows = comparison(runs)
    return [
        f"Fréchet distance to the teacher's cached x_0, mean ± sd over {protocol['num_sets']} sets of "
        f"{protocol['set_size']:,} fresh seeds; {protocol['features']} features, reference of "
        f"{protocol['num_reference']:,} seeds.",
        "",
        f"| {' | '.join(columns)} |",
        f"{'|---' * len(columns)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def comparison(runs: Sequence[EvaluatedRun]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line per run, the teacher itself last."""
    columns = ["run", "distance", "minus the run before, 95 %", "held-out MSE", "parameters", "M MACs"]
    rows = [
        [
            run.name,
            _distance(run.student),
            run.gain.text(1) if run.gain else "",
            "" if run.held_out_mse is None else f"{run.held_out_mse:.4f}",
            f"{run.num_parameters:,}",
            f"{run.macs / 1e6:.1f}",
        ]
        for run in runs
    ]
    teacher = runs[0].teacher
    return columns, [*rows, ["the teacher itself", _distance(teacher), "", "", "", ""]] if teacher else rows


def _distance(row: Row) -> str:
    return f"{row.mean('frechet'):.1f} ± {row.deviation('frechet'):.1f}"
