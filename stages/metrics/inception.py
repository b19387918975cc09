"""Inception through pytorch-fid: the field's features for colour images, with the weights of the original FID."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from advkd.cache.errors import UsageError
from advkd.stages.metrics.features import Look

NAME = "inception"
MIN_SIDE = 32
NUM_FEATURES = 2048


def look_with_inception(network: nn.Module, images: Tensor) -> Look:
    """Images in [−1, 1], shape (N, 3, H, W) → pooled features (N, 2048) and the three blocks before them."""
    *maps, pooled = network((images + 1.0) / 2.0)
    # Inception's 1,000 classes are ImageNet's: they say nothing of these images' own.
    return Look(features=pooled.flatten(1), maps=maps, probabilities=None)


def load_inception(weights: str | None) -> nn.Module:
    """pytorch-fid's network.

    Args:
        weights: its file; None takes torch's download folder, and downloads it there if need be.

    Raises:
        UsageError: the weights are not on this machine and can't be downloaded, or are not pytorch-fid's.
    """
    from pytorch_fid import inception

    weights = weights and os.path.expanduser(weights)
    if weights is not None and not Path(weights).is_file():
        raise UsageError(f"inception weights {weights}: no such file")
    download = inception.load_state_dict_from_url
    if weights is not None:  # pytorch-fid takes no path
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    try:
        blocks = list(range(inception.InceptionV3.BLOCK_INDEX_BY_DIM[NUM_FEATURES] + 1))
        network: nn.Module = inception.InceptionV3(blocks)
    except (OSError, URLError) as error:
        raise UsageError(
            f"inception weights are not on this machine and can't be downloaded ({error}): copy pytorch-fid's "
            f"{Path(inception.FID_WEIGHTS_URL).name} here and name it with --inception-weights FILE"
        ) from None
    except Exception as error:  # unpickling and state-dict errors of torch.load
        raise UsageError(f"inception weights {weights}: not pytorch-fid's ({type(error).__name__})") from None
    finally:
        inception.load_state_dict_from_url = download
    return network.eval().requires_grad_(False)
