"""Encoding prompts by a pipeline's own encoders alone: without its network and its autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advkd.cache.errors import TeacherError
from advkd.cache.format.prompts import Prompt, PromptCondition
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.pipelines.encoding import encode
from advkd.stages.teacher.pipelines.loading import find_pipeline, load_pipeline
from advkd.stages.teacher.pipelines.teacher import encoder_hashes

_NOT_NEEDED = ("unet", "transformer", "transformer_2", "vae")


def encode_texts(
    config: TeacherConfig,
    texts: Sequence[str],
    condition: PromptCondition,
    *,
    call: Mapping[str, Any],
    encoders: Mapping[str, str],
    precision: str,
    device: torch.device,
) -> dict[str, Tensor | list[Tensor]]:
    """What a teacher's encoders make of some texts, each alone, as its cache was built.

    Args:
        config: where the teacher is.
        texts: the prompts.
        condition: of the cache's recipe, which says which embeddings are wanted.
        call: arguments of the pipeline's call that the cache was built with.
        encoders: SHA-256 of the encoders' tensors by name, as the recipe has them; empty if they aren't known.
        precision: what they compute in, such as float32.
        device: where.

    Returns:
        By name of the embedding, float32 or whole numbers on the CPU: shape (N, …), or N tensors where they are padded.

    Raises:
        TeacherError: the pipeline is missing, can't be loaded or can't encode, or has other encoders.
    """
    not_needed = _NOT_NEEDED if config.lora is None else ("vae",)  # a LoRA may change network and encoders
    folder, _ = find_pipeline(config, leave_out=not_needed)
    pipe = load_pipeline(folder, config, device, precision, leave_out=not_needed)
    found = encoder_hashes(pipe)
    other = next((name for name, known in encoders.items() if found.get(name) != known), None)
    if other is not None:
        raise TeacherError(
            f"teacher {config.source}: its {other} has other weights than the one that encoded the cache's prompts; "
            "expected the teacher that made the cache"
        )
    encoded = [encode(pipe, Prompt(text=text), call, device) for text in texts]
    made: dict[str, Tensor | list[Tensor]] = {}
    for one in condition.embeddings:
        if any(one.name not in tensors for tensors in encoded):
            raise TeacherError(f"teacher {config.source}: its encoders give no {one.name}")
        rows = [tensors[one.name].cpu() for tensors in encoded]
        made[one.name] = rows if one.padded else torch.stack(rows)
    return made
