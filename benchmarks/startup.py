"""How long commands take that have nothing to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.comparison import Comparison, Target, rows_of
from benchmarks.harness import ROOT, Benchmark, interleaved, run, seconds_of
from benchmarks.networks import write_states

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
BARE, TORCH, HELP, INFO = "python -c pass", "python -c 'import torch'", "advkd-cache --help", "advkd-cache info"
NOTHING, CHANGED = "dvc repro, nothing to do", "the same after every file's mtime changed"
HASHES = """
import sys
import dvc_data.hashfile.hash as hashing
found, original = [], hashing.file_md5
def counted(path, fs, *arguments, **keywords):
    if "local" in fs.protocol:  # listings of folders are hashed in memory
        found.append(path)
    return original(path, fs, *arguments, **keywords)
hashing.file_md5 = counted
from dvc.cli import main
code = main(["repro", "--quiet"])
print(len(found))
sys.exit(code)
"""
"""A `dvc repro` that prints how many files it hashed."""


def command(*parts: object, folder: Path = ROOT) -> Callable[[], None]:
    """A method that runs a process and discards its output."""

    def call() -> None:
        subprocess.run(
            [str(part) for part in parts], cwd=folder, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL
        )

    return call


def pipeline(folder: Path, num_bytes: int) -> Path:
    """A finished DVC pipeline of three stages whose store has `num_bytes` bytes in files of 15 MB."""
    folder.mkdir()
    command("git", "init", "--quiet", folder=folder)()
    command("dvc", "init", "--quiet", folder=folder)()
    for name in ("dvc.yaml", "configs", ".dvcignore"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    text = (folder / "dvc.yaml").read_text()
    stages = [line.split(":")[0].strip() for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    made = {
        "teachers/digits/pipeline/model.safetensors": 2_000_000,
        "runs/digits/run.json": 100,
        "runs/digits/student/model.safetensors": 1_000_000,
        "runs/digits/preview/a.png": 10_000,
        "runs/digits/log/plots/loss.tsv": 10_000,
        "runs/digits/log/metrics.json": 100,
        **{f"runs/digits/evaluation/{name}": 1000 for name in ("scores.json", "metrics.json", "samplers.csv")},
        **{f"runs/digits/evaluation/{name}.png": 1000 for name in ("samples", "trajectory", "scores")},
        "runs/digits/evaluation/report.html": 100_000,
        "cache/digits.zarr/zarr.json": 100,
    }
    size = min(num_bytes, 15_000_000)
    for number in range(max(num_bytes // size, 1)):
        made[f"cache/digits.zarr/blocks/{number:06d}.json"] = 1000
        made[f"cache/digits.zarr/states/0000/c/{number}/0/0/0"] = size
    generator = np.random.default_rng(0)
    for name, length in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(generator.bytes(length) if not name.endswith(".json") else b"{}" + b" " * length)
    assert {"cache", "train"} <= set(stages)
    command("dvc", "commit", "--force", "--quiet", "dvc.yaml", folder=folder)()
    return folder


def measure(bench: Benchmark, folder: Path) -> None:
    """The command line, then DVC."""
    store = folder / "a.zarr"
    write_states(store, {step: np.zeros((256, 3, 32, 32), np.float16) for step in (0, 50)}, 64)
    methods = {
        BARE: command(sys.executable, "-c", "pass"),
        HELP: command(BIN / "advkd-cache", "--help"),
        INFO: command(BIN / "advkd-cache", "info", store),
        TORCH: command(sys.executable, "-c", "import torch"),
    }
    for method in methods.values():
        method()
    times = interleaved(methods, bench.rounds(9))
    more = {
        name: float(np.median([a - b for a, b in zip(times[name], times[BARE], strict=True)])) for name in (HELP, INFO)
    }
    bench.add(
        Comparison(
            title="the command line",
            unit="s",
            baseline=BARE,
            rows=rows_of(times, BARE),
            targets=[
                Target(what=f"{name}: seconds beyond the bare interpreter", found=value, limit=0.3)
                for name, value in more.items()
            ],
            note="Neither imports torch, zarr or diffusers. NumPy takes half of the rest, click most of the other "
            "half; the limit is the bare interpreter.",
        )
    )
    here = pipeline(folder / "pipeline", 1_000_000 if bench.quick else 600_000_000)
    nothing = command("dvc", "repro", "--quiet", folder=here)
    importing = command(sys.executable, "-c", "import dvc.repo")
    methods = {BARE: methods[BARE], "import dvc": importing, NOTHING: nothing}
    nothing()
    times = interleaved(methods, bench.rounds(5))
    hashed = subprocess.run(
        [sys.executable, "-c", HASHES], cwd=here, env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    number = int(hashed.stdout.split()[-1])
    for path in (here / "cache").rglob("*"):
        os.utime(path)
    times[CHANGED] = [seconds_of(nothing)] * len(times[NOTHING])
    bench.add(
        Comparison(
            title=f"DVC, with a store of {1 if bench.quick else 600} MB",
            unit="s",
            baseline=BARE,
            rows=rows_of(times, BARE),
            targets=[
                Target(what="dvc repro with nothing to do, seconds", found=float(np.median(times[NOTHING])), limit=3.0),
                Target(what="data files that dvc repro hashes again", found=number, limit=0),
            ],
            note=f"It hashed {number} files. Nearly all of the time goes into DVC's own imports; then it compares each "
            "file's mtime and size. The last row shows the cost of hashing everything.",
        )
    )


if __name__ == "__main__":
    run("startup", "Start-up: how long do commands take that have nothing to do?", measure)
