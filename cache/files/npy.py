"""Arrays as the bytes of a `.npy` file."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt


def npy_bytes(values: npt.NDArray[Any]) -> bytes:
    """What `np.save` writes of an array; of objects it writes nothing, since reading them would execute code.

    Raises:
        ValueError: the array holds objects.
    """
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()
