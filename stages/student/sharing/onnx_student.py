"""A student exported by `advkd-export`, run by onnxruntime on the CPU and called like a torch one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.errors import AdvkdError, TrainingError, UsageError, first_line
from advkd.stages.decoder import BATCH
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.prompts import PromptForm
from advkd.stages.student.student import labels_of, prompts_of
from advkd.stages.student.training.protocol import check_condition

INPUT, LABEL, PROMPT, OUTPUT = "noise", "label", "prompt", "images"
LATENTS = "latents"
"""The input of a decoder."""
SPLIT_FROM = 16
"""Images per thread from which threads take parts of the batch. Otherwise onnxruntime divides each operation among the
threads, which costs more than it gains for small int8 ones: on two cores 64 digits took 0.7 of the time, in float32
0.9."""
METADATA = "advkd.geometry"


def input_names(geometry: Geometry) -> list[str]:
    """What an exported student takes: the noise, and labels or prompts where it is told some."""
    return [INPUT, *[LABEL] * bool(geometry.num_classes), *[PROMPT] * (geometry.prompts is not None)]


def decoder_path(path: Path) -> Path:
    """Where the decoder of an exported student of latents lies: beside it; that of int8 is the same."""
    return path.with_name(path.name.removesuffix(".onnx").removesuffix(".int8") + ".decoder.onnx")


class OnnxStudent:
    """Loads an exported student, and its decoder if it has latents.

    Args:
        path: the file.
        num_threads: of onnxruntime; torch's number if not given.

    Raises:
        TrainingError: there is no such file, or advkd-export didn't write it.
        UsageError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        runtime = _onnxruntime()
        if not path.is_file():
            raise TrainingError(f"no student in {path}: write it with `advkd-export RUN --onnx {path}`")
        self._num_threads = num_threads or torch.get_num_threads()
        try:
            self._together = _session(runtime, path, self._num_threads)
            self._alone = _session(runtime, path, 1) if self._num_threads > 1 else self._together
            self.geometry = _geometry_of(self._together)
            beside = decoder_path(path)
            self._decoder = None if self.geometry.space is None else _session(runtime, beside, self._num_threads)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise TrainingError(f"{path} was not written by advkd-export ({first_line(error)})") from None
        self._threads = ThreadPoolExecutor(self._num_threads)

    def __call__(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """x_T (N, C, H, W), unit normal → x_0 of the same shape, float32 on the CPU.

        Args:
            noise: x_T.
            condition: class labels, int64, shape (N,), or prompts as `Student.prompts` gives them; None of an
                unconditional student.

        Raises:
            UsageError: the condition is missing or surplus.
        """
        prompts = self.geometry.prompts
        check_condition(
            noise, condition, self.geometry.num_classes, None if prompts is None else PromptForm.of(prompts).shape
        )
        given = {INPUT: np.ascontiguousarray(noise.detach().cpu().numpy(), dtype=np.float32)}
        if condition is not None:
            given[input_names(self.geometry)[1]] = condition.cpu().numpy()
        if self._num_threads == 1 or len(noise) < SPLIT_FROM * self._num_threads:
            return torch.from_numpy(_run(self._together, given))
        split = [np.array_split(values, self._num_threads) for values in given.values()]
        parts = [dict(zip(given, part, strict=True)) for part in zip(*split, strict=True)]
        return torch.from_numpy(np.concatenate(list(self._threads.map(partial(_run, self._alone), parts))))

    def labels(self, seeds: npt.ArrayLike) -> Tensor | None:
        """Class labels of some seeds, the same as the teacher's: int64, shape (N,); None if it is unconditional."""
        return labels_of(self.geometry, seeds)

    def prompts(self, **embeddings: Tensor | Sequence[Tensor]) -> Tensor:
        """As `Student.prompts`."""
        return prompts_of(self.geometry, embeddings)

    def decode(self, items: Tensor) -> Tensor:
        """Images of x_0, about [−1, 1], float32, shape (N, *image_shape): decoded latents, or pixels as they are."""
        if self._decoder is None:
            return items.float()
        parts = [_run(self._decoder, {LATENTS: part.float().cpu().numpy()}) for part in torch.split(items, BATCH)]
        return torch.from_numpy(np.concatenate(parts))


def _session(runtime: Any, path: Path, num_threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, given: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    images: npt.NDArray[np.float32]
    (images,) = session.run([OUTPUT], given)
    return images


def _geometry_of(session: Any) -> Geometry:
    metadata = session.get_modelmeta().custom_metadata_map
    if METADATA not in metadata:
        raise ValueError(f"no metadata {METADATA!r}")
    try:
        geometry = Geometry.from_json(json.loads(metadata[METADATA]))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, AdvkdError) as error:
        raise ValueError(f"metadata {METADATA!r}: {error}") from None
    (taken, *others), (made,) = session.get_inputs(), session.get_outputs()
    shapes = [list(value.shape[1:]) for value in (taken, made)]
    if (taken.name, made.name) != (INPUT, OUTPUT) or shapes != [list(geometry.item_shape)] * 2:
        raise ValueError(f"it maps {shapes[0]} to {shapes[1]}, expected {list(geometry.item_shape)} for both")
    if [value.name for value in (taken, *others)] != input_names(geometry):
        raise ValueError(f"it takes {[value.name for value in (taken, *others)]}, not {input_names(geometry)}")
    return geometry


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError("exported students need onnxruntime: pip install 'advkd[export]'") from None
    return onnxruntime
