"""The evaluation on a terminal: two tables that fit 100 columns, and what a pass costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from advkd.stages.evaluate.scores import Evaluation
    from advkd.stages.metrics.intervals import Interval

WIDTH = 100
"""Of the output where there is no terminal."""
TEACHER = "teacher itself"
"""The name of its row, which is short; the caption names its sampler."""


MAX_CLASSES = 10
"""Classes on the terminal; scores.json has all."""


def print_evaluation(evaluation: Evaluation) -> None:
    """What is worth reading at once; scores.json has the rest."""
    terminal = Console()
    console = Console(highlight=False, width=None if terminal.is_terminal else WIDTH)
    console.print(_samplers(evaluation))
    console.print(_beside(evaluation))
    _print_by_class(evaluation)
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
    from advkd.stages.metrics.registry import MEASURES

    measures = [name for name, measure in MEASURES.items() if measure.column_decimals is not None]
    form = "the whole protocol" if evaluation.full else "a short form of the protocol: see --full"
    teacher = evaluation.table.rows[1].name
    treatments = "".join(f"\n{mark}: {treatment}" for mark, treatment in evaluation.table.marks().items())
    table = _table(
        f"Against the teacher's cached x_0 of {evaluation.num_reference:,} seeds, in {evaluation.features} features "
        f"({form}).\nMean ± sd over {evaluation.config.num_sets} sets of {evaluation.config.set_size:,} fresh seeds "
        "(KID: ± standard error; precision, recall: %)\n",
        "student minus this: Fréchet distance, 95 % interval; ahead or behind where it excludes 0\n"
        f"{TEACHER}: {teacher.removeprefix('teacher ').strip('()')}{treatments}\n",
        ["sampler", "evals", *(MEASURES[name].title for name in measures), "student minus this", "student"],
    )
    for name, *cells in evaluation.table.cells(measures):  # rows without scores are explained below the tables
        table.add_row(name.replace(teacher, TEACHER), *cells)
    return table


def _beside(evaluation: Evaluation) -> Table:
    from advkd.stages.metrics.registry import MEASURES
    from advkd.stages.metrics.table import difference_text

    student, teacher = evaluation.table.rows[:2]
    table = _table(
        "The student beside the teacher itself, on the same seeds (precision, recall: %)\n",
        f"*: the interval excludes 0. Reference {evaluation.num_reference:,} seeds, "
        f"{evaluation.num_training:,} of them training images\n",
        ["mean ± sd", "student", "teacher", "student minus teacher, 95 %", ""],
    )
    for name, measure in MEASURES.items():
        if name in student.values and name != "frechet":
            gap = evaluation.table.student_minus(teacher, name)
            mark = "*" if gap and gap.excludes_zero else ""
            table.add_row(measure.title, student.text(name), teacher.text(name), difference_text(gap, name), mark)
    return table


def _print_by_class(evaluation: Evaluation) -> None:
    """Fréchet distances within classes, the student's and the teacher's, where the teacher is told classes."""
    from advkd.stages.metrics.frechet import MIN_PER_DIMENSION
    from advkd.stages.metrics.table import NOT_MEASURED

    student, teacher = (row.class_frechet for row in evaluation.table.rows[:2])
    if student is None:
        return
    if not any(value is not None for value in student.values()):
        click.echo(
            "Fréchet distance within each class: not measured; a class needs "
            f"{MIN_PER_DIMENSION} images per feature,\nin the sets together and in the reference\n"
        )
        return
    said = []
    for label in list(student)[:MAX_CLASSES]:
        values = [row[label] for row in (student, teacher) if row is not None]
        own, *others = (NOT_MEASURED if value is None else f"{value:.1f}" for value in values)
        said.append(f"{evaluation.name_of(label)}: {own}" + "".join(f" ({other})" for other in others))
    more = f" … ({len(student)} classes)" if len(student) > MAX_CLASSES else ""
    click.echo(f"Fréchet distance within each class, student (teacher):\n{', '.join(said)}{more}\n")


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
    if evaluation.decoder:
        times = ", ".join(
            f"{seconds * 1e3:.1f} ms at batch {batch}" for batch, seconds in evaluation.decoder.latency.items()
        )
        click.echo(f"decoding on top, of any sampler: {times}")
    if not teacher:
        click.echo(f"teacher: not measured ({evaluation.without_teacher})")


def _range(interval: Interval) -> str:
    return f"[{interval.low:.4f}, {interval.high:.4f}]"
