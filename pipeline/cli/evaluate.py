"""`advkd-evaluate`: scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from advkd.pipeline.cli.common import all_or_nothing, config_option, example, keeping

if TYPE_CHECKING:
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.pipeline.config import Experiment
    from advkd.stages.evaluate.config import EvaluateConfig
    from advkd.stages.teacher.config import TeacherConfig


@click.command(
    epilog=example("advkd-evaluate --config digits --run runs/digits --cache cache/digits.zarr"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--run", metavar="FOLDER", type=click.Path(path_type=Path), required=True, help="The run to score.")
@click.option("--cache", "store", metavar="STORE", required=True, help="A folder, or a URL that fsspec reads.")
@config_option("the defaults of its section `evaluate`")
@click.option(
    "--teacher",
    metavar="PATH_OR_HUB_ID",
    help="The cache's teacher (default: the configuration's, then the one that the cache records).",
)
@click.option("--no-teacher", is_flag=True, help="Score the student alone: the teacher and its solvers cost the most.")
@click.option(
    "--features",
    metavar="NAME|FOLDER",
    help="`inception`, `self` (trained on the cache's own images), or a folder: of a small classifier, or of a DINOv2.",
)
@click.option("--inception-weights", metavar="FILE", help="pytorch-fid's weights, where they can't be downloaded.")
@click.option(
    "--real", metavar="NAME|FOLDER", help="Real images to compare with: `digits`, `mnist`, `emoji`, or a folder."
)
@click.option("--full", is_flag=True, help="The whole protocol: five sets of 2,048 seeds, reference of 8,192.")
@click.option(
    "--sets",
    metavar="N",
    type=click.IntRange(min=2),
    help="Number of sets: more sets shrink the intervals and tell close samplers apart. At least five with --full.",
)
@click.option(
    "--fid-statistics",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Only this: FID of the student to published statistics (.npz with mu and sigma). A stopped run goes on.",
)
@click.option("--fid-samples", metavar="N", type=click.IntRange(min=2), help="Images for it; 50,000 if not given.")
@click.option("--seed", metavar="N", type=int, help="Which fresh seeds: those of two values are disjoint.")
@click.option("--device", help="cpu, cuda or mps (default: the best there is).")
@all_or_nothing
def main(
    run: Path,
    store: str,
    config: str | None,
    overrides: tuple[str, ...],
    teacher: str | None,
    no_teacher: bool,
    features: str | None,
    inception_weights: str | None,
    real: str | None,
    full: bool,
    sets: int | None,
    fid_statistics: Path | None,
    fid_samples: int | None,
    seed: int | None,
    device: str | None,
) -> None:
    """Score a student beside the samplers that you would otherwise use, on the same fresh seeds.

    Writes metrics.json, scores.json, samplers.csv, pictures and report.html, which shows them all, to RUN/evaluation.
    """
    from advkd.cache.errors import UsageError
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.pipeline.cli.evaluate_tables import print_evaluation
    from advkd.pipeline.config import default_settings, load_experiment
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.evaluate.results import write_results

    if teacher and no_teacher:
        raise UsageError("--teacher and --no-teacher contradict each other: give one of them")
    cache = TrajectoryCache.open(store)
    experiment = load_experiment(config, overrides) if config else None
    settings = (experiment or default_settings(overrides)).evaluate
    given: dict[str, Any] = {
        "features": features, "inception_weights": inception_weights, "real": real, "num_sets": sets, "seed": seed,
    }  # fmt: skip
    settings = dataclasses.replace(settings, **{key: value for key, value in given.items() if value is not None})
    if fid_statistics is not None:
        if full or sets or real or teacher:
            raise UsageError(
                "--fid-statistics scores the student alone: leave out --full, --sets, --real and --teacher"
            )
        _fid(run, store, fid_statistics, settings, fid_samples, device)
        return
    if fid_samples is not None:
        raise UsageError("--fid-samples is of --fid-statistics FILE: give both")
    from advkd.stages.evaluate.evaluate import evaluate

    with TerminalReporter() as reporter:
        evaluation = evaluate(
            run,
            store,
            settings,
            teachers=[] if no_teacher else _candidates(teacher, experiment, cache),
            require_teacher=teacher is not None,
            full=full,
            device=device,
            reporter=reporter,
        )
    write_results(run / "evaluation", evaluation, cache)
    print_evaluation(evaluation)
    from advkd.stages.report.report import write_report
    from advkd.stages.report.runs import read_runs

    click.echo(f"look: {write_report(read_runs([run]), run / 'evaluation' / 'report.html')}")


def _fid(
    run: Path, store: str, statistics: Path, settings: EvaluateConfig, num_samples: int | None, device: str | None
) -> None:
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.evaluate.fid import NUM_SAMPLES, RESULT, fid

    with keeping(), TerminalReporter() as reporter:
        found = fid(run, store, statistics, settings, reporter, num_samples=num_samples or NUM_SAMPLES, device=device)
    click.echo(f"{found}\nlook: {run / 'evaluation' / RESULT}")


def _candidates(named: str | None, experiment: Experiment | None, cache: TrajectoryCache) -> list[TeacherConfig]:
    """Where the teacher may be: where the user says, or else where the configuration and then the cache say."""
    from advkd.cache.care.summary import origin_of
    from advkd.stages.teacher.config import TeacherConfig

    known = origin_of(cache)
    if named:
        return [TeacherConfig.recorded(known, named)]
    recorded = [TeacherConfig.recorded(known)] if "source" in known else []
    return [*([experiment.teacher] if experiment else []), *recorded]
