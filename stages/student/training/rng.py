"""Random draws of a training step: pure functions of integers, so that resuming needs no saved generator state."""

from __future__ import annotations

import torch

from advkd.cache.format.hashing import mixed


def generator_of(*parts: int) -> torch.Generator:
    """A generator on the CPU, seeded by integers such as (seed, phase, step)."""
    return torch.Generator().manual_seed(mixed(*parts) >> 1)
