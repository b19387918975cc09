"""Sprite sheets: images side by side without gaps, in their own size, as a canvas copies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from advkd.stages.pictures import save_image, to_pixels

Images = npt.NDArray[Any]


def save_sprite(path: Path, images: Images, columns: int) -> Path:
    """Write images in [−1, 1], shape (N, C, H, W) with C = 1 or 3, as a PNG with so many per row."""
    pixels = to_pixels(images)
    num, height, width, _ = pixels.shape
    rows = -(-num // columns)
    sheet = np.zeros((rows * columns, height, width, 3), dtype=np.uint8)
    sheet[:num] = pixels
    tiled = sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return save_image(path, Image.fromarray(tiled))
