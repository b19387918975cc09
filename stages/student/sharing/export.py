"""A student as an ONNX file, in float32 or with int8 convolutions, written only after a comparison with PyTorch.

A conditional student takes `noise` and `label`, or `prompt`; the decoder of latents is a second file. The batch size is
dynamic; the file's metadata hold the student's geometry, so that a seed has the same noise as in PyTorch. The int8 form
is onnxruntime's static quantisation in QDQ form: weights per channel, activations calibrated on noise from the cache's
own generator; everything but convolutions stays in float32.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from advkd.cache.errors import TrainingError, UsageError
from advkd.cache.files.durable import write_atomically
from advkd.stages.decoder import Decoder
from advkd.stages.student.hub import Student
from advkd.stages.student.prompts import PromptForm
from advkd.stages.student.sharing.onnx_student import (
    LATENTS,
    METADATA,
    OUTPUT,
    OnnxStudent,
    decoder_path,
    input_names,
)

FIRST_CHECK_SEED = 1 << 41
FIRST_CALIBRATION_SEED = 1 << 42
"""Caches, and the sets that are scored, have seeds below these."""
NUM_CHECKED = 64
NUM_CALIBRATION = 512
CALIBRATION_BATCH = 16
MAX_ERROR = 1e-3
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """Difference of an exported student's images from PyTorch's, in units of images in [−1, 1]."""

    largest: float
    rms: float


def check_packages() -> None:
    """Check that the packages that exporting needs are installed.

    Raises:
        UsageError: one isn't.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exporting needs {', '.join(missing)}: pip install 'advkd[export]'")


def export_onnx(
    student: Student, path: Path, *, max_error: float = MAX_ERROR, decoder: Decoder | None = None
) -> Deviation:
    """Write a student as ONNX in float32, if it agrees with PyTorch.

    Args:
        student: to export; isn't changed.
        path: the file.
        max_error: bound on the deviation of any pixel.
        decoder: to write for a student of latents; its own if None.

    Raises:
        TrainingError: the deviation is larger; nothing is written.
        UsageError: packages are missing.
    """
    return _write_if_close(student, path, lambda made: _to_onnx(student, made), max_error, decoder)


def export_int8(student: Student, source: Path, path: Path, *, decoder: Decoder | None = None) -> Deviation:
    """Quantise the convolutions of an exported student. Any finite deviation passes: the caller judges or scores it.

    Args:
        student: its noise calibrates the activations, its images are compared with.
        source: a file that `export_onnx` wrote.
        path: the file to write.
        decoder: that `export_onnx` wrote.

    Raises:
        TrainingError: the images are not finite; nothing is written.
        UsageError: packages are missing, or the student is told prompts.
    """
    return _write_if_close(student, path, lambda made: _quantise(student, source, made), math.inf, decoder)


def _write_if_close(
    student: Student, path: Path, make: Callable[[Path], None], max_error: float, decoder: Decoder | None
) -> Deviation:
    check_packages()
    decoder = decoder or student.decoder
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.onnx")
        make(made)
        if decoder is not None:
            _decoder_to_onnx(decoder, decoder_path(made), student.geometry.item_shape)
        deviation = compare(student, OnnxStudent(made), decoder)
        if not (math.isfinite(deviation.largest) and deviation.largest <= max_error):
            raise TrainingError(
                f"the exported student deviates from PyTorch by {deviation.largest:.2g}, more than {max_error:g}; "
                f"{path} was not written"
            )
        if decoder is not None:
            write_atomically(decoder_path(path), [decoder_path(made).read_bytes()])
        write_atomically(path, [made.read_bytes()])
    return deviation


