"""Features that need no labels: trained as their formula says, the same every time, and sensitive to what matters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.evaluate.networks import ARCHITECTURES, load_features
from advkd.stages.images.datasets import load_dataset
from advkd.stages.metrics.features import MAX_SIDE, FeatureNetwork, see, shrunk
from advkd.stages.metrics.frechet import Gaussian, frechet_distance
from advkd.stages.metrics.saved import SmallNetwork, load_network, save_network
from advkd.stages.metrics.self_supervised import (
    TEMPERATURE,
    SelfSupervisedCnn,
    contrastive_loss,
    train_self_supervised,
    view,
)
from advkd.stages.pretrain.classifier import train_classifier
from advkd.stages.pretrain.config import ClassifierConfig
from advkd.stages.reporter import SilentReporter


def test_the_loss_is_the_paper_s() -> None:
    """Chen et al. 2020, eq. 1, as a double loop."""
    projections = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def similarity(i: int, j: int) -> float:
        return float(F.cosine_similarity(projections[i], projections[j], dim=0)) / TEMPERATURE

    losses = []
    for i in range(10):
        others = [np.exp(similarity(i, k)) for k in range(10) if k != i]
        losses.append(-np.log(np.exp(similarity(i, (i + 5) % 10)) / np.sum(others)))
    assert float(contrastive_loss(projections)) == pytest.approx(np.mean(losses))


def test_the_same_seed_gives_the_same_network_and_nothing_else_changes(tmp_path: Path) -> None:
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(1)
    before = torch.get_rng_state()
    networks = [train_self_supervised(images, 8, seed, SilentReporter(), num_steps=3) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    one, same, other = (network.look(images).features for network in networks)
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.testing.assert_close(one.std(0), torch.ones(64))
    save_network(tmp_path, networks[0], {"trained_on": {"seed": 0}})
    assert torch.equal(load_network(tmp_path, ARCHITECTURES).look(images).features, one)
    features = load_features(EvaluateConfig(features=str(tmp_path)), (1, 8, 8))
    assert features.name == "self-supervised-cnn" and see(features, [images])[1] is None


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 10, 10), (3, 33, 33), (3, 80, 80)])
def test_it_takes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    network = SelfSupervisedCnn(shape[0], shape[1])
    look = network.look(torch.zeros(2, *shape))
    assert look.features.shape == (2, 64) and len(look.maps) == 4
    assert max(look.maps[0].shape[-2:]) <= MAX_SIDE
    assert torch.equal(network(torch.ones(1, *shape)), network(shrunk(torch.ones(1, *shape))))


def test_a_view_is_near_its_image_and_no_two_are_equal() -> None:
    images = load_dataset("digits", 16)[0][:50]
    generator = torch.Generator().manual_seed(0)
    one, other = view(images, generator), view(images, generator)
    own = (one - images).square().mean((1, 2, 3))
    assert bool((own < (one - images.roll(1, 0)).square().mean((1, 2, 3))).float().mean() > 0.9)
    assert float((one - other).abs().amax((1, 2, 3)).min()) > 0.1
    torch.testing.assert_close(one.mean(), images.mean(), atol=0.1, rtol=0.0)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """By a Gaussian of `sigma` pixels."""
    reach = int(4 * sigma) + 1
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])


def degradations(images: Tensor, labels: Tensor) -> dict[str, list[Tensor]]:
    """Known ones, each worse than the one before; the first of each are the images themselves."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return {
        "blur": [images, *(blurred(images, sigma) for sigma in (0.5, 0.7, 1.0, 1.5, 2.0))],
        "noise": [images, *(images + sigma * noise for sigma in (0.2, 0.3, 0.5, 0.8))],
        "dropped classes": [images[labels >= first] for first in range(0, 9, 2)],
        "few images": [images[: len(images) // times].repeat(times, 1, 1, 1) for times in (1, 4, 16, 32)],
    }


def distances(network: FeatureNetwork, reference: Tensor, sets: list[Tensor]) -> list[float]:
    wanted = Gaussian.fit(see(network, [reference])[0])
    return [frechet_distance(Gaussian.fit(see(network, [images])[0]), wanted) for images in sets]


def as_features(network: SmallNetwork) -> FeatureNetwork:
    return FeatureNetwork(name=network.architecture, network=network, look=network.look)


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """A half of the digits as the reference, the other half, and its labels."""
    images, labels, _ = load_dataset("digits", 16)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    half = len(images) // 2
    return images[order[:half]], images[order[half:]], labels[order[half:]]


def test_it_ranks_known_degradations() -> None:
    """In its short form: trained for fewer steps."""
    reference, images, labels = digits()
    network = as_features(train_self_supervised(reference, 16, 0, SilentReporter(), num_steps=75))
    for name, sets in degradations(images, labels).items():
        found = distances(network, reference, sets)
        assert found == sorted(found), f"{name}: {found}"
        assert found[-1] > 3.0 * found[0], f"{name}: {found}"


@pytest.mark.slow
def test_it_ranks_degradations_as_a_classifier_with_labels_does() -> None:
    reference, images, labels = digits()
    classifier, _ = train_classifier(load_dataset("digits", 16), ClassifierConfig(), 0, SilentReporter())
    network = as_features(train_self_supervised(reference, 16, 0, SilentReporter()))
    ours, theirs = [], []
    for name, sets in degradations(images, labels).items():
        found = distances(network, reference, sets)
        labelled = distances(as_features(classifier), reference, sets)
        assert found == sorted(found), f"{name}: {found}"
        assert stats.spearmanr(found, labelled).statistic > 0.9, f"{name}: {found}, {labelled}"
        ours += found
        theirs += labelled
    assert stats.spearmanr(ours, theirs).statistic > 0.7
