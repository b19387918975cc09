"""`advkd-train`: stage two."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from advkd.pipeline.cli.common import (
    INTERRUPTED,
    command_line,
    config_option,
    example,
    guarded,
    parse_steps,
    store_name,
)


@click.command(
    epilog=example("advkd-train --cache cache/digits.zarr --config digits"),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--cache", "store", metavar="STORE", required=True, help="A folder, or a URL that fsspec reads.")
@config_option("settings for 32×32 colour images")
@click.option(
    "--run",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Default: runs/NAME of the store.",
)
@click.option("--states", metavar="LIST", help="Learn from these recorded states only, such as 0,50.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop at this step; the same command resumes.")
@click.option("--resume", is_flag=True, help="Fail unless the run exists already.")
@click.option(
    "--on-mismatch",
    type=click.Choice(["stop", "set-aside"]),
    default="stop",
    show_default=True,
    help="If the folder holds another run: stop, or rename it and start anew.",
)
@click.option("--seed", type=click.IntRange(min=0, max=(1 << 31) - 1), help="Replaces train.seed.")
@click.option("--device", help="cuda, cuda:1, mps or cpu; the best of this machine if not given.")
@guarded
def main(
    store: str,
    config: str | None,
    overrides: tuple[str, ...],
    run: Path | None,
    states: str | None,
    max_steps: int | None,
    resume: bool,
    on_mismatch: Any,
    seed: int | None,
    device: str | None,
) -> None:
    """Train a one-pass student from a trajectory cache alone.

    Item shape, recorded states and noise schedule come from the cache. The same command resumes an interrupted run,
    also with another number of processes; more train.steps prolong a finished one. Several processes: torchrun
    --nproc-per-node N -- "$(which advkd-train)" …
    """
    from advkd.cache.format.metadata import read_metadata
    from advkd.cache.format.source import open_source

    read_metadata(open_source(store))  # a wrong path fails before anything slow is imported
    from advkd.cache.files.interrupts import StopRequest
    from advkd.pipeline.config import default_settings, load_experiment
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.student.train import train

    settings = (load_experiment(config, overrides) if config else default_settings(overrides)).train
    if states is not None:
        settings = dataclasses.replace(settings, states=parse_steps("--states", states))
    if seed is not None:
        settings = dataclasses.replace(settings, seed=seed)
    folder = run or Path("runs") / store_name(store)
    with StopRequest() as stop, TerminalReporter() as reporter:
        trained = train(
            store,
            settings,
            folder,
            max_steps=max_steps,
            resume=resume,
            on_mismatch=on_mismatch,
            reporter=reporter,
            device=device,
            should_stop=stop,
        )
    if stop.requested and not trained.complete:
        if trained.is_main:
            click.echo(f"stopped at step {trained.step}, checkpoint saved. To resume: {command_line()}", err=True)
        sys.exit(INTERRUPTED)
    if not trained.is_main:
        return
    where = f"; preview: {trained.preview}" if trained.preview else ""
    click.echo(
        f"{folder}: step {trained.step} of {trained.num_steps}, "
        f"mean squared error on held-out seeds {trained.held_out_mse:.4f}{where}"
    )
