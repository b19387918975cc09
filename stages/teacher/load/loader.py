"""Loading a teacher: any unconditional pixel-space pipeline made of a `UNet2DModel` and a scheduler.

Only JSON and safetensors are read: a pipeline from someone else never executes code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from advkd.cache.errors import TeacherError
from advkd.cache.format.recipe import MAX_CHANNELS, MAX_SIDE
from advkd.stages.device import forbid_tf32
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.diffusers_api import diffusers, first_line
from advkd.stages.teacher.load.folders import component, find_folder, license_of, read_json
from advkd.stages.teacher.load.identity import tensors_sha256
from advkd.stages.teacher.load.network import Teacher, best_memory_format
from advkd.stages.teacher.path.schedulers import KNOWN_SCHEDULERS

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def load_teacher(config: TeacherConfig, device: torch.device, precision: str = "float32") -> Teacher:
    """Load a teacher from a folder or the Hub.

    Raises:
        TeacherError: it is missing, incomplete, unreachable, or of a kind that advkd cannot sample from.
    """
    folder, commit = find_folder(config)
    unet_folder = component(folder, "unet", "config.json", config.source)
    unet_config = read_json(unet_folder / "config.json")
    item_shape = _check_unet(unet_config, config.source)
    scheduler_folder = component(folder, "scheduler", "scheduler_config.json", config.source)
    scheduler_config = read_json(scheduler_folder / "scheduler_config.json")
    class_name = scheduler_config.get("_class_name")
    if class_name not in KNOWN_SCHEDULERS:
        raise TeacherError(
            f"teacher {config.source}: its scheduler {class_name!r} is unknown; expected one of the discrete "
            f"variance-preserving ones ({', '.join(KNOWN_SCHEDULERS)})"
        )
    if not (unet_folder / WEIGHTS_NAME).is_file():
        raise TeacherError(
            f"teacher {config.source}: no {WEIGHTS_NAME} in its UNet folder; only safetensors are loaded "
            "(save the pipeline again with safe_serialization=True)"
        )
    forbid_tf32()
    try:
        unet, loading = diffusers().UNet2DModel.from_pretrained(
            unet_folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # whatever a foreign configuration makes diffusers and torch raise
        raise TeacherError(f"teacher {config.source}: its UNet can't be loaded ({first_line(error)})") from error
    wrong = {key: names for key, names in loading.items() if names}
    if wrong:
        found = ", ".join(f"{len(names)} {key.replace('_', ' ')}" for key, names in wrong.items())
        raise TeacherError(f"teacher {config.source}: its weights don't fit its UNet's configuration ({found})")
    checkpoint_hash = tensors_sha256(unet.state_dict())
    memory_format = best_memory_format(device, precision)
    unet.requires_grad_(False).eval().to(device=device, dtype=getattr(torch, precision))
    unet.to(memory_format=memory_format)
    return Teacher(
        unet=unet,
        memory_format=memory_format,
        scheduler_config=scheduler_config,
        item_shape=item_shape,
        source=config.source,
        commit=commit,
        config=unet_config,
        license=license_of(folder),
        tensors_sha256=checkpoint_hash,
    )


def _check_unet(config: Mapping[str, Any], source: str) -> tuple[int, int, int]:
    class_name = config.get("_class_name")
    if class_name != "UNet2DModel":
        raise TeacherError(f"teacher {source}: its network is a {class_name}; expected an unconditional UNet2DModel")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise TeacherError(f"teacher {source}: it is conditioned on a class; expected an unconditional one")
    size = config.get("sample_size")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or height != width:
        raise TeacherError(f"teacher {source}: its images are {height}×{width}; expected square ones")
    channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if not isinstance(channels, int) or not 1 <= channels <= MAX_CHANNELS or not 1 <= height <= MAX_SIDE:
        raise TeacherError(f"teacher {source}: its images are {channels}×{height}×{width}, which can't be")
    if channels != out_channels:
        raise TeacherError(
            f"teacher {source}: {channels} channels in, {out_channels} out (a learned variance?); expected the same"
        )
    return int(channels), height, height
