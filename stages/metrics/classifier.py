"""A small classifier whose last hidden layer serves as features: the network, and the folder it is saved in.

FOLDER/
  config.json         the architecture's name and options, and how good it is
  model.safetensors   its weights
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from advkd.cache.errors import UsageError
from advkd.cache.files.durable import write_atomically, write_json
from advkd.stages.metrics.features import Look

NAME = "small-cnn"


class SmallClassifier(nn.Module):
    """A small convolutional classifier.

    Args:
        channels: of an image.
        size: height and width of an image.
        num_classes: of the labels.
        width: of the first convolution.
        num_features: of the hidden layer before the logits.
    """

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


def save_classifier(folder: Path, classifier: SmallClassifier, report: dict[str, Any]) -> None:
    """Write weights, then the configuration that names their architecture.

    Args:
        folder: created if it does not exist.
        classifier: to save.
        report: facts to keep beside it, such as its accuracy.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    write_atomically(folder / "model.safetensors", [save(weights)])
    write_json(folder / "config.json", {"architecture": NAME, "options": classifier.options, **report})


def load_classifier(folder: Path) -> SmallClassifier:
    """Load what `save_classifier` wrote, ready to evaluate.

    Raises:
        UsageError: nothing is there, or something else.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if config["architecture"] != NAME:
            raise ValueError(f"architecture {config['architecture']!r}, expected {NAME!r}")
        with torch.device("meta"):  # no memory before the weights are there
            classifier = SmallClassifier(**config["options"])
        classifier.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, SafetensorError) as error:
        raise UsageError(
            f"features {folder}: no classifier that advkd can load ({error}); give `inception` or the folder of one"
        ) from None
    return classifier.eval().requires_grad_(False)
