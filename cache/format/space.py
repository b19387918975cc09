"""The space in which a teacher denoises, where that isn't pixels: latents, and the decoder that makes them images."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from advkd.cache.errors import NewerCacheError, NotACacheError
from advkd.cache.files.strict_json import integer, shortened, unknown_members

MAX_CHANNELS, MAX_SIDE = 64, 8192
"""Largest shape of an item that a store may claim."""
DECODERS = ("AutoencoderKL", "VQModel", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLQwenImage")
"""diffusers' classes that this version can decode with."""
DECODER_PATH = "decoder/model.safetensors"
"""The decoder's weights, relative to a store or a student's folder; `tensors_sha256` says what they must be."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Latents z of an autoencoder; its image is decode(z / scaling_factor + shift_factor), in [−1, 1].

    Latents have no range of their own.
    """

    decoder: str
    """Its class in diffusers, one of `DECODERS`."""
    config: dict[str, Any]
    """Of that class."""
    tensors_sha256: str
    """Of the weights that decoding takes, as they were saved; hashed as the teacher's are."""
    scaling_factor: float
    shift_factor: float
    image_shape: tuple[int, int, int]
    """Shape of a decoded image, (C, H, W)."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"kind": "latent", **asdict(self), "image_shape": list(self.image_shape)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            NewerCacheError: it is of a kind, or has a decoder or a member, that this version doesn't know.
            NotACacheError: a part is out of range.
        """
        unknown = unknown_members(value, ["kind", *(field.name for field in fields(cls))])
        if value["kind"] != "latent" or value["decoder"] not in DECODERS or unknown:
            what = unknown[0] if unknown else f"{shortened(value['kind'])}, {shortened(value['decoder'])}"
            raise NewerCacheError(f"its space ({what}) is of a newer advkd: upgrade advkd")
        channels, height, width = (integer(length) for length in value["image_shape"])
        numbers = (value["scaling_factor"], value["shift_factor"])
        fits = all(type(number) is float and math.isfinite(number) for number in numbers) and numbers[0] > 0
        fits = fits and 1 <= channels <= MAX_CHANNELS and 1 <= min(height, width) <= max(height, width) <= MAX_SIDE
        if not (fits and isinstance(value["config"], dict) and _SHA256.fullmatch(value["tensors_sha256"])):
            raise NotACacheError("its space is impossible: image shape, factors, configuration or hash of the decoder")
        return cls(
            decoder=value["decoder"],
            config=value["config"],
            tensors_sha256=value["tensors_sha256"],
            scaling_factor=numbers[0],
            shift_factor=numbers[1],
            image_shape=(channels, height, width),
        )
