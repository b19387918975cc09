"""A small classifier whose last hidden layer serves as features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from advkd.stages.metrics.features import Look
from advkd.stages.metrics.saved import SmallNetwork, convolutions, save_network


class SmallClassifier(SmallNetwork):
    """A small convolutional classifier.

    Args:
        channels: of an image.
        size: height and width of an image, a multiple of 4.
        num_classes: of the labels.
        width: of the first convolution.
        num_features: of the hidden layer before the logits.
    """

    architecture = "small-cnn"

    def __init__(self, channels: int, size: int, num_classes: int, width: int = 32, num_features: int = 64) -> None:
        super().__init__(channels=channels, size=size, num_classes=num_classes, width=width, num_features=num_features)
        self.body = nn.Sequential(
            *convolutions(channels, width),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, num_features),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.2)
        self.logits = nn.Linear(num_features, num_classes)

    def look(self, images: Tensor) -> Look:
        """Images in [−1, 1], shape (N, C, H, W) → hidden layer, the four convolutions' outputs, probabilities."""
        hidden, maps = images, []
        for layer in self.body:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU) and hidden.dim() == 4:
                maps.append(hidden)
        return Look(features=hidden, maps=maps, probabilities=self.logits(hidden).softmax(1))

    def forward(self, images: Tensor) -> Tensor:
        """Images in [−1, 1], shape (N, C, H, W) → logits, shape (N, num_classes)."""
        logits: Tensor = self.logits(self.dropout(self.body(images)))
        return logits


def save_classifier(folder: Path, classifier: SmallClassifier, report: Mapping[str, Any]) -> None:
    """Save a classifier as features that `evaluate.features` can name.

    Args:
        folder: created if it does not exist.
        classifier: to save.
        report: facts to keep beside it, such as its accuracy.
    """
    save_network(folder, classifier, report)
