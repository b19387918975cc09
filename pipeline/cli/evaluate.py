"""`advkd-evaluate`: scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from advkd.pipeline.cli.common import CONFIG_OPTION, example, guarded

if TYPE_CHECKING:
    from advkd.stages.evaluate.evaluate import Evaluation


@click.command(
    epilog=example("advkd-evaluate --config digits --run runs/digits --cache cache/digits.zarr"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--run", metavar="FOLDER", type=click.Path(path_type=Path), required=True)
@click.option("--cache", "store", metavar="STORE", required=True, help="A folder, or a URL that fsspec reads.")
@CONFIG_OPTION
@click.option("--teacher", metavar="PATH_OR_HUB_ID", help="The cache's teacher; where the cache says if not given.")
@click.option("--features", metavar="NAME|FOLDER", help="`inception`, or the folder of a small classifier.")
@click.option("--inception-weights", metavar="FILE", help="pytorch-fid's weights, where they can't be fetched.")
@click.option("--real", metavar="NAME|FOLDER", help="Real images to compare with: `digits`, or a folder.")
@click.option("--full", is_flag=True, help="The whole protocol: five sets of 2,048 seeds, reference of 8,192.")
@guarded
def main(
    run: Path,
    store: str,
    config: str | None,
    teacher: str | None,
    features: str | None,
    inception_weights: str | None,
    real: str | None,
    full: bool,
) -> None:
    """Score a student beside the samplers that one would otherwise use, on the same fresh seeds.

    Writes metrics.json, samplers.csv and pictures to RUN/evaluation.
    """
    from advkd.cache.reader import TrajectoryCache
    from advkd.cache.summary import origin_of
    from advkd.pipeline.config import load_experiment
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.evaluate.config import EvaluateConfig
    from advkd.stages.evaluate.report import write_report

    cache = TrajectoryCache.open(store)
    experiment = load_experiment(config) if config else None
    settings = experiment.evaluate if experiment else EvaluateConfig()
    given: dict[str, Any] = {"features": features, "inception_weights": inception_weights, "real": real}
    settings = dataclasses.replace(settings, **{key: value for key, value in given.items() if value is not None})
    known = origin_of(cache)
    source = {"source": teacher} if teacher else {"source": known.get("source"), "revision": known.get("commit")}
    if experiment and not teacher:
        source = {"source": experiment.teacher.source, "revision": experiment.teacher.revision}
    from advkd.stages.evaluate.evaluate import evaluate

    with TerminalReporter() as reporter:
        evaluation = evaluate(
            run,
            store,
            settings,
            teacher_source=source.get("source"),
            teacher_revision=source.get("revision"),
            full=full,
            reporter=reporter,
        )
    pictures = write_report(run / "evaluation", evaluation, cache)
    _print(evaluation)
    click.echo("look: " + "  ".join(map(str, pictures)))


def _print(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    form = "the whole protocol" if evaluation.full else "a short form of the protocol, see --full"
    table = Table(
        title=f"Fréchet distance to the teacher's cached x_0, mean ± sd over {evaluation.num_sets} sets of "
        f"{evaluation.set_size} fresh seeds\n({form}; reference {evaluation.num_reference} seeds; "
        f"{evaluation.features} features)",
        title_justify="left",
    )
    for name in ("sampler", "evaluations", "to teacher", "to real", "student minus this, 95 %", "student is"):
        table.add_column(name, justify="left" if name in ("sampler", "student is") else "right")
    for row in evaluation.rows:
        difference, verdict = "", ""
        if row.difference:
            difference = f"{row.difference.mean:+.1f} [{row.difference.low:+.1f}, {row.difference.high:+.1f}]"
            verdict = "not distinguishable"
            if row.difference.excludes_zero:
                verdict = "ahead" if row.difference.mean < 0 else "behind"
        measured = f"{row.mean:.1f} ± {row.deviation or 0.0:.1f}" if row.mean is not None else "not measured"
        real = f"{row.to_real:.1f}" if row.to_real is not None else "–"
        table.add_row(row.name, str(row.evaluations), measured, real, difference, verdict)
    Console(highlight=False, width=None if Console().is_terminal else 120).print(table)
    student, teacher = evaluation.student, evaluation.teacher
    click.echo(
        f"student: {student.num_parameters:,} parameters ({evaluation.deployed_parameters:,} deployed), "
        f"{student.macs / 1e6:.1f} M multiply-accumulates, "
        + ", ".join(f"{seconds * 1e3:.1f} ms at batch {batch}" for batch, seconds in student.latency.items())
        + f" ({evaluation.device})"
    )
    if teacher:
        ratios = ", ".join(f"{evaluation.latency_ratio(batch):.2f} at batch {batch}" for batch in student.latency)
        click.echo(
            f"one evaluation of the teacher: {teacher.num_parameters:,} parameters, "
            f"{teacher.macs / 1e6:.1f} M multiply-accumulates; latency of the student's pass in them: {ratios}"
        )
    else:
        click.echo(f"teacher: not measured ({evaluation.without_teacher})")
    click.echo(f"mean squared error to the teacher's x_0 on held-out seeds: {evaluation.held_out_mse:.4f}")
