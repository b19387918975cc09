"""Networks that turn images into features to compare: Inception through pytorch-fid, or a small classifier.

A feature network from someone else is a named architecture plus safetensors weights; no code comes with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from advkd.cache.errors import UsageError
from advkd.cache.files.durable import write_atomically, write_json
from advkd.stages.evaluate.config import INCEPTION, EvaluateConfig

SMALL_CNN = "small-cnn"
MIN_INCEPTION_SIZE = 32
LOOK_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a network sees in N images."""

    features: Tensor
    """Shape (N, D), to compare distributions with."""
    maps: list[Tensor]
    """Earlier layers, each of shape (N, C, H, W), to compare image pairs with."""
    probabilities: Tensor | None
    """Of the classes, shape (N, K), where the network is a classifier of such images."""


class FeatureNetwork(Protocol):
    """Maps images to features."""

    name: str
    device: torch.device

    @property
    def network(self) -> nn.Module:
        """Its module."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images in [−1, 1], shape (N, C, H, W) → features, shape (N, D)."""

    def look(self, images: Tensor) -> Look:
        """The same in one pass with layers and, of a classifier, probabilities."""


class SmallClassifier(nn.Module):
    """A small convolutional classifier whose last hidden layer serves as features.

    Args:
        channels: of an image.
        size: height and width of an image.
        num_classes: of the labels.
        width: of the first convolution.
        num_features: of the hidden layer before the logits.
    """

    name = SMALL_CNN

    def __init__(self, channels: int, size: int, num_classes: int, width: int = 32, num_features: int = 64) -> None:
        super().__init__()
        self.options = {
            "channels": channels,
            "size": size,
            "num_classes": num_classes,
            "width": width,
            "num_features": num_features,
        }
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, num_features),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.2)
        self.logits = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Images in [−1, 1], shape (N, C, H, W) → the hidden layer, shape (N, num_features)."""
        hidden: Tensor = self.body(images)
        return hidden

    def look(self, images: Tensor) -> Look:
        """Images in [−1, 1] → features, the four convolutions' outputs, and probabilities."""
        hidden, maps = images, []
        for layer in self.body:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU) and hidden.dim() == 4:
                maps.append(hidden)
        return Look(features=hidden, maps=maps, probabilities=self.logits(hidden).softmax(1))

    def forward(self, images: Tensor) -> Tensor:
        """Images in [−1, 1] → logits, shape (N, num_classes)."""
        logits: Tensor = self.logits(self.dropout(self.features(images)))
        return logits


def save_classifier(folder: Path, classifier: SmallClassifier, report: dict[str, Any]) -> None:
    """Write weights, then the configuration that names their architecture."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    write_atomically(folder / "model.safetensors", [save(weights)])
    write_json(folder / "config.json", {"architecture": SMALL_CNN, "options": classifier.options, **report})


def load_classifier(folder: Path) -> SmallClassifier:
    """Load what `save_classifier` wrote.

    Raises:
        UsageError: it is not there, or something else.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if config["architecture"] != SMALL_CNN:
            raise ValueError(f"architecture {config['architecture']!r}, expected {SMALL_CNN!r}")
        with torch.device("meta"):  # no storage until the weights are there
            classifier = SmallClassifier(**config["options"])
        classifier.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, SafetensorError) as error:
        raise UsageError(
            f"features {folder}: no classifier that advkd can load ({error}); give `inception` or the folder of one"
        ) from None
    return classifier.eval().requires_grad_(False)


class _SmallFeatures:
    name = SMALL_CNN

    def __init__(self, classifier: SmallClassifier, device: torch.device) -> None:
        self.network = classifier.to(device)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        return self.network.features(images)

    def look(self, images: Tensor) -> Look:
        return self.network.look(images)


class _InceptionFeatures:
    name = INCEPTION

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.to(device)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        return self.look(images).features

    def look(self, images: Tensor) -> Look:
        *maps, pooled = self.network((images.clamp(-1.0, 1.0) + 1.0) / 2.0)
        # Inception's 1,000 classes are ImageNet's: they say nothing of these images' own.
        return Look(features=pooled.flatten(1), maps=maps, probabilities=None)


def load_features(
    config: EvaluateConfig, item_shape: tuple[int, ...], device: torch.device | None = None
) -> FeatureNetwork:
    """The feature network that the configuration names.

    Raises:
        UsageError: it doesn't fit the images, or its weights are not there.
    """
    device = device or torch.device("cpu")
    if config.features != INCEPTION:
        classifier = load_classifier(Path(config.features))
        expected = (classifier.options["channels"], classifier.options["size"])
        if expected != tuple(item_shape[:2]):
            raise UsageError(
                f"features {config.features}: made for {expected[0]}×{expected[1]}×{expected[1]} images, these are "
                f"{'×'.join(map(str, item_shape))}"
            )
        return _SmallFeatures(classifier, device)
    if item_shape[0] != 3 or item_shape[1] < MIN_INCEPTION_SIZE:
        shape = "×".join(map(str, item_shape))
        raise UsageError(
            f"features inception: needs colour images of at least 32 pixels, these are {shape}; "
            "give --features FOLDER of a small classifier (docs/evaluation.md says how to make one)"
        )
    return _InceptionFeatures(_load_inception(config.inception_weights), device)


def _load_inception(weights: str | None) -> nn.Module:
    from pytorch_fid import inception

    if weights is not None and not Path(weights).is_file():
        raise UsageError(f"inception weights {weights}: no such file")
    original = inception.load_state_dict_from_url
    if weights is not None:
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    try:
        blocks = list(range(inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048] + 1))
        network: nn.Module = inception.InceptionV3(blocks).eval().requires_grad_(False)
    except (OSError, URLError) as error:
        raise UsageError(
            f"inception weights are not here and can't be fetched ({error}): put pytorch-fid's "
            f"{Path(inception.FID_WEIGHTS_URL).name} on this machine and name it with --inception-weights FILE"
        ) from None
    except Exception as error:  # unpickling and state-dict errors of torch.load
        raise UsageError(f"inception weights {weights}: not pytorch-fid's ({type(error).__name__})") from None
    finally:
        inception.load_state_dict_from_url = original
    return network


@torch.no_grad()
def extract(network: FeatureNetwork, images: Tensor, batch_size: int = 256) -> npt.NDArray[np.float32]:
    """Features of images (N, C, H, W), in batches; float32, shape (N, D)."""
    parts = [network(part.to(network.device)).float().cpu().numpy() for part in torch.split(images, batch_size)]
    return np.concatenate(parts).astype(np.float32)


@torch.no_grad()
def observe(network: FeatureNetwork, images: Tensor) -> Iterator[tuple[slice, Look]]:
    """What a network sees in images (N, C, H, W), in parts small enough to hold the layers of two at once."""
    for start in range(0, len(images), LOOK_BATCH):
        part = slice(start, min(start + LOOK_BATCH, len(images)))
        yield part, network.look(images[part].to(network.device))
