"""The commands: help with examples, one clear line for every bad input, and nothing changed by it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.config import main as config_command
from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.pipeline.cli.export import main as export_command
from advkd.pipeline.cli.page import main as page_command
from advkd.pipeline.cli.report import main as report_command
from advkd.pipeline.cli.sample import main as sample_command
from advkd.pipeline.cli.teacher import main as teacher_command
from advkd.pipeline.cli.train import main as train_command
from advkd.stages.pictures import to_pixels
from tests.conftest import ROOT, Invoke
from tests.stores import write_store

COMMANDS = {
    "advkd-cache advise": cache_command.commands["advise"],
    "advkd-cache build": cache_command.commands["build"],
    "advkd-cache info": cache_command.commands["info"],
    "advkd-cache verify": cache_command.commands["verify"],
    "advkd-cache merge": cache_command.commands["merge"],
    "advkd-cache subset": cache_command.commands["subset"],
    "advkd-cache pack": cache_command.commands["pack"],
    "advkd-cache unpack": cache_command.commands["unpack"],
    "advkd-cache export": cache_command.commands["export"],
    "advkd-cache import": cache_command.commands["import"],
    "advkd-cache push": cache_command.commands["push"],
    "advkd-cache preview": cache_command.commands["preview"],
    "advkd-cache diff": cache_command.commands["diff"],
    "advkd-teacher": teacher_command,
    "advkd-train": train_command,
    "advkd-sample": sample_command,
    "advkd-evaluate": evaluate_command,
    "advkd-export": export_command,
    "advkd-page": page_command,
    "advkd-report": report_command,
    "advkd-config": config_command,
}
FLAGS = {
    "advkd-cache advise": {"--config", "--set", "--teacher", "--tolerance", "--num", "--features", "--device", "--out"},
    "advkd-cache build": {
        "--config", "--set", "--teacher", "--steps", "--sampler", "--record", "--seeds", "--block-size", "--batch-size",
        "--dtype", "--precision", "--device", "--workers", "--scheduler", "--out", "--on-mismatch", "--dry-run",
        "--accept-range", "--eta", "--spacing", "--labels", "--guidance", "--keep-weights", "--prompts",
        "--seeds-per-prompt", "--height", "--width",
    },
    "advkd-cache info": {"--json"},
    "advkd-cache verify": {"--recompute", "--teacher", "--batch-size", "--device", "--repair", "--json"},
    "advkd-cache merge": {"--out", "--prefer"},
    "advkd-cache subset": {"--out", "--seeds", "--states"},
    "advkd-cache pack": {"--out", "--codec", "--max-error", "--keep-bits", "--level", "--workers"},
    "advkd-cache unpack": {"--out", "--workers"},
    "advkd-cache export": {"--format", "--out", "--seeds", "--states"},
    "advkd-cache import": {"--out", "--levels", "--decoder", "--block-size", "--dtype", "--accept-range"},
    "advkd-cache push": {"--private"},
    "advkd-cache preview": {"--seeds", "--out"},
    "advkd-cache diff": set(),
    "advkd-teacher": {"--config", "--set", "--out"},
    "advkd-train": {
        "--cache", "--config", "--set", "--run", "--states", "--max-steps", "--resume", "--on-mismatch", "--seed",
        "--device",
    },
    "advkd-sample": {
        "--run", "--num", "--first-seed", "--seeds", "--labels", "--prompt", "--teacher", "--seed", "--out",
        "--batch-size", "--device",
    },
    "advkd-evaluate": {
        "--run", "--cache", "--config", "--set", "--teacher", "--features", "--inception-weights", "--real", "--full",
        "--sets", "--no-teacher", "--seed", "--device", "--fid-statistics", "--fid-samples",
    },
    "advkd-report": {"--out"},
    "advkd-config": {"--name", "--small", "--set"},
    "advkd-export": {
        "--onnx", "--int8", "--max-error", "--cache", "--features", "--time", "--folder", "--push", "--decoder",
    },
    "advkd-page": {"--out", "--cache", "--title", "--float32", "--runtime", "--serve", "--port", "--push"},
}  # fmt: skip


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
    assert options - {"--version"} == FLAGS[name] and "--version" in options


def test_every_command_is_tested_and_documented() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name.partition(" ")[0] for name in COMMANDS} == set(scripts)
    assert {name.partition(" ")[2] for name in COMMANDS} - {""} == set(cache_command.commands)
    pages = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    assert [name for name in COMMANDS if not any(re.search(rf"{name}\b", page) for page in pages)] == []


@pytest.mark.parametrize("name", [*COMMANDS, "advkd-cache"])
def test_every_command_says_its_version(invoke: Invoke, name: str) -> None:
    result = invoke({**COMMANDS, "advkd-cache": cache_command}[name], "--version")
    assert result.exit_code == 0 and result.output.split()[-1] == metadata.version("advkd")


def test_overrides_reach_every_command_that_takes_a_configuration(invoke: Invoke) -> None:
    for name, command in COMMANDS.items():
        if "--config" in FLAGS[name]:
            given = ["--cache", "none.zarr"] if "--cache" in FLAGS[name] else []
            given += ["--run", "none"] if "evaluate" in name else []
            write_store(Path("none.zarr"), "0:256") if given and not Path("none.zarr").exists() else None
            result = invoke(command, *given, "--config", "smoke", "--set", "trian.steps=5")
            assert result.exit_code == 2, result.output
            assert "smoke with --set trian.steps=5: unknown key 'trian'; did you mean 'train'?" in result.stderr


def test_an_overridden_run_is_the_run_of_the_edited_file(invoke: Invoke, toy_yaml: Path) -> None:
    invoke(cache_command, "build", "--config", toy_yaml)
    edited = toy_yaml.with_name("edited.yaml")
    edited.write_text(re.sub(r"batch_size: 16", "batch_size: 8", toy_yaml.read_text()))
    train = ("--cache", "cache/toy.zarr", "--max-steps", "2")
    assert invoke(train_command, *train, "--config", toy_yaml, "--set", "train.batch_size=8").exit_code == 0
    assert invoke(train_command, *train, "--config", edited).exit_code == 0
    result = invoke(train_command, *train, "--config", toy_yaml)
    assert result.exit_code == 2 and "batch_size" in result.stderr


def test_build_train_sample_evaluate(
    invoke: Invoke, tmp_path: Path, toy_yaml: Path, pipeline_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from advkd.stages.metrics.classifier import SmallClassifier, save_classifier

    assert "seeds 0:256; built 4 blocks" in invoke(cache_command, "build", "--config", toy_yaml).output
    store = Path("cache/toy.zarr")
    info = invoke(cache_command, "info", store).output
    assert TrajectoryCache.open(store).digest in info and "state 0002    t = 499" in info
    result = invoke(train_command, "--cache", store, "--config", toy_yaml)
    range_line, result_line = result.output.splitlines()[:2]
    assert range_line.startswith("x_0 in cache/toy.zarr: values from -1.00 to")
    assert result_line.startswith("runs/toy: step 4 of 4, mean squared error on held-out seeds")
    for name in ("grid.png", "array.npy", "folder"):
        assert invoke(sample_command, "--run", "runs/toy", "--num", "5", "--out", name).exit_code == 0
    assert picture_size("grid.png")[0] > 100
    assert np.load("array.npy").shape == (5, 1, 8, 8)
    assert invoke(sample_command, "--run", "runs/toy/student", "--num", "5", "--out", "alone.npy").exit_code == 0
    np.testing.assert_array_equal(np.load("alone.npy"), np.load("array.npy"))
    assert picture_size("folder/000003.png") == (8, 8)
    assert invoke(sample_command, "--run", "runs/toy", "--seeds", "5:9", "--out", "folder").exit_code == 0
    assert len(list(Path("folder").iterdir())) == 9
    again = invoke(sample_command, "--run", "runs/toy", "--seeds", "8:12", "--out", "folder")
    assert again.exit_code == 2 and "first of seed 8" in again.stderr and len(list(Path("folder").iterdir())) == 9
    for flags in (("--seeds", "3:5"), ("--first-seed", "3", "--num", "2", "--device", "cpu")):
        assert invoke(sample_command, "--run", "runs/toy", *flags, "--out", "two.npz").exit_code == 0
        with np.load("two.npz") as archive:
            np.testing.assert_array_equal(archive["arr_0"], to_pixels(np.load("array.npy")[3:]))
    assert invoke(sample_command, "--run", "runs/toy", "--num", "5", "--seed", "9", "--out", "other.npy").exit_code == 0
    assert not np.isclose(np.load("other.npy"), np.load("array.npy")).all(axis=(1, 2, 3)).any()
    for flags in (("--seeds", "0:2", "--num", "2"), ("--seeds", "2:2"), ("--device", "cuda:99")):
        assert invoke(sample_command, "--run", "runs/toy", *flags, "--out", "none.npy").exit_code == 2
    assert not Path("none.npy").exists()
    seeded = ("--cache", store, "--config", toy_yaml, "--seed", "5", "--device", "cpu")
    assert invoke(train_command, *seeded).exit_code == 2
    assert invoke(train_command, *seeded, "--run", "runs/seeded").exit_code == 0
    assert json.loads(Path("runs/seeded/run.json").read_text())["identity"]["config"]["seed"] == 5
    save_classifier(Path("classifier"), SmallClassifier(1, 8, 10).eval(), {})
    result = invoke(evaluate_command, "--run", "runs/toy", "--cache", store, "--config", toy_yaml)
    assert "short form of the protocol" in " ".join(result.output.split())
    scores = json.loads(Path("runs/toy/evaluation/metrics.json").read_text())
    assert set(scores["frechet"]) == {"student", "teacher (ddim 4)", "ddim 2", "dpmsolver++ 2"}
    assert all(value > 0 for value in scores["frechet"].values())
    details = json.loads(Path("runs/toy/evaluation/scores.json").read_text())
    assert len(details["samplers"]["student"]["frechet"]) == 2
    assert details["cost"]["teacher"]["macs"] > 0
    assert result.output.splitlines()[-1] == "look: runs/toy/evaluation/report.html"
    report = Path("runs/toy/evaluation/report.html").read_text()
    assert "dpmsolver++ 2" in report and report.count("data:image/png") == 5  # four pictures, a preview
    for name in ("samples.png", "nearest.png", "trajectory.png", "scores.png"):
        assert picture_size(f"runs/toy/evaluation/{name}")[0] > 100
    bare = ("--run", "runs/toy", "--cache", store, "--features", "classifier")
    assert invoke(evaluate_command, *bare).exit_code == 0
    capfd.readouterr()
    shutil.copytree(pipeline_folder, "other")
    weights = Path("other/unet/diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights)
    for wrong in ("gone/for/good", "other"):
        result = invoke(evaluate_command, *bare, "--teacher", wrong)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and str(wrong) in result.stderr
    result = invoke(evaluate_command, *bare, "--no-teacher")
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


def test_stage_0_replaces_nothing_but_an_earlier_teacher(invoke: Invoke) -> None:
    Path("thesis").mkdir()
    Path("thesis/years.txt").write_text("of work")
    result = invoke(teacher_command, "--config", "smoke", "--out", "thesis")
    assert (result.exit_code, "thesis holds something other than" in result.stderr) == (2, True), result.stderr
    assert Path("thesis/years.txt").read_text() == "of work"


def test_a_teacher_from_elsewhere_is_written_down(invoke: Invoke) -> None:
    result = invoke(teacher_command, "--config", "cifar10")
    assert "nothing to train, the teacher is google/ddpm-cifar10-32" in result.output
    assert json.loads(Path("teachers/cifar/teacher.json").read_text())["source"] == "google/ddpm-cifar10-32"


BAD_TRAININGS = [
    (("--cache", "nothing.zarr"), 1, "no cache at nothing.zarr"),
    (("--cache", "notes"), 1, "notes is not a trajectory cache"),
    (("--cache", "empty.zarr"), 1, "empty.zarr is empty (0 of 1 blocks)"),
    (("--cache", "partial.zarr"), 1, "partial.zarr is partial: 15 of the 16 blocks"),
    (("--cache", "whole.zarr", "--config", "bad.yaml"), 2, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    (("--cache", "whole.zarr", "--resume"), 2, "there is no run in runs/whole"),
    (("--cache", "whole.zarr", "--run", "notes"), 2, "notes holds files but no run.json"),
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
        (sample_command, ("--run", "./runs/none"), 1, "no student in ./runs/none: "),
        (sample_command, ("--run", "a.zarr"), 1, "no student in a.zarr"),
        (sample_command, ("--run", "runs/none", "--out", "x.gif"), 2, "expected a .png, a .npy, a .npz or a folder"),
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
