"""Where to compute."""

from __future__ import annotations

import torch

from advkd.cache.errors import UsageError


def best_device(wanted: str | None = None) -> torch.device:
    """The device that was asked for, or the best that is there.

    Raises:
        UsageError: no such device here.
    """
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted or found)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"device {wanted!r} is not here; {found} is") from None
    return device


def forbid_tf32() -> None:
    """Let float32 mean float32 on GPUs too: convolutions would otherwise round their inputs to 10 bits."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
