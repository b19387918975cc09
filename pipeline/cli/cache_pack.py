"""`advkd-cache pack` and `unpack`."""

from __future__ import annotations

from pathlib import Path

import click

from advkd.pipeline.cli.common import example, guarded

_OUT = click.option(
    "--out", metavar="STORE", type=click.Path(path_type=Path), required=True, help="The store to write."
)
_WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes that share the blocks; one a core if not given.",
)


@click.command(epilog=example("advkd-cache pack cache/digits.zarr --max-error 0.004 --out packed/digits.zarr"))
@click.argument("store")
@_OUT
@click.option(
    "--codec",
    type=click.Choice(["lossless", "archive", "zstd", "blosc", "pcodec"]),
    help="archive if --max-error is given, else lossless; the last three open in any Zarr reader.",
)
@click.option(
    "--max-error", type=float, metavar="E", help="Of archive: how far a stored value may be off, such as 0.004."
)
@click.option("--keep-bits", type=int, metavar="N", help="Of zstd, blosc, pcodec: round mantissas to N bits first.")
@click.option("--level", type=int, metavar="L", help="Of zstd, blosc, pcodec: effort.")
@_WORKERS
@guarded
def pack(
    store: str,
    out: Path,
    codec: str | None,
    max_error: float | None,
    keep_bits: int | None,
    level: int | None,
    workers: int | None,
) -> None:
    """Write a copy of a cache that is small enough to share.

    lossless and archive don't store the noise, which the seeds draw again, and predict each state from it and from
    earlier ones. Every chunk is decoded again from the file that was written; the ledger says what the error is. Run
    the same command again to go on, or to add what the cache has gained: only new blocks are written.
    """
    from advkd.cache.files.processes import num_cores
    from advkd.cache.format.encoding import Packing
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.cache.write.pack import pack as run_pack
    from advkd.pipeline.progress import TerminalReporter

    cache = TrajectoryCache.open(store)
    chosen = codec or ("lossless" if max_error is None else "archive")
    packing = Packing.of(chosen, cache.layout.dtype, max_error=max_error, keep_bits=keep_bits, level=level)
    if packing.is_predictive and not cache.recipe.deterministic:
        click.echo(
            f"{cache.recipe.sampler['name']} draws noise at every step, and drawing that again costs more than its "
            "bytes: only x_T is left out, the rest takes nearly what PCodec takes",
            err=True,
        )
    with TerminalReporter() as reporter:
        packed = run_pack(
            cache,
            out,
            packing,
            num_workers=workers or num_cores(),
            begin=lambda num_bytes: reporter.start("pack", num_bytes, "bytes"),
            advance=reporter.advance,
        )
        reporter.finish()
    error = f"error rms {packed.error_rms:.1e}, at most {packed.error_max:.1e}" if packed.error_max else "no error"
    click.echo(
        f"{out}: {packed.num_added} blocks packed, {packed.num_present} were there; {packed.num_bytes / 1e6:,.1f} MB, "
        f"{packed.num_bytes / max(1, packed.num_values):.3f} bytes a value; {error}"
    )


@click.command(epilog=example("advkd-cache unpack packed/digits.zarr --out cache/digits.zarr"))
@click.argument("packed")
@_OUT
@_WORKERS
@guarded
def unpack(packed: str, out: Path, workers: int | None) -> None:
    """Give back the cache that one trains from: PACKED is a folder or a URL.

    From lossless it has the same bytes as the one that was packed. Run the same command again to go on.
    """
    from advkd.cache.files.processes import num_cores
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.cache.write.pack import unpack as run_unpack
    from advkd.pipeline.progress import TerminalReporter

    with TerminalReporter() as reporter:
        unpacked = run_unpack(
            TrajectoryCache.open(packed),
            out,
            num_workers=workers or num_cores(),
            begin=lambda num_bytes: reporter.start("unpack", num_bytes, "bytes"),
            advance=reporter.advance,
        )
        reporter.finish()
    click.echo(f"{out}: {unpacked.num_added} blocks unpacked, {unpacked.num_present} were there")
