"""Stage two's reader compared with other ways to store the same states, all in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from benchmarks.comparison import Comparison, Target, ratio_between, rows_of
from benchmarks.harness import Benchmark, interleaved, missing, run
from benchmarks.readers import CEILING, LMDB, OURS, ZARR, check_agreement, make_readers, random_batches


def measure(bench: Benchmark, folder: Path) -> None:
    """Batches of 64 and 512 at 32×32, of 64 at 256×256."""
    for size, num_seeds, block_size, batches in (
        (32, 128 if bench.quick else 16384, 64 if bench.quick else 2048, (16,) if bench.quick else (64, 512)),
        (256, 8 if bench.quick else 320, 4 if bench.quick else 160, (4,) if bench.quick else (64,)),
    ):
        here = folder / str(size)
        here.mkdir()
        readers = make_readers(here, size, num_seeds, block_size)
        agreement = check_agreement(readers, num_seeds)
        for reader in readers.values():  # brings everything into memory, and lets ours check all that it will read
            for start in range(0, num_seeds, 1024):
                reader.read(np.arange(start, min(start + 1024, num_seeds)))
        for batch in batches:
            methods = {name: random_batches(reader, num_seeds, batch) for name, reader in readers.items()}
            quick = 2 if bench.quick else 40 if size == 32 else 4
            times = interleaved(
                methods, bench.rounds(15 if size == 32 else 7), calls={CEILING: quick, OURS: quick, LMDB: quick}
            )
            bench.add(_comparison(times, size, num_seeds, batch, agreement))
        shutil.rmtree(here)


def _comparison(times: dict[str, list[float]], size: int, num_seeds: int, batch: int, agreement: str) -> Comparison:
    figures = {name: [batch / seconds for seconds in values] for name, values in times.items()}
    where = f"{size}×{size}, batches of {batch}"
    limits = {CEILING: 0.55 if batch > 64 else 0.45, LMDB: 1.0}
    if size == 32:
        limits[ZARR] = 60.0 if batch <= 64 else 1.0
    names = {CEILING: "the memmap ceiling", LMDB: "LMDB", ZARR: "Zarr's API"}
    targets = [
        Target(
            what=f"reader / {names[other]}, pairs/s, {where}",
            found=ratio_between(figures, OURS, other),
            limit=limit,
            at_most=False,
            headline="Reading random batches: times faster than LMDB" if (other, size, batch) == (LMDB, 32, 64) else "",
        )
        for other, limit in limits.items()
        if other in figures
    ]
    bytes_per_second = np.median(figures[OURS]) * 2 * 3 * size * size * 2
    return Comparison(
        title=f"{num_seeds:,} × (3, {size}, {size}) fp16, noise and one state, random {where.split(', ')[1]}, warm",
        unit="pairs/s",
        baseline=CEILING,
        rows=rows_of(figures, CEILING),
        targets=targets,
        agreement=f"{agreement} {missing('lmdb')}".strip(),
        note="The limit is one copy of every row out of the page cache, which a memory map also makes: "
        f"{bytes_per_second / 1e9:.1f} GB/s here. The rest is about ten microseconds per batch and state: dividing "
        "seeds among blocks, checking that each block is mapped and verified, and selecting rows.",
    )  # fmt: skip


if __name__ == "__main__":
    run("reading", "Stage two's reader: how fast are random batches from the cache?", measure)
