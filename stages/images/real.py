"""Real images to compare with, in the teacher's range and size.

Image files of another size are cropped to the teacher's aspect ratio around their centre, then resized with Pillow's
Lanczos filter, which antialiases. Transparent images are composited on white.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advkd.cache.errors import UsageError
from advkd.stages.images.datasets import DATASETS, load_dataset

RESIZING = "centre crop, antialiased Lanczos"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Pillow's modes of at most 8 bits per channel; conversion from others clips or rescales values, by its version."""


class RealImages:
    """A data set by name, or the image files of a folder and its sub-folders.

    Args:
        source: a name of `DATASETS`, or a folder.
        item_shape: of the teacher's images, (C, H, W).

    Raises:
        UsageError: there are no usable images.
    """

    def __init__(self, source: str, item_shape: tuple[int, ...]) -> None:
        self.source = source
        self.num_resized = 0
        """Images of another size: of a folder's those read so far, of a data set all or none."""
        self.num_transparent = 0
        """Images with transparent pixels, of those read so far."""
        self._item_shape = item_shape
        self._paths: list[Path] = []
        if source in DATASETS:
            dataset = DATASETS[source]
            if item_shape[0] != dataset.channels:
                are = "grey" if dataset.channels == 1 else "in colour"
                raise UsageError(f"real images {source}: they are {are}, the cache's have {item_shape[0]} channels")
            if item_shape[1] != item_shape[2]:
                shape = "×".join(map(str, item_shape[1:]))
                raise UsageError(f"real images {source}: they are square, the cache's are {shape}; give a folder")
            self._images = load_dataset(source, item_shape[1]).images
            self.resizing, self.num_images = dataset.resizing, len(self._images)
            self.num_resized = 0 if dataset.native_size in (None, item_shape[1]) else self.num_images
            return
        folder = Path(os.path.expanduser(source))
        if folder.is_dir():
            self._paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        if len(self._paths) < 2:
            raise UsageError(
                f"real images {source}: found {len(self._paths)} image files; expected "
                f"{', '.join(f'`{name}`' for name in DATASETS)}, or a folder with at least two image files"
            )
        self.resizing, self.num_images = RESIZING, len(self._paths)

    def batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """All images once; float32 in [−1, 1], shape (n, C, H, W).

        Raises:
            UsageError: an image can't be read.
        """
        if not self._paths:
            yield from torch.split(self._images, batch_size)
        for start in range(0, len(self._paths), batch_size):
            yield torch.stack([self._read(path) for path in self._paths[start : start + batch_size]])

    def _read(self, path: Path) -> Tensor:
        channels, height, width = self._item_shape
        try:
            with Image.open(path) as file:
                if file.mode not in _EIGHT_BITS:
                    raise ValueError(f"Pillow's mode {file.mode}: convert it to 8 bits per channel")
                image = self._opaque(file)
            self.num_resized += image.size != (width, height)
            image = _centre(image.convert("L" if channels == 1 else "RGB"), width / height)
            fitted = image.resize((width, height), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UsageError(f"real images: {path} can't be read ({error})") from None
        pixels = np.asarray(fitted, dtype=np.float32) / 127.5 - 1.0
        return torch.from_numpy(pixels.reshape(height, width, channels).transpose(2, 0, 1).copy())

    def _opaque(self, image: Image.Image) -> Image.Image:
        """The image without transparency, on white."""
        if not image.has_transparency_data:
            return image.copy()
        layers = image.convert("RGBA")
        self.num_transparent += layers.getchannel("A").getextrema()[0] != 255
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")

    def note(self) -> str:
        """What was done to the images that were read; empty if nothing."""
        parts = []
        if self.num_resized:
            parts.append(f"{self.num_resized} were resized ({self.resizing})")
        if self.num_transparent:
            parts.append(f"{self.num_transparent} were transparent and composited on white")
        size = "×".join(map(str, self._item_shape[1:]))
        return f"real images {self.source}: of {self.num_images} for {size}, {', '.join(parts)}" if parts else ""


def _centre(image: Image.Image, aspect: float) -> Image.Image:
    """The largest central part with an aspect ratio, width / height."""
    width, height = min(image.width, round(image.height * aspect)), min(image.height, round(image.width / aspect))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
