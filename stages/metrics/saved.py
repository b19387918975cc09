"""Feature networks in a folder: a named architecture plus safetensors weights; no code comes with it.

FOLDER/
  config.json         the architecture's name and options, and how good it is
  model.safetensors   its weights
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from advkd.cache.errors import UsageError
from advkd.cache.files.durable import write_atomically, write_json
from advkd.stages.metrics.features import Look


def convolutions(channels: int, width: int) -> list[nn.Module]:
    """The layers that small networks begin with: (N, channels, H, W) → (N, 2 · width, H / 4, W / 4)."""
    return [
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2),
        nn.ReLU(),
    ]


class SmallNetwork(nn.Module):
    """A small network that looks at images of one shape.

    Args:
        options: the keyword arguments that construct it again; `channels` and `size` of an image among them.
    """

    architecture: str

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.options = options

    def look(self, images: Tensor) -> Look:
        """Images in [−1, 1], shape (N, C, H, W) → what it sees."""
        raise NotImplementedError


def save_network(folder: Path, network: SmallNetwork, report: Mapping[str, Any]) -> None:
    """Write weights, then the configuration that names their architecture.

    Args:
        folder: created if it does not exist.
        network: to save.
        report: facts to keep beside it, such as its accuracy.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(folder / "model.safetensors", [save(weights)])
    write_json(folder / "config.json", {"architecture": network.architecture, "options": network.options, **report})


def load_network(folder: Path, architectures: Mapping[str, type[SmallNetwork]]) -> SmallNetwork:
    """Load what `save_network` wrote, ready to evaluate.

    Args:
        folder: of the network.
        architectures: by name.

    Raises:
        UsageError: nothing is there, or something else.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if config["architecture"] not in architectures:
            raise ValueError(f"architecture {config['architecture']!r}, expected {' or '.join(architectures)}")
        with torch.device("meta"):  # no memory before the weights are there
            network = architectures[config["architecture"]](**config["options"])
        network.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, SafetensorError) as error:
        raise UsageError(
            f"features {folder}: no network that advkd can load ({error}); give `inception`, or the folder of a "
            "classifier, such as `advkd-evaluate --features self` makes, or of DINOv2"
        ) from None
    return network.eval().requires_grad_(False)
