"""Charts as SVG: a run's training curves, and several runs' distances."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advkd.stages.metrics.table import Row

CURVES = {
    "held-out error": ("held_out/mse",),
    "training error": ("train/mse", "train/x0", "train/state"),
    "critic": ("train/critic", "train/generator"),
}
"""Panels, and the files of DVCLive's log that each shows; others are losses' parts of kinds that few use."""
Curve = list[tuple[int, float]]


def training_curves(log: Path) -> str | None:
    """The curves of a run's log, `log/plots/metrics`; None if it has none."""
    folder = log / "plots/metrics"
    panels: dict[str, dict[str, Curve]] = {}
    for title, names in CURVES.items():
        curves = {name: _read(folder / f"{name}.tsv") for name in names}
        panels[title] = {name: curve for name, curve in curves.items() if curve}
    panels = {title: curves for title, curves in panels.items() if curves}
    return _svg(panels) if panels else None


def _read(path: Path) -> Curve:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [(int(step), float(value)) for step, value in list(csv.reader(file, delimiter="\t"))[1:]]
    except (OSError, ValueError):
        return []


def _svg(panels: Mapping[str, Mapping[str, Curve]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(panels), 3.0), layout="constrained")
    for position, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), label=name, marker="." if len(curve) < 20 else None)
        positive = all(value > 0.0 for curve in curves.values() for _, value in curve)
        axes.set(xlabel="step", title=title, yscale="log" if positive else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _text(figure)


def distances(runs: Sequence[tuple[str, Row]], teacher: Row | None) -> str:
    """Fréchet distances of several runs' students, mean ± sd, with the teacher's own as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 0.45 * len(runs) + 1.2), layout="constrained")
    axes: Any = figure.add_subplot()
    means = [row.mean("frechet") for _, row in runs]
    axes.barh(range(len(runs)), means, xerr=[row.deviation("frechet") for _, row in runs], capsize=3)
    axes.set_yticks(range(len(runs)), [name for name, _ in runs])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="Fréchet distance to the teacher")
    axes.xaxis.set_major_formatter("{x:g}")
    if teacher:
        axes.axvline(teacher.mean("frechet"), color="black", linestyle="--", label="the teacher itself")
        axes.legend()
    return _text(figure)


def _text(figure: Any) -> str:
    """The figure as SVG, the same text for the same numbers."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "advkd"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
