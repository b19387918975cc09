"""The space of a latent teacher: its pipeline's autoencoder, of which only the decoder is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from advkd.cache.errors import TeacherError, first_line
from advkd.cache.format.space import DECODERS, MAX_CHANNELS, MAX_SIDE, LatentSpace
from advkd.stages.decoder import ONE_FRAME, build_decoder, decoding_tensors
from advkd.stages.teacher.diffusers_api import diffusers, recorded_config
from advkd.stages.teacher.load.folders import Part
from advkd.stages.teacher.load.identity import tensors_sha256
from advkd.stages.teacher.load.model import load_model

_CHANNELS = {
    "AutoencoderDC": ("latent_channels", 32),
    "AutoencoderKL": ("latent_channels", 4),
    "AutoencoderKLQwenImage": ("z_dim", 16),
    "AutoencoderTiny": ("latent_channels", 4),
    "VQModel": ("latent_channels", 3),
}
"""By class: the option that says how many channels latents have, and its default."""


def load_space(
    autoencoder: Part, item_shape: tuple[int, int, int], source: str
) -> tuple[LatentSpace, dict[str, Tensor]]:
    """The space of a teacher's latents, and the weights of its decoder; decodes one item to see the images' shape.

    Args:
        autoencoder: the pipeline's.
        item_shape: of the latents, (C, h, w).
        source: the teacher, for messages.

    Raises:
        TeacherError: it is of a class or has options that advkd can't decode with, or doesn't fit the latents.
    """
    config, what = autoencoder.config, f"teacher {source}: its autoencoder"
    name = config.get("_class_name")
    if name not in DECODERS:
        raise TeacherError(f"{what} is a {name}; expected one of {', '.join(DECODERS)}")
    by_channel = config.get("latents_mean") is not None or config.get("latents_std") is not None
    if by_channel and name != ONE_FRAME:
        raise TeacherError(f"{what} normalises latents by channel (latents_mean); expected one scaling_factor")
    channels = config.get(*_CHANNELS[name])
    if channels != item_shape[0]:
        raise TeacherError(f"{what} has {channels} latent channels; expected the {item_shape[0]} of its network")
    tensors = decoding_tensors(name, load_model(config, autoencoder.weights, what).state_dict())
    space = LatentSpace(
        decoder=name,
        config=recorded_config(config, ()),
        tensors_sha256=tensors_sha256(tensors),
        scaling_factor=1.0 if name == ONE_FRAME else _factor(config, "scaling_factor", what),
        shift_factor=_factor(config, "shift_factor", what),
        image_shape=item_shape,  # until an item is decoded
    )
    try:
        with torch.inference_mode():
            count, height, width = build_decoder(space, tensors).decode(torch.zeros(1, *item_shape)).shape[1:]
    except Exception as error:  # whatever a foreign configuration makes diffusers and torch raise
        shape = "×".join(map(str, item_shape))
        raise TeacherError(f"{what} can't decode latents of {shape} ({first_line(error)})") from error
    if not (count <= MAX_CHANNELS and max(height, width) <= MAX_SIDE):
        raise TeacherError(f"{what} makes images of {count}×{height}×{width}; expected up to {MAX_SIDE} pixels a side")
    shaped = {**space.to_json(), "image_shape": [int(count), int(height), int(width)]}
    return LatentSpace.from_json(shaped), tensors


def _factor(config: Mapping[str, Any], name: str, what: str) -> float:
    """A factor of an autoencoder's configuration, else its class's default; a shift of None is 0."""
    found = config.get(name, _default(str(config["_class_name"]), name))
    if name == "shift_factor" and found is None:
        return 0.0
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise TeacherError(f"{what} has {name} {found!r}; expected a number")
    if name == "scaling_factor" and found <= 0:
        raise TeacherError(f"{what} has scaling_factor {found}; expected a positive number")
    return float(found)


def _default(class_name: str, option: str) -> Any:
    import inspect

    parameters = inspect.signature(getattr(diffusers(), class_name)).parameters
    return parameters[option].default if option in parameters else None
