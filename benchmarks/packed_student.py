"""Does a student trained on an archive score as well as one trained on the raw cache?

    python -m benchmarks.packed_student --config digits --cache cache/digits.zarr --max-error 0.00392

Packs the cache, trains the configuration's student on both, scores both as the evaluation does (the same fresh sets of
seeds, the raw cache's x_0 as reference) and prints the paired difference with its 95 % interval. `--steps` shortens the
training. It takes a little more than twice the experiment's training and evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from advkd.pipeline.config import load_experiment


def run(name: str, *arguments: object) -> None:
    """Run a command of this environment."""
    print(f"$ {name} {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([Path(sys.executable).with_name(name), *map(str, arguments)], check=True)


def main() -> None:
    """Pack, train twice, score twice, compare."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packed_student", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", default="digits")
    parser.add_argument("--cache", type=Path, default=Path("cache/digits.zarr"))
    parser.add_argument("--max-error", type=float, default=1 / 255)
    parser.add_argument("--steps", type=int, help="training steps; default: the configuration's")
    parser.add_argument("--out", type=Path, default=Path("runs/packed-student"))
    arguments = parser.parse_args()
    config: dict[str, Any] = dataclasses.asdict(load_experiment(arguments.config))
    config["train"]["steps"] = arguments.steps or config["train"]["steps"]
    config["evaluate"]["solver_steps"] = [1]
    arguments.out.mkdir(parents=True, exist_ok=True)
    experiment, packed = arguments.out / "experiment.yaml", arguments.out / "packed.zarr"
    experiment.write_text(yaml.safe_dump(config))
    run("advkd-cache", "pack", arguments.cache, "--max-error", arguments.max_error, "--out", packed)
    scores = {}
    for name, store in (("raw", arguments.cache), ("archive", packed)):
        folder = arguments.out / name
        run("advkd-train", "--config", experiment, "--cache", store, "--run", folder)
        run("advkd-evaluate", "--config", experiment, "--run", folder, "--cache", arguments.cache)
        found = json.loads((folder / "evaluation/scores.json").read_bytes())
        scores[name] = np.array(found["samplers"]["student"]["frechet"])
        print(f"{name:8} Fréchet distance {scores[name].mean():.2f} ± {scores[name].std(ddof=1):.2f}, held-out mean "
              f"squared error {found['held_out_mse']:.5f}", flush=True)  # fmt: skip
    apart = scores["archive"] - scores["raw"]
    half = stats.t.ppf(0.975, len(apart) - 1) * stats.sem(apart)
    print(f"archive minus raw: {apart.mean():+.2f}, 95 % [{apart.mean() - half:+.2f}, {apart.mean() + half:+.2f}]")


if __name__ == "__main__":
    main()
