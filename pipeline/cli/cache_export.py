"""`advkd-cache export` and `push`: caches for other tools, and on the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from advkd.pipeline.cli.common import example, guarded, parse_steps


@click.command(epilog=example("advkd-cache export cache/digits.zarr --format npz --out pairs"))
@click.argument("store")
@click.option(
    "--format",
    "form",
    type=click.Choice(["npz", "webdataset", "fastgen"]),
    required=True,
    help="Pairs of noise and image; whole paths for webdataset readers; or for NVIDIA FastGen.",
)
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--seeds", metavar="A:B", help="Which seeds; all that are there if not given.")
@click.option("--states", metavar="LIST", help="Which states of a path, by solver steps done; all if not given.")
@guarded
def export(store: str, form: str, out: Path, seeds: str | None, states: str | None) -> None:
    """Write a cache for other tools, a shard per block; STORE is a folder or a URL.

    A killed export goes on when it is run again. `index.json` says what the shards hold.
    """
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.exchange.export import export_cache

    steps = None if states is None else parse_steps("--states", states)
    with TerminalReporter() as reporter:
        exported = export_cache(TrajectoryCache.open(store), out, form, reporter, seeds=seeds, steps=steps)
    there = f", {exported.num_present} of which were there" if exported.num_present else ""
    click.echo(f"{out}: {exported.num_seeds:,} seeds in {exported.num_shards:,} shards{there}")


@click.command(epilog=example("advkd-cache push cache/digits.zarr hf://datasets/me/digits"))
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("address")
@click.option("--private", is_flag=True, default=None, help="Make a new repository private.")
@guarded
def push(store: Path, address: str, private: bool | None) -> None:
    """Publish a cache as a data set of the Hub, hf://datasets/OWNER/NAME, with a card and a picture.

    Sends what the Hub lacks: an interrupted push goes on, a grown cache sends its new blocks. Every command that reads
    a cache opens the address. `hf auth login` comes first.
    """
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.exchange.push import push_cache

    with TerminalReporter() as reporter:
        pushed = push_cache(store, address, reporter, private=private)
    there = f"; {pushed.num_present:,} were there" if pushed.num_present else ""
    click.echo(f"{pushed.url}: {pushed.num_files:,} files in {pushed.num_commits} commits{there}")
