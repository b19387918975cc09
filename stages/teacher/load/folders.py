"""Finding a teacher's files: in a folder or on the Hub, nested as diffusers saves them or flat as it used to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advkd.cache.errors import TeacherError
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.diffusers_api import first_line


def find_folder(config: TeacherConfig) -> tuple[Path, str | None]:
    """The pipeline's folder, and its commit if the Hub had it.

    Raises:
        TeacherError: there is no such folder, and the Hub doesn't give one.
    """
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
            f"teacher {config.source}: no such folder, and the Hub did not give it ({first_line(error)})"
        ) from error
    return Path(snapshot), Path(snapshot).name


def license_of(folder: Path) -> str | None:
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


def component(folder: Path, name: str, config_file: str, source: str) -> Path:
    """A pipeline's part, in its sub-folder or, as in older repositories, at the root."""
    for candidate in (folder / name, folder):
        if (candidate / config_file).is_file():
            return candidate
    kind = {"unet": "UNet", "scheduler": "scheduler"}[name]
    raise TeacherError(
        f"teacher {source}: no {kind} in it (expected {name}/{config_file}, as DDPMPipeline.save_pretrained writes)"
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
