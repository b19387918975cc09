"""Decoding latents to images: diffusers' own autoencoders, of which only the decoding half is kept.

Both stages use it, and only here does anything but the teacher import diffusers: `diffusers.models` alone, when a store
or a student has latents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load
from torch import Tensor, nn

from advkd.cache.errors import DamagedError, UsageError, first_line
from advkd.cache.format.space import DECODER_PATH, LatentSpace
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.read.weights import decoder_weights
from advkd.stages.diffusers_models import model_class

_PARTS = {
    "AutoencoderDC": ("decoder",),
    "AutoencoderKL": ("decoder", "post_quant_conv"),
    "AutoencoderKLQwenImage": ("decoder", "post_quant_conv"),
    "AutoencoderTiny": ("decoder",),
    "VQModel": ("decoder", "post_quant_conv", "quantize"),
}
"""By class: the modules that decoding takes. No other class is loaded."""
TINY, ONE_FRAME = "AutoencoderTiny", "AutoencoderKLQwenImage"
BATCH = 16
"""Images decoded at once: a decoder's activations are as large as its images times hundreds of channels."""


class Decoder:
    """Makes images of latents.

    Args:
        space: the latents' space.
        model: the autoencoder of that space, without its encoder.
    """

    def __init__(self, space: LatentSpace, model: nn.Module) -> None:
        self.space = space
        self.model = model.requires_grad_(False).eval()

    def to(self, device: torch.device) -> Decoder:
        """Move the weights to a device."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents, a few at a time: diffusers' `decode(z / scaling_factor + shift_factor)`.

        Args:
            latents: float32, shape (N, C, h, w), on any device.

        Returns:
            Images, about [−1, 1], float32, shape (N, *image_shape), on the device of the latents.
        """
        device = next(self.model.parameters()).device
        parts = [self.decode(part.to(device)).to(latents.device) for part in torch.split(latents.float(), BATCH)]
        return torch.cat(parts) if parts else latents.new_empty(0, *self.space.image_shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of a few latents on the model's device, float32.

        Qwen-Image's autoencoder is one of video that normalises by channel: an image is a video of one frame.
        """
        model: Any = self.model
        scaled = latents / self.space.scaling_factor + self.space.shift_factor
        if self.space.decoder != ONE_FRAME:
            images: Tensor = model.decode(scaled).sample
            return images.float()
        mean, deviation = (
            scaled.new_tensor(model.config[name])[:, None, None] for name in ("latents_mean", "latents_std")
        )
        frames: Tensor = model.decode((scaled * deviation + mean)[:, :, None]).sample
        return frames[:, :, 0].float()


def as_images(values: npt.NDArray[Any] | Tensor, decoder: Decoder | None) -> npt.NDArray[np.float32]:
    """Images of states: decoded latents, or pixels as they are; float32, shape (N, *image_shape)."""
    tensor = torch.as_tensor(np.asarray(values, dtype=np.float32))
    images: npt.NDArray[np.float32] = (tensor if decoder is None else decoder(tensor)).numpy()
    return images


def decoding_tensors(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of an autoencoder's tensors that decoding takes.

    Args:
        name: its class.
        tensors: all of them, by name.
    """
    return {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] in _PARTS[name]}


def build_decoder(space: LatentSpace, tensors: Mapping[str, Tensor]) -> Decoder:
    """A decoder from its weights.

    Raises:
        Exception: whatever diffusers and torch raise for a configuration or weights that don't fit.
    """
    kind = model_class(space.decoder)
    with torch.device("meta"):
        model: nn.Module = kind.from_config(dict(space.config))
    for child, _ in list(model.named_children()):
        if child not in _PARTS[space.decoder]:
            setattr(model, child, nn.Module())  # without weights; Qwen-Image's counts the layers of both halves
    model.load_state_dict(dict(tensors), assign=True)
    return Decoder(space, model.float())


def cache_decoder(cache: TrajectoryCache) -> Decoder | None:
    """The decoder of a cache; None if it holds pixels.

    Raises:
        NotCachedError: it is not in this copy.
        DamagedError: it differs from what the recipe says.
    """
    space = cache.recipe.space
    where = f"{cache.address}/{DECODER_PATH}"
    return None if space is None else read_decoder_file(space, decoder_weights(cache), where)


def open_tiny_decoder(folder: Path, space: LatentSpace, item_shape: tuple[int, ...]) -> Decoder:
    """A smaller decoder for latents: an `AutoencoderTiny` that diffusers saved.

    Args:
        folder: with its config.json and weights in safetensors.
        space: of the latents; its images must have the same shape.
        item_shape: of the latents, (C, h, w).

    Raises:
        UsageError: the folder holds no such decoder, or one of other latents.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        (file,) = folder.glob("diffusion_pytorch_model*.safetensors")
        if config["_class_name"] != TINY:
            raise ValueError(f"it is a {config['_class_name']}")
        tensors = decoding_tensors(TINY, load(file.read_bytes()))
        options = {key: value for key, value in config.items() if not key.startswith("_")}
        factor = float(options.get("scaling_factor", 1.0))
        tiny = replace(space, decoder=TINY, config=options, scaling_factor=factor, shift_factor=0.0)
        decoder = build_decoder(tiny, tensors)
        made = tuple(decoder(torch.zeros(1, *item_shape)).shape[1:])
        if made != space.image_shape:
            raise ValueError(f"it makes images of {made}, the teacher's own decoder of {space.image_shape}")
    except Exception as error:  # whatever a foreign folder makes diffusers, torch and safetensors raise
        problem = first_line(error)
        raise UsageError(f"decoder {folder}: no {TINY} that diffusers saved as safetensors ({problem})") from error
    return decoder


def read_decoder_file(space: LatentSpace, data: bytes, where: str) -> Decoder:
    """The decoder in a safetensors file whose tensors were checked.

    Args:
        space: of its latents.
        data: the file.
        where: it is, for messages.

    Raises:
        DamagedError: it doesn't fit its configuration.
    """
    try:
        return build_decoder(space, load(data))
    except Exception as error:  # whatever a foreign configuration makes diffusers, torch and safetensors raise
        problem = first_line(error)
        raise DamagedError(f"{where} doesn't fit the configuration of its {space.decoder} ({problem})") from error
