"""Writes the report: scores, pictures, curves, costs, configuration and provenance of evaluated runs in one HTML file.

Nothing in it is fetched or run: pictures are inside, there is no script, and a policy forbids both.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from advkd.cache.files.durable import write_atomically
from advkd.stages.evaluate.fid import measured_fid
from advkd.stages.evaluate.results import PICTURES
from advkd.stages.metrics.registry import MEASURES
from advkd.stages.metrics.table import NOT_MEASURED, difference_text
from advkd.stages.report.charts import distances, training_curves
from advkd.stages.report.runs import EvaluatedRun, comparison
from advkd.stages.student.facts import attribution, class_names, provenance_facts, score_notes
from advkd.stages.student.hub import Student
from advkd.stages.student.run import Run

MAX_PREVIEWS = 6


def write_report(runs: Sequence[EvaluatedRun], out: Path) -> Path:
    """Write one HTML file.

    Args:
        runs: as `read_runs` gives them; several are compared, each with the one before.
        out: the file, replaced atomically.
    """
    style = _asset("report.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_asset("report.html")).render(
        title=", ".join(run.name for run in runs),
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        comparison=_compared(runs) if len(runs) > 1 else None,
        runs=[_told(run) for run in runs],
    )
    write_atomically(out, [text.encode()])
    return out


def _asset(name: str) -> str:
    return files("advkd.stages.report").joinpath("assets", name).read_text(encoding="utf-8")


def _compared(runs: Sequence[EvaluatedRun]) -> dict[str, Any]:
    columns, rows = comparison(runs)
    configurations = [_flat(run.identity.get("config", {})) for run in runs]
    keys = dict.fromkeys(key for configuration in configurations for key in configuration)
    values = {key: [configuration.get(key, "–") for configuration in configurations] for key in keys}
    return {
        "columns": columns,
        "rows": rows,
        "chart": _image(distances([(run.name, run.student) for run in runs], runs[0].teacher)),
        "names": [run.name for run in runs],
        "changes": {key: found for key, found in values.items() if len(set(found)) > 1},
    }


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """A configuration as text by dotted key."""
    if not isinstance(value, dict):
        return {path: str(value)}
    return {key: text for name in value for key, text in _flat(value[name], f"{path}.{name}".strip(".")).items()}


def _told(run: EvaluatedRun) -> dict[str, Any]:
    student = Student.from_pretrained(run.path)
    columns = [name for name, measure in MEASURES.items() if measure.column_decimals is not None]
    how, notes = score_notes(student.provenance)
    evaluation, folder = run.path / "evaluation", Run(run.path)
    previews = sorted(folder.preview.glob("step-*.png"))
    spread = {round(index * (len(previews) - 1) / (MAX_PREVIEWS - 1)) for index in range(MAX_PREVIEWS)}
    curves, fid = training_curves(folder.log), measured_fid(run.path)
    return {
        "name": run.name,
        "how": how,
        "notes": [*notes, f"{fid}."] if fid else notes,
        "columns": ["sampler", "evaluations", *(MEASURES[name].title for name in columns), "student minus this", ""],
        "rows": run.table.cells(columns),
        "beside": _beside(run),
        "classes": _classes(run, student),
        "pictures": [
            (_image(path), caption) for name, caption in PICTURES.items() if (path := evaluation / name).is_file()
        ],
        "attribution": attribution(student.provenance),
        "curves": None if curves is None else _image(curves),
        "previews": [
            (_image(previews[index]), f"step {int(previews[index].stem.removeprefix('step-')):,}")
            for index in sorted(spread)
            if previews
        ],
        "costs": _costs(run.cost),
        "configuration": yaml.safe_dump(run.identity.get("config", {}), sort_keys=False, allow_unicode=True),
        "facts": provenance_facts(student.geometry, student.provenance),
    }


def _beside(run: EvaluatedRun) -> list[list[str]]:
    """Every measure of the student beside the teacher's."""
    if run.teacher is None:
        return [[measure.title, run.student.text(name), "", "", ""] for name, measure in MEASURES.items()
                if name in run.student.values]  # fmt: skip
    lines = []
    for name, measure in MEASURES.items():
        if name in run.student.values:
            gap = run.table.student_minus(run.teacher, name)
            lines.append(
                [measure.title, run.student.text(name), run.teacher.text(name), difference_text(gap, name),
                 measure.verdict(gap)]
            )  # fmt: skip
    return lines


def _classes(run: EvaluatedRun, student: Student) -> dict[str, Any] | None:
    """A line per class: its share of the samples, and the distance within it where classes were asked for."""
    rows = {"student": run.student, "teacher": run.teacher}
    known = {name: row for name, row in rows.items() if row is not None and row.class_shares is not None}
    if "student" not in known:
        return None
    inside = {name: row.class_frechet for name, row in known.items() if row.class_frechet is not None}
    labels = range(len(run.student.class_shares or []))
    names = class_names(student.provenance, labels)
    lines = [
        [
            name,
            *(f"{100 * row.class_shares[label]:.1f} %" for row in known.values() if row.class_shares),
            *(_distance(found.get(str(label))) for found in inside.values()),
        ]
        for label, name in zip(labels, names, strict=True)
    ]
    columns = ["class", *(f"share, {name}" for name in known), *(f"distance within it, {name}" for name in inside)]
    return {"columns": columns, "rows": lines}


def _distance(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}"


def _costs(cost: dict[str, Any]) -> list[list[str]]:
    """Parameters, multiply-accumulates and milliseconds per image of a pass, a line per network."""
    lines = []
    for name, found in cost.items():
        if found:
            latency = ", ".join(
                f"{seconds * 1e3 / int(batch):.2f} ms at batch {batch}" for batch, seconds in found["latency"].items()
            )
            deployed = found.get("deployed_parameters", found["num_parameters"])
            lines.append([name, f"{deployed:,}", f"{found['macs'] / 1e6:.1f}", latency])
    return lines


def _image(source: Path | str) -> str:
    """A PNG file, or SVG as text, as a `data:` address."""
    if isinstance(source, Path):
        return f"data:image/png;base64,{base64.b64encode(source.read_bytes()).decode()}"
    return f"data:image/svg+xml;base64,{base64.b64encode(source.encode()).decode()}"
