"""The one door to diffusers: loading a teacher, making its schedulers, saving a pipeline.

A teacher is any unconditional pixel-space pipeline made of a `UNet2DModel` and a scheduler, in a folder or on the
Hub. Only JSON and safetensors are read: a pipeline from someone else never executes code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advkd.cache.errors import TeacherError
from advkd.cache.format.recipe import MAX_CHANNELS, MAX_SIDE
from advkd.stages.device import forbid_tf32
from advkd.stages.teacher.config import SamplerConfig, TeacherConfig
from advkd.stages.teacher.path.solvers import find_solver

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_KNOWN_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers whose configuration describes a discrete variance-preserving diffusion (betas and T)."""

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_DIFFUSION_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A loaded teacher: a network, and how it was trained to see noise."""

    unet: nn.Module
    scheduler_config: dict[str, Any]
    item_shape: tuple[int, int, int]
    source: str
    commit: str | None
    """Commit of the Hub's repository, where it came from there."""
    config: dict[str, Any] = field(default_factory=dict)
    """The UNet's configuration."""
    license: str | None = None
    """What its model card names, where it has one."""
    tensors_sha256: str = ""
    """Of the weights as they were saved, whatever precision they are used in."""

    memory_format: torch.memory_format = torch.contiguous_format
    """How the network's convolutions like their inputs in memory."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.unet.parameters()).device

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        """One network evaluation in the network's own precision; float32 in and out, shape (B, C, H, W)."""
        parameter = next(self.unet.parameters())
        return self.unet(x.to(parameter.dtype), timestep).sample.float()  # type: ignore[no-any-return]

    def identity(self) -> dict[str, Any]:
        """What the recipe records of the teacher."""
        return {
            "tensors_sha256": self.tensors_sha256,
            "unet": _json_safe(_public(self.config)),
            "scheduler": _json_safe(_public(self.scheduler_config)),
        }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors by sorted name, dtype, shape and bytes; independent of the file they came in."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes())
    return total.hexdigest()


def load_teacher(config: TeacherConfig, device: torch.device, precision: str = "float32") -> Teacher:
    """Load a teacher from a folder or the Hub.

    Raises:
        TeacherError: it is missing, incomplete, unreachable, or of a kind that advkd cannot sample from.
    """
    folder, commit = _find_folder(config)
    unet_folder = _component(folder, "unet", "config.json", config.source)
    unet_config = _read_json(unet_folder / "config.json")
    item_shape = _check_unet(unet_config, config.source)
    scheduler_folder = _component(folder, "scheduler", "scheduler_config.json", config.source)
    scheduler_config = _read_json(scheduler_folder / "scheduler_config.json")
    class_name = scheduler_config.get("_class_name")
    if class_name not in _KNOWN_SCHEDULERS:
        raise TeacherError(
            f"teacher {config.source}: its scheduler {class_name!r} is unknown; expected one of the discrete "
            f"variance-preserving ones ({', '.join(_KNOWN_SCHEDULERS)})"
        )
    if not (unet_folder / WEIGHTS_NAME).is_file():
        raise TeacherError(
            f"teacher {config.source}: no {WEIGHTS_NAME} in its UNet folder; only safetensors are loaded "
            "(save the pipeline again with safe_serialization=True)"
        )
    forbid_tf32()
    try:
        unet, loading = _diffusers().UNet2DModel.from_pretrained(
            unet_folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # whatever a foreign configuration makes diffusers and torch raise
        raise TeacherError(f"teacher {config.source}: its UNet can't be loaded ({_first_line(error)})") from error
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
        license=_license(folder),
        tensors_sha256=checkpoint_hash,
    )


def best_memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """Channels last is a tenth faster on CPUs; tensor cores want it too, but a GPU's float32 convolutions don't."""
    wanted = device.type == "cpu" or (device.type == "cuda" and precision != "float32")
    return torch.channels_last if wanted else torch.contiguous_format


