"""Stage two's reader beside other ways to keep the same states, everything in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness import Benchmark, Comparison, Target, interleaved, missing, ratio_between, rows_of, run
from benchmarks.readers import CEILING, OURS, Reader, check_agreement, clear, make_readers

LMDB, API = "LMDB, a value a seed", "Zarr's API on the same store"


def random_batches(reader: Reader, num_seeds: int, batch: int) -> Callable[[], None]:
    """Reads another random batch each time."""
    generator = np.random.default_rng(2)

    def way() -> None:
        noise, state = reader.read(generator.integers(0, num_seeds, batch))
        assert len(noise) == len(state) == batch

    return way


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
        for reader in readers.values():  # everything is in memory, and ours has checked all it will read
            for start in range(0, num_seeds, 1024):
                reader.read(np.arange(start, min(start + 1024, num_seeds)))
        for batch in batches:
            ways = {name: random_batches(reader, num_seeds, batch) for name, reader in readers.items()}
            quick = 2 if bench.quick else 40 if size == 32 else 4
            times = interleaved(
                ways, bench.rounds(15 if size == 32 else 7), calls={CEILING: quick, OURS: quick, LMDB: quick}
            )
            bench.add(_comparison(times, size, num_seeds, batch, agreement))
        clear(here)


def _comparison(times: dict[str, list[float]], size: int, num_seeds: int, batch: int, agreement: str) -> Comparison:
    figures = {name: [batch / seconds for seconds in values] for name, values in times.items()}
    where = f"{size}×{size}, batches of {batch}"
    limits = {CEILING: 0.55 if batch > 64 else 0.45, LMDB: 1.0}
    if size == 32:
        limits[API] = 60.0 if batch <= 64 else 1.0
    names = {CEILING: "the memmap ceiling", LMDB: "LMDB", API: "Zarr's API"}
    targets = [
        Target(
            what=f"reader by {names[other]}, {where}",
            found=ratio_between(figures, OURS, other),
            limit=limit,
            at_most=False,
        )
        for other, limit in limits.items()
        if other in figures
    ]
    bytes_a_second = np.median(figures[OURS]) * 2 * 3 * size * size * 2
    return Comparison(
        title=f"{num_seeds:,} × (3, {size}, {size}) fp16, noise and one state, random {where.split(', ')[1]}, warm",
        unit="pairs/s",
        baseline=CEILING,
        rows=rows_of(figures, CEILING),
        targets=targets,
        agreement=f"{agreement} {missing('lmdb')}".strip(),
        note="The limit is one copy of every row out of the page cache, which a single map makes as well: "
        f"{bytes_a_second / 1e9:.1f} GB/s here. What is left to it is some ten microseconds a batch and state: "
        "dividing seeds into blocks, looking that each block is mapped and was checked, and choosing rows.",
    )  # fmt: skip


if __name__ == "__main__":
    run("reading", "Stage two's reader: how fast do random batches come out of the cache?", measure)
