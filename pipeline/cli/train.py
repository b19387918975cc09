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
@click.option("--run", metavar="FOLDER", type=click.Path(path_type=Path), help="runs/NAME of the store if not given.")
@click.option("--states", metavar="LIST", help="Learn from these recorded states only, such as 0,50.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after so many steps in all; goes on later.")
@click.option("--resume", is_flag=True, help="Insist that the run is there already, and go on with it.")
@click.option(
    "--on-mismatch",
    type=click.Choice(["stop", "set-aside"]),
    default="stop",
    show_default=True,
    help="Where the folder holds another run: stop, or rename it out of the way.",
)
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
) -> None:
    """Train a one-pass student from a trajectory cache alone.

    Item shape, recorded states and noise schedule come from the cache. Run the same command again to go on after an
    interruption.
    """
    from advkd.cache.format.metadata import read_metadata
    from advkd.cache.format.source import open_source

    read_metadata(open_source(store))  # a wrong path is said at once, before anything heavy is imported
    from advkd.pipeline.config import default_settings, load_experiment
    from advkd.pipeline.interrupts import StopRequest
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.student.train import train

    settings = (load_experiment(config, overrides) if config else default_settings(overrides)).train
    if states is not None:
        settings = dataclasses.replace(settings, states=parse_steps("--states", states))
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
            should_stop=stop,
        )
    if stop.requested and not trained.complete:
        if trained.is_main:
            click.echo(f"stopped at step {trained.step}, checkpoint saved. To resume: {command_line()}", err=True)
        sys.exit(INTERRUPTED)
    if not trained.is_main:
        return
    where = f"; look: {trained.preview}" if trained.preview else ""
    click.echo(
        f"{folder}: step {trained.step} of {trained.num_steps}, "
        f"mean squared error on held-out seeds {trained.held_out_mse:.4f}{where}"
    )
