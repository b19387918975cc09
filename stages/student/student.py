"""A student's network: built from a configuration, saved and loaded without running anyone's code.

Folder layout: `config.json` (kind, options, geometry) and `model.safetensors`.
`advkd.stages.student.hub` adds where it comes from, and the Hub.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from advkd.cache.errors import AdvkdError, TrainingError
from advkd.cache.files.durable import write_atomically, write_json
from advkd.cache.format.noise import standard_normal
from advkd.stages.student.config import StudentConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.progressive.network import ProgressiveStudent
from advkd.stages.student.unrolled.network import UnrolledStudent

FORMAT = 1
WEIGHTS = "model.safetensors"
MAX_BLOCKS = 4096
"""Residual blocks in all that a loaded configuration may ask for: it is believed before the weights are read."""

StudentNetwork = UnrolledStudent | ProgressiveStudent
"""`network(noise)`: x_T (N, C, H, W), unit normal → x_0 of the same shape, about [−1, 1]; `network.heads(noise)`: one
prediction per recorded state after x_T."""


def build_student(config: StudentConfig, geometry: Geometry) -> StudentNetwork:
    """A student with fresh weights.

    Raises:
        TrainingError: the geometry doesn't allow this kind.
    """
    if config.kind == "progressive":
        return ProgressiveStudent(geometry, config.base_channels, config.max_channels)
    return UnrolledStudent(
        geometry, config.width, config.depth, config.patch, config.attention, config.shared, config.coarse
    )


def save_student(folder: Path, student: nn.Module, config: StudentConfig, geometry: Geometry) -> None:
    """Write weights, then the configuration that names them."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    write_atomically(folder / WEIGHTS, [save(weights)])
    write_json(folder / "config.json", {"format": FORMAT, "student": asdict(config), "geometry": geometry.to_json()})


def weights_sha256(folder: Path) -> str | None:
    """Which weights a student's folder holds; None if it holds none."""
    try:
        return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def is_student(folder: Path) -> bool:
    """Whether a folder's config.json is a student's, and not that of one of the many other networks that have one."""
    try:
        value = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"format", "student", "geometry"} <= value.keys()


def load_student(folder: Path) -> tuple[StudentNetwork, Geometry]:
    """Load what `save_student` wrote, ready to evaluate.

    Raises:
        TrainingError: it is not there, or not a student.
    """
    network, _, geometry = read_student(folder)
    return network, geometry


def read_student(folder: Path) -> tuple[StudentNetwork, StudentConfig, Geometry]:
    """Load what `save_student` wrote, with its configuration; float32, ready to evaluate.

    Raises:
        TrainingError: it is not there, or not a student.
    """
    if not (folder / "config.json").is_file():
        raise TrainingError(f"no student in {folder}: train one with `advkd-train --cache STORE`")
    try:
        value: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        if value["format"] != FORMAT:
            raise ValueError(f"format {str(value['format'])[:20]}, this advkd reads {FORMAT}")
        config, geometry = StudentConfig(**value["student"]), Geometry.from_json(value["geometry"])
        if (config.depth + config.coarse) * (len(geometry.levels) - 1) > MAX_BLOCKS:
            raise ValueError(f"more than {MAX_BLOCKS} residual blocks")
        # Without storage until the weights are there: a configuration from someone else can't claim memory.
        with torch.device("meta"):
            network = build_student(config, geometry)
        network.load_state_dict(_fitting(load_file(folder / WEIGHTS), network), assign=True)
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
    return network.eval().requires_grad_(False), config, geometry


def _fitting(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights in the types that the network was trained in, wherever they were stored in shorter floats."""
    kept = {}
    expected = network.state_dict()
    for name, tensor in weights.items():
        wanted = expected[name].dtype if name in expected else tensor.dtype
        if tensor.is_floating_point() != wanted.is_floating_point or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weights {name!r} are {tensor.dtype}, or not finite; expected {wanted}")
        kept[name] = tensor.to(wanted)
    return kept


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
