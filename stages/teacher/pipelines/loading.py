"""Loading a text-to-image pipeline as diffusers saved it: networks from safetensors, code from diffusers alone."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advkd.cache.errors import TeacherError, first_line
from advkd.stages.device import forbid_tf32
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.diffusers_api import diffusers
from advkd.stages.teacher.load.folders import local_folder, read_json
from advkd.stages.transformers_api import transformers

_LIBRARIES = ("diffusers", "transformers")
"""Whose classes a pipeline may be made of; its model_index.json could name any module of Python."""
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that neither denoise nor encode prompts."""
_OTHER_INPUTS = {
    "image": "changes an image",
    "mask_image": "fills in an image",
    "control_image": "follows a control image",
    "control_mode": "follows a control image",
    "images": "changes an image",
    "num_frames": "makes video",
    "video_length": "makes video",
    "num_videos_per_prompt": "makes video",
    "video": "changes video",
    "audio_length_in_s": "makes sound",
    "audio_end_in_s": "makes sound",
    "num_waveforms_per_prompt": "makes sound",
}
"""Arguments of a call that say what a pipeline does instead of making an image of a text."""


def find_pipeline(config: TeacherConfig, leave_out: Sequence[str] = ()) -> tuple[Path, str | None]:
    """A pipeline's folder on this machine, downloaded from the Hub if it is there, and the Hub's commit.

    Args:
        config: where it is.
        leave_out: parts that need not be downloaded.

    Raises:
        TeacherError: it is missing or unreachable.
    """
    folder = local_folder(config.source)
    if folder is not None:
        return folder, None
    try:
        found = Path(
            diffusers().DiffusionPipeline.download(
                config.source,
                revision=config.revision,
                variant=config.variant,
                use_safetensors=True,
                **dict.fromkeys(leave_out),
            )
        )
    except Exception as error:  # the Hub's client raises its own, requests', httpx' and OS errors
        raise TeacherError(
            f"teacher {config.source}: no such folder, and the Hub did not give it ({first_line(error)})"
        ) from error
    return found, found.name


def load_pipeline(
    folder: Path, config: TeacherConfig, device: torch.device, precision: str, leave_out: Sequence[str] = ()
) -> Any:
    """A pipeline on its device.

    Args:
        folder: where it is.
        config: which variant to load, and how to fit it into the device's memory.
        device: where it computes.
        precision: what it computes in.
        leave_out: parts that aren't needed.

    Raises:
        TeacherError: it is no text-to-image pipeline, or can't be loaded.
        UsageError: transformers isn't installed.
    """
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    kind = _checked_class(index, config.source)
    forbid_tf32()
    transformers(f"teacher {config.source}")  # its encoders are made of it
    warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)  # on how a dtype was named
    try:
        pipe = kind.from_pretrained(
            folder,
            torch_dtype=getattr(torch, precision),  # deprecated by diffusers 0.42, but what 0.33 understands
            variant=config.variant,
            use_safetensors=True,
            local_files_only=True,
            **{
                part: None for part, value in index.items() if part in (*_LEFT_OUT, *leave_out) or value == [None, None]
            },
            **({"requires_safety_checker": False} if "requires_safety_checker" in index else {}),
        )
    except Exception as error:  # whatever foreign files make diffusers, transformers and torch raise
        raise TeacherError(f"teacher {config.source}: the pipeline can't be loaded ({first_line(error)})") from error
    pipe.set_progress_bar_config(disable=True)
    if config.lora is not None:
        _fuse_lora(pipe, config.lora)
    if config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _fuse_lora(pipe: Any, lora: str) -> None:
    """Add a LoRA's products to the weights, once and for all.

    Raises:
        TeacherError: the pipeline takes none, peft isn't installed, or it can't be loaded or doesn't fit.
    """
    path = Path(os.path.expanduser(lora))
    where, name = (path.parent, {"weight_name": path.name}) if path.is_file() else (path if path.is_dir() else lora, {})
    if not hasattr(pipe, "load_lora_weights"):
        raise TeacherError(f"teacher.lora {lora}: a {type(pipe).__name__} takes no LoRA")
    try:
        pipe.load_lora_weights(where, use_safetensors=True, **name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    except Exception as error:  # whatever foreign files make diffusers, peft and torch raise
        raise TeacherError(f"teacher.lora {lora} can't be fused ({first_line(error)})") from error


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """The network that denoises."""
    network = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if network is None:
        raise TeacherError(f"a {type(pipe).__name__} has neither transformer nor unet")
    return network  # type: ignore[no-any-return]


def _checked_class(index: Mapping[str, Any], source: str) -> Any:
    """The class of a pipeline that makes images of texts.

    Raises:
        TeacherError: it is none of diffusers', is made of foreign code, or does something else.
    """
    name = index.get("_class_name")
    kind = getattr(diffusers(), name, None) if isinstance(name, str) else None
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise TeacherError(
            f"teacher {source}: its model_index.json names the pipeline {name!r}; expected a class of the installed "
            "diffusers (code from a repository is never run)"
        )
    for part, value in index.items():
        library = value[0] if isinstance(value, list) and value else None
        if library is not None and part not in _LEFT_OUT and library not in _LIBRARIES:
            raise TeacherError(
                f"teacher {source}: its part {part} is of {library!r}; expected classes of {' and '.join(_LIBRARIES)}"
            )
    known = inspect.signature(kind.__call__).parameters
    does = next((does for argument, does in _OTHER_INPUTS.items() if argument in known), None)
    absent = next((argument for argument in ("prompt", "prompt_embeds", "latents") if argument not in known), None)
    if does or absent or not hasattr(kind, "encode_prompt"):
        why = does or (f"takes no {absent}" if absent else "has no encode_prompt")
        raise TeacherError(f"teacher {source}: a {name} {why}; expected one that makes images of prompts and noise")
    return kind
