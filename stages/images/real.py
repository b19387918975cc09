"""Real images to compare with, in the teacher's range and size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from advkd.cache.errors import UsageError
from advkd.stages.images.datasets import load_dataset
from advkd.stages.images.known import DATASETS

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def real_batches(source: str, item_shape: tuple[int, ...], batch_size: int = 256) -> Iterator[Tensor]:
    """Real images by a data set's name or from a folder, in batches; float32 in [−1, 1], shape (N, *item_shape).

    Raises:
        UsageError: nothing usable is there; an image that can't be read is found when its turn comes.
    """
    channels, height, _ = item_shape
    if source in DATASETS:
        if channels != 1:
            raise UsageError(f"real images {source}: they are grey, the cache's have {channels} channels")
        return iter(torch.split(load_dataset(source, height)[0], batch_size))
    folder = Path(source)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if len(paths) < 2:
        raise UsageError(
            f"real images {source}: expected {' or '.join(f'`{name}`' for name in DATASETS)}, or a folder "
            "with image files"
        )
    parts = (paths[start : start + batch_size] for start in range(0, len(paths), batch_size))
    return (torch.stack([_read(path, item_shape) for path in part]) for part in parts)


def _read(path: Path, item_shape: tuple[int, ...]) -> Tensor:
    channels, height, width = item_shape
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"real images: {path} can't be read ({error})") from None
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(pixels.reshape(height, width, channels).transpose(2, 0, 1).copy())
