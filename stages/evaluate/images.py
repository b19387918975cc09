"""Real images to compare with, in the teacher's range and size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import UsageError

DIGITS = "digits"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_digits(size: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits (8×8, 16 grey levels), bilinearly enlarged.

    Returns:
        Images in [−1, 1], float32, shape (1797, 1, size, size), and labels 0–9, shape (1797,).
    """
    from sklearn.datasets import load_digits as load

    data = load()
    images = torch.from_numpy(data.images.astype(np.float32) / 8.0 - 1.0)[:, None]
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return enlarged, data.target.astype(np.int64)


def load_real(source: str, item_shape: tuple[int, ...]) -> Tensor:
    """Real images by name (`digits`) or folder, float32 in [−1, 1], shape (N, *item_shape).

    Raises:
        UsageError: nothing usable is there.
    """
    channels, height, width = item_shape
    if source == DIGITS:
        return load_digits(height)[0]
    folder = Path(source)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if len(paths) < 2:
        raise UsageError(f"real images {source}: expected `digits` or a folder with image files")
    items = []
    for path in paths:
        try:
            image = Image.open(path).convert("L" if channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"real images: {path} can't be read ({error})") from None
        pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
        items.append((pixels / 127.5 - 1.0).reshape(height, width, channels).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(items))
