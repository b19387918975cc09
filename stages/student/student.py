"""A student's folder, `config.json` (kind, options, geometry) and `model.safetensors`, saved and loaded.

Loading runs no code from the folder. `advkd.stages.student.hub` adds provenance and the Hub.
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
from advkd.stages.student.config import KINDS, StudentConfig
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.training.protocol import StudentNetwork

FORMAT = 1
WEIGHTS = "model.safetensors"
MAX_BLOCKS = 4096
"""Largest number of residual blocks that a loaded configuration may have: modules are built before weights are read,
and a configuration from elsewhere must not exhaust memory or time."""


def build_student(config: StudentConfig, geometry: Geometry) -> StudentNetwork:
    """A student's network with fresh weights.

    Raises:
        TrainingError: the geometry doesn't allow this kind.
    """
    return KINDS[config.kind].build(config, geometry)


def save_student(folder: Path, student: nn.Module, config: StudentConfig, geometry: Geometry) -> None:
    """Write the weights, then the configuration; each file is replaced atomically."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    write_atomically(folder / WEIGHTS, [save(weights)])
    write_json(folder / "config.json", {"format": FORMAT, "student": asdict(config), "geometry": geometry.to_json()})


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of the weights file in a student's folder, as hex; None if there is none."""
    try:
        return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def is_student(folder: Path) -> bool:
    """Whether a folder's config.json is a student's; many other libraries write a file of that name."""
    try:
        value = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"format", "student", "geometry"} <= value.keys()


def load_student(folder: Path) -> tuple[StudentNetwork, Geometry]:
    """Load a student's network, in float32 and evaluation mode, and its geometry.

    Raises:
        TrainingError: the folder holds no student.
    """
    network, _, geometry = read_student(folder)
    return network, geometry


def read_student(folder: Path) -> tuple[StudentNetwork, StudentConfig, Geometry]:
    """Load a student's network, in float32 and evaluation mode, its configuration and its geometry.

    Raises:
        TrainingError: the folder holds no student.
    """
    if not (folder / "config.json").is_file():
        raise TrainingError(f"no student in {folder}: train one with `advkd-train --cache STORE`")
    try:
        value: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        if value["format"] != FORMAT:
            raise ValueError(f"format {str(value['format'])[:20]}, expected {FORMAT}")
        config, geometry = StudentConfig(**value["student"]), Geometry.from_json(value["geometry"])
        if (config.depth + config.coarse) * (len(geometry.levels) - 1) > MAX_BLOCKS:
            raise ValueError(f"more than {MAX_BLOCKS} residual blocks")
        # The meta device allocates nothing, so a hostile configuration can't exhaust the memory.
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
    """Weights in the network's own dtypes; floats may be stored in shorter ones."""
    kept = {}
    expected = network.state_dict()
    for name, tensor in weights.items():
        wanted = expected[name].dtype if name in expected else tensor.dtype
        if tensor.is_floating_point() != wanted.is_floating_point or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weights {name!r} are {tensor.dtype}, or not finite; expected finite {wanted}")
        kept[name] = tensor.to(wanted)
    return kept


def noise_of(geometry: Geometry, seeds: npt.ArrayLike) -> Tensor:
    """x_T of some seeds, with the same values as the teacher's: float32, shape (N, C, H, W)."""
    rows = cast("list[int]", torch.as_tensor(seeds, dtype=torch.int64).ravel().tolist())
    drawn = standard_normal(geometry.root_seed, rows, geometry.item_shape)
    return torch.from_numpy(drawn.astype(geometry.noise_dtype).astype(drawn.dtype))


@torch.no_grad()
def generate(student: nn.Module, noise: Tensor, batch_size: int = 256) -> Tensor:
    """x_0 for x_T (N, C, H, W), in batches, on the student's device; float32 on the CPU."""
    device = next(student.parameters()).device
    return torch.cat([student(part.to(device)).float().cpu() for part in torch.split(noise, batch_size)])
