"""The commands: help with examples, one clear line for every bad input, and nothing changed by it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from advkd.cache.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.compare import main as compare_command
from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.pipeline.cli.export import main as export_command
from advkd.pipeline.cli.sample import main as sample_command
from advkd.pipeline.cli.teacher import main as teacher_command
from advkd.pipeline.cli.train import main as train_command
from tests.conftest import Invoke
from tests.stores import tree, write_store

COMMANDS = {
    "advkd-cache build": cache_command.commands["build"],
    "advkd-cache info": cache_command.commands["info"],
    "advkd-cache verify": cache_command.commands["verify"],
    "advkd-cache merge": cache_command.commands["merge"],
    "advkd-cache subset": cache_command.commands["subset"],
    "advkd-cache pack": cache_command.commands["pack"],
    "advkd-cache unpack": cache_command.commands["unpack"],
    "advkd-cache preview": cache_command.commands["preview"],
    "advkd-cache diff": cache_command.commands["diff"],
    "advkd-cache upgrade": cache_command.commands["upgrade"],
    "advkd-teacher": teacher_command,
    "advkd-train": train_command,
    "advkd-sample": sample_command,
    "advkd-evaluate": evaluate_command,
    "advkd-compare": compare_command,
    "advkd-export": export_command,
}
FLAGS = {
    "advkd-cache build": {
        "--config", "--teacher", "--steps", "--sampler", "--record", "--seeds", "--block-size", "--batch-size",
        "--dtype", "--precision", "--device", "--workers", "--scheduler", "--out", "--on-mismatch", "--dry-run",
    },
    "advkd-cache info": {"--json"},
    "advkd-cache verify": {"--recompute", "--teacher", "--batch-size", "--device", "--repair", "--json"},
    "advkd-cache merge": {"--out", "--prefer"},
    "advkd-cache subset": {"--out", "--seeds", "--states"},
    "advkd-cache pack": {"--out", "--codec", "--max-error", "--keep-bits", "--level", "--workers"},
    "advkd-cache unpack": {"--out", "--workers"},
    "advkd-cache preview": {"--seeds", "--out"},
    "advkd-cache diff": set(),
    "advkd-cache upgrade": set(),
    "advkd-teacher": {"--config", "--out"},
    "advkd-train": {"--cache", "--config", "--run", "--states", "--max-steps", "--resume", "--on-mismatch"},
    "advkd-sample": {"--run", "--num", "--first-seed", "--out", "--batch-size"},
    "advkd-evaluate": {
        "--run", "--cache", "--config", "--teacher", "--features", "--inception-weights", "--real", "--full",
        "--sets", "--no-teacher",
    },
    "advkd-compare": {"--out"},
    "advkd-export": {
        "--onnx", "--int8", "--max-error", "--cache", "--features", "--time", "--folder", "--push",
    },
}  # fmt: skip
SMALL = ("--seeds", "0:16", "--block-size", "8", "--batch-size", "8", "--record", "2", "--steps", "4")


def picture_size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(invoke: Invoke, name: str) -> None:
    command = COMMANDS[name]
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"{name} " in result.output.partition("Example:")[2]
    options = {option for p in command.params if isinstance(p, click.Option) for option in p.opts}
    assert options - {"--help", "-h"} == FLAGS[name]


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


def test_build_train_sample_evaluate(
    invoke: Invoke, tmp_path: Path, toy_yaml: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from advkd.stages.evaluate.features import SmallClassifier, save_classifier

    assert "seeds 0:256; built 4 blocks" in invoke(cache_command, "build", "--config", toy_yaml).output
    store = Path("cache/toy.zarr")
    info = invoke(cache_command, "info", store).output
    assert TrajectoryCache.open(store).digest in info and "state 0002    t = 499" in info
    result = invoke(train_command, "--cache", store, "--config", toy_yaml)
    assert result.output.startswith("runs/toy: step 4 of 4, mean squared error on held-out seeds")
    for name in ("grid.png", "array.npy", "folder"):
        assert invoke(sample_command, "--run", "runs/toy", "--num", "5", "--out", name).exit_code == 0
    assert picture_size("grid.png")[0] > 100
    assert np.load("array.npy").shape == (5, 1, 8, 8)
    assert invoke(sample_command, "--run", "runs/toy/student", "--num", "5", "--out", "alone.npy").exit_code == 0
    np.testing.assert_array_equal(np.load("alone.npy"), np.load("array.npy"))
    assert picture_size("folder/000003.png") == (8, 8)
    save_classifier(Path("classifier"), SmallClassifier(1, 8, 10).eval(), {})
    result = invoke(evaluate_command, "--run", "runs/toy", "--cache", store, "--config", toy_yaml)
    assert "short form of the protocol" in " ".join(result.output.split())
    scores = json.loads(Path("runs/toy/evaluation/metrics.json").read_text())
    assert set(scores["frechet"]) == {"student", "teacher (ddim 4)", "ddim 2", "dpmsolver++ 2"}
    assert all(value > 0 for value in scores["frechet"].values())
    details = json.loads(Path("runs/toy/evaluation/scores.json").read_text())
    assert len(details["samplers"]["student"]["frechet"]) == 2
    assert details["cost"]["teacher"]["macs"] > 0
    for name in ("samples.png", "trajectory.png", "scores.png"):
        assert picture_size(f"runs/toy/evaluation/{name}")[0] > 100
    bare = ("--run", "runs/toy", "--cache", store, "--features", "classifier")
    assert invoke(evaluate_command, *bare).exit_code == 0
    capfd.readouterr()
    result = invoke(evaluate_command, *bare, "--teacher", "gone/for/good")
    assert "not measured" in result.output and "dpmsolver++ 5" not in result.output
    scores = json.loads(Path("runs/toy/evaluation/metrics.json").read_text())
    assert scores["frechet"]["ddim 5"] is None and scores["frechet"]["student"] > 0
    assert scores["latency_ratio"] == {"batch_1": None, "batch_64": None}
    result = invoke(evaluate_command, *bare, "--full")
    assert result.exit_code == 2 and "--full needs a reference of 8192 seeds" in result.stderr
    # A configuration that names another teacher doesn't hide the one that the cache knows.
    elsewhere = toy_yaml.with_name("elsewhere.yaml")
    elsewhere.write_text(re.sub(r"source: [^,}\n]+", "source: ./gone", toy_yaml.read_text(), count=1))
    assert invoke(evaluate_command, *bare, "--config", elsewhere).exit_code == 0
    scores = json.loads(Path("runs/toy/evaluation/metrics.json").read_text())
    assert scores["frechet"]["teacher (ddim 4)"] > 0
    assert invoke(evaluate_command, *bare, "--no-teacher", "--sets", "3").exit_code == 0
    scores = json.loads(Path("runs/toy/evaluation/metrics.json").read_text())
    assert scores["frechet"]["teacher (ddim 4)"] is None and scores["frechet"]["student"] > 0
    assert invoke(evaluate_command, *bare, "--no-teacher", "--teacher", "x").exit_code == 2
    details = json.loads(Path("runs/toy/evaluation/scores.json").read_text())
    assert len(details["samplers"]["student"]["frechet"]) == 3
    assert invoke(evaluate_command, *bare, "--sets", "1").exit_code == 2


def test_student_and_teacher_share_the_seed(invoke: Invoke, toy_yaml: Path) -> None:
    """advkd-sample's seed i is the cache's row i."""
    from advkd.stages.student.student import load_student, noise_of

    invoke(cache_command, "build", "--config", toy_yaml)
    invoke(train_command, "--cache", "cache/toy.zarr", "--config", toy_yaml)
    _, geometry = load_student(Path("runs/toy/student"))
    cached = TrajectoryCache.open("cache/toy.zarr").rows(0, [3, 70])
    np.testing.assert_array_equal(noise_of(geometry, [3, 70]).numpy(), cached.astype(np.float32))


def test_dry_run_measures_and_writes_nothing(invoke: Invoke, tmp_path: Path, toy_yaml: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = invoke(cache_command, "build", "--config", toy_yaml, "--dry-run")
    assert result.exit_code == 0
    for part in ("256 of them still to build", "evaluations   1,024 of one image", "in 4 blocks", "time ", "disk "):
        assert part in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_counts_what_is_left(invoke: Invoke, toy_yaml: Path) -> None:
    invoke(cache_command, "build", "--config", toy_yaml, "--seeds", "64:128")
    store = tree(Path("cache/toy.zarr"))
    result = invoke(cache_command, "build", "--config", toy_yaml, "--dry-run")
    assert "192 of them still to build" in result.output
    assert tree(Path("cache/toy.zarr")) == store


def test_the_default_command_has_a_store_of_its_own(invoke: Invoke, pipeline_folder: Path) -> None:
    """`advkd-cache build --steps 1000` with the default teacher in place; few seeds to keep it short."""
    shutil.copytree(pipeline_folder, "teachers/digits/pipeline")
    result = invoke(cache_command, "build", "--steps", "1000", "--dry-run")
    assert "store         cache/digits-1000.zarr (new)" in result.output
    assert "ddim, 1000 steps; states after 0, 200, 400, 600, 800, 1000 steps" in result.output
    assert not Path("cache").exists()


def test_a_dry_run_measures_a_default_teacher_that_is_not_there_yet(invoke: Invoke) -> None:
    result = invoke(cache_command, "build", "--config", "smoke", "--steps", "20", "--dry-run")
    assert result.exit_code == 0
    assert "teachers/smoke/pipeline (not there yet: a build would train it first)" in result.output
    assert "evaluations   7,680 of one image" in result.output
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "flags", [("--steps", "7", "--record", "10"), ("--sampler", "magic"), ("--seeds", "5:5"), ("--device", "cuda:99")]
)
def test_a_bad_request_is_seen_before_the_default_teacher_is_trained(invoke: Invoke, flags: tuple[str, ...]) -> None:
    result = invoke(cache_command, "build", "--config", "smoke", *flags)
    assert result.exit_code == 2
    assert not list(Path().iterdir())


def test_stage_0_replaces_nothing_but_an_earlier_teacher(invoke: Invoke) -> None:
    Path("thesis").mkdir()
    Path("thesis/years.txt").write_text("of work")
    result = invoke(teacher_command, "--config", "smoke", "--out", "thesis")
    assert (result.exit_code, "holds something else" in result.stderr) == (2, True)
    assert Path("thesis/years.txt").read_text() == "of work"


def test_a_teacher_from_elsewhere_is_written_down(invoke: Invoke) -> None:
    result = invoke(teacher_command, "--config", "cifar10")
    assert "nothing to train, the teacher is google/ddpm-cifar10-32" in result.output
    assert json.loads(Path("teachers/cifar/teacher.json").read_text())["source"] == "google/ddpm-cifar10-32"


BAD_BUILDS = [
    (("--config", "nowhere.yaml"), 2, "no configuration nowhere.yaml"),
    (("--config", "bad.yaml"), 2, "unknown key 'stpes'; did you mean 'steps'"),
    (("--steps", "7", "--record", "10"), 2, "record 10 doesn't fit steps 7"),
    (("--steps", "0"), 2, "0 is not a positive number of steps"),
    (("--steps", "5000"), 1, "steps 5000 don't fit the teacher: it was trained with 1000 timesteps"),
    (("--seeds", "0:1000000000000"), 2, "choose larger blocks"),
    (("--sampler", "a/b"), 2, "sampler 'a/b' is unknown"),
    (("--record", "1,2,99"), 2, "record 1,2,99 doesn't fit steps 4"),
    (("--record", "some"), 2, "expected a number of states"),
    (("--seeds", "5:5"), 2, "the range is empty"),
    (("--seeds", "9:5"), 2, "the range is reversed"),
    (("--seeds", "-4:5"), 2, "seeds are not negative"),
    (("--seeds", "all"), 2, "expected A:B"),
    (("--block-size", "0"), 2, "block_size: 0 is not positive"),
    (("--teacher", "no/such/folder"), 1, "no such folder"),
    (("--teacher", "notes"), 1, "no UNet in it"),
    (("--sampler", "magic"), 2, "sampler 'magic' is unknown; advkd has tables for: ddim, ddpm"),
    (("--device", "cuda:99"), 2, "device 'cuda:99' is not here"),
    (("--out", "notes"), 1, "notes is not a trajectory cache"),
]


@pytest.mark.parametrize(("flags", "code", "message"), BAD_BUILDS, ids=[case[2][:30] for case in BAD_BUILDS])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["build", "dry-run"])
def test_bad_builds(
    invoke: Invoke,
    tmp_path: Path,
    toy_yaml: Path,
    flags: tuple[str, ...],
    code: int,
    message: str,
    dry: tuple[str, ...],
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    (tmp_path / "bad.yaml").write_text("name: x\nteacher: {source: a/b}\nsampler: {stpes: 4}\n")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    config = () if "--config" in flags else ("--config", toy_yaml)
    result = invoke(cache_command, "build", *config, *flags, *dry)
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.output
    assert message in result.stderr
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_store_of_another_teacher_stops_the_build(invoke: Invoke, tmp_path: Path, toy_yaml: Path) -> None:
    write_store(tmp_path / "cache/toy.zarr", "0:16")
    before = tree(tmp_path / "cache/toy.zarr")
    result = invoke(cache_command, "build", "--config", toy_yaml)
    assert result.exit_code == 1
    assert "was built otherwise" in result.stderr and "--on-mismatch set-aside" in result.stderr
    assert tree(tmp_path / "cache/toy.zarr") == before


BAD_TRAININGS = [
    (("--cache", "nothing.zarr"), 1, "no cache at nothing.zarr"),
    (("--cache", "notes"), 1, "notes is not a trajectory cache"),
    (("--cache", "empty.zarr"), 1, "empty.zarr is empty (0 of 1 blocks)"),
    (("--cache", "partial.zarr"), 1, "partial.zarr is partial: 15 of the 16 blocks"),
    (("--cache", "whole.zarr", "--config", "bad.yaml"), 2, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    (("--cache", "whole.zarr", "--resume"), 2, "there is no run in runs/whole"),
    (("--cache", "whole.zarr", "--run", "notes"), 1, "notes is no run"),
    (("--cache", "whole.zarr", "--max-steps", "0"), 2, "0 is not in the range"),
    ((), 2, "Missing option '--cache'"),
]


@pytest.mark.parametrize(("flags", "code", "message"), BAD_TRAININGS, ids=[case[2][:30] for case in BAD_TRAININGS])
def test_bad_trainings(invoke: Invoke, tmp_path: Path, flags: tuple[str, ...], code: int, message: str) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    (tmp_path / "bad.yaml").write_text("name: x\nteacher: {source: a/b}\ntrain: {learning_rat: 4}\n")
    for name, seeds, lost in (("empty", "0:16", 0), ("partial", "0:256", 5), ("whole", "0:256", None)):
        write_store(tmp_path / f"{name}.zarr", seeds)
        if lost is not None:
            (tmp_path / f"{name}.zarr/blocks/{lost:06d}.json").unlink()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    result = invoke(train_command, *flags)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_bad_samples_and_evaluations(invoke: Invoke, tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", "0:16")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for command, flags, code, message in (
        (sample_command, ("--run", "./runs/none"), 1, "no student in ./runs/none: no such folder"),
        (sample_command, ("--run", "a.zarr"), 1, "no student in a.zarr"),
        (sample_command, ("--run", "runs/none", "--out", "x.gif"), 2, "expected a .png, a .npy or a folder"),
        (sample_command, ("--run", "runs/none", "--out", "a.zarr/states"), 2, "the folder is not empty"),
        (evaluate_command, ("--run", "runs/none", "--cache", "none.zarr"), 1, "no cache at none.zarr"),
        (evaluate_command, ("--run", "runs/none", "--cache", "a.zarr"), 1, "no student in runs/none"),
        (cache_command, ("info", "none.zarr"), 1, "no cache at none.zarr"),
    ):
        result = invoke(command, *flags)
        assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.output
        assert message in result.stderr
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    """As in `advkd-cache info STORE | head -1`."""
    write_store(tmp_path / "a.zarr", "0:16")
    command = Path(sys.executable).with_name("advkd-cache")
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [command, "info", tmp_path / "a.zarr"], stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(write_end)
    assert result.stderr == ""


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    """A real process, a Hub that refuses connections."""
    command = Path(sys.executable).with_name("advkd-cache")
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    result = subprocess.run(
        [command, "build", "--config", "cifar10", "--seeds", "0:4"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: teacher google/ddpm-cifar10-32: no such folder, and the Hub did not give it")
    assert not (tmp_path / "cache").exists()
