"""Finding a teacher's files: in a folder or on the Hub, nested as diffusers saves them or flat as it used to.

Only JSON, safetensors and the model card are read: a pipeline from someone else never executes code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkd.cache.errors import TeacherError, first_line
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.load.card import TeacherCard

_WEIGHTS = "diffusion_pytorch_model"
_VARIANT = re.compile(rf"{_WEIGHTS}\.(\w+?)(-\d+-of-\d+)?\.safetensors")
_MODEL_CONFIG, _SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
_NETWORKS, _AUTOENCODERS = ("unet", "transformer"), ("vae", "vqvae")
"""What diffusers' pipelines call these parts, and the folders that they are saved in."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The files of one model of a pipeline."""

    config: dict[str, Any]
    weights: tuple[Path, ...]
    """Safetensors files that together hold all tensors."""


@dataclass(frozen=True, kw_only=True)
class TeacherFiles:
    """A teacher's files on this machine."""

    network: Part
    autoencoder: Part | None
    """None if the network denoises pixels."""
    scheduler_config: dict[str, Any]
    commit: str | None
    """Of the Hub's repository, if it came from there."""
    card: TeacherCard


def find_files(config: TeacherConfig) -> TeacherFiles:
    """Find a teacher's files, downloading them if it is on the Hub.

    Raises:
        TeacherError: it is missing, incomplete, unreachable, or has no network or no scheduler.
    """
    folder, commit = _find_folder(config, ["*.json", "README.md"])
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    network = _part(folder, config.unet or _network_name(folder), _MODEL_CONFIG, index, config)
    name = next((name for name in _AUTOENCODERS if name in index or (folder / name).is_dir()), None)
    autoencoder = None if name is None else _part(folder, name, _MODEL_CONFIG, index, config)
    if config.scheduler is None:
        scheduler = _part(folder, "scheduler", _SCHEDULER_CONFIG, index, config) / _SCHEDULER_CONFIG
    else:
        scheduler = _separate_scheduler(Path(os.path.expanduser(config.scheduler)), config.source)
    parts = [network, *([] if autoencoder is None else [autoencoder])]
    if commit is not None:  # only these parts: others may be large; all their variants, so that an error can name them
        subfolders = ["" if part == folder else f"{part.relative_to(folder).as_posix()}/" for part in parts]
        _find_folder(config, [f"{subfolder}{_WEIGHTS}*.safetensors" for subfolder in subfolders], commit)
    return TeacherFiles(
        network=_read_part(network, config),
        autoencoder=None if autoencoder is None else _read_part(autoencoder, config),
        scheduler_config=read_json(scheduler),
        commit=commit,
        card=TeacherCard.read(folder, index),
    )


def autoencoder_part(source: str) -> Part:
    """The files of an autoencoder in a folder of its own, or of a pipeline in a folder.

    Raises:
        TeacherError: there is none.
    """
    folder = local_folder(source)
    if folder is not None:
        for candidate in (folder, *(folder / name for name in _AUTOENCODERS)):
            if (candidate / _MODEL_CONFIG).is_file():
                return _read_part(candidate, TeacherConfig(source=source))
    raise TeacherError(
        f"decoder {source}: no autoencoder there; expected a folder with {_MODEL_CONFIG}, or a pipeline's"
    )


def local_folder(source: str) -> Path | None:
    """A teacher's folder on this machine; None if `source` names none."""
    folder = Path(os.path.expanduser(source))
    return folder if folder.is_dir() else None


def _find_folder(config: TeacherConfig, patterns: list[str], commit: str | None = None) -> tuple[Path, str | None]:
    folder = local_folder(config.source)
    if folder is not None:
        return folder, None
    parts = config.source.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..") or parts[0].startswith("~"):
        raise TeacherError(
            f"teacher {config.source}: no such folder; expected one that diffusers saved, or a Hub id such as "
            "google/ddpm-cifar10-32"
        )
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            config.source, revision=commit or config.revision, allow_patterns=patterns
        )
    except Exception as error:  # the Hub's client raises its own, requests', httpx' and OS errors
        raise TeacherError(
            f"teacher {config.source}: no such folder, and the Hub did not give it ({first_line(error)})"
        ) from error
    return Path(snapshot), Path(snapshot).name


