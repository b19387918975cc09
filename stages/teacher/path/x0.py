"""What a teacher's scheduler does to the predicted image x̂_0 before it steps on: clipping or thresholding.

Symbols, at one evaluation: the network saw x = α·x_0 + σ·ε with α² + σ² = 1, so r = σ/α fixes both; it predicts ε,
x_0 or v = α·ε − σ·x_0 (Salimans & Ho 2022, appendix D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

CLIPPED_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")
"""Classes that clip where their configuration doesn't say; the others have no such option, or leave it off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class X0Rule:
    """How x̂_0 is kept within the range of images."""

    kind: Literal["clip", "threshold"]
    limit: float
    """The range is [−limit, limit]; for "threshold" the largest threshold."""
    quantile: float = 1.0
    """Of an image's |x̂_0|: its threshold (Saharia et al. 2022, section 2.3). Only for "threshold"."""

    @classmethod
    def of(cls, scheduler_config: Mapping[str, Any]) -> Self | None:
        """The rule of a teacher's scheduler; None if it leaves x̂_0 alone. Thresholding goes before clipping."""
        if scheduler_config.get("thresholding", False):
            return cls(
                kind="threshold",
                limit=float(scheduler_config.get("sample_max_value", 1.0)),
                quantile=float(scheduler_config.get("dynamic_thresholding_ratio", 0.995)),
            )
        if clips(scheduler_config):
            return cls(kind="clip", limit=float(scheduler_config.get("clip_sample_range", 1.0)))
        return None

    def __str__(self) -> str:
        if self.kind == "clip":
            return f"x̂_0 clipped to ±{self.limit:g}"
        return f"x̂_0 thresholded at its {self.quantile:g} quantile, at most {self.limit:g}"

    def apply(self, x0: Tensor) -> Tensor:
        """x̂_0 within the range; shape (B, C, H, W)."""
        if self.kind == "clip":
            return x0.clamp(-self.limit, self.limit)
        thresholds = torch.quantile(x0.abs().flatten(1).float(), self.quantile, dim=1).clamp(min=1.0, max=self.limit)
        thresholds = thresholds.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-thresholds, thresholds) / thresholds

    def constrain(self, prediction: Tensor, x: Tensor, ratio: float, prediction_type: str) -> Tensor:
        """The prediction that a network with x̂_0 within the range would have made; unchanged where it is.

        Args:
            prediction: of the network, shape (B, C, H, W).
            x: what the network saw, at unit variance, the same shape.
            ratio: r.
            prediction_type: "epsilon", "sample" or "v_prediction".
        """
        alpha = (1.0 + ratio**2) ** -0.5
        sigma = ratio * alpha
        if prediction_type == "sample":
            return self.apply(prediction)
        if prediction_type == "epsilon":
            x0 = (x - sigma * prediction) / alpha
        else:
            x0 = alpha * x - sigma * prediction
        allowed = self.apply(x0)
        instead = (x - alpha * allowed) / sigma if prediction_type == "epsilon" else (alpha * x - allowed) / sigma
        return torch.where(allowed == x0, prediction, instead)


def clips(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of this configuration clips x̂_0, where it doesn't threshold it."""
    return bool(scheduler_config.get("clip_sample", scheduler_config.get("_class_name") in CLIPPED_BY_DEFAULT))
