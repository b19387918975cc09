"""The same readers on a cold page cache, as with data larger than memory."""

from __future__ import annotations

import functools
import shutil
import statistics
from pathlib import Path

import numpy as np

from advkd.cache import TrajectoryCache
from advkd.cache.dataset import BlockShuffle, TrajectoryDataset
from benchmarks.comparison import Comparison, Target, ratio_between, rows_of
from benchmarks.harness import Benchmark, interleaved, missing, run, seconds_of
from benchmarks.readers import (
    CEILING,
    FRESH,
    OURS,
    STATES,
    Reader,
    check_agreement,
    evict,
    first_touch,
    make_readers,
    random_batches,
)

WHOLE, FEW = "full shuffle", "BlockShuffle with the blocks that fit"
HEADLINE = "Reading a cache larger than memory: times faster than the best alternative"


def measure(bench: Benchmark, folder: Path) -> None:
    """Every method begins each turn with all files out of memory and reads a few batches."""
    for size, num_seeds, block_size, batch, count in (
        (32, 128 if bench.quick else 16384, 64 if bench.quick else 2048, 16 if bench.quick else 64, 4),
        (256, 8 if bench.quick else 640, 4 if bench.quick else 160, 4 if bench.quick else 32, 2),
    ):
        here = folder / str(size)
        here.mkdir()
        readers = make_readers(here, size, num_seeds, block_size)
        agreement = check_agreement(readers, num_seeds)
        readers[OURS].read(np.arange(num_seeds))  # as in later epochs: everything has been checked once
        readers[FRESH] = first_touch(here / "a.zarr")
        methods = {name: random_batches(reader, num_seeds, batch) for name, reader in readers.items()}
        calls = dict.fromkeys(methods, count)
        times = interleaved(methods, bench.rounds(5), functools.partial(evict, readers), calls)
        figures = {name: [batch / seconds for seconds in values] for name, values in times.items()}
        bench.add(_comparison(figures, size, num_seeds, batch, count, agreement))
        if size == 32:
            bench.add(orders(bench, here / "a.zarr", readers, batch, 16 if bench.quick else 2 * block_size))
        shutil.rmtree(here)


def orders(bench: Benchmark, store: Path, readers: dict[str, Reader], batch: int, memory: int) -> Comparison:
    """Whole epochs with memory for `memory` seeds: everything is evicted each time that many have been read."""
    dataset = TrajectoryDataset(TrajectoryCache.open(store), steps=list(STATES))
    values = np.asarray(dataset.cache.rows(50, dataset.seeds), dtype=np.float32).reshape(len(dataset), -1)
    by_blocks = BlockShuffle(dataset, max(1, memory // dataset.cache.layout.block_size))
    generator = np.random.default_rng(0)
    figures: dict[str, list[float]] = {WHOLE: [], FEW: []}
    spread: dict[str, list[float]] = {WHOLE: [], FEW: []}
    for epoch in range(bench.rounds(5)):
        by_blocks.set_epoch(epoch)
        for name, order in ((WHOLE, generator.permutation(len(dataset))), (FEW, np.asarray(list(by_blocks)))):
            seconds = 0.0
            for start in range(0, len(order) - batch + 1, batch):
                if start % memory == 0:
                    evict(readers)
                here = dataset.seeds[order[start : start + batch]]
                seconds += seconds_of(functools.partial(readers[OURS].read, here))
            figures[name].append(len(order) // batch * batch / seconds)
            cut = order[: len(order) // batch * batch].reshape(-1, batch)
            spread[name].append(float(values[cut].mean(1).var(0).mean() / values.var(0).mean() * batch))
    found = ratio_between(spread, FEW, WHOLE)
    return Comparison(
        title=f"an epoch with memory for {memory:,} of {len(dataset):,} pairs, batches of {batch}",
        unit="pairs/s",
        baseline=WHOLE,
        rows=rows_of(figures, WHOLE),
        targets=[Target(what="variance of batch means, BlockShuffle / full shuffle", found=found, limit=1.1)],
        agreement="Either order visits every seed once.",
        note=f"Statistical cost: batch means vary {found:.3f} times as much, since seeds are independent draws; "
        "but consecutive batches come from the same blocks.",
    )


def _comparison(
    figures: dict[str, list[float]], size: int, num_seeds: int, batch: int, count: int, agreement: str
) -> Comparison:
    others = [name for name in figures if name not in (OURS, FRESH)]
    best = max(others, key=lambda name: statistics.median(figures[name]))
    what = f"reader / best alternative, pairs/s, cold, {size}×{size}"
    return Comparison(
        title=f"{num_seeds:,} × (3, {size}, {size}) fp16, noise and one state, {count} random batches of {batch}, cold",
        unit="pairs/s",
        baseline=CEILING,
        rows=rows_of(figures, CEILING),
        targets=[Target(what=what, found=ratio_between(figures, OURS, best), limit=1.0, at_most=False,
                        headline=HEADLINE if size == 32 else "")],
        agreement=f"{agreement} {missing('lmdb')}".strip(),
        note="The limit is the disk. Read-ahead is off for our maps, because a random row's neighbours are not needed, "
        "and once a batch has waited for the disk, the next ones request all their rows at once before copying "
        f"them; a plain map waits for one page after another. The best alternative: {best}. The first read checks "
        "whole segments of 1 MiB, once.",
    )  # fmt: skip


if __name__ == "__main__":
    run("cold", "Stage two's reader: how fast is it when nothing is in memory?", measure)
