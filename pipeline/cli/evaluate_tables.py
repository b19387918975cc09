"""The evaluation on a terminal: two tables that fit 100 columns, and what a pass costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from advkd.stages.evaluate.scores import Evaluation, Row
    from advkd.stages.metrics.intervals import Interval

WIDTH = 100
"""Of what is printed where there is no terminal."""
NOT_MEASURED = "–"
TEACHER = "teacher itself"
"""The name of its row, which is short; the sampler stands below."""
BESIDE = {
    "precision": "precision",
    "recall": "recall",
    "class_overlap": "class shares' overlap with reference",
    "rarest_class": "rarest class, of its share there",
    "confidence": "classifier's confidence",
    "nearest_training": "rms to the nearest training image",
    "nearest_training_closest": "… of the closest hundredth",
    "frechet_to_real": "Fréchet distance to the real images",
    "mse_to_teacher": "squared error to teacher, same noise",
    "perceptual_to_teacher": "perceptual distance to teacher",
}
"""Measures of the second table."""
DIGITS = 3
"""Significant ones, so that an interval still fits."""


def print_evaluation(evaluation: Evaluation) -> None:
    """Everything worth reading at once; scores.json has the rest."""
    terminal = Console()
    console = Console(highlight=False, width=None if terminal.is_terminal else WIDTH)
    console.print(_samplers(evaluation))
    console.print(_beside(evaluation))
    _print_held_out(evaluation)
    _print_costs(evaluation)


def _table(title: str, caption: str, columns: list[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _samplers(evaluation: Evaluation) -> Table:
    form = "the whole protocol" if evaluation.full else "a short form of the protocol: see --full"
    table = _table(
        f"Against the teacher's cached x_0 of {evaluation.num_reference:,} seeds, in {evaluation.features} features "
        f"({form}).\nMean ± sd over {evaluation.num_sets} sets of {evaluation.set_size:,} fresh seeds "
        "(KID: ± standard error; precision, recall: %)\n",
        "student minus this: Fréchet distance, 95 % interval; ahead or behind where it excludes 0; "
        f"{TEACHER}: {evaluation.rows[1].name.removeprefix('teacher ').strip('()')}\n",
        ["sampler", "evals", "Fréchet", "KID", "precision", "recall", "student minus this", "student"],
    )
    for row in evaluation.rows:
        if not row.values:  # said in a line below, and why
            continue
        gap = evaluation.student_minus(row, "frechet") if row is not evaluation.rows[0] else None
        verdict = ("ahead" if gap.mean < 0.0 else "behind") if gap and gap.excludes_zero else ""
        table.add_row(
            TEACHER if row is evaluation.rows[1] else row.name,
            str(row.evaluations),
            _spread(row, "frechet", 1),
            _spread(row, "kid"),
            _percent(row, "precision"),
            _percent(row, "recall"),
            _interval(gap, 1),
            verdict,
        )
    return table


def _beside(evaluation: Evaluation) -> Table:
    student, teacher = evaluation.rows[:2]
    table = _table(
        "The student beside the teacher itself, on the same seeds\n",
        f"*: the interval excludes 0. Reference {evaluation.num_reference:,} seeds, "
        f"{evaluation.num_training:,} of them training images\n",
        ["mean ± sd", "student", "teacher", "student minus teacher, 95 %", ""],
    )
    for measure, label in BESIDE.items():
        if measure in student.values:
            gap = evaluation.student_minus(teacher, measure)
            mark = "*" if gap and gap.excludes_zero else ""
            table.add_row(label, _spread(student, measure), _spread(teacher, measure), _interval(gap), mark)
    return table


def _print_held_out(evaluation: Evaluation) -> None:
    if evaluation.held_out is None:
        click.echo("held-out seeds of the cache: too few")
        return
    held_out = evaluation.held_out
    click.echo(
        f"to the teacher's x_0 on {held_out.num_seeds:,} held-out seeds of the cache, 95 %: "
        f"squared error {held_out.mse.mean:.4f} {_range(held_out.mse)},\n"
        f"perceptual distance {held_out.perceptual.mean:.4f} {_range(held_out.perceptual)}"
    )


def _print_costs(evaluation: Evaluation) -> None:
    student, teacher = evaluation.student, evaluation.teacher
    click.echo(
        f"student: {student.num_parameters:,} parameters ({evaluation.deployed_parameters:,} deployed), "
        f"{student.macs / 1e6:.1f} M multiply-accumulates,\n"
        + ", ".join(f"{seconds * 1e3:.1f} ms at batch {batch}" for batch, seconds in student.latency.items())
        + f" ({evaluation.device})"
    )
    if teacher:
        ratios = ", ".join(f"{evaluation.latency_ratio(batch):.2f} at batch {batch}" for batch in student.latency)
        click.echo(
            f"one evaluation of the teacher: {teacher.num_parameters:,} parameters, "
            f"{teacher.macs / 1e6:.1f} M multiply-accumulates;\nlatency of the student's pass in them: {ratios}"
        )
    else:
        click.echo(f"teacher: not measured ({evaluation.without_teacher})")


def _decimals(*values: float, most: int = 4) -> int:
    """Decimals that show the largest of some values to `DIGITS` digits, and not more than `most`."""
    largest = max(map(abs, values))
    return next((decimals for decimals in range(most) if largest * 10**decimals >= 10 ** (DIGITS - 1)), most)


def _spread(row: Row, measure: str, most: int = 4) -> str:
    mean = row.mean(measure)
    spread = row.standard_error(measure) if measure == "kid" else row.deviation(measure)
    if mean is None or spread is None:
        return NOT_MEASURED
    decimals = _decimals(mean, spread, most=most)
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def _percent(row: Row, measure: str) -> str:
    mean, spread = row.mean(measure), row.deviation(measure)
    return NOT_MEASURED if mean is None or spread is None else f"{100.0 * mean:.0f} ± {100.0 * spread:.0f}"


def _interval(interval: Interval | None, most: int = 4) -> str:
    if interval is None:
        return ""
    decimals = _decimals(interval.low, interval.high, most=most)
    return f"{interval.mean:+.{decimals}f} [{interval.low:+.{decimals}f}, {interval.high:+.{decimals}f}]"


def _range(interval: Interval) -> str:
    return f"[{interval.low:.4f}, {interval.high:.4f}]"
