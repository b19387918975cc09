"""What all benchmarks share: ways taken in turns, medians and ratios, agreement, results as JSON.

Each round takes every way once, in an order that turns, and a ratio is taken within its round: what else the machine
does meanwhile then hits all ways alike. A figure is a median; its spread is the quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from advkd.pipeline.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
Way = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of doing it."""

    name: str
    median: float
    low: float
    high: float
    """Quartiles."""
    ratio: float | None = None
    """Median over rounds of this way's figure by the baseline's of the same round."""
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a figure should be."""

    what: str
    found: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit


@dataclass(kw_only=True, slots=True)
class Comparison:
    """Some ways of doing one thing."""

    title: str
    unit: str
    baseline: str | None
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    agreement: str = ""
    """How it was seen that all ways give the same."""
    note: str = ""
    """How far the physical limit is, or where the time goes."""

    def row(self, name: str) -> Row:
        """A way by name."""
        return next(row for row in self.rows if row.name == name)


def seconds_of(way: Way) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def interleaved(
    ways: Mapping[str, Way],
    rounds: int,
    before: Callable[[], None] = lambda: None,
    calls: Mapping[str, int] | None = None,
    settle: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns.

    Args:
        ways: by name.
        rounds: how often each.
        before: called before each way, outside the time that is taken.
        calls: how often to call a way in its turn, where it is too quick for one; the time is that of one call.
        settle: seconds to wait before each way, which is then called once more outside the time that is taken. Threads
            of another library go on looking for work for a while, and would take the cores from this one's.
    """
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            before()
            if settle:
                time.sleep(settle)
                ways[name]()
            count = (calls or {}).get(name, 1)
            begin = time.perf_counter()
            for _ in range(count):
                ways[name]()
            times[name].append((time.perf_counter() - begin) / count)
    return times


def rows_of(figures: Mapping[str, list[float]], baseline: str | None) -> list[Row]:
    """Medians, quartiles and ratios of what was taken in rounds."""
    rows = []
    for name, values in figures.items():
        low, middle, high = _quartiles(values)
        ratio: tuple[float | None, ...] = (None, None, None)
        if baseline is not None:
            ratio = _quartiles([value / base for value, base in zip(values, figures[baseline], strict=True)])
        rows.append(
            Row(name=name, median=middle, low=low, high=high, ratio=ratio[1], ratio_low=ratio[0], ratio_high=ratio[2])
        )
    return rows


def ratio_between(figures: Mapping[str, list[float]], name: str, other: str) -> float:
    """Median over rounds of one way's figure by another's."""
    return statistics.median(a / b for a, b in zip(figures[name], figures[other], strict=True))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return low, middle, high


def missing(*modules: str) -> str:
    """Optional packages that are not here, in words; empty if all are."""
    absent = []
    for name in modules:
        try:
            __import__(name)
        except ImportError:
            absent.append(name)
    return f"not measured: {', '.join(absent)} not installed (`pip install -e '.[bench]'`)" if absent else ""


@dataclass(kw_only=True, slots=True)
class Benchmark:
    """One program: its question, and what it found."""

    name: str
    question: str
    quick: bool
    device: str
    out: Path
    most: int | None = None
    """Rounds at most."""
    comparisons: list[Comparison] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def add(self, comparison: Comparison) -> None:
        """Keep a comparison, and print it."""
        self.comparisons.append(comparison)
        from benchmarks.table import comparison_lines

        print("\n".join(["", *comparison_lines(comparison)]), flush=True)

    def rounds(self, number: int) -> int:
        """So many rounds, one in a quick run, and no more than were allowed."""
        return min(1 if self.quick else number, self.most or number)

    def write(self) -> Path:
        """Write what was found as JSON."""
        value = {
            "name": self.name,
            "question": self.question,
            "date": datetime.now(UTC).date().isoformat(),
            "quick": self.quick,
            "device": self.device,
            "machine": machine(self.device),
            "seconds": round(time.perf_counter() - self.began, 1),
            "comparisons": [
                {**asdict(item), "targets": [{**asdict(target), "met": target.met} for target in item.targets]}
                for item in self.comparisons
            ],
        }
        suffix = "" if self.device == "cpu" else f"-{self.device.split(':')[0]}"
        path = self.out / f"{self.name}{suffix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def run(name: str, question: str, measure: Callable[[Benchmark, Path], None]) -> None:
    """A program's main: read the options, measure in a folder that goes afterwards, write the JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run, and do the ways agree?")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, where a network is evaluated")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    parser.add_argument("--rounds", type=int, metavar="N", help="so many rounds at most, on a machine that is busy")
    options = parser.parse_args()
    bench = Benchmark(
        name=name,
        question=question,
        quick=options.quick,
        device=options.device,
        out=options.out,
        most=options.rounds,
    )
    print(question)
    keep_freed_memory()  # as all of advkd's commands do; the alternatives in this process gain by it too
    with scratch() as folder:
        measure(bench, folder)
    print(f"\n{bench.write()}")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder on a real disk, where there is one: what lies in memory can't be cold."""
    folder = Path(tempfile.mkdtemp(prefix="advkd-bench-", dir=os.environ.get("ADVKD_BENCH_FOLDER")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def machine(device: str) -> dict[str, Any]:
    """What kind of machine this is; nothing that names it."""
    import torch

    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "numpy", "zarr")},
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {})


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def wait_for(device: str) -> None:
    """Let a GPU finish what it was told."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def peak_megabytes() -> float:
    """The most memory that this process ever had, in 10⁶ bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
