"""docs/evaluation.md: its commands and its Python run as they stand."""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np

from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.stages.evaluate.scores import MEASURES
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
        assert name == "advkd-evaluate"
        result = invoke(evaluate_command, *arguments)
        assert result.exit_code == 0, f"{command}: {result.output}"
    scores = json.loads(Path("runs/mine/evaluation/scores.json").read_text())
    assert scores["samplers"]["student"]["frechet"][0] > 0.0
    assert scores["protocol"]["measures"] == MEASURES


def test_its_links_are_there() -> None:
    for page in ("README.md", "docs/training.md"):
        assert "evaluation.md)" in (ROOT / page).read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert all((ROOT / "docs" / target).is_file() for target in targets)
