"""A student that `advkd-export` wrote, run by onnxruntime on the CPU: no torch network, the same call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkd.cache.errors import AdvkdError, TrainingError, UsageError
from advkd.stages.student.geometry import Geometry

INPUT, OUTPUT = "noise", "images"
METADATA = "advkd.geometry"


class OnnxStudent:
    """Loads an exported student.

    Args:
        path: the file.
        num_threads: of onnxruntime; torch's number if not given.

    Raises:
        TrainingError: it is not there, or no student that advkd exported.
        UsageError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        runtime = _onnxruntime()
        if not path.is_file():
            raise TrainingError(f"no student in {path}: `advkd-export RUN --onnx {path}` makes it")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.geometry = _geometry_of(self._session)
        except Exception as error:  # onnxruntime raises its own, of no common base
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainingError(f"{path} is no student that advkd-export wrote ({first[:160]})") from None

    def __call__(self, noise: Tensor) -> Tensor:
        """x_T (N, C, H, W), unit normal → x_0 of the same shape, float32 on the CPU."""
        array = np.ascontiguousarray(noise.detach().cpu().numpy(), dtype=np.float32)
        (images,) = self._session.run([OUTPUT], {INPUT: array})
        return torch.from_numpy(images)


def _geometry_of(session: Any) -> Geometry:
    told = session.get_modelmeta().custom_metadata_map
    if METADATA not in told:
        raise ValueError("it says nothing of a student")
    try:
        geometry = Geometry.from_json(json.loads(told[METADATA]))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, AdvkdError) as error:
        raise ValueError(f"what it says of its student: {error}") from None
    (taken,), (made,) = session.get_inputs(), session.get_outputs()
    shapes = [list(value.shape[1:]) for value in (taken, made)]
    if (taken.name, made.name) != (INPUT, OUTPUT) or shapes != [list(geometry.item_shape)] * 2:
        raise ValueError(f"it maps {shapes[0]} to {shapes[1]}, expected {list(geometry.item_shape)}")
    return geometry


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError("exported students need onnxruntime: pip install 'advkd[export]'") from None
    return onnxruntime
