"""Learning rate schedules, as factors of the peak rate."""

from __future__ import annotations

import math


def one_cycle(step: int, num_steps: int, warmup: float) -> float:
    """A linear rise over the fraction `warmup` of the steps, then a cosine decay to zero.

    Args:
        step: counted from 0.
        num_steps: of the whole run.
        warmup: in [0, 1).
    """
    position = (step + 1) / num_steps
    if position < warmup:
        return position / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (position - warmup) / (1.0 - warmup)))
