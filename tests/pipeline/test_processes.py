"""Real processes, really killed: what was committed stays, and the same command goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from advkd.cache.reader import TrajectoryCache
from tests.stores import tree, write_store

BIN = Path(sys.executable).parent
BUILD = ("build", "--seeds", "0:40", "--block-size", "4", "--batch-size", "4", "--record", "2", "--out", "c.zarr")


def start(folder: Path, command: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / command, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_listen_to_ctrl_c,
    )


def _listen_to_ctrl_c() -> None:
    """Where the tests themselves run in the background, a shell has told all children to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return output, error


def stop(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    return process.returncode, error


@pytest.fixture
def build(tmp_path: Path, pipeline_folder: Path) -> tuple[str, ...]:
    path = tmp_path / "toy.yaml"
    path.write_text(f"name: toy\nteacher: {{source: {pipeline_folder}}}\nsampler: {{steps: 150}}\n")
    return ("advkd-cache", *BUILD, "--config", "toy.yaml")


def committed(folder: Path) -> int:
    return len(list(folder.glob("c.zarr/blocks/*.json")))


def test_killed_builds_resume_to_the_same_bytes(tmp_path: Path, build: tuple[str, ...]) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "toy.yaml").write_text((tmp_path / "toy.yaml").read_text())
    finish(start(whole, *build))
    for number, blocks in ((signal.SIGKILL, 1), (signal.SIGTERM, 4), (signal.SIGINT, 6)):
        process = start(tmp_path, *build)
        wait_until(lambda blocks=blocks: committed(tmp_path) >= blocks, process)
        code, error = stop(process, number)
        kept = TrajectoryCache.open(tmp_path / "c.zarr").blocks
        assert blocks <= len(kept) < 10
        if number != signal.SIGKILL:
            assert code == 130
            assert "what was committed is kept. To go on: advkd-cache build --seeds 0:40" in error
    process = start(tmp_path, *build)
    output, _ = finish(process)
    assert f"built {10 - len(kept)} blocks, {len(kept)} were there" in output
    assert tree(tmp_path / "c.zarr") == tree(whole / "c.zarr")


@pytest.mark.slow
def test_sixty_kills_at_random_moments(tmp_path: Path, build: tuple[str, ...]) -> None:
    """The long form: wherever a build is killed, going on ends with the bytes of one that wasn't."""
    generator = random.Random(0)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "toy.yaml").write_text((tmp_path / "toy.yaml").read_text())
    finish(start(whole, *build))
    kills = 0
    while kills < 60:
        process = start(tmp_path, *build)
        try:
            process.wait(generator.uniform(0.5, 8.0))
            process.communicate()
            assert tree(tmp_path / "c.zarr") == tree(whole / "c.zarr")
            shutil.rmtree(tmp_path / "c.zarr")
        except subprocess.TimeoutExpired:
            stop(process, signal.SIGKILL)
            kills += 1
    finish(start(tmp_path, *build))
    assert tree(tmp_path / "c.zarr") == tree(whole / "c.zarr")


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    write_store(tmp_path / "toy.zarr", "0:256")
    (tmp_path / "toy.yaml").write_text(
        "name: toy\nteacher: {source: none}\ntrain: {student: {width: 8, depth: 1}, steps: 300, batch_size: 16,\n"
        "  log_every: 10, preview_every: 300, checkpoint_every: 50, objective: {critic_width: 4}}\n"
    )
    command = ("advkd-train", "--cache", "toy.zarr", "--config", "toy.yaml")
    finish(start(tmp_path, *command, "--run", "whole"))
    checkpoint = tmp_path / "runs/toy/checkpoint/last.safetensors"
    process = start(tmp_path, *command)
    wait_until(checkpoint.exists, process)
    stop(process, signal.SIGKILL)
    process = start(tmp_path, *command)
    wait_until(lambda: _logged(tmp_path) > 60, process)
    code, error = stop(process, signal.SIGTERM)
    assert code == 130
    assert "checkpoint saved. To go on: advkd-train --cache toy.zarr --config toy.yaml" in error
    process = start(tmp_path, *command, "--resume")
    output, error = finish(process)
    assert "step 300 of 300" in output
    assert "going on from step" in error
    weights = "student/model.safetensors"
    assert (tmp_path / "runs/toy" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def _logged(folder: Path) -> int:
    try:
        return int(json.loads((folder / "runs/toy/log/metrics.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return 0
