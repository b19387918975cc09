"""docs/training.md and docs/ablation.md: their commands run as they stand there, on small students."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from advkd.cache import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.train import main as train_command
from advkd.stages.metrics.classifier import SmallClassifier, save_classifier
from advkd.stages.student.config import TrainConfig
from advkd.stages.student.unrolled.config import AdversarialConfig, ObjectiveConfig
from tests.conftest import ROOT, Invoke
from tests.pipeline.clones import ENVIRONMENT, new_clone, repro, run, select_experiment
from tests.pipeline.readme import commands_below, shell_blocks
from tests.stages.teachers import save_conditional
from tests.stores import write_store

TRAINING = (ROOT / "docs/training.md").read_text()
ABLATION = (ROOT / "docs/ablation.md").read_text()
FROM_TEACHER = "Students that start from the teacher"
SMALL = """
teacher: {source: nowhere}
train:
  student: {width: 8, depth: 1}
  steps: 4
  batch_size: 16
  log_every: 2
  preview_every: 2
  checkpoint_every: 2
  objective: {adversarial: {width: 4}}
evaluate: {features: classifier, num_sets: 2, set_size: 16, solver_steps: [2]}
"""


def test_the_commands_that_train(tmp_path: Path) -> None:
    """Alone, and in processes that torchrun and `accelerate launch` start; only one of them prints."""
    (tmp_path / "configs").mkdir()
    for name in ("digits", "digits-small", "cifar10"):
        (tmp_path / f"configs/{name}.yaml").write_text(f"name: {name}\n{SMALL}")
    save_classifier(tmp_path / "classifier", SmallClassifier(1, 8, 10), {})
    for name in ("digits", "cifar"):
        write_store(tmp_path / f"cache/{name}.zarr", "0:256")
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    said = {}
    blocks = [block for block in shell_blocks(TRAINING) if block not in commands_below(TRAINING, FROM_TEACHER)]
    first, *rest = [command for block in blocks for command in block]
    scored = "advkd-evaluate --config configs/digits.yaml --run runs/digits --cache cache/digits.zarr"
    for command in (first, scored, *rest):  # as `dvc repro` scores the run that others are compared with
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said[command] = done.stdout
    for (command, output), name, processes in zip(
        [item for item in said.items() if "advkd-train" in item[0]],
        ("digits", "small", "tracked", "two", "cifar"),
        (1, 1, 1, 2, 4),
        strict=True,
    ):
        assert output.count(f"runs/{name}: step 4 of 4") == 1, command
        record = json.loads((tmp_path / f"runs/{name}/run.json").read_text())
        assert record["identity"]["processes"] == processes
    assert [*(tmp_path / "runs/tracked/log/tensorboard").glob("events.*")]
    (compared,) = (output for command, output in said.items() if command.startswith("advkd-report"))
    assert "| small | " in compared and (tmp_path / "report.html").is_file()


def test_the_commands_of_students_that_start_from_the_teacher(tmp_path: Path, invoke: Invoke) -> None:
    """On a teacher with random weights, whose cache is built with them."""
    save_conditional(tmp_path / "teacher", prediction_type="v_prediction")
    small = yaml.safe_load(SMALL) | {"name": "digits"}
    small |= {"teacher": {"source": "teacher"}, "cache": {"seeds": "0:64", "block_size": 32, "accept_range": True}}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/digits.yaml").write_text(yaml.safe_dump(small))
    (commands,) = commands_below(TRAINING, FROM_TEACHER)
    for command, (program, *arguments) in zip((cache_command, train_command), map(shlex.split, commands), strict=True):
        done = invoke(command, *arguments)
        assert done.exit_code == 0, done.output
        assert program in ("advkd-cache", "advkd-train")
    config = json.loads((tmp_path / "runs/two/student/config.json").read_text())
    assert config["student"]["kind"] == "teacher" and config["geometry"]["steps"] == [0, 20, 50]


def test_every_key_that_the_page_names_exists() -> None:
    known = {**TrainConfig.__dataclass_fields__, **ObjectiveConfig.__dataclass_fields__}
    table = TRAINING.split("## Losses of the unrolled student")[1].split("## ")[0]
    keys = re.findall(
        r"`([a-z0-9_.]+)(?:: \w+)?`", " ".join(row.split("|")[1] for row in table.splitlines() if row[:1] == "|")
    )
    inner = [key for key in keys if key in AdversarialConfig.__dataclass_fields__]
    assert len(keys) > 12 and len(inner) > 5
    for key in keys:
        name = key.removeprefix("adversarial.").removeprefix("train.")
        assert name in known or name in AdversarialConfig.__dataclass_fields__, key
    for key in re.findall(r"`train\.([a-z_]+)`", TRAINING):
        assert key in TrainConfig.__dataclass_fields__, key


@pytest.mark.slow
def test_the_ladder_runs_from_one_command(tmp_path: Path) -> None:
    """As it stands in the repository, with the smallest students on the smallest teacher."""
    clone = new_clone(tmp_path / "advkd")
    smoke = (clone / "configs/smoke.yaml").read_text().replace("smoke", "digits")
    (clone / "configs/digits.yaml").write_text(smoke)
    select_experiment(clone, "digits", "digits")
    configs = clone / "configs"
    others = [path for kind in ("digits-*", "mnist*") for path in configs.glob(f"{kind}.yaml")]
    for path in [*(configs / "ablation").glob("[0-9]*.yaml"), *others]:
        rung = yaml.safe_load(path.read_text())
        rung["train"]["student"] |= {"width": 8, "depth": 1, "base_channels": 4, "max_channels": 8}
        rung["train"] |= {"steps": 4, "batch_size": 16, "seeds": None}
        if "stages" in rung["train"]:
            rung["train"]["stages"] |= {"epochs": [1], "batch_sizes": [64]}
        rung["evaluate"] |= {"num_sets": 2, "set_size": 64}
        if rung.get("pretrain"):
            rung["pretrain"] |= {"channels": [8, 16], "steps": 4, "report_samples": 64, "classifier": {"epochs": 1}}
        if "cache" in rung:
            default = yaml.safe_load(smoke)
            rung |= {"sampler": default["sampler"], "cache": default["cache"] | {"seeds": "0:512"}}
        path.write_text(yaml.safe_dump(rung))
    assert repro(clone) == ["teacher", "cache", "train", "evaluate"]
    ladder, *commands = [line for block in shell_blocks(ABLATION) for line in block]
    assert ladder.startswith("dvc repro ")
    run(clone, *ladder.split())
    table = (clone / "runs/ablation/ladder.md").read_text()
    assert all(f"| {name} | " in table for name in ("0-faithful", "3-average", "8-few-seeds-adversarial"))
    assert (clone / "runs/ablation/ladder.png").is_file()
    assert run(clone, "git", "status", "--porcelain", "--", "runs") == ""
    assert commands
    for command in commands:
        run(clone, *command.replace(" --full", "").split())  # the whole protocol asks for 8,192 seeds
    assert len(others) == 5
    for path in others:
        assert (clone / f"runs/{path.stem}/evaluation/scores.json").is_file()
    assert len(TrajectoryCache.open(clone / "cache/digits-long.zarr").seeds()) == 512
