"""What tests of several commands use."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time networks once per batch size: scoring spends half of its time on the latency table."""
    monkeypatch.setattr("advkd.stages.evaluate.cost.MIN_REPEATS", 1)
    monkeypatch.setattr("advkd.stages.evaluate.cost.SECONDS_OF_TIMING", 0.0)


@pytest.fixture
def toy_yaml(tmp_path: Path, pipeline_folder: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(
        f"name: toy\nteacher: {{source: {pipeline_folder}}}\nsampler: {{steps: 4}}\n"
        "cache: {seeds: '0:256', record: 2, block_size: 64, batch_size: 64}\n"
        "train: {student: {width: 8, depth: 1}, steps: 4, batch_size: 16, log_every: 2,\n"
        "        preview_every: 4, checkpoint_every: 2, objective: {adversarial: {width: 4}}}\n"
        "evaluate: {features: classifier, num_sets: 2, set_size: 32, solver_steps: [2]}\n"
    )
    return path
