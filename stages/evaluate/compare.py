"""Evaluated runs side by side: what each change was worth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.files.durable import write_atomically
from advkd.cache.format.differences import differences
from advkd.stages.metrics.intervals import Interval
from advkd.stages.metrics.table import Row, ScoreTable, difference
from advkd.stages.pictures import save_figure
from advkd.stages.student.run import Run
from advkd.stages.student.student import weights_sha256


@dataclass(frozen=True, kw_only=True)
class Rung:
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


def read_rungs(runs: Sequence[Path]) -> list[Rung]:
    """Read the scores of evaluated runs, each with its difference from the one before.

    Raises:
        TrainingError: a run was not evaluated.
        UsageError: they were not evaluated alike, so that their scores are not comparable; or a path is a cache.
    """
    rungs: list[Rung] = []
    for run in runs:
        rung = _read(run)
        if rungs and rung.protocol != rungs[0].protocol:
            raise UsageError(
                f"{runs[0]} and {run} were evaluated differently "
                f"({'; '.join(differences(rungs[0].protocol, rung.protocol))}): evaluate all runs alike, on one cache"
            )
        if rungs:
            rung = dataclasses.replace(rung, gain=difference(rung.student, rungs[-1].student, "frechet"))
        rungs.append(rung)
    return rungs


def _read(run: Path) -> Rung:
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
        protocol = {key: value["protocol"][key] for key in ("features", "num_sets", "set_size", "num_reference")}
        protocol["features_sha256"] = value["protocol"].get("features_sha256")
        protocol["seed"] = value["protocol"].get("seed", 0)
        protocol["cache"] = value["student"]["cache"]["fingerprint"][:12]
        cost = value["cost"]["student"]
        student, *others = ScoreTable.from_json(value["samplers"]).rows
        if student.mean("frechet") is None:
            raise ValueError("the student's Fréchet distance is missing")
        return Rung(
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


def write_ladder(rungs: Sequence[Rung], out: Path) -> list[Path]:
    """Write a Markdown table, `out`.md, and a plot, `out`.png.

    Returns:
        Their paths.
    """
    table, plot = out.with_name(out.name + ".md"), out.with_name(out.name + ".png")
    write_atomically(table, ["\n".join([*table_lines(rungs), ""]).encode()])
    _plot(rungs, plot)
    return [table, plot]


def table_lines(rungs: Sequence[Rung]) -> list[str]:
    """The table as Markdown."""
    protocol = rungs[0].protocol
    lines = [
        f"Fréchet distance to the teacher's cached x_0, mean ± sd over {protocol['num_sets']} sets of "
        f"{protocol['set_size']:,} fresh seeds; {protocol['features']} features, reference of "
        f"{protocol['num_reference']:,} seeds.",
        "",
        "| run | distance | minus the run before, 95 % | held-out MSE | parameters | M MACs |",
        "|---|---|---|---|---|---|",
    ]
    for rung in rungs:
        gain = rung.gain.text(1) if rung.gain else ""
        mse = "" if rung.held_out_mse is None else f"{rung.held_out_mse:.4f}"
        lines.append(
            f"| {rung.name} | {_distance(rung.student)} | {gain} | {mse} | {rung.num_parameters:,} | "
            f"{rung.macs / 1e6:.1f} |"
        )
    if rungs[0].teacher:
        lines.append(f"| the teacher itself | {_distance(rungs[0].teacher)} | | | | |")
    return lines


def _distance(row: Row) -> str:
    return f"{row.mean('frechet'):.1f} ± {row.deviation('frechet'):.1f}"


def _plot(rungs: Sequence[Rung], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 0.45 * len(rungs) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rungs))
    sets = np.array([rung.student.values["frechet"] for rung in rungs])
    means, spreads = sets.mean(1), sets.std(1, ddof=1)
    axes.barh(places, means, xerr=spreads, capsize=3)
    axes.set_yticks(places, [rung.name for rung in rungs])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="Fréchet distance to the teacher")
    axes.xaxis.set_major_formatter("{x:g}")
    if rungs[0].teacher:
        axes.axvline(
            float(np.mean(rungs[0].teacher.values["frechet"])),
            color="black",
            linestyle="--",
            label="the teacher itself",
        )
        axes.legend()
    save_figure(path, figure)
