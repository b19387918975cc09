"""Building with one and two processes, and the cost of a block in dask's scheduler."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from advkd.stages.teacher.build import workers
from advkd.stages.teacher.build.tasks import Request
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from benchmarks.comparison import Comparison, Target, ratio_between, row_of, rows_of
from benchmarks.harness import ROOT, Benchmark, run
from benchmarks.networks import save_random, tiny

BIN = Path(sys.executable).parent
ALONE, THREADS = "one process, one thread", "one process, two threads"
TWO, BUILDERS = "--workers 2, one thread each", "two builders, one thread each"


def rate(
    teacher: Path, store: Path, work: dict[str, Any], builders: int, threads: int, flags: tuple[str, ...]
) -> float:
    """Blocks per second of a build, from the times at which blocks were committed."""
    settings = [f"--{name}={value}" for name, value in work.items()]
    command = [str(BIN / "advkd-cache"), "build", "--teacher", str(teacher), "--out", str(store), *settings, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(builders)
    ]
    for process in running:
        _, error = process.communicate()
        if process.returncode:
            raise SystemExit(error)
    return blocks_per_second(store)


def blocks_per_second(store: Path) -> float:
    """The rate while all processes worked: from the last process's first commit to the first process's last."""
    commits: dict[int, list[float]] = {}
    for path in (store / "blocks").glob("*.json"):
        maker = json.loads((store / f"provenance/block-{path.stem}.json").read_bytes())["pid"]
        commits.setdefault(maker, []).append(path.stat().st_mtime_ns / 1e9)
    begin, end = max(min(moments) for moments in commits.values()), min(max(moments) for moments in commits.values())
    between = sum(begin < moment <= end for moments in commits.values() for moment in moments)
    if between:
        return between / (end - begin)
    everything = sorted(moment for moments in commits.values() for moment in moments)  # a process started too late
    return (len(everything) - 1) / (everything[-1] - everything[0])


def nothing(request: Request, block: int) -> str:
    """A block that takes no time."""
    return "made"


def scheduler_costs(address_file: Path, num_tasks: int) -> dict[str, float]:
    """Processor seconds per block's task of scheduler and client, and wall seconds from one to the next."""
    from distributed import Client

    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    scheduler = subprocess.Popen([*command, "--scheduler-file", str(address_file)], cwd=ROOT, env=environment, **quiet)
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(address_file)]
    others = [
        subprocess.Popen(
            [*worker, "--nthreads", "1", "--no-nanny", "--no-dashboard"], cwd=ROOT, env=environment, **quiet
        )
        for _ in range(2)
    ]
    original = workers.__dict__["make"]
    try:
        with Client(scheduler_file=str(address_file), set_as_default=False, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            setattr(workers, "make", nothing)  # noqa: B010
            request = Request(
                run="warm", teacher=TeacherConfig(source="a"), sampler=SamplerConfig(), config=CacheConfig(),
                store=Path("/a"), fingerprint="f" * 64, layout_hash="l" * 64, command="c" * 100, report_seconds=1.0,
                threads=None,
            )  # fmt: skip
            costs = {}
            for name, number in (("warm", 50), ("measured", num_tasks)):
                before = processor_seconds(scheduler.pid), resource.getrusage(resource.RUSAGE_SELF)
                begin = time.perf_counter()
                blocks = list(range(number))
                attempt = workers.attempt_on(client, dataclasses.replace(request, run=name), blocks)
                made = sum(outcome == "made" for _, outcome in attempt)
                wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
                assert made == number
                own = after.ru_utime + after.ru_stime - before[1].ru_utime - before[1].ru_stime
                costs = {
                    "scheduler, processor time": (processor_seconds(scheduler.pid) - before[0]) / number,
                    "command, processor time": own / number,
                    "wall time from one block to the next": wall / number,
                }
            return costs
    finally:
        setattr(workers, "make", original)  # noqa: B010
        for process in (*others, scheduler):
            process.kill()
            process.wait()


def processor_seconds(process: int) -> float:
    """User and system time of a process."""
    times = importlib.import_module("psutil").Process(process).cpu_times()
    return float(times.user + times.system)


def measure(bench: Benchmark, folder: Path) -> None:
    """Throughput, then the scheduler."""
    teacher = save_random(folder / "teacher", tiny(width=8 if bench.quick else 48))
    blocks, size = (8, 2) if bench.quick else (14, 24)
    steps = 2 if bench.quick else 10
    work: dict[str, Any] = {"seeds": f"0:{blocks * size}", "steps": steps, "record": steps}
    work |= {"block-size": size, "batch-size": size}
    methods: dict[str, dict[str, Any]] = {
        ALONE: {"builders": 1, "threads": 1, "flags": ()},
        THREADS: {"builders": 1, "threads": 2, "flags": ()},
        TWO: {"builders": 1, "threads": 2, "flags": ("--workers=2",)},
        BUILDERS: {"builders": 2, "threads": 1, "flags": ()},
    }
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(bench.rounds(3)):
        for place, (name, options) in enumerate(methods.items()):
            store = folder / f"{number}-{place}.zarr"
            rates[name].append(size * rate(teacher, store, work, **options))
            shutil.rmtree(store)
    efficiency = {name: ratio_between(rates, name, ALONE) / 2 for name in (THREADS, TWO, BUILDERS)}
    bench.add(
        Comparison(
            title=f"blocks of {size} seeds, {work['record'] + 1} states at 32×32",
            unit="seeds/s",
            baseline=ALONE,
            rows=rows_of(rates, ALONE),
            targets=[
                Target(what=f"efficiency of {name}", found=efficiency[name], limit=0.9, at_most=False)
                for name in (TWO, BUILDERS)
            ],
            agreement=f"Every method commits the same {blocks} blocks; a test compares their bytes.",
            note=f"Two threads in one process: {efficiency[THREADS]:.2f}. The limit is 1 if each process has a core to "
            "itself; both share memory bandwidth and the last-level cache. Rates cover the time in which all processes "
            "work, without starting and loading the teacher.",
        )
    )
    costs = scheduler_costs(folder / "scheduler.json", 200 if bench.quick else 5000)
    cost = costs["scheduler, processor time"]
    bench.add(
        Comparison(
            title="a block that takes no time, on a local dask cluster of two workers",
            unit="s",
            baseline=None,
            rows=[row_of(name, [value]) for name, value in costs.items()],
            targets=[Target(what="scheduler time per block, ms", found=cost * 1e3, limit=5.0)],
            note=f"One scheduler handles {1 / cost:,.0f} blocks per second on a core: it keeps a thousand workers busy "
            f"if a block takes {1000 * cost:.1f} s or more.",
        )
    )


if __name__ == "__main__":
    run("workers", "Workers: how much faster are two processes, and what does a block cost the scheduler?", measure)
