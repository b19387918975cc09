"""Random draws of a training step: functions of whole numbers alone, so that going on needs no random state."""

from __future__ import annotations

import torch

from advkd.cache.format.hashing import mixed


def generator_of(*parts: int) -> torch.Generator:
    """A generator on the CPU for some whole numbers, such as (seed, phase, step)."""
    return torch.Generator().manual_seed(mixed(*parts) >> 1)
