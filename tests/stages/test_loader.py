"""Teachers: every usual layout is loaded, and what can't be sampled from is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from advkd.cache.errors import TeacherError, UsageError
from advkd.stages.teacher.build.build import build
from advkd.stages.teacher.build.plan import make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"sample_size": [8, 16]}, "8×16; expected square"),
        ({"sample_size": None}, "expected square"),
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel"),
        ({"out_channels": 2}, "1 channels in, 2 out"),
        ({"num_class_embeds": 10}, "conditioned on a class"),
        ({"block_out_channels": [8, 12]}, "can't be loaded"),
        ({"block_out_channels": []}, "can't be loaded"),
        ({"norm_num_groups": 0}, "can't be loaded"),
        ({"in_channels": "x", "out_channels": "x"}, "which can't be"),
    ],
)
def test_unusable_networks_are_refused(
    pipeline_folder: Path, tmp_path: Path, edit: dict[str, object], message: str
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(TeacherError, match=message):
        load_teacher(TeacherConfig(source=str(folder)), torch.device("cpu"))


def test_unusable_folders_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    device = torch.device("cpu")

    def refused(message: str) -> None:
        with pytest.raises(TeacherError, match=message):
            load_teacher(TeacherConfig(source=str(tmp_path / "teacher")), device)

    refused("no such folder")
    shutil.copytree(pipeline_folder, tmp_path / "teacher")
    scheduler = tmp_path / "teacher/scheduler/scheduler_config.json"
    text = scheduler.read_text()
    scheduler.write_text(text.replace("DDPMScheduler", "ScoreSdeVeScheduler"))
    refused(r"'ScoreSdeVeScheduler' is unknown; expected one of .*DDPMScheduler")
    scheduler.write_text("{")
    refused("not readable JSON")
    scheduler.write_text(text)
    weights = tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused("only safetensors are loaded")
    shutil.rmtree(tmp_path / "teacher/unet")
    refused("no UNet in it")


def test_missing_weights_are_never_made_up(pipeline_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if "mid_block" not in name}, path)
    with pytest.raises(TeacherError, match=r"weights don't fit its UNet's configuration \(\d+ missing keys\)"):
        load_teacher(TeacherConfig(source=str(folder)), torch.device("cpu"))
    save_file(weights | {"another.weight": torch.zeros(2)}, path)
    with pytest.raises(TeacherError, match="1 unexpected keys"):
        load_teacher(TeacherConfig(source=str(folder)), torch.device("cpu"))


@pytest.mark.parametrize(
    "edit",
    [
        {"beta_schedule": "foo"},
        {"prediction_type": "foo"},
        {"num_train_timesteps": "x"},
        {"beta_start": None},
        {"trained_betas": [0.1, 0.2]},
        {"beta_start": float("nan")},
    ],
)
def test_impossible_schedulers_are_refused(pipeline_folder: Path, tmp_path: Path, edit: dict[str, object]) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    cache = CacheConfig(seeds="0:8", device="cpu")
    with pytest.raises((TeacherError, UsageError)):
        build(make_plan(TeacherConfig(source=str(folder)), SamplerConfig(steps=4), cache, tmp_path / "a.zarr"))
    assert not (tmp_path / "a.zarr").exists()


def test_a_flat_repository_loads_as_older_ones_are_laid_out(pipeline_folder: Path, tmp_path: Path) -> None:
    """google/ddpm-cifar10-32 keeps config.json, weights and scheduler_config.json at its root."""
    for path in (*(pipeline_folder / "unet").iterdir(), *(pipeline_folder / "scheduler").iterdir()):
        shutil.copy(path, tmp_path / path.name)
    flat = load_teacher(TeacherConfig(source=str(tmp_path)), torch.device("cpu"))
    nested = load_teacher(TeacherConfig(source=str(pipeline_folder)), torch.device("cpu"))
    assert flat.identity() == nested.identity()
