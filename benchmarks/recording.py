"""What recording costs in memory and in waiting, with a teacher so quick that the disk has to keep up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Comparison, Target, rows_of, run
from benchmarks.networks import save_random, tiny

PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from benchmarks.harness import peak_megabytes
from advkd.stages.teacher.build import background, build
from advkd.stages.teacher.build.block import sample_block
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.sample.sampling import initial_noise, sample

how, teacher, store, block_size, batch, blocks, device = sys.argv[1:]
config = CacheConfig(seeds=f"0:{int(block_size) * int(blocks)}", record=10, block_size=int(block_size),
                     batch_size=int(batch), device=device)
plan = make_plan(TeacherConfig(source=teacher), SamplerConfig(steps=10), config, Path(store))
waited, sampled, committed = [], [], []

def timed(function, times):
    def call(*arguments, **keywords):
        begin = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            times.append(time.perf_counter() - begin)
    return call

if how == "bare":  # weights and activations: a batch is sampled, and nothing kept
    for start in range(0, int(block_size), int(batch)):
        seeds = range(start, min(start + int(batch), int(block_size)))
        noise = initial_noise(0, seeds, plan.recipe.item_shape, "float16")
        sample(plan.teacher, plan.sampler, noise, seeds=seeds, root_seed=0, record=[])
else:
    background.Background.wait = timed(background.Background.wait, waited)
    build.sample_block = timed(sample_block, sampled)
    build.commit_block = timed(build.commit_block, committed)
    build.build(plan)
print(json.dumps({"peak": peak_megabytes(), "waited": waited, "sampled": sampled, "committed": committed}))
"""


def figures_of(how: str, *arguments: object) -> dict[str, Any]:
    """What a process of its own found."""
    command = [sys.executable, "-c", PROGRAM, how, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(bench: Benchmark, folder: Path) -> None:
    """Some blocks of 11 states at 32×32 by a tiny teacher."""
    block_size, batch, blocks = (16, 8, 3) if bench.quick else (1000, 125, 3)
    teacher = save_random(folder / "teacher", tiny())
    block = block_size * 11 * 3 * 32 * 32 * 4 / 1e6
    memory: dict[str, list[float]] = {"sampling alone": [], "building": []}
    stalls: dict[str, list[float]] = {"sampling a block": [], "writing it": [], "sampling waits for it": []}
    for number in range(bench.rounds(3)):
        bare = figures_of("bare", teacher, folder / "none", block_size, batch, blocks, bench.device)
        built = figures_of("build", teacher, folder / f"{number}.zarr", block_size, batch, blocks, bench.device)
        memory["sampling alone"].append(bare["peak"])
        memory["building"].append(built["peak"])
        # The first block is shown before the next begins, and nothing is sampled while the last is written.
        later = len(built["sampled"]) - 1
        stalls["sampling a block"].append(sum(built["sampled"][1:]) / later)
        stalls["writing it"].append(sum(built["committed"]) / len(built["committed"]))
        waits = built["waited"][3:-2]
        stalls["sampling waits for it"].append(sum(waits) / later)
    more = sorted(b - a for a, b in zip(memory["sampling alone"], memory["building"], strict=True))
    bench.add(
        Comparison(
            title=f"peak memory, blocks of {block_size} seeds × 11 states (float32: {block:,.0f} MB)",
            unit="MB",
            baseline="sampling alone",
            rows=rows_of(memory, "sampling alone"),
            targets=[
                Target(
                    what="memory beyond weights and activations, in blocks", found=more[len(more) // 2] / block, limit=2
                )
            ],
            note="A block is kept as it was computed, in float32, until it is written; the limit is one block and "
            "what of the next one is sampled meanwhile. Weights and activations are what a process needs that samples "
            "and keeps nothing.",
        )
    )  # fmt: skip
    share = [
        wait / work for wait, work in zip(stalls["sampling waits for it"], stalls["sampling a block"], strict=True)
    ]
    bench.add(
        Comparison(
            title="stalls, the same build",
            unit="s",
            baseline="sampling a block",
            rows=rows_of(stalls, "sampling a block"),
            targets=[
                Target(
                    what="share of sampling that waits for writing", found=sorted(share)[len(share) // 2], limit=0.01
                )
            ],
            note="With a teacher of a few thousand parameters: one of 35.75 M takes a hundred times as long a "
            "block, and writes the same.",
        )
    )  # fmt: skip


if __name__ == "__main__":
    run("recording", "Stage one: what does recording cost in memory and in waiting?", measure)
