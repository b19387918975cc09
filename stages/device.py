"""Choice of device and precision."""

from __future__ import annotations

import torch

from advkd.cache.errors import UsageError


def best_device(wanted: str | None = None) -> torch.device:
    """A device by name, or the best one of this machine.

    Raises:
        UsageError: this machine doesn't have the device.
    """
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted or found)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"device {wanted!r} is not available on this machine; {found} is") from None
    return device


def forbid_tf32() -> None:
    """Compute in full float32 on GPUs: by default their convolutions round inputs to 10 bits of mantissa."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