def make_scheduler(scheduler_config: Mapping[str, Any], sampler: SamplerConfig) -> Any:
    """A fresh diffusers scheduler, timesteps set: multi-step solvers keep history, so one a batch."""
    cls = getattr(_diffusers(), find_solver(sampler.name).scheduler)
    # Only what describes the diffusion: another class's own options would change the solver behind the recipe's back.
    diffusion = {key: scheduler_config[key] for key in _DIFFUSION_KEYS if key in scheduler_config}
    predicted = diffusion.get("prediction_type", "epsilon")
    if predicted not in _PREDICTIONS:
        raise TeacherError(f"the teacher predicts {predicted!r}; expected one of {', '.join(_PREDICTIONS)}")
    try:
        limit = int(diffusion.get("num_train_timesteps", 1000))
        if sampler.steps > limit:
            raise TeacherError(f"steps {sampler.steps} don't fit the teacher: it was trained with {limit} timesteps")
        scheduler = cls.from_config(diffusion, timestep_spacing=sampler.spacing)
        scheduler.set_timesteps(sampler.steps)
        if len(scheduler.alphas_cumprod) != limit:
            raise TeacherError(f"the teacher has {len(scheduler.alphas_cumprod)} betas for {limit} timesteps")
    except TeacherError:
        raise
    except Exception as error:  # whatever a foreign configuration makes diffusers raise
        raise TeacherError(
            f"{cls.__name__} can't be made from the teacher's scheduler with steps {sampler.steps} and spacing "
            f"{sampler.spacing!r} ({_first_line(error)})"
        ) from error
    return scheduler


def sampler_identity(sampler: SamplerConfig, scheduler: Any, deterministic: bool) -> dict[str, Any]:
    """What the recipe records of the sampler."""
    return {
        "name": sampler.name,
        "steps": sampler.steps,
        "eta": sampler.eta,
        "deterministic": deterministic,
        "scheduler": type(scheduler).__name__,
        "config": _json_safe(_public(dict(scheduler.config))),
        "timesteps": [float(t) for t in scheduler.timesteps],
    }


def new_unet(options: Mapping[str, Any]) -> nn.Module:
    """A `UNet2DModel` with fresh weights."""
    unet: nn.Module = _diffusers().UNet2DModel(**options)
    return unet


def new_training_scheduler(options: Mapping[str, Any]) -> Any:
    """A `DDPMScheduler`: adds noise in training and describes the diffusion afterwards."""
    return _diffusers().DDPMScheduler(**options)


def save_pipeline(folder: Path, unet: nn.Module, scheduler: Any) -> None:
    """Save a normal `DDPMPipeline` folder with safetensors."""
    _diffusers().DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)


def _diffusers() -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def _find_folder(config: TeacherConfig) -> tuple[Path, str | None]:
    folder = Path(config.source)
    if folder.is_dir():
        return folder, None
    parts = config.source.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise TeacherError(f"teacher {config.source}: no such folder")
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            config.source, revision=config.revision, allow_patterns=["*.json", "*.safetensors", "README.md"]
        )
    except Exception as error:  # the Hub's client raises its own, requests', httpx' and OS errors
        raise TeacherError(
            f"teacher {config.source}: no such folder, and the Hub did not give it ({_first_line(error)})"
        ) from error
    return Path(snapshot), Path(snapshot).name


def _license(folder: Path) -> str | None:
    """The licence in a model card's front matter."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")[:100_000]
        opening, front, *rest = text.split("---", 2)
        value = yaml.safe_load(front) if rest and not opening.strip() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    named = value.get("license") if isinstance(value, dict) else None
    return str(named)[:80] if named else None


def _component(folder: Path, name: str, config_file: str, source: str) -> Path:
    """A pipeline's part, in its sub-folder or, as in older repositories, at the root."""
    for candidate in (folder / name, folder):
        if (candidate / config_file).is_file():
            return candidate
    kind = {"unet": "UNet", "scheduler": "scheduler"}[name]
    raise TeacherError(
        f"teacher {source}: no {kind} in it (expected {name}/{config_file}, as DDPMPipeline.save_pretrained writes)"
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path} is not readable JSON ({_first_line(error)})") from None
    if not isinstance(value, dict):
        raise TeacherError(f"{path} holds no configuration")
    return value


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without diffusers' own bookkeeping (`_class_name`, `_diffusers_version`, …)."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _json_safe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, np.ndarray | Tensor):
        return _json_safe(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__
