"""What many tests use: a tiny real teacher, a store written without one, and the commands run in this process.

Nothing heavy is imported before it is used: the cache room's tests run where neither torch nor click is installed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.stores import write_store

if TYPE_CHECKING:
    import click
    from click.testing import Result

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # other processes run tests on the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

MEMORY, ROOM = Path("/dev/shm"), 8 << 30
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    # A durable write waits milliseconds for a disk. What is tested isn't whether a disk keeps its promises.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipeline", "benchmarks", "stages", "cache")
"""Rooms of tests, those of long modules first: pytest-xdist hands out whole modules in this order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start long modules first, so that no process is left with one at the end."""

    def place(item: pytest.Item) -> int:
        room = item.path.relative_to(ROOT / "tests").parts[0]
        return ROOMS.index(room) if room in ROOMS else len(ROOMS)

    items.sort(key=place)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 256 seeds that no diffusion made."""
    write_store(tmp_path / "toy.zarr", "0:256")
    return tmp_path / "toy.zarr"


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real DDPMPipeline of a tiny UNet with random weights, 8×8 grey images."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("teacher") / "pipeline"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=1000)).save_pretrained(folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For torch, as the processes that tests start have."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Invoke = Callable[..., "Result"]


def settings(*changes: str) -> list[str]:
    """A command's options that change keys of its configuration, such as `train.steps=4`."""
    return [part for change in changes for part in ("--set", change)]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    from click.testing import CliRunner

    def run(command: click.Command, *arguments: object) -> Result:
        result = CliRunner().invoke(command, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def save_random_inception(path: Path) -> None:
    """pytorch-fid's network with random weights, as a file that stands for its own."""
    import torch
    from pytorch_fid import inception

    network = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    network.Mixed_5b = inception.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = inception.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = inception.FIDInceptionA(288, pool_features=64)
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        setattr(network, name, inception.FIDInceptionC(768, channels_7x7=width))
    network.Mixed_7b, network.Mixed_7c = inception.FIDInceptionE_1(1280), inception.FIDInceptionE_2(2048)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
