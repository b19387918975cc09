"""Loading a teacher: any unconditional pixel-space pipeline made of a `UNet2DModel` and a scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkd.cache.errors import TeacherError
from advkd.cache.format.space import MAX_CHANNELS, MAX_SIDE
from advkd.stages.device import forbid_tf32
from advkd.stages.teacher.config import PARTS, TeacherConfig
from advkd.stages.teacher.diffusers_api import diffusers, first_line
from advkd.stages.teacher.load.folders import find_files
from advkd.stages.teacher.load.identity import tensors_sha256
from advkd.stages.teacher.load.network import Teacher, best_memory_format
from advkd.stages.teacher.path.schedulers import check_scheduler

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention layers' names in files of diffusers before 0.15, such as google/ddpm-cifar10-32's, and today's."""


def load_teacher(config: TeacherConfig, device: torch.device, precision: str = "float32") -> Teacher:
    """Load a teacher from a folder or the Hub, and evaluate it once.

    Raises:
        TeacherError: it is missing, incomplete, unreachable, or of a kind that advkd cannot sample from.
    """
    source = config.source
    files = find_files(config)
    item_shape = _check_unet(files.unet_config, source)
    check_scheduler(files.scheduler_config, source)
    forbid_tf32()
    unet = _load_unet(files.unet_config, files.weights, source)
    checkpoint_hash = tensors_sha256(unet.state_dict())
    memory_format = best_memory_format(device, precision)
    unet.requires_grad_(False).eval().to(device=device, dtype=getattr(torch, precision))
    unet.to(memory_format=memory_format)
    teacher = Teacher(
        unet=unet,
        memory_format=memory_format,
        scheduler_config=files.scheduler_config,
        item_shape=item_shape,
        source=source,
        commit=files.commit,
        config=files.unet_config,
        license=files.license,
        parts={key: value for key in PARTS if (value := getattr(config, key)) is not None},
        tensors_sha256=checkpoint_hash,
    )
    _try_out(teacher)
    return teacher


def _load_unet(config: Mapping[str, Any], weights: tuple[Path, ...], source: str) -> nn.Module:
    """The network in the precision in which it was saved."""
    from safetensors.torch import load_file

    try:
        with torch.device("meta"):  # random weights would only take time; this thread's alone
            unet: nn.Module = diffusers().UNet2DModel.from_config(dict(config))
        if any(buffer.is_meta for buffer in unet.buffers()):  # fixed filters, which no file holds
            unet = diffusers().UNet2DModel.from_config(dict(config))
        # Copied: a file that changes while it is mapped would change the network.
        tensors = {name: tensor.clone() for path in weights for name, tensor in load_file(path).items()}
    except Exception as error:  # whatever a foreign configuration makes diffusers, torch and safetensors raise
        raise TeacherError(f"teacher {source}: its UNet can't be loaded ({first_line(error)})") from error
    expected = unet.state_dict()
    tensors = {_todays_name(name, expected): tensor for name, tensor in tensors.items()}
    wrong = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "mismatched": {
            name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape
        },
    }
    if any(wrong.values()):
        found = ", ".join(f"{len(names)} {kind} keys" for kind, names in wrong.items() if names)
        raise TeacherError(f"teacher {source}: its weights don't fit its UNet's configuration ({found})")
    unet.load_state_dict(tensors, assign=True)
    return unet


def _todays_name(name: str, expected: Mapping[str, Tensor]) -> str:
    *path, layer, kind = name.split(".") if name.count(".") else ("", name)
    return name if name in expected or layer not in _OLD_NAMES else ".".join([*path, _OLD_NAMES[layer], kind])


def _check_unet(config: Mapping[str, Any], source: str) -> tuple[int, int, int]:
    class_name = config.get("_class_name")
    if class_name != "UNet2DModel":
        raise TeacherError(f"teacher {source}: its network is a {class_name}; expected an unconditional UNet2DModel")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise TeacherError(f"teacher {source}: it is conditioned on a class; expected an unconditional one")
    size = config.get("sample_size")
    if size is None:
        raise TeacherError(
            f"teacher {source}: its UNet's configuration names no sample_size; expected the side of its images in "
            'pixels: write it into config.json, such as `"sample_size": 32`'
        )
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    whole = all(type(number) is int for number in (channels, height, width))
    if not whole or not 1 <= channels <= MAX_CHANNELS or not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise TeacherError(
            f"teacher {source}: its images are {channels}×{height}×{width}; expected up to {MAX_CHANNELS} channels and "
            f"{MAX_SIDE} pixels a side"
        )
    if out_channels not in (channels, 2 * channels):  # the second half is a variance, of which only DDPM makes use
        raise TeacherError(
            f"teacher {source}: {channels} channels in, {out_channels} out ({_why(channels, out_channels)}); "
            "expected the same, or twice as many where it learned the variance"
        )
    return channels, height, width


def _why(channels: int, out_channels: Any) -> str:
    """What a network with other channels out than in is for."""
    if isinstance(out_channels, int) and out_channels < channels:
        return "it is conditioned on an image, as for super-resolution or inpainting"
    return "it predicts something else than an image"


def _try_out(teacher: Teacher) -> None:
    """Evaluate one image at the noisiest timestep, so that a network that can't do it fails here, in one line.

    Raises:
        TeacherError: the evaluation fails, or gives another shape.
    """
    x = torch.zeros(1, *teacher.item_shape, device=teacher.device).contiguous(memory_format=teacher.memory_format)
    cause: Exception | None = None
    try:
        with torch.inference_mode():
            found = tuple(teacher.predict(x, torch.tensor(teacher.num_timesteps - 1, device=teacher.device)).shape[1:])
        if found == (teacher.config.get("out_channels", 3), *teacher.item_shape[1:]):
            return
        problem = f"it gives {'×'.join(map(str, found))}"
    except Exception as error:  # whatever a foreign configuration makes diffusers and torch raise
        problem, cause = first_line(error), error
    halvings = len(teacher.config.get("block_out_channels", ())) - 1
    expected = "expected a network that runs at its own sample_size and at all of its scheduler's timesteps"
    if halvings > 0 and any(side % 2**halvings for side in teacher.item_shape[1:]):
        expected = f"its blocks halve the sides {halvings} times: expected a multiple of {2**halvings} as sample_size"
    raise TeacherError(
        f"teacher {teacher.source}: its UNet can't evaluate an image of {'×'.join(map(str, teacher.item_shape))} at "
        f"timestep {teacher.num_timesteps - 1} ({problem}); {expected}"
    ) from cause
