"""`advkd-cache merge` and `subset`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from advkd.pipeline.cli.common import example, guarded, parse_steps, printable

if TYPE_CHECKING:
    from advkd.cache.write.combine import Combined

_OUT = click.option(
    "--out", metavar="STORE", type=click.Path(path_type=Path), required=True, help="The store to write."
)


@click.command(epilog=example("advkd-cache merge cache/mine.zarr cache/theirs.zarr --out cache/ours.zarr"))
@click.argument("stores", nargs=-1, required=True)
@_OUT
@click.option("--prefer", metavar="STORE", help="Whose block to take where two differ within the recorded tolerance.")
@guarded
def merge(stores: tuple[str, ...], out: Path, prefer: str | None) -> None:
    """Bring the blocks of several caches of one recipe into one, which may be one of them.

    Files are linked, not copied, where the file system can. A killed merge goes on when it is run again.
    """
    from advkd.cache.errors import UsageError
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.cache.write.combine import merge as run_merge
    from advkd.pipeline.progress import TerminalReporter

    if prefer is not None and prefer not in stores:
        raise UsageError(f"--prefer {prefer} is none of the stores to merge: {', '.join(stores)}")
    caches = {store: TrajectoryCache.open(store) for store in stores}
    with TerminalReporter() as reporter:
        combined = run_merge(
            list(caches.values()),
            out,
            prefer=caches[prefer] if prefer else None,
            begin=lambda num_blocks: reporter.start("merge", num_blocks, "blocks"),
            advance=reporter.advance,
        )
        reporter.finish()
    _tell(combined)


@click.command(epilog=example("advkd-cache subset cache/digits.zarr --seeds 0:4096 --states 0,50 --out small.zarr"))
@click.argument("store")
@_OUT
@click.option("--seeds", metavar="A:B", help="Which seeds, widened to whole blocks; all that are there if not given.")
@click.option("--states", metavar="LIST", help="Which states, by solver steps done; x_T always. All here if not given.")
@guarded
def subset(store: str, out: Path, seeds: str | None, states: str | None) -> None:
    """Cut some seeds and states out of a cache, a folder or a URL, into one of its own with the same fingerprint."""
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.cache.write.combine import subset as run_subset
    from advkd.pipeline.progress import TerminalReporter

    steps = parse_steps("--states", states) if states is not None else None
    with TerminalReporter() as reporter:
        combined = run_subset(
            TrajectoryCache.open(store),
            out,
            seeds=seeds,
            steps=steps,
            begin=lambda num_blocks: reporter.start("subset", num_blocks, "blocks"),
            advance=reporter.advance,
        )
        reporter.finish()
    _tell(combined)


def _tell(combined: Combined) -> None:
    parts = [f"{combined.num_added} blocks added", f"{combined.num_present} were there"]
    if combined.num_replaced:
        parts.append(f"{combined.num_replaced} replaced")
    how = ", ".join(f"{count} as {way}" for way, count in sorted(combined.how.items()))
    click.echo(printable(f"{combined.store}: {', '.join(parts)}{f' (files: {how})' if how else ''}"))
