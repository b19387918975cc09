"""A loaded teacher: its network, evaluated in its own precision, and what identifies it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkd.cache.format.condition import ClassCondition
from advkd.cache.format.equivalence import DEFAULT_NETWORK, NETWORK_OPTIONS, SCHEDULER_DEFAULTS
from advkd.cache.format.space import LatentSpace
from advkd.stages.teacher.diffusers_api import recorded_config
from advkd.stages.teacher.load.card import TeacherCard


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A loaded teacher: a network, and how it was trained to see noise."""

    network: nn.Module
    scheduler_config: dict[str, Any]
    item_shape: tuple[int, int, int]
    source: str
    commit: str | None
    """Commit of the Hub's repository, where it came from there."""
    config: dict[str, Any] = field(default_factory=dict)
    """The network's configuration."""
    card: TeacherCard = field(default_factory=TeacherCard)
    """What is known of it besides its files."""
    files: tuple[Path, ...] = ()
    """Safetensors files that hold the network's weights."""
    tensors_sha256: str = ""
    """Of the weights as they were saved, whatever precision they are used in."""
    parts: dict[str, str] = field(default_factory=dict)
    """Where its files differ from what a pipeline has by default: `unet`, `variant`, `scheduler` of `TeacherConfig`."""
    num_classes: int = 0
    """Rows of its table of classes; 0 for an unconditional one."""
    null_class: int | None = None
    """The row that stands for no label, if there is one."""
    space: LatentSpace | None = None
    """Where its states live; None for pixels."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the decoder of its latents."""
    memory_format: torch.memory_format = torch.contiguous_format
    """How the network's convolutions like their inputs in memory."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return next(self.network.parameters()).dtype

    @property
    def num_timesteps(self) -> int:
        """T: how many timesteps it was trained with."""
        return int(self.scheduler_config.get("num_train_timesteps", 1000))

    @property
    def only_whole_timesteps(self) -> bool:
        """Whether it learned one embedding per timestep, so that there is nothing between two of them."""
        return self.config.get("time_embedding_type") == "learned"

    @property
    def learned_variance(self) -> bool:
        """Whether the network gives a variance besides its prediction: 2C channels."""
        return bool(self.config.get("out_channels") == 2 * self.item_shape[0])

    @property
    def network_class(self) -> str:
        """Its class in diffusers."""
        return str(self.config.get("_class_name", DEFAULT_NETWORK))

    def predict(
        self, x: Tensor, timestep: Tensor, labels: Tensor | None = None, condition: ClassCondition | None = None
    ) -> Tensor:
        """One prediction, in the network's own precision.

        Classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale w = 1 + their weight) evaluates the network with
        and without the labels, in one batch.

        Args:
            x: float32, shape (B, C, H, W).
            timestep: a number.
            labels: int64, shape (B,); None for an unconditional teacher.
            condition: of the recipe; without one there is no guidance.

        Returns:
            float32, shape (B, C, H, W); where the network learned the variance too it has 2C channels, the prediction
            first.
        """
        if labels is None or condition is None or condition.null_class is None:
            return self._evaluate(x, timestep, labels)
        labels_and_null = torch.cat([labels, torch.full_like(labels, condition.null_class)])
        labelled, unlabelled = self._evaluate(torch.cat([x, x]), timestep, labels_and_null).chunk(2)
        count = x.shape[1]
        guided = unlabelled[:, :count] + condition.guidance * (labelled[:, :count] - unlabelled[:, :count])
        return torch.cat([guided, labelled[:, count:]], dim=1) if labelled.shape[1] > count else guided

    def _evaluate(self, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        if self.only_whole_timesteps:  # Euler's and Heun's are floats; `_check_evaluations` requires whole ones
            timestep = timestep.long()
        known = {} if labels is None else {"class_labels": labels}
        return self.network(x.to(self.dtype), timestep.expand(len(x)), **known).sample.float()  # type: ignore[no-any-return]

    def identity(self) -> dict[str, Any]:
        """What the recipe records of the teacher."""
        return {
            "tensors_sha256": self.tensors_sha256,
            "unet": recorded_config(self.config, NETWORK_OPTIONS[self.network_class]),
            "scheduler": recorded_config(self.scheduler_config, SCHEDULER_DEFAULTS),
            **({} if self.network_class == DEFAULT_NETWORK else {"network": self.network_class}),
        }


def best_memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """Channels last is a tenth faster on CPUs; tensor cores want it too, but a GPU's float32 convolutions don't."""
    wanted = device.type == "cpu" or (device.type == "cuda" and precision != "float32")
    return torch.channels_last if wanted else torch.contiguous_format
