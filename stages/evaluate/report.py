"""What an evaluation leaves behind: metrics.json for DVC, scores.json with everything, a CSV for plots, pictures."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from advkd.cache.durable import write_json
from advkd.cache.reader import TrajectoryCache
from advkd.stages.evaluate.evaluate import Evaluation
from advkd.stages.pictures import save_rows, save_trajectories
from advkd.stages.provenance import versions

MAX_ROWS = 4
SEEDS_IN_PICTURE = 12


def write_report(folder: Path, evaluation: Evaluation, cache: TrajectoryCache) -> list[Path]:
    """Write everything; the pictures' paths come back, the best first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics(evaluation))
    write_json(folder / "scores.json", details(evaluation))
    _write_table(folder / "samplers.csv", evaluation)
    shown = [name for name in _picture_order(evaluation) if name in evaluation.pictures][:MAX_ROWS]
    compared = save_rows(
        folder / "samples.png", {name: evaluation.pictures[name][:SEEDS_IN_PICTURE].numpy() for name in shown}
    )
    seeds = cache.seeds()[: SEEDS_IN_PICTURE // 2]
    states = list(cache.states.values())
    trajectory = save_trajectories(
        folder / "trajectory.png",
        [state.timestep for state in states],
        [cache.rows(state.step, seeds) for state in states],
    )
    return [compared, trajectory, _plot(folder / "scores.png", evaluation)]


def _picture_order(evaluation: Evaluation) -> list[str]:
    """Teacher beside student first, then the solvers of about ten steps."""
    names = [row.name for row in evaluation.rows]
    rest = sorted(evaluation.rows[2:], key=lambda row: abs(math.log(row.evaluations / 10)))
    return [names[1], names[0], *[row.name for row in rest]]


def _mse(evaluation: Evaluation) -> float | None:
    return None if math.isnan(evaluation.held_out_mse) else evaluation.held_out_mse


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """The few numbers that `dvc metrics` compares between commits; what was not measured is null."""
    return {
        "held_out_mse": _mse(evaluation),
        "frechet": {row.name: row.mean for row in evaluation.rows},
        "latency_ratio": {f"batch_{batch}": evaluation.latency_ratio(batch) for batch in evaluation.student.latency},
    }


def details(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that was measured, and how; what was not measured is null."""
    samplers = {
        row.name: {
            "evaluations": row.evaluations,
            "frechet": row.distances or None,
            "frechet_mean": row.mean,
            "frechet_sd": row.deviation,
            "frechet_to_real": row.to_real,
            "student_minus_this": asdict(row.difference) if row.difference else None,
        }
        for row in evaluation.rows
    }
    return {
        "student": evaluation.identity,
        "versions": versions("pytorch-fid", "scipy"),
        "protocol": {
            "form": "full" if evaluation.full else "short",
            "features": evaluation.features,
            "num_sets": evaluation.num_sets,
            "set_size": evaluation.set_size,
            "num_reference": evaluation.num_reference,
            "real": evaluation.real_source,
        },
        "held_out_mse": _mse(evaluation),
        "samplers": samplers,
        "cost": {
            "student": {**asdict(evaluation.student), "deployed_parameters": evaluation.deployed_parameters},
            "teacher": asdict(evaluation.teacher) if evaluation.teacher else None,
        },
    }


def _write_table(path: Path, evaluation: Evaluation) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sampler", "evaluations", "frechet", "frechet_sd", "frechet_to_real"])
        for row in evaluation.rows:
            values = [row.mean, row.deviation, row.to_real]
            writer.writerow([row.name, row.evaluations, *["" if v is None else f"{v:.6g}" for v in values]])


def _plot(path: Path, evaluation: Evaluation) -> Path:
    """Fréchet distance against network evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    groups: dict[str, list[tuple[int, float, float]]] = {}
    for row in evaluation.rows:
        if row.mean is not None:
            group = row.name if row.name.startswith(("student", "teacher")) else row.name.rsplit(" ", 1)[0]
            groups.setdefault(group, []).append((row.evaluations, row.mean, row.deviation or 0.0))
    for group, points in groups.items():
        x, y, spread = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, yerr=spread, marker="*" if group == "student" else "o", capsize=3, label=group)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="network evaluations an image",
        ylabel="Fréchet distance to the teacher",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
