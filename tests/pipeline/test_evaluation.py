"""docs/evaluation.md: its commands and its Python run as they stand."""

import itertools
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.pipeline.cli.evaluate_tables import print_evaluation
from advkd.pipeline.cli.report import main as report_command
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.evaluate.cost import Cost
from advkd.stages.evaluate.scores import Evaluation
from advkd.stages.metrics.registry import MEASURES
from advkd.stages.metrics.table import Row, ScoreTable
from advkd.stages.student.config import StudentConfig, TrainConfig
from advkd.stages.student.train import train
from tests.conftest import ROOT, Invoke
from tests.pipeline.readme import python_blocks, shell_blocks
from tests.stores import write_store

PAGE = (ROOT / "docs/evaluation.md").read_text()
CONFIG = """
name: digits
teacher: {source: ./nowhere}
evaluate: {features: classifiers/mine, num_sets: 2, set_size: 16, solver_steps: [1]}
"""


def test_the_page_runs_as_it_stands(invoke: Invoke, tmp_path: Path) -> None:
    """On a small student, and labelled images of two kinds that the classifier tells apart."""
    write_store(tmp_path / "cache/digits.zarr", "0:256")
    student = StudentConfig(width=8, depth=1)
    train(tmp_path / "cache/digits.zarr", TrainConfig(student=student, steps=2, batch_size=16), Path("runs/digits"))
    for folder in ("cache/digits.zarr", "runs/digits"):
        shutil.copytree(folder, folder.replace("digits", "mine"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/digits.yaml").write_text(CONFIG)
    labels = np.arange(800) % 2
    images = np.random.default_rng(0).normal(size=(800, 1, 8, 8)) * 0.1 + labels[:, None, None, None] - 0.5
    np.savez("labelled.npz", images=images.astype(np.float32), labels=labels)
    (classify,) = python_blocks(PAGE)
    names: dict[str, float] = {}
    exec(classify, names)
    assert names["accuracy"] > 0.95
    for command in itertools.chain(*shell_blocks(PAGE)):
        name, *arguments = shlex.split(command)
        if name == "advkd-report":
            shutil.copytree("runs/digits", "runs/small")
        result = invoke({"advkd-evaluate": evaluate_command, "advkd-report": report_command}[name], *arguments)
        assert result.exit_code == 0, f"{command}: {result.output}"
    scores = json.loads(Path("runs/mine/evaluation/scores.json").read_text())
    assert scores["samplers"]["student"]["frechet"][0] > 0.0
    assert scores["protocol"]["measures"] == {name: measure.label for name, measure in MEASURES.items()}


def test_the_tables_fit_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the teacher's sampler is called, and of a student that is far off."""
    values = {"frechet": [1178.0, 1190.0], "kid": [17504.0, 16389.0], "precision": [0.93, 0.9], "recall": [0.79, 0.8]}
    names = ("student", "teacher (dpmsolver++ 1000)", "ddim 50", "dpmsolver++ 50")
    rows = [
        Row(
            name=name,
            evaluations=1000,
            x0=None if name == "student" else "x̂_0 thresholded at its 0.995 quantile, at most 1.5",
            values={key: [value * (1 + 0.3 * index) for value in pair] for key, pair in values.items()},
        )
        for index, name in enumerate(names)
    ]
    cost = Cost(num_parameters=35_746_307, macs=6.1e9, latency={1: 0.1, 64: 6.0})
    print_evaluation(
        Evaluation(
            table=ScoreTable(rows=rows), features="small-cnn", features_sha256="",
            config=EvaluateConfig(num_sets=5, set_size=2048), num_reference=1_000_000, num_training=937_500,
            held_out=None, student=cost, teacher=cost,
            deployed_parameters=1, without_teacher="", real=None, reference_shares=None, pictures={}, nearest=[],
            clip_sha256=None, weights_sha256=None, identity={}, device="cpu",
        )
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "teacher itself: dpmsolver++ 1000" in said
    assert max(map(len, said.splitlines())) <= 100 and "…" not in said
