"""A loaded teacher: its network, evaluated in its own precision, and what identifies it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from advkd.cache.format.equivalence import SCHEDULER_DEFAULTS, UNET_OPTIONS
from advkd.stages.teacher.diffusers_api import recorded_config


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A loaded teacher: a network, and how it was trained to see noise."""

    unet: nn.Module
    scheduler_config: dict[str, Any]
    item_shape: tuple[int, int, int]
    source: str
    commit: str | None
    """Commit of the Hub's repository, where it came from there."""
    config: dict[str, Any] = field(default_factory=dict)
    """The UNet's configuration."""
    license: str | None = None
    """What its model card names, where it has one."""
    tensors_sha256: str = ""
    """Of the weights as they were saved, whatever precision they are used in."""
    parts: dict[str, str] = field(default_factory=dict)
    """Where its files differ from what a pipeline has by default: `unet`, `variant`, `scheduler` of `TeacherConfig`."""
    memory_format: torch.memory_format = torch.contiguous_format
    """How the network's convolutions like their inputs in memory."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return next(self.unet.parameters()).dtype

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

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        """One network evaluation in the network's own precision; float32 in and out, shape (B, C, H, W).

        Where the network learned the variance too, the result has 2C channels, the prediction first.
        """
        if self.only_whole_timesteps:  # Euler's and Heun's are floats; `_check_evaluations` requires whole ones
            timestep = timestep.long()
        return self.unet(x.to(self.dtype), timestep).sample.float()  # type: ignore[no-any-return]

    def identity(self) -> dict[str, Any]:
        """What the recipe records of the teacher."""
        return {
            "tensors_sha256": self.tensors_sha256,
            "unet": recorded_config(self.config, UNET_OPTIONS),
            "scheduler": recorded_config(self.scheduler_config, SCHEDULER_DEFAULTS),
        }


def best_memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """Channels last is a tenth faster on CPUs; tensor cores want it too, but a GPU's float32 convolutions don't."""
    wanted = device.type == "cpu" or (device.type == "cuda" and precision != "float32")
    return torch.channels_last if wanted else torch.contiguous_format
