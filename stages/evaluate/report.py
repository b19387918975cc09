"""What an evaluation leaves behind: metrics.json for DVC, scores.json with everything, a CSV for plots, pictures."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from advkd.cache.files.durable import write_atomically, write_json
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.plots import plot_scores
from advkd.stages.evaluate.scores import MEASURES, Evaluation, Row
from advkd.stages.metrics.classes import Shares
from advkd.stages.metrics.kid import MAX_REFERENCE
from advkd.stages.pictures import save_rows, save_trajectories
from advkd.stages.provenance import versions

BESIDE = (
    "frechet_to_real",
    "mse_to_teacher",
    "perceptual_to_teacher",
    "class_overlap",
    "rarest_class",
    "confidence",
    "nearest_training",
    "nearest_training_closest",
)
"""Measures of student and teacher in metrics.json."""
COLUMNS = [f"{measure}{suffix}" for measure in MEASURES for suffix in ("", "_sd")]
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
    return [compared, trajectory, plot_scores(folder / "scores.png", evaluation)]


def _picture_order(evaluation: Evaluation) -> list[str]:
    """Teacher beside student first, then the solvers of about ten steps."""
    names = [row.name for row in evaluation.rows]
    rest = sorted(evaluation.rows[2:], key=lambda row: abs(math.log(row.evaluations / 10)))
    return [names[1], names[0], *[row.name for row in rest]]


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """The few numbers that `dvc metrics` compares between commits; what was not measured is null."""
    held_out = evaluation.held_out
    by_sampler = {
        measure: {row.name: row.mean(measure) for row in evaluation.rows}
        for measure in ("frechet", "kid", "precision", "recall")
    }
    beside = {
        row: {measure: evaluation.rows[index].mean(measure) for measure in BESIDE}
        for index, row in enumerate(("student", "teacher"))
    }
    return {
        "held_out_mse": held_out.mse.mean if held_out else None,
        "held_out_perceptual": held_out.perceptual.mean if held_out else None,
        **by_sampler,
        **beside,
        "latency_ratio": {f"batch_{batch}": evaluation.latency_ratio(batch) for batch in evaluation.student.latency},
    }


def details(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that was measured, and how; what was not measured is null."""
    held_out = evaluation.held_out
    return {
        "student": evaluation.identity,
        "weights_sha256": evaluation.weights_sha256,
        "versions": versions("pytorch-fid", "scikit-learn", "scipy"),
        "protocol": {
            "form": "full" if evaluation.full else "short",
            "features": evaluation.features,
            "features_sha256": evaluation.features_sha256,
            "perceptual": evaluation.perceptual,
            "num_sets": evaluation.num_sets,
            "set_size": evaluation.set_size,
            "num_reference": evaluation.num_reference,
            "num_kid_reference": min(evaluation.num_reference // evaluation.num_sets, MAX_REFERENCE),
            "num_precision_recall": min(evaluation.set_size, evaluation.num_reference),
            "num_training": evaluation.num_training,
            "num_held_out": held_out.num_seeds if held_out else 0,
            "real": evaluation.real_source,
            "measures": MEASURES,
        },
        "held_out_mse": held_out.mse.mean if held_out else None,
        "held_out": asdict(held_out) if held_out else None,
        "reference_class_shares": _listed(evaluation.reference_shares),
        "samplers": {row.name: _sampler(evaluation, row) for row in evaluation.rows},
        "cost": {
            "student": {**asdict(evaluation.student), "deployed_parameters": evaluation.deployed_parameters},
            "teacher": asdict(evaluation.teacher) if evaluation.teacher else None,
        },
    }


def _sampler(evaluation: Evaluation, row: Row) -> dict[str, Any]:
    return {
        "evaluations": row.evaluations,
        "frechet": row.values.get("frechet"),
        "frechet_mean": row.mean("frechet"),
        "frechet_sd": row.deviation("frechet"),
        "frechet_to_real": row.mean("frechet_to_real"),
        "student_minus_this": _minus(evaluation, row, "frechet"),
        "class_shares": _listed(row.class_shares),
        "scores": {
            measure: {
                "sets": values,
                "mean": row.mean(measure),
                "sd": row.deviation(measure),
                "standard_error": row.standard_error(measure),
                "student_minus_this": _minus(evaluation, row, measure),
            }
            for measure, values in row.values.items()
        },
    }


def _minus(evaluation: Evaluation, row: Row, measure: str) -> dict[str, float] | None:
    interval = evaluation.student_minus(row, measure) if row is not evaluation.rows[0] else None
    return asdict(interval) if interval else None


def _listed(shares: Shares | None) -> list[float] | None:
    return None if shares is None else shares.tolist()


def _write_table(path: Path, evaluation: Evaluation) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["sampler", "evaluations", *COLUMNS, "num_sets", "set_size"])
    for row in evaluation.rows:
        cells = [_cell(row, column) for column in COLUMNS]
        writer.writerow([row.name, row.evaluations, *cells, evaluation.num_sets, evaluation.set_size])
    write_atomically(path, [table.getvalue().encode()])


def _cell(row: Row, column: str) -> str:
    sd = column.endswith("_sd")
    value = row.deviation(column.removesuffix("_sd")) if sd else row.mean(column)
    return "" if value is None else f"{value:.6g}"