def _network_name(folder: Path) -> str:
    """What a pipeline in a folder calls its network."""
    return next((name for name in _NETWORKS if (folder / name / _MODEL_CONFIG).is_file()), _NETWORKS[0])


def _read_part(folder: Path, config: TeacherConfig) -> Part:
    return Part(config=read_json(folder / _MODEL_CONFIG), weights=_weights(folder, config))


def _in_words(index: Mapping[str, Any]) -> str:
    """What model_index.json says that a pipeline is."""
    if not index:
        return ""
    parts = ", ".join(f"{part} {value[1]}" for part, value in index.items() if isinstance(value, list) and value[1:])
    return f" (it is a {index.get('_class_name')}: {parts or 'no parts'})"


def _part(folder: Path, name: str, config_file: str, index: Mapping[str, Any], config: TeacherConfig) -> Path:
    """A pipeline's part, in its sub-folder or, as in older repositories, at the root."""
    flat = [folder] if name in (*_NETWORKS, "scheduler") else []
    for candidate in (folder / name, *flat):
        if (candidate / config_file).is_file():
            return candidate
    if name == "scheduler":
        what, hint = "scheduler", "`teacher.scheduler: PATH` names one that lies elsewhere"
    elif name in _AUTOENCODERS:
        what, hint = "autoencoder", f"its model_index.json names {name}: save the pipeline again"
    else:
        others = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{_MODEL_CONFIG}"))) or "there is none"
        what, hint = "network", f"`teacher.unet: FOLDER` names another of its folders ({others})"
    raise TeacherError(
        f"teacher {config.source}: no {what} in it{_in_words(index)}; expected {name}/{config_file}, as "
        f"DDPMPipeline.save_pretrained writes: {hint}"
    )


def _separate_scheduler(path: Path, source: str) -> Path:
    for candidate in (path, path / _SCHEDULER_CONFIG, path / "scheduler" / _SCHEDULER_CONFIG):
        if candidate.is_file():
            return candidate
    raise TeacherError(
        f"teacher {source}: no scheduler at {path}; expected {_SCHEDULER_CONFIG}, or a folder that holds it "
        "(teacher.scheduler)"
    )


def _weights(unet: Path, config: TeacherConfig) -> tuple[Path, ...]:
    """The weights' file, or all shards that an index names."""
    variant = f".{config.variant}" if config.variant else ""
    whole, index = unet / f"{_WEIGHTS}{variant}.safetensors", unet / f"{_WEIGHTS}.safetensors.index{variant}.json"
    if whole.is_file():
        return (whole,)
    if index.is_file():
        shards = read_json(index).get("weight_map")
        names = {str(name) for name in shards.values()} if isinstance(shards, Mapping) else {""}
        absent = sorted(name for name in names if Path(name).name != name or not (unet / name).is_file())
        if absent:
            raise TeacherError(f"teacher {config.source}: {index.name} names {absent[0]!r}, which is not beside it")
        return tuple(unet / name for name in sorted(names))
    found = sorted(path.name for path in unet.glob(f"{_WEIGHTS}*"))
    variants = {match[1] for name in found if (match := _VARIANT.fullmatch(name))}
    advice = "only safetensors are loaded: save the pipeline again with safe_serialization=True"
    if config.variant or variants:
        known = ", ".join(sorted(variants)) or "none"
        advice = f"`teacher.variant` chooses a variant; there are: {known}"
    there = ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
    raise TeacherError(
        f"teacher {config.source}: no {whole.name} in its {unet.name} folder, which has {there or 'no weights'}; "
        f"{advice}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        TeacherError: it is no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path} is not readable JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise TeacherError(f"{path} holds no configuration")
    return value
