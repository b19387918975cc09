"""A student as a thing to keep: built from a configuration, saved and loaded without running anyone's code.

Folder layout: `config.json` (kind, options, geometry) and `model.safetensors`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from advkd.cache.durable import write_atomically, write_json
from advkd.cache.errors import AdvkdError, TrainingError
from advkd.cache.noise import standard_normal
from advkd.stages.student.config import StudentConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.progressive import ProgressiveStudent
from advkd.stages.student.unrolled import UnrolledStudent

FORMAT = 1


class Student(Protocol):
    """What every student offers besides being a module."""

    def __call__(self, noise: Tensor) -> Tensor:
        """x_T (N, C, H, W), unit normal → x_0 of the same shape, about [−1, 1]."""

    def heads(self, noise: Tensor) -> list[Tensor]:
        """One prediction per recorded state after x_T."""

    def deployed_parameters(self) -> int:
        """Parameters that a sample needs."""


def build_student(config: StudentConfig, geometry: Geometry) -> UnrolledStudent | ProgressiveStudent:
    """A student with fresh weights.

    Raises:
        TrainingError: the geometry doesn't allow this kind.
    """
    if config.kind == "progressive":
        return ProgressiveStudent(geometry, config.base_channels, config.max_channels)
    return UnrolledStudent(geometry, config.width, config.depth, config.patch, config.attention, config.shared)


def save_student(folder: Path, student: nn.Module, config: StudentConfig, geometry: Geometry) -> None:
    """Write weights, then the configuration that names them."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    write_atomically(folder / "model.safetensors", [save(weights)])
    write_json(folder / "config.json", {"format": FORMAT, "student": asdict(config), "geometry": geometry.to_json()})


def load_student(folder: Path) -> tuple[UnrolledStudent | ProgressiveStudent, Geometry]:
    """Load what `save_student` wrote, ready to evaluate.

    Raises:
        TrainingError: it is not there, or not a student.
    """
    if not (folder / "config.json").is_file():
        raise TrainingError(f"no student in {folder}: train one with `advkd-train --cache STORE`")
    try:
        value: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        geometry = Geometry.from_json(value["geometry"])
        # Without storage until the weights are there: a configuration from someone else can't claim memory.
        with torch.device("meta"):
            student = build_student(StudentConfig(**value["student"]), geometry)
        student.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        RecursionError,
        OverflowError,
        SafetensorError,
        AdvkdError,
    ) as error:
        raise TrainingError(f"{folder} holds no student that this advkd can load ({error})") from None
    return student.eval().requires_grad_(False), geometry


def noise_of(geometry: Geometry, seeds: npt.ArrayLike) -> Tensor:
    """x_T of some seeds exactly as the teacher had it: float32, shape (N, C, H, W)."""
    rows = cast("list[int]", torch.as_tensor(seeds, dtype=torch.int64).ravel().tolist())
    drawn = standard_normal(geometry.root_seed, rows, geometry.item_shape)
    return torch.from_numpy(drawn.astype(geometry.noise_dtype).astype(drawn.dtype))


@torch.no_grad()
def generate(student: nn.Module, noise: Tensor, batch_size: int = 256) -> Tensor:
    """x_0 for x_T (N, C, H, W), in batches, on the student's device; float32 on the CPU."""
    device = next(student.parameters()).device
    return torch.cat([student(part.to(device)).float().cpu() for part in torch.split(noise, batch_size)])
