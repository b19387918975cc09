"""Loading a teacher: a pipeline of a `UNet2DModel` or a DiT and a scheduler, with an autoencoder if it has latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from advkd.cache.errors import TeacherError, first_line
from advkd.cache.format.equivalence import NETWORK_OPTIONS
from advkd.cache.format.space import MAX_CHANNELS, MAX_SIDE
from advkd.stages.device import forbid_tf32
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.load.folders import find_files
from advkd.stages.teacher.load.identity import tensors_sha256
from advkd.stages.teacher.load.latents import load_space
from advkd.stages.teacher.load.model import load_model
from advkd.stages.teacher.load.network import Teacher, best_memory_format
from advkd.stages.teacher.path.schedulers import check_scheduler

_LEGACY_DIT = ("Transformer2DModel", "ada_norm_zero")
"""Class and `norm_type` by which DiTs were saved before diffusers 0.29."""


def load_teacher(config: TeacherConfig, device: torch.device, precision: str = "float32") -> Teacher:
    """Load a teacher from a folder or the Hub, and evaluate it once.

    Raises:
        TeacherError: it is missing, incomplete, unreachable, or of a kind that advkd cannot sample from.
    """
    source = config.source
    files = find_files(config)
    network_config = _of_known_class(files.network.config, source)
    item_shape = _item_shape(network_config, source)
    num_classes, null_class = _classes(network_config, config.null_class, source)
    check_scheduler(files.scheduler_config, source)
    forbid_tf32()
    network = load_model(network_config, files.network.weights, f"teacher {source}: its network")
    checkpoint_hash = tensors_sha256(network.state_dict())
    space, decoder = load_space(files.autoencoder, item_shape, source) if files.autoencoder else (None, {})
    memory_format = best_memory_format(device, precision)
    network.requires_grad_(False).eval().to(device=device, dtype=getattr(torch, precision))
    network.to(memory_format=memory_format)
    teacher = Teacher(
        network=network,
        num_classes=num_classes,
        null_class=null_class,
        space=space,
        decoder=decoder,
        memory_format=memory_format,
        scheduler_config=files.scheduler_config,
        item_shape=item_shape,
        source=source,
        commit=files.commit,
        config=network_config,
        card=files.card,
        files=files.network.weights,
        parts=config.parts(),
        tensors_sha256=checkpoint_hash,
    )
    _try_out(teacher)
    return teacher


def saved_network(teacher: Teacher) -> bytes:
    """One safetensors file with a teacher's network, in the precision in which it was saved."""
    from safetensors.torch import save

    return save(load_model(teacher.config, teacher.files, f"teacher {teacher.source}: its network").state_dict())


def _of_known_class(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A network's configuration with today's name of its class.

    Raises:
        TeacherError: advkd knows no such network.
    """
    name = config.get("_class_name")
    if (name, config.get("norm_type")) == _LEGACY_DIT:
        name = "DiTTransformer2DModel"
        config = {"_class_name": name, **{key: config[key] for key in NETWORK_OPTIONS[name] if key in config}}
    if name not in NETWORK_OPTIONS:
        raise TeacherError(
            f"teacher {source}: its network is a {name}; expected a {' or a '.join(NETWORK_OPTIONS)}, or a "
            "text-to-image pipeline's with --prompts FILE"
        )
    return dict(config)


def _classes(config: Mapping[str, Any], null_class: int | None, source: str) -> tuple[int, int | None]:
    """Rows of a network's table of classes, 0 without one, and which of them is the null class.

    Raises:
        TeacherError: it is conditioned on something else than labels, or has no such row.
    """
    if config["_class_name"] == "DiTTransformer2DModel":
        rows = int(config.get("num_embeds_ada_norm", 1000)) + 1  # diffusers adds the null row to DiT's table
        known: int | None = rows - 1
    else:
        if config.get("class_embed_type") is not None:
            raise TeacherError(
                f"teacher {source}: it is conditioned on vectors (class_embed_type {config['class_embed_type']!r}); "
                "expected class labels (num_class_embeds), or no condition"
            )
        rows, known = int(config.get("num_class_embeds") or 0), None
    if null_class is not None and (known is not None or rows == 0) and null_class != known:
        has = f"its null class is {known}" if known is not None else "it is unconditional"
        raise TeacherError(f"teacher {source}: {has}, teacher.null_class says {null_class}: remove it")
    if null_class is not None and not 0 <= null_class < rows:
        raise TeacherError(f"teacher {source}: its table has {rows} rows, teacher.null_class {null_class} is none")
    return rows, known if null_class is None else null_class


def _item_shape(config: Mapping[str, Any], source: str) -> tuple[int, int, int]:
    options = NETWORK_OPTIONS[config["_class_name"]] | dict(config)
    size = options["sample_size"]
    if size is None:
        raise TeacherError(
            f"teacher {source}: its network's configuration names no sample_size; expected the side of its images in "
            'pixels: write it into config.json, such as `"sample_size": 32`'
        )
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    channels = options["in_channels"]
    out_channels = channels if options["out_channels"] is None else options["out_channels"]
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
    timestep = torch.tensor(teacher.num_timesteps - 1, device=teacher.device)
    labels = torch.zeros(1, dtype=torch.int64, device=teacher.device) if teacher.num_classes else None
    cause: Exception | None = None
    try:
        with torch.inference_mode():
            found = tuple(teacher.predict(x, timestep, labels).shape[1:])
        if found == (teacher.item_shape[0] * (2 if teacher.learned_variance else 1), *teacher.item_shape[1:]):
            return
        problem = f"it gives {'×'.join(map(str, found))}"
    except Exception as error:  # whatever a foreign configuration makes diffusers and torch raise
        problem, cause = first_line(error), error
    halvings = len(teacher.config.get("block_out_channels", ())) - 1
    expected = "expected a network that runs at its own sample_size and at all of its scheduler's timesteps"
    if halvings > 0 and any(side % 2**halvings for side in teacher.item_shape[1:]):
        expected = f"its blocks halve the sides {halvings} times: expected a multiple of {2**halvings} as sample_size"
    raise TeacherError(
        f"teacher {teacher.source}: its network can't evaluate an item of {'×'.join(map(str, teacher.item_shape))} at "
        f"timestep {teacher.num_timesteps - 1} ({problem}); {expected}"
    ) from cause
