"""`advkd-cache advise`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from advkd.pipeline.cli.cache_build import make_teacher
from advkd.pipeline.cli.common import config_option, example, guarded

if TYPE_CHECKING:
    from advkd.stages.evaluate.advise import Advice
    from advkd.stages.teacher.build.plan import Plan


@click.command(epilog=example("advkd-cache advise --config configs/digits.yaml"))
@config_option("digits")
@click.option("--teacher", metavar="PATH_OR_HUB_ID", help="A diffusers pipeline: a folder or a Hub id.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0.0, min_open=True),
    metavar="T",
    help="Root mean square error of x_0 that is small enough; the configured sampler's own if not given.",
)
@click.option("--num", type=click.IntRange(min=2), default=32, show_default=True, help="Seeds to sample, in one batch.")
@click.option(
    "--features", metavar="NAME", help="Compare images by Fréchet distance, too: `inception`, or a network's folder."
)
@click.option("--device", help="cuda, cuda:1, mps or cpu; the best that is there if not given.")
@click.option(
    "--out", metavar="FOLDER", type=click.Path(path_type=Path), help="What was tried; cache/NAME.advice if not given."
)
@guarded
def advise(
    config: str | None,
    overrides: tuple[str, ...],
    teacher: str | None,
    tolerance: float | None,
    num: int,
    features: str | None,
    device: str | None,
    out: Path | None,
) -> None:
    """Say how many steps of which solver a teacher needs, before a cache is begun.

    Compares x_0 of every deterministic solver in 5 to 1000 steps with a fine solve's, from the same noise. Goes on
    where an interrupted call stopped.
    """
    from advkd.pipeline.config import load_experiment
    from advkd.pipeline.experiment import with_flags
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.evaluate.advise import advise as run_advise
    from advkd.stages.teacher.build.plan import make_plan

    experiment, _ = with_flags(load_experiment(config, overrides), {"teacher": teacher, "device": device})
    make_teacher(experiment)
    folder = out or Path("cache") / f"{experiment.name}.advice"
    plan = make_plan(experiment.teacher, experiment.sampler, experiment.cache, folder / "none.zarr")
    network = None
    if features is not None:
        from advkd.stages.evaluate.networks import load_features

        shape = plan.teacher.space.image_shape if plan.teacher.space else plan.teacher.item_shape
        network = load_features(dataclasses.replace(experiment.evaluate, features=features), shape)
    with TerminalReporter() as reporter:
        advice = run_advise(plan, num, tolerance, folder, reporter, network)
    _print(plan, advice)


def _print(plan: Plan, advice: Advice) -> None:
    from advkd.pipeline.progress import duration

    seeds = len(plan.seeds)
    has_frechet = any(one.frechet is not None for one in advice.tried)
    wide = 10 if has_frechet else 0
    click.echo(
        f"error: root mean square difference of x_0 from {advice.reference}'s; below {advice.floor:.2g} it says "
        f"nothing\n"
        f"{'solver':<14}{'steps':>6}{'evaluations':>13}{'error':>9}{'Fréchet' if has_frechet else '':>{wide}}"
        f"   {seeds:,} seeds here"
    )
    for one in advice.tried:
        mark = "  ← cheapest within the tolerance" if one is advice.enough else ""
        taken = duration(one.seconds * one.evaluations * seeds)
        distance = f"{one.frechet:.2f}" if one.frechet is not None else ""
        click.echo(
            f"{one.name:<14}{one.steps:>6}{one.evaluations:>13}{one.error:>9.2g}{distance:>{wide}}   {taken}{mark}"
        )
    if not plan.recipe.deterministic:
        click.echo(
            f"the configured {plan.sampler.name} adds noise at each step: its x_0 doesn't follow from x_T, so errors "
            "can't tell how many steps it needs"
        )
    disk = math.ceil(seeds / plan.layout.block_size) * plan.block_bytes / 1e9
    click.echo(f"disk          {disk:.3f} GB for the configured states and seeds, whatever the solver")
    if advice.enough is None:
        click.echo(f"none is within {advice.tolerance:.2g}: allow more with --tolerance")
    else:
        click.echo(
            f"within {advice.tolerance:.2g}; to take it:\nsampler:\n  name: {advice.enough.name}\n"
            f"  steps: {advice.enough.steps}\n  spacing: {plan.sampler.spacing}"
        )
    click.echo(f"look: {advice.plot}")
