"""A student's folder, `config.json` (kind, options, geometry) and `model.safetensors`, saved and loaded.

Loading runs no code from the folder. `advkd.stages.student.hub` adds provenance and the Hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from advkd.cache.errors import AdvkdError, DamagedError, TrainingError, UsageError
from advkd.cache.files.durable import write_atomically, write_json
from advkd.cache.format.noise import standard_normal
from advkd.cache.format.space import DECODER_PATH
from advkd.cache.read.weights import check_decoder
from advkd.stages.student.config import KINDS, StudentConfig
from advkd.stages.student.geometry import CONDITIONAL_FORMAT, FORMAT, Geometry
from advkd.stages.student.prompts import PromptForm
from advkd.stages.student.training.protocol import StudentNetwork

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


def save_student(
    folder: Path, student: nn.Module, config: StudentConfig, geometry: Geometry, decoder: bytes | None = None
) -> None:
    """Write the weights, then the configuration; each file is replaced atomically.

    Args:
        folder: of the student.
        student: its network.
        config: its configuration.
        geometry: of its cache.
        decoder: the file of the decoder of its latents; None for pixels.
    """
    if decoder is not None:
        write_atomically(folder / DECODER_PATH, [decoder])
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    write_atomically(folder / WEIGHTS, [save(weights)])
    value = {"format": geometry.format, "student": asdict(config), "geometry": geometry.to_json()}
    write_json(folder / "config.json", value)


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


def folder_of(path: Path) -> Path:
    """A student's folder: that of a run, or the path itself."""
    is_run = (path / "run.json").is_file() or (path / "student" / "config.json").is_file()
    return path / "student" if is_run else path


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
        if value["format"] not in (FORMAT, CONDITIONAL_FORMAT):
            raise ValueError(f"format {str(value['format'])[:20]}, expected {FORMAT} or {CONDITIONAL_FORMAT}")
        config, geometry = StudentConfig(**value["student"]), Geometry.from_json(value["geometry"])
        if value["format"] != geometry.format:
            raise ValueError(
                f"format {value['format']}, but {FORMAT} is that of students without classes, prompts and latents"
            )
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


def read_decoder(folder: Path, geometry: Geometry) -> bytes | None:
    """The file of the decoder in a student's folder, checked; None for a student of pixels.

    Raises:
        TrainingError: it is missing, or another decoder.
    """
    if geometry.space is None:
        return None
    try:
        data = (folder / DECODER_PATH).read_bytes()
        check_decoder(data, geometry.space, str(folder / DECODER_PATH))
    except (OSError, DamagedError) as error:
        raise TrainingError(f"{folder}: the decoder of its latents can't be used ({error})") from None
    return data


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


def labels_of(geometry: Geometry, seeds: npt.ArrayLike) -> Tensor | None:
    """Class labels of some seeds, the teacher's own: int64, shape (N,); None for an unconditional student."""
    labels = geometry.labels_of(np.asarray(seeds).ravel())
    return None if labels is None else torch.from_numpy(labels.astype(np.int64))


def prompts_of(geometry: Geometry, embeddings: Mapping[str, Tensor | Sequence[Tensor]]) -> Tensor:
    """Prompts as a student is told them: float32, shape (N, rows, columns).

    Args:
        geometry: of the student.
        embeddings: by the names of the pipeline's call, such as `prompt_embeds`, shape (N, …).

    Raises:
        UsageError: the student is told no prompts, or embeddings are missing or don't fit.
    """
    if geometry.prompts is None:
        raise UsageError(f"the student is told no prompts: leave out {', '.join(embeddings)}")
    return PromptForm.of(geometry.prompts).told(embeddings)


@torch.no_grad()
def generate(student: nn.Module, noise: Tensor, condition: Tensor | None = None, batch_size: int = 256) -> Tensor:
    """x_0 for x_T (N, C, H, W), in batches, on the student's device; float32 on the CPU.

    Args:
        student: a network or a `Student`.
        noise: x_T.
        condition: what the student is told, N rows: class labels or prompts; None of an unconditional one.
        batch_size: x_T per pass.

    Raises:
        UsageError: the condition is missing or surplus.
    """
    device = next(student.parameters()).device
    given = [torch.split(values, batch_size) for values in (noise, condition) if values is not None]
    parts = zip(*given, strict=True)
    return torch.cat([student(*(values.to(device) for values in part)).float().cpu() for part in parts])
