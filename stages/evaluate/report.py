"""What an evaluation leaves behind: metrics.json, a CSV for plots, pictures."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from advkd.cache.durable import write_json
from advkd.cache.reader import TrajectoryCache
from advkd.stages.evaluate.evaluate import Evaluation
from advkd.stages.pictures import save_columns, save_trajectories

MAX_COLUMNS = 4
ROWS_IN_PICTURE = 8


def write_report(folder: Path, evaluation: Evaluation, cache: TrajectoryCache) -> list[Path]:
    """Write everything; the pictures' paths come back, the best first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics(evaluation))
    _write_table(folder / "samplers.csv", evaluation)
    columns = [name for name in _picture_order(evaluation) if name in evaluation.pictures][:MAX_COLUMNS]
    compared = save_columns(
        folder / "samples.png",
        columns,
        [evaluation.pictures[name][:ROWS_IN_PICTURE].numpy() for name in columns],
    )
    seeds = cache.seeds()[:ROWS_IN_PICTURE]
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


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Plain numbers, for `dvc metrics`; what was not measured is null."""
    samplers = {}
    for row in evaluation.rows:
        entry: dict[str, Any] = {
            "evaluations": row.evaluations,
            "frechet": row.mean,
            "frechet_sd": row.deviation,
            "frechet_to_real": row.to_real,
        }
        if row.difference:
            entry["student_minus_this"] = {
                "mean": row.difference.mean,
                "low": row.difference.low,
                "high": row.difference.high,
            }
        samplers[row.name] = entry
    cost = {"student": evaluation.student, "teacher": evaluation.teacher}
    return {
        "held_out_mse": None if math.isnan(evaluation.held_out_mse) else evaluation.held_out_mse,
        "protocol": {
            "features": evaluation.features,
            "form": "full" if evaluation.full else "short",
            "num_sets": evaluation.num_sets,
            "set_size": evaluation.set_size,
            "reference": evaluation.num_reference,
        },
        "samplers": samplers,
        "cost": {
            name: {
                "parameters": value.num_parameters,
                "macs": value.macs,
                "latency_seconds": {f"batch_{batch}": seconds for batch, seconds in value.latency.items()},
            }
            if value
            else None
            for name, value in cost.items()
        },
        "student_deployed_parameters": evaluation.deployed_parameters,
        "latency_in_teacher_evaluations": {
            f"batch_{batch}": evaluation.latency_ratio(batch) for batch in evaluation.student.latency
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
            group = row.name.rsplit(" ", 1)[0] if row.name != "student" else "student"
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
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