@torch.no_grad()
def compare(student: Student, exported: OnnxStudent, decoder: Decoder | None = None) -> Deviation:
    """Deviation of images on the same seeds' noise, in batches of several sizes.

    Args:
        student: in PyTorch.
        exported: its file.
        decoder: of its latents, as exported; None for a student of pixels.
    """
    sizes, reference, first, differences = [1, 2, 5, *[8] * (NUM_CHECKED // 8 - 1)], _cpu_copy(student), 0, []
    for size in sizes:
        given = _inputs(student, range(FIRST_CHECK_SEED + first, FIRST_CHECK_SEED + first + size))
        expected = reference(*given)
        expected = expected if decoder is None else decoder.to(expected.device)(expected)
        differences.append(exported.decode(exported(*given)) - expected)
        first += size
    difference = torch.cat(differences)
    return Deviation(largest=float(difference.abs().max()), rms=float(difference.square().mean().sqrt()))


def _inputs(student: Student, seeds: range) -> tuple[Tensor, ...]:
    """What the student takes for some seeds; prompts don't follow from seeds, but drawn numbers compare as well."""
    if student.geometry.prompts is None:
        return student.inputs(seeds)
    shape = (len(seeds), *PromptForm.of(student.geometry.prompts).shape)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seeds.start))
    return student.noise(seeds), torch.cat([drawn[..., :-1], torch.ones(*shape[:2], 1)], dim=2)


def _cpu_copy(student: Student) -> Student:
    """A copy on the CPU, in float32."""
    return copy.deepcopy(student).cpu().float().eval()


class _TwoStepGroupNorm(nn.Module):
    """Group normalisation whose scale and shift are a batch normalisation of mean 0 and variance 1.

    onnxruntime has no group normalisation on CPUs; the exporter's scale and shift take two passes over the features, a
    batch normalisation takes one.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("mean", torch.zeros(norm.num_channels))
        self.register_buffer("variance", torch.ones(norm.num_channels))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(x.shape[0], self.num_groups, -1)
        normal = functional.instance_norm(groups, eps=self.eps).reshape(x.shape)
        return functional.batch_norm(normal, self.mean, self.variance, self.weight, self.bias, eps=0.0)  # type: ignore[arg-type]


def _exportable(student: Student) -> Student:
    """A copy that computes the same with operations that onnxruntime runs fast."""
    copied = _cpu_copy(student)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm) and child.affine:
                setattr(parent, name, _TwoStepGroupNorm(child))
    return copied


class _Decoding(nn.Module):
    """A decoder as one network: latents → images."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model = copy.deepcopy(decoder.model).cpu()
        self._decode = Decoder(decoder.space, self.model).decode

    def forward(self, latents: Tensor) -> Tensor:
        return self._decode(latents)


def _decoder_to_onnx(decoder: Decoder, path: Path, item_shape: tuple[int, ...]) -> None:
    network = _Decoding(decoder).eval()
    _export(network, (torch.zeros(2, *item_shape),), path, [LATENTS], {"latents": {0: torch.export.Dim("batch")}})
    _strip(path, {})


def _to_onnx(student: Student, path: Path) -> None:
    names, batch = input_names(student.geometry), {0: torch.export.Dim("batch")}
    shapes = dict.fromkeys(("noise", "condition")[: len(names)], batch)
    _export(_exportable(student), _inputs(student, range(2)), path, names, shapes)
    _strip(path, {METADATA: json.dumps(student.geometry.to_json())})


def _export(
    network: nn.Module, given: tuple[Tensor, ...], path: Path, names: list[str], shapes: dict[str, Any]
) -> None:
    try:
        with _quiet():
            torch.onnx.export(
                network,
                given,
                path,
                dynamo=True,
                input_names=names,
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise TrainingError(f"torch {torch.__version__} can't export this student ({lines[0][:200]})") from error


def _strip(path: Path, metadata: dict[str, str]) -> None:
    """Remove the exporter's notes (stack traces with paths of this machine, names); add metadata."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.type.ClearField("denotation")
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def _quantise(student: Student, source: Path, target: Path) -> None:
    from onnxruntime import quantization

    names = input_names(student.geometry)

    class Noise(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Batches of noise."""

        def __init__(self) -> None:
            self.batches = _calibration(student)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(zip(names, map(Tensor.numpy, batch), strict=True))

    prepared = target.with_name("prepared.onnx")
    with _quiet():
        quantization.shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            target,
            Noise(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    _strip(target, {METADATA: json.dumps(student.geometry.to_json())})


def _calibration(student: Student) -> Iterator[tuple[Tensor, ...]]:
    for first in range(FIRST_CALIBRATION_SEED, FIRST_CALIBRATION_SEED + NUM_CALIBRATION, CALIBRATION_BATCH):
        yield student.inputs(range(first, first + CALIBRATION_BATCH))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings and logs about themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
