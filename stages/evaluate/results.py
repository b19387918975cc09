"""What an evaluation leaves behind: metrics.json for DVC, scores.json with everything, a CSV for plots, pictures."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from advkd.cache.files.durable import write_atomically, write_json
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.evaluate.plots import plot_scores
from advkd.stages.evaluate.scores import Evaluation
from advkd.stages.metrics.kid import MAX_REFERENCE
from advkd.stages.metrics.registry import MEASURES
from advkd.stages.pictures import save_rows
from advkd.stages.provenance import versions
from advkd.stages.trajectories import draw_trajectories

SEEDS_IN_PICTURE = 12
SAMPLES, NEAREST, TRAJECTORY, SCORES = "samples.png", "nearest.png", "trajectory.png", "scores.png"
PICTURES = {
    SAMPLES: "Each sampler's images from the same noise.",
    NEAREST: "The student's images above the nearest images that it was trained on.",
    TRAJECTORY: "States of the teacher as the cache has them, a row per seed.",
    SCORES: "Scores against evaluations, precision against recall, shares of classes.",
}
"""Files that `write_results` writes, with what they show; `nearest.png` only where neighbours were searched."""


def write_results(folder: Path, evaluation: Evaluation, cache: TrajectoryCache) -> None:
    """Write everything."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics(evaluation))
    write_json(folder / "scores.json", details(evaluation))
    config = evaluation.config
    table = evaluation.table.to_csv(num_sets=config.num_sets, set_size=config.set_size)
    write_atomically(folder / "samplers.csv", [table.encode()])
    shown = [name for name in _picture_order(evaluation) if name in evaluation.pictures]
    save_rows(folder / SAMPLES, {name: evaluation.pictures[name][:SEEDS_IN_PICTURE].numpy() for name in shown})
    if evaluation.nearest:
        near = torch.stack(evaluation.nearest[:SEEDS_IN_PICTURE]).numpy()
        save_rows(
            folder / NEAREST,
            {"student": evaluation.pictures[evaluation.table.student.name][: len(near)].numpy(), "nearest": near},
        )
    draw_trajectories(folder / TRAJECTORY, cache, cache.varied(cache.seeds(), SEEDS_IN_PICTURE // 2))
    plot_scores(folder / SCORES, evaluation)


def _picture_order(evaluation: Evaluation) -> list[str]:
    """Teacher beside student first, then the solvers of about ten steps."""
    student, teacher, *others = evaluation.table.rows
    rest = sorted(others, key=lambda row: abs(math.log(row.evaluations / 10)))
    return [row.name for row in (teacher, student, *rest)]


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """The few numbers that `dvc metrics` compares between commits; what was not measured is null.

    Measures with a column in the table of all samplers are there for each of them, the others for student and teacher.
    """
    held_out, rows = evaluation.held_out, evaluation.table.rows
    columns = [name for name, measure in MEASURES.items() if measure.column_decimals is not None]
    beside = [name for name in MEASURES if name not in columns]
    return {
        "held_out_mse": held_out.mse.mean if held_out else None,
        "held_out_perceptual": held_out.perceptual.mean if held_out else None,
        **{measure: {row.name: row.mean(measure) for row in rows} for measure in columns},
        **{
            key: {measure: row.mean(measure) for measure in beside}
            for key, row in zip(("student", "teacher"), rows, strict=False)
        },
        "latency_ratio": {f"batch_{batch}": evaluation.latency_ratio(batch) for batch in evaluation.student.latency},
    }


def details(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that was measured, and how; what was not measured is null."""
    held_out, shares, real = evaluation.held_out, evaluation.reference_shares, evaluation.real
    config = evaluation.config
    return {
        "student": evaluation.identity,
        "weights_sha256": evaluation.weights_sha256,
        "versions": versions("pytorch-fid", "scikit-learn", "scipy"),
        "protocol": {
            "form": "full" if evaluation.full else "short",
            "features": evaluation.features,
            "features_sha256": evaluation.features_sha256,
            "clip_sha256": evaluation.clip_sha256,
            "perceptual": config.perceptual,
            "num_sets": config.num_sets,
            "set_size": config.set_size,
            "seed": config.seed,
            "num_reference": evaluation.num_reference,
            "num_kid_reference": min(evaluation.num_reference // config.num_sets, MAX_REFERENCE),
            "num_precision_recall": min(config.set_size, evaluation.num_reference),
            "num_training": evaluation.num_training,
            "num_held_out": held_out.num_seeds if held_out else 0,
            "real": real.source if real else None,
            "num_real": real.num_images if real else 0,
            "real_resizing": real.resizing if real and real.num_resized else None,
            "num_real_resized": real.num_resized if real else 0,
            "num_real_transparent": real.num_transparent if real else 0,
            "measures": {name: measure.label for name, measure in MEASURES.items()},
        },
        "held_out_mse": held_out.mse.mean if held_out else None,
        "held_out": asdict(held_out) if held_out else None,
        "reference_class_shares": None if shares is None else shares.tolist(),
        "samplers": evaluation.table.to_json(),
        "cost": {
            "student": {**asdict(evaluation.student), "deployed_parameters": evaluation.deployed_parameters},
            "teacher": asdict(evaluation.teacher) if evaluation.teacher else None,
            **({} if evaluation.decoder is None else {"decoder": asdict(evaluation.decoder)}),
        },
    }
