"""What all programs share: methods timed in turns, child processes, the machine, results as JSON.

Each round runs every method once, in a rotating order, and ratios are taken within a round, so that other load on the
machine affects all methods alike. A figure is a median; its spread is the quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from advkd.pipeline.memory import keep_freed_memory
from benchmarks.comparison import Comparison
from benchmarks.table import comparison_lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
Method = Callable[[], object]


def seconds_of(method: Method) -> float:
    """Duration of one call."""
    begin = time.perf_counter()
    method()
    return time.perf_counter() - begin


def interleaved(
    methods: Mapping[str, Method],
    rounds: int,
    before: Callable[[], None] = lambda: None,
    calls: Mapping[str, int] | None = None,
    settle: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds per call of each method, measured in turns.

    Args:
        methods: by name.
        rounds: number of rounds.
        before: called before each method's turn, untimed.
        calls: calls per turn for methods that are too quick for one.
        settle: seconds to sleep before each turn, followed by one untimed call: another library's threads spin for a
            while after their work and would take the cores from this one's.
    """
    names = list(methods)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            before()
            if settle:
                time.sleep(settle)
                methods[name]()
            count = (calls or {}).get(name, 1)
            begin = time.perf_counter()
            for _ in range(count):
                methods[name]()
            times[name].append((time.perf_counter() - begin) / count)
    return times


def missing(*modules: str) -> str:
    """A sentence that names the optional packages that are not installed; empty if all are."""
    absent = []
    for name in modules:
        try:
            __import__(name)
        except ImportError:
            absent.append(name)
    return f"not measured: {', '.join(absent)} not installed (`pip install -e '.[bench]'`)" if absent else ""


@dataclass(kw_only=True, slots=True)
class Benchmark:
    """One program: its question and its findings."""

    name: str
    question: str
    quick: bool
    device: str
    out: Path
    max_rounds: int | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def add(self, comparison: Comparison) -> None:
        """Keep a comparison and print it."""
        self.comparisons.append(comparison)
        print("\n".join(["", *comparison_lines(comparison)]), flush=True)

    def rounds(self, number: int) -> int:
        """The number of rounds to run: one in a quick run, at most `max_rounds`."""
        return min(1 if self.quick else number, self.max_rounds or number)

    def write(self) -> Path:
        """Write the findings as JSON."""
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
    """A program's main: read the options, measure in a temporary folder, write the JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks that it runs and that methods agree")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for networks")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="folder of the JSON")
    parser.add_argument("--rounds", type=int, metavar="N", help="at most N rounds, for a busy machine")
    options = parser.parse_args()
    bench = Benchmark(
        name=name, question=question, quick=options.quick, device=options.device, out=options.out,
        max_rounds=options.rounds,
    )  # fmt: skip
    print(question)
    keep_freed_memory()  # as all of advkd's commands do; the alternatives in this process gain from it too
    with scratch() as folder:
        measure(bench, folder)
    print(f"\n{bench.write()}")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, in $ADVKD_BENCH_FOLDER if set: it must be on a real disk, as tmpfs is never cold."""
    folder = Path(tempfile.mkdtemp(prefix="advkd-bench-", dir=os.environ.get("ADVKD_BENCH_FOLDER")))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_child(module: str, *arguments: object) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS…` and return the JSON object on the last line of its output."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine(device: str) -> dict[str, Any]:
    """The kind of machine, without its name."""
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
    """Wait until a GPU has finished its queue."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def has_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 instructions."""
    import torch

    return device != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def peak_megabytes() -> float:
    """Peak resident memory of this process in 10⁶ bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
