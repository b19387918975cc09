"""What recording costs in memory and stalls, with a teacher so fast that the disk must keep up."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.comparison import Comparison, Target, ratio_between, rows_of
from benchmarks.harness import Benchmark, in_child, run
from benchmarks.networks import save_random, tiny

ALONE, BUILD = "sampling alone", "building"
SAMPLING, WAITING = "sampling a block", "waiting for the writer"


def measure(bench: Benchmark, folder: Path) -> None:
    """Blocks of 11 states at 32×32 by a tiny teacher."""
    block_size, batch, blocks = (16, 8, 3) if bench.quick else (1000, 125, 3)
    teacher = save_random(folder / "teacher", tiny())
    block = block_size * 11 * 3 * 32 * 32 * 4 / 1e6
    memory: dict[str, list[float]] = {ALONE: [], BUILD: []}
    stalls: dict[str, list[float]] = {SAMPLING: [], "writing it": [], WAITING: []}
    for number in range(bench.rounds(3)):
        bare, built = (
            in_child(
                "benchmarks.recording_child", how, teacher, folder / store, block_size, batch, blocks, bench.device
            )
            for how, store in (("sample", "none"), ("build", f"{number}.zarr"))
        )
        memory[ALONE].append(bare["peak"])
        memory[BUILD].append(built["peak"])
        # The preview of the first block comes before the second; nothing is sampled while the last is written.
        later = len(built["sampled"]) - 1
        stalls[SAMPLING].append(sum(built["sampled"][1:]) / later)
        stalls["writing it"].append(sum(built["committed"]) / len(built["committed"]))
        stalls[WAITING].append(sum(built["waited"][3:-2]) / later)
    more = statistics.median(b - a for a, b in zip(memory[ALONE], memory[BUILD], strict=True))
    bench.add(
        Comparison(
            title=f"peak memory, blocks of {block_size} seeds × 11 states (float32: {block:,.0f} MB)",
            unit="MB",
            baseline=ALONE,
            rows=rows_of(memory, ALONE),
            targets=[
                Target(
                    what="memory beyond weights and activations, in blocks", found=more / block, limit=2
                )
            ],
            note="States are rounded to the stored float16 batch by batch; at most one block waits to be written while "
            "the next one is sampled. Sampling alone shows what weights and activations need.",
        )
    )  # fmt: skip
    bench.add(
        Comparison(
            title="stalls of the same build",
            unit="s",
            baseline=SAMPLING,
            rows=rows_of(stalls, SAMPLING),
            targets=[
                Target(
                    what="waiting / sampling", found=ratio_between(stalls, WAITING, SAMPLING), limit=0.01
                )
            ],
            note="The teacher has a few thousand parameters; one of 35.75 M takes a hundred times as long per block "
            "and writes the same amount.",
        )
    )  # fmt: skip


if __name__ == "__main__":
    run("recording", "Stage one: how much memory and waiting does recording cost?", measure)
