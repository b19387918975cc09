"""Every benchmark runs to its end in its quick form, and the README quotes what was measured. Nothing here is timed."""

import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from advkd.pipeline.config import load_experiment
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.student import build_student
from advkd.stages.student.training.data import Batch
from advkd.stages.student.unrolled.config import AdversarialConfig
from advkd.stages.student.unrolled.network import UnrolledStudent
from advkd.stages.student.unrolled.program import UnrolledProgram
from benchmarks.__main__ import readme_part
from benchmarks.comparison import Comparison, Target, ratio_between, rows_of
from benchmarks.harness import RESULTS, interleaved
from benchmarks.networks import DIGITS_SHAPE, smooth_store
from benchmarks.table import PROGRAMS, comparison_lines, comparisons_of, read_results, summary, table
from benchmarks.training import NaiveProgram
from tests.conftest import ROOT

SLOW = ("workers",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PROGRAMS]
)
def test_a_program_runs_its_ways_agree_and_it_says_what_it_found(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ADVKD_BENCH_FOLDER": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json"], "something was left behind"
    text = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert result["quick"] and result["name"] == name and result["comparisons"]
    assert str(tmp_path) not in text
    for comparison in result["comparisons"]:
        assert comparison["targets"] and comparison["note"], comparison["title"]
        for row in comparison["rows"]:
            assert math.isfinite(row["median"]) and row["low"] <= row["median"] <= row["high"], row
        if comparison["baseline"]:
            (baseline,) = [row for row in comparison["rows"] if row["name"] == comparison["baseline"]]
            assert baseline["ratio"] == 1.0
        assert all(math.isfinite(target["found"]) for target in comparison["targets"])
    assert "a quick run" in table([result])


def test_our_training_step_teaches_what_the_naive_loop_does(tmp_path: Path) -> None:
    """The critic first, then the student against it: of one pass as of two."""
    cache = smooth_store(tmp_path / "s.zarr", DIGITS_SHAPE, 6, 64)
    config = load_experiment("smoke").train
    adversarial = AdversarialConfig(weight=0.5, start=0.0, fresh=4, penalty_every=1)
    config = replace(config, steps=4, objective=replace(config.objective, adversarial=adversarial))
    geometry, trained = Geometry.of(cache, None), list[torch.Tensor]()
    for kind in (NaiveProgram, UnrolledProgram):
        torch.manual_seed(0)
        student = build_student(config.student, geometry)
        assert isinstance(student, UnrolledStudent)
        program = kind(config, student, geometry, Accelerator(cpu=True))
        program.begin(0)
        for step in range(4):
            seeds = np.arange(8 * step, 8 * step + 8)
            program.step(Batch.read(cache, list(cache.states), seeds.tolist()), 0, step)
        trained += [torch.nn.utils.parameters_to_vector(module.parameters()) for module in program.modules().values()]
    for naive, ours in zip(trained[:2], trained[2:], strict=True):
        torch.testing.assert_close(naive, ours, rtol=1e-3, atol=1e-5)


def test_the_readme_quotes_the_results() -> None:
    results = read_results(RESULTS)
    assert {result["name"] for result in results} == set(PROGRAMS)
    assert not [result["name"] for result in results if result["quick"]]
    assert (RESULTS / "table.md").read_text(encoding="utf-8") == table(results)
    assert readme_part((ROOT / "README.md").read_text(encoding="utf-8")) == summary(results)


def test_results_name_no_host() -> None:
    for path in RESULTS.iterdir():
        text = path.read_text(encoding="utf-8")
        assert platform.node() not in text and str(Path.home()) not in text


def test_ways_take_turns_and_ratios_are_taken_within_a_round() -> None:
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in "abc"}  # type: ignore[misc]
    times = interleaved(ways, 3, calls={"b": 2})
    assert "".join(order) == "abbc" + "bbca" + "cabb"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    order.clear()
    interleaved(ways, 1, calls={"b": 2}, settle=1e-9)
    assert "".join(order) == "aa" + "bbb" + "cc", "once more, after the other library's threads went to sleep"
    # A machine that is three times slower in the second round changes medians, not ratios.
    figures = {"ours": [1.0, 3.0, 1.0], "theirs": [2.0, 6.0, 2.0]}
    assert ratio_between(figures, "ours", "theirs") == 0.5
    assert [row.ratio for row in rows_of(figures, "theirs")] == [0.5, 1.0]


def test_a_missed_target_is_said_in_the_table_and_in_the_readme() -> None:
    targets = [Target(what="speed", found=1.0, limit=2.0, at_most=False), Target(what="size", found=1.0, limit=2.0)]
    comparison = Comparison(title="a", unit="s", baseline=None, rows=rows_of({"x": [1.0]}, None), targets=targets)
    lines = "\n".join(comparison_lines(comparison))
    assert "- **missed**: speed: 1 (≥ 2)" in lines and "- met: size: 1 (≤ 2)" in lines
    result = json.loads((RESULTS / "growth.json").read_text(encoding="utf-8"))
    result["comparisons"][0]["targets"] = [
        {"what": "speed", "found": 1.0, "limit": 2.0, "at_most": False, "met": False}
    ]
    assert comparisons_of(result)[0].targets == targets[:1]
    assert "| speed | 1 (missed) | ≥ 2 |" in summary([result])
