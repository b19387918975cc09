"""What many tests use: a tiny real teacher, stores written without one, and the commands run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result

from advkd.cache.layout import parse_seed_range
from advkd.cache.noise import NOISE_RULE, standard_normal
from advkd.cache.recipe import Layout, Recipe, State
from advkd.cache.writer import CacheWriter

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")

ROOT = Path(__file__).resolve().parents[1]
ITEM_SHAPE = (1, 8, 8)
BLOCK_SIZE = 16


def make_recipe(**changes: object) -> Recipe:
    """A recipe as stage one would write it, with made-up contents."""
    values: dict[str, object] = {
        "teacher": {"tensors_sha256": "0" * 64, "unet": {"sample_size": 8}, "scheduler": {"beta_start": 0.0001}},
        "sampler": {"name": "ddim", "steps": 4, "eta": 0.0, "deterministic": True, "config": {}, "timesteps": [3.0]},
        "precision": {"compute": "float32", "tf32": False},
        "noise": {"rule": NOISE_RULE, "root_seed": 0},
        "item_shape": ITEM_SHAPE,
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def make_layout(block_size: int = BLOCK_SIZE, dtype: str = "float16") -> Layout:
    """Three recorded states of a variance-preserving path."""
    states = (
        State(step=0, timestep=999.0, alpha=0.0, sigma=1.0, scale=1.0),
        State(step=2, timestep=499.0, alpha=0.6, sigma=0.8, scale=1.0),
        State(step=4, timestep=-1.0, alpha=1.0, sigma=0.0, scale=1.0),
    )
    return Layout(states=states, dtype=dtype, block_size=block_size)


def block_states(layout: Layout, block: int) -> dict[int, npt.NDArray[np.float32]]:
    """States that follow from the seeds: x_0 is a smooth function of x_T, the others lie between."""
    seeds = range(block * layout.block_size, (block + 1) * layout.block_size)
    noise = standard_normal(0, seeds, ITEM_SHAPE).astype(layout.dtype).astype(np.float32)
    x0 = np.tanh(noise.mean(axis=(1, 2, 3), keepdims=True) * 4.0 + noise * 0.1).astype(np.float32)
    return {state.step: (state.alpha * x0 + state.sigma * noise).astype(np.float32) for state in layout.states}


def write_store(path: Path, seeds: str = "0:64", **changes: object) -> CacheWriter:
    """A committed store over some seeds."""
    layout = make_layout()
    writer = CacheWriter.open(path, make_recipe(**changes), layout)
    with writer.locked():
        writer.grow(parse_seed_range(seeds))
        for block in writer.missing(parse_seed_range(seeds)):
            writer.commit(block, block_states(layout, block))
    return writer


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 256 seeds that no diffusion made."""
    write_store(tmp_path / "toy.zarr", "0:256")
    return tmp_path / "toy.zarr"


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real DDPMPipeline of a tiny UNet with random weights, 8×8 grey images."""
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


Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(command: click.Command, *arguments: object) -> Result:
        result = CliRunner().invoke(command, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without provenance."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "provenance" not in path.relative_to(folder).parts
    }


def save_random_inception(path: Path) -> None:
    """pytorch-fid's network with random weights, as a file that stands for its own."""
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
