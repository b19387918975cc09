"""One picture of the scores: distances against evaluations, precision against recall, classes, paired errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from advkd.stages.evaluate.scores import Evaluation
from advkd.stages.metrics.table import Row
from advkd.stages.pictures import save_figure

STUDENT, TEACHER = 0, 1
MAX_UPRIGHT = 3
"""Characters of a class's name that stand side by side; longer ones are turned."""
Draw = Callable[[Any, Evaluation], None]


def plot_scores(path: Path, evaluation: Evaluation) -> Path:
    """Write a PNG with a panel per score that was measured."""
    from matplotlib.figure import Figure

    panels: list[Draw] = [_distances("frechet", "Fréchet distance to the teacher", "log")]
    if any("kid" in row.values for row in evaluation.table.rows):
        panels.append(_kid)
    if any("precision" in row.values for row in evaluation.table.rows):
        panels.append(_precision_recall)
    if evaluation.reference_shares is not None:
        panels.append(_classes)
    figure = Figure(figsize=(11.0, 4.0 * -(-len(panels) // 2)), layout="constrained")
    for position, draw in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, position + 1)
        draw(axes, evaluation)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    sets = f"mean ± sd over {evaluation.config.num_sets} sets of {evaluation.config.set_size} fresh seeds"
    figure.suptitle(f"{sets}; reference {evaluation.num_reference} seeds; {evaluation.features} features", fontsize=10)
    return save_figure(path, figure)


def _group(row: Row) -> str:
    return row.name if row.name.startswith(("student", "teacher")) else row.name.rsplit(" ", 1)[0]


def _distances(measure: str, label: str, scale: str) -> Draw:
    def draw(axes: Any, evaluation: Evaluation) -> None:
        groups: dict[str, list[tuple[int, float, float]]] = {}
        for row in evaluation.table.rows:
            mean, deviation = row.mean(measure), row.deviation(measure)
            if mean is not None and deviation is not None:
                groups.setdefault(_group(row), []).append((row.evaluations, mean, deviation))
        for group, points in groups.items():
            x, y, spread = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, yerr=spread, marker="*" if group == "student" else "o", capsize=3, label=group)
        axes.set(xscale="log", yscale=scale, xlabel="network evaluations per image", ylabel=label)
        axes.xaxis.set_major_formatter("{x:g}")
        if scale == "log":
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(fontsize=8)

    return draw


def _kid(axes: Any, evaluation: Evaluation) -> None:
    _distances("kid", "KID to the teacher", "linear")(axes, evaluation)
    axes.axhline(0.0, color="black", linewidth=0.8)


def _precision_recall(axes: Any, evaluation: Evaluation) -> None:
    for row in evaluation.table.rows:
        recall, precision = row.mean("recall"), row.mean("precision")
        if recall is not None and precision is not None:
            axes.errorbar(
                recall,
                precision,
                xerr=row.deviation("recall"),
                yerr=row.deviation("precision"),
                marker="*" if row is evaluation.table.rows[STUDENT] else "o",
                capsize=2,
                label=row.name,
            )
    axes.set(xlabel="recall", ylabel="precision")
    axes.legend(fontsize=7)


def _classes(axes: Any, evaluation: Evaluation) -> None:
    shares = {row.name: row.class_shares for row in evaluation.table.rows[: TEACHER + 1]} | {
        "reference": evaluation.reference_shares
    }
    bars = {name: values for name, values in shares.items() if values is not None}
    width = 0.8 / len(bars)
    for index, (name, values) in enumerate(bars.items()):
        axes.bar(np.arange(len(values)) + (index - (len(bars) - 1) / 2) * width, values, width, label=name)
    axes.set(xlabel="class, by the classifier", ylabel="share of samples")
    count = len(next(iter(bars.values())))
    names = [evaluation.name_of(label) for label in range(count)]
    axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > MAX_UPRIGHT else 0)
    axes.legend(fontsize=8)
