"""`advkd-cache verify`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from advkd.pipeline.cli.common import example, guarded, printable

if TYPE_CHECKING:
    from advkd.cache.read.reader import TrajectoryCache

MAX_LINES = 50


@click.command(epilog=example("advkd-cache verify cache/digits.zarr --recompute 2"))
@click.argument("store")
@click.option("--recompute", type=click.IntRange(min=1), metavar="K", help="Sample K random blocks again and compare.")
@click.option("--teacher", metavar="PATH_OR_HUB_ID", help="For --recompute; where the cache says if not given.")
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="For --recompute.")
@click.option("--device", help="For --recompute: cuda, cuda:1, mps or cpu.")
@click.option("--repair", is_flag=True, help="Remove what is provably damaged, so that the next build makes it again.")
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
@guarded
def verify(
    store: str,
    recompute: int | None,
    teacher: str | None,
    batch_size: int,
    device: str | None,
    repair: bool,
    as_json: bool,
) -> None:
    """Check every byte of a cache against its ledger, and every metadata file against its recipe.

    STORE is a folder or a URL. Exit code 1 if anything is wrong; each finding names file, block and state.
    """
    from advkd.cache.care.repair import repair as run_repair
    from advkd.cache.care.verify import bytes_to_verify
    from advkd.cache.care.verify import verify as run_verify
    from advkd.cache.read.reader import TrajectoryCache
    from advkd.pipeline.progress import TerminalReporter

    cache = TrajectoryCache.open(store)
    with TerminalReporter() as reporter:
        reporter.start("verify", bytes_to_verify(cache), "bytes")
        verified = run_verify(cache, reporter.advance)
        reporter.finish()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(verified), indent=2))
    else:
        for finding in verified.findings[:MAX_LINES]:
            click.echo(printable(finding))
        if len(verified.findings) > MAX_LINES:
            click.echo(f"and {len(verified.findings) - MAX_LINES} more (--json lists all)")
        partial = f"; not here: state {', '.join(verified.absent_states)}" if verified.absent_states else ""
        found = f"{len(verified.findings)} findings" if verified.findings else "all as recorded"
        click.echo(f"{store}: {verified.num_blocks} blocks, {verified.num_bytes:,} bytes compared: {found}{partial}")
    if repair and verified.findings:
        for line in run_repair(cache, verified.findings):
            click.echo(line, err=as_json)
        cache = TrajectoryCache.open(store)  # without the blocks that were removed
    agreed = _recompute(cache, recompute, teacher, batch_size, device) if recompute else True
    if verified.findings or not agreed:
        sys.exit(1)


def _recompute(cache: TrajectoryCache, count: int, teacher: str | None, batch_size: int, device: str | None) -> bool:
    from advkd.cache.care.summary import origin_of
    from advkd.pipeline.progress import TerminalReporter
    from advkd.stages.teacher.build.recompute import choose_blocks, plan_of, recompute
    from advkd.stages.teacher.config import TeacherConfig

    named = TeacherConfig.recorded(origin_of(cache), teacher) if teacher else None
    plan = plan_of(cache, named, batch_size, device)
    with TerminalReporter() as reporter:
        results = recompute(cache, plan, choose_blocks(cache, count), reporter)
    for result in results:
        if not result.apart:
            click.echo(f"block {result.block}: sampled again to the same bytes")
            continue
        step = max(result.apart, key=lambda step: result.apart[step] / max(result.tolerance[step], 1e-30))
        verdict = "within" if result.within else "BEYOND"
        click.echo(
            f"block {result.block}: sampled again, {verdict} the recorded tolerance (state {step:04d}: rms "
            f"{result.apart[step]:.1e}, tolerance {result.tolerance[step]:.1e})"
        )
    return all(result.within for result in results)
