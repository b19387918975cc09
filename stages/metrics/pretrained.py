"""Networks that others trained, from a folder that transformers saved: known classes and safetensors, no code."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import UsageError, first_line
from advkd.stages.transformers_api import transformers


def model_type(folder: Path) -> str | None:
    """What transformers calls the kind of network in a folder, such as "dinov2"; None if it isn't one of its."""
    try:
        return str(json.loads((folder / "config.json").read_bytes())["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def load_part(folder: Path, class_name: str, what: str, **options: Any) -> Any:
    """A network or a tokenizer, from this machine alone.

    Args:
        folder: where transformers saved it.
        class_name: in transformers.
        what: the setting that names the folder, for messages.
        options: of its `from_pretrained`.

    Raises:
        UsageError: transformers isn't installed, or it can't be loaded.
    """
    kind = getattr(transformers(f"{what} {folder}"), class_name)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # whatever foreign files make transformers and torch raise
        raise UsageError(f"{what} {folder}: no {class_name} can be loaded ({first_line(error)})") from None


def load_network(folder: Path, class_name: str, what: str) -> Any:
    """A network in float32, ready to evaluate; raises as `load_part` does."""
    return load_part(folder, class_name, what, use_safetensors=True).float().eval().requires_grad_(False)


def prepared(images: Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images as networks for photographs take them.

    Args:
        images: in [−1, 1], shape (N, 1 or 3, H, W).
        side: what the shorter side is resized to, bicubically; the middle of the longer one is kept.
        mean: of each colour in [0, 1], which is subtracted.
        std: which it is divided by then.

    Returns:
        Shape (N, 3, side, side).
    """
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = [max(side, math.floor(length * scale)) for length in (height, width)]
    unit = (images.expand(-1, 3, -1, -1) + 1.0) / 2.0
    resized = F.interpolate(unit, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0.0, 1.0)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    middle = resized[:, :, top : top + side, left : left + side]
    return (middle - middle.new_tensor(mean)[:, None, None]) / middle.new_tensor(std)[:, None, None]
