"""Evaluated runs side by side: what each change was worth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.files.durable import write_atomically
from advkd.cache.format.differences import differences
from advkd.stages.metrics.intervals import Interval
from advkd.stages.metrics.table import Row, ScoreTable, difference
from advkd.stages.pictures import save_figure
from advkd.stages.student.run import Run
from advkd.stages.student.student import weights_sha256


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """One run's scores."""

    name: str
    student: Row
    teacher: Row | None
    """The teacher itself on the same seeds, where it was measured."""
    held_out_mse: float | None
    num_parameters: int
    """Of the deployed student."""
    macs: float
    protocol: dict[str, Any]
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
        student, *others = ScoreTable.from_json(value["samplers"]).rows
        if student.mean("frechet") is None:
            raise ValueError("the student's Fréchet distance is missing")
        return EvaluatedRun(
            name=run.name,
            student=student,
            teacher=next((row for row in others if row.name.startswith("teacher") and row.values), None),
            held_out_mse=value["held_out_mse"],
            num_parameters=int(cost["deployed_parameters"]),
            macs=float(cost["macs"]),
            protocol=protocol,
        )
    except FileNotFoundError:
        raise TrainingError(
            f"{run} was not evaluated (no {path}): run `advkd-evaluate --run {run} --cache STORE` first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} is not what advkd-evaluate writes ({type(error).__name__}: {error})") from None


def write_comparison(runs: Sequence[EvaluatedRun], out: Path) -> list[Path]:
    """Write a Markdown table, `out`.md, and a plot, `out`.png.

    Returns:
        Their paths.
    """
    table, plot = out.with_name(out.name + ".md"), out.with_name(out.name + ".png")
    write_atomically(table, ["\n".join([*table_lines(runs), ""]).encode()])
    _plot(runs, plot)
    return [table, plot]


def table_lines(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The table as Markdown."""
    protocol = runs[0].protocol
    lines = [
        f"Fréchet distance to the teacher's cached x_0, mean ± sd over {protocol['num_sets']} sets of "
        f"{protocol['set_size']:,} fresh seeds; {protocol['features']} features, reference of "
        f"{protocol['num_reference']:,} seeds.",
        "",
        "| run | distance | minus the run before, 95 % | held-out MSE | parameters | M MACs |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        gain = run.gain.text(1) if run.gain else ""
        mse = "" if run.held_out_mse is None else f"{run.held_out_mse:.4f}"
        lines.append(
            f"| {run.name} | {_distance(run.student)} | {gain} | {mse} | {run.num_parameters:,} | "
            f"{run.macs / 1e6:.1f} |"
        )
    if runs[0].teacher:
        lines.append(f"| the teacher itself | {_distance(runs[0].teacher)} | | | | |")
    return lines


def _distance(row: Row) -> str:
    return f"{row.mean('frechet'):.1f} ± {row.deviation('frechet'):.1f}"


def _plot(runs: Sequence[EvaluatedRun], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 0.45 * len(runs) + 1.2), layout="constrained")
    axes: Any = figure.add_subplot()
    means = [run.student.mean("frechet") for run in runs]
    deviations = [run.student.deviation("frechet") for run in runs]
    axes.barh(range(len(runs)), means, xerr=deviations, capsize=3)
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="Fréchet distance to the teacher")
    axes.xaxis.set_major_formatter("{x:g}")
    if runs[0].teacher:
        mean = runs[0].teacher.mean("frechet")
        axes.axvline(mean, color="black", linestyle="--", label="the teacher itself")
        axes.legend()
    save_figure(path, figure)
