"""`advkd-cache import`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from advkd.pipeline.cli.common import command_line, example, guarded


@click.command("import", epilog=example("advkd-cache import pairs --out cache/pairs.zarr"))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", metavar="STORE", type=click.Path(path_type=Path), required=True, help="The store to write.")
@click.option(
    "--levels",
    metavar="A:S,…",
    help="alpha and sigma of each state on the way, the noise first: x_t = alpha x_0 + sigma noise.",
)
@click.option("--decoder", metavar="PATH", help="The values are latents: the folder of their autoencoder.")
@click.option(
    "--block-size", metavar="S", type=click.IntRange(min=1), help="Seeds in a block; 1,024 or fewer if not given."
)
@click.option("--dtype", type=click.Choice(["float16", "float32"]), help="To store; the source's own if not given.")
@click.option("--accept-range", is_flag=True, help="Go on where images do not lie in [−1, 1].")
@guarded
def import_(
    folder: Path,
    out: Path,
    levels: str | None,
    decoder: str | None,
    block_size: int | None,
    dtype: str | None,
    accept_range: bool,
) -> None:
    """Make a cache of trajectories that another tool has written.

    FOLDER holds shards: .npz with the arrays noise, image and perhaps label, or tar files for NVIDIA FastGen's
    distillation (latent.pth, noise.pth, path.pth, label.pth). A killed import goes on when it is run again.
    """
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.exchange.importing import import_cache

    known = None if levels is None else _levels(levels)
    with TerminalReporter() as reporter:
        imported = import_cache(
            folder,
            out,
            reporter,
            levels=known,
            decoder=decoder,
            block_size=block_size,
            dtype=dtype,
            accept_range=accept_range,
            command=command_line(),
        )
    there = f", {imported.num_present:,} of which were there" if imported.num_present else ""
    left = f"; the last {imported.num_dropped:,} don't fill a block and were left out" if imported.num_dropped else ""
    click.echo(f"{out}: {imported.num_seeds:,} seeds{there}{left}")


def _levels(text: str) -> list[tuple[float, float]]:
    from advkd.cache.errors import UsageError

    try:
        levels = [(float(alpha), float(sigma)) for alpha, sigma in (part.split(":") for part in text.split(","))]
    except ValueError:
        levels = []
    if not levels or not all(math.isfinite(number) and number >= 0 for level in levels for number in level):
        raise UsageError(f"--levels {text!r}: expected pairs of numbers such as 0.006:1,0.5:0.87")
    return levels
