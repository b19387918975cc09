"""The README's path with a teacher of one's own: google/ddpm-cifar10-32's exact architecture, random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.pipeline.cli.sample import main as sample_command
from advkd.pipeline.cli.train import main as train_command
from tests.conftest import Invoke


@pytest.fixture(scope="module")
def cifar_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_746_307
    folder = tmp_path_factory.mktemp("cifar") / "ddpm-cifar10-32"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


def test_cifar_from_teacher_to_scores(invoke: Invoke, cifar_teacher: Path, tmp_path: Path) -> None:
    flags = ("--steps", "4", "--record", "2", "--seeds", "0:16", "--block-size", "16", "--batch-size", "8")
    build = ("build", "--config", "configs/cifar10.yaml", "--teacher", cifar_teacher, *flags)
    store = Path("cache/cifar.zarr")
    result = invoke(cache_command, *build, "--out", store)
    assert result.exit_code == 0, result.output
    cache = TrajectoryCache.open(store)
    assert (cache.item_shape, sorted(cache.states), cache.blocks) == ((3, 32, 32), [0, 2, 4], (0,))
    assert np.isfinite(cache.rows(4, range(16))).all()
    (tmp_path / "mine.yaml").write_text("name: cifar\nteacher: {source: none}\ntrain: {batch_size: 4}\n")
    result = invoke(train_command, "--cache", store, "--config", "mine.yaml", "--max-steps", "2")
    assert "\nruns/cifar: step 2 of 100000" in result.output, result.output
    assert invoke(sample_command, "--run", "runs/cifar", "--num", "64", "--out", "samples.png").exit_code == 0
    (tmp_path / "short.yaml").write_text(
        f"name: cifar\nteacher: {{source: {cifar_teacher}}}\n"
        "evaluate: {features: small, num_sets: 2, set_size: 4, batch_size: 8, solver_steps: [2]}\n"
    )
    from advkd.stages.metrics.classifier import SmallClassifier, save_classifier

    save_classifier(Path("small"), SmallClassifier(3, 32, 10).eval(), {})
    result = invoke(evaluate_command, "--run", "runs/cifar", "--cache", store, "--config", "short.yaml")
    assert result.exit_code == 0, result.output
    scores = json.loads(Path("runs/cifar/evaluation/scores.json").read_text())
    assert scores["cost"]["teacher"]["num_parameters"] == 35_746_307
    assert scores["samplers"]["teacher (ddim 4)"]["frechet_mean"] > 0.0
    result = invoke(evaluate_command, "--run", "runs/cifar", "--cache", store, "--inception-weights", "none.pth")
    assert (result.exit_code, "inception weights none.pth: no such file" in result.stderr) == (2, True)
