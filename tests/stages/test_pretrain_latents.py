"""Stage 0 for latents: an autoencoder first, then a teacher of what it makes, which stage one records."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from advkd.cache.errors import ConfigError
from advkd.stages.images.datasets import load_dataset
from advkd.stages.pretrain.autoencoder import encode, reconstruct, train_autoencoder
from advkd.stages.pretrain.config import AutoencoderConfig, ClassifierConfig, PretrainConfig
from advkd.stages.pretrain.run import pretrain
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher

CPU = torch.device("cpu")
SMALL = AutoencoderConfig(channels=[8, 16, 16], steps=60, learning_rate=4e-3)


def config(autoencoder: AutoencoderConfig | None = SMALL, **changes: Any) -> PretrainConfig:
    known: dict[str, Any] = {"size": 16, "channels": [8, 16], "classes": True, "steps": 2, "report_samples": 64}
    classifier = ClassifierConfig(epochs=1, held_out=100)
    return PretrainConfig(**known | changes, classifier=classifier, autoencoder=autoencoder)


def test_its_folder_is_a_teacher_of_latents(tmp_path: Path) -> None:
    report = pretrain(config(), tmp_path / "small")
    folder = tmp_path / "small/pipeline"
    teacher = load_teacher(TeacherConfig(source=str(folder), null_class=10), CPU)
    assert teacher.item_shape == (4, 4, 4) and teacher.space is not None
    assert teacher.space.image_shape == (1, 16, 16)
    model = AutoencoderKL.from_pretrained(folder / "vae")
    images = load_dataset("digits", 16).images
    latents = encode(model, images, CPU)
    assert abs(float(latents.mean())) < 1e-3 and float(latents.std()) == pytest.approx(1.0, abs=1e-3)
    assert report.reconstruction_mse is not None and 0.0 < report.reconstruction_mse < 0.3
    known = json.loads((tmp_path / "small/report.json").read_text())
    assert known["frechet_reconstructed_to_real"] == report.frechet_reconstructed_to_real
    assert known["config"]["autoencoder"]["latent_channels"] == 4
    with Image.open(tmp_path / "small/reconstructions.png") as picture:
        assert picture.width > 16 * 64 and picture.height > 2 * 64


def test_an_autoencoder_learns_reproducibly() -> None:
    """More steps, smaller error; the same seed, the same weights."""
    images = load_dataset("digits", 16).images[:64]

    def trained(steps: int) -> Any:
        settings = dataclasses.replace(SMALL, steps=steps, batch_size=8)
        return train_autoencoder(images, config(settings), settings, SilentReporter(), CPU)

    first, again, longer = trained(8), trained(8), trained(200)
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    errors = [float((reconstruct(model, images, CPU) - images).square().mean()) for model in (first, longer)]
    assert errors[1] < 0.5 * errors[0]
    assert reconstruct(longer, images, CPU).abs().max() <= 1.0


def test_shape_of_latents_follows_from_the_autoencoder() -> None:
    assert config().item_shape == (4, 4, 4)
    assert config(None).item_shape == (1, 16, 16)
    assert config(dataclasses.replace(SMALL, channels=[8, 8], latent_channels=3)).item_shape == (3, 8, 8)
    with pytest.raises(ConfigError, match="16 can't be halved 3 times, after the autoencoder has divided it by 4"):
        config(channels=[8, 16, 16, 16])
    for changes in ({"channels": [8]}, {"channels": [8, 12]}, {"steps": 0}, {"learning_rate": 0.0}, {"kl_weight": -1}):
        with pytest.raises(ConfigError, match="autoencoder"):
            AutoencoderConfig(**changes)  # type: ignore[arg-type]
