"""Applies the flags of `advkd-cache build` to an experiment, and names the store accordingly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from advkd.cache.errors import UsageError
from advkd.pipeline.config import Experiment
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.path.solvers import find_solver

_SECTIONS = {
    "teacher": ("teacher", "source"),
    "sampler": ("sampler", "name"),
    "steps": ("sampler", "steps"),
    "eta": ("sampler", "eta"),
    "spacing": ("sampler", "spacing"),
    "guidance": ("sampler", "guidance"),
    "labels": ("cache", "labels"),
    "record": ("cache", "record"),
    "prompts": ("cache", "prompts"),
    "seeds_per_prompt": ("cache", "seeds_per_prompt"),
    "height": ("sampler", "height"),
    "width": ("sampler", "width"),
    "seeds": ("cache", "seeds"),
    "block_size": ("cache", "block_size"),
    "batch_size": ("cache", "batch_size"),
    "dtype": ("cache", "dtype"),
    "precision": ("cache", "precision"),
    "device": ("cache", "device"),
    "accept_range": ("cache", "accept_range"),
    "keep_weights": ("cache", "keep_weights"),
}
_NAMING = (
    "teacher",
    "sampler",
    "steps",
    "eta",
    "spacing",
    "guidance",
    "labels",
    "prompts",
    "seeds_per_prompt",
    "height",
    "width",
    "record",
    "block_size",
    "dtype",
    "precision",
)
"""Flags that change the recipe or layout; the store's name gets a suffix for each, or it would collide with the
configured store."""
_PREFIXES = {
    "block_size": "block",
    "eta": "eta",
    "guidance": "guidance",
    "seeds_per_prompt": "each",
    "height": "height",
    "width": "width",
}


def with_flags(experiment: Experiment, flags: dict[str, Any]) -> tuple[Experiment, str]:
    """Replace the values that flags give.

    Args:
        experiment: as configured.
        flags: value by flag name; None if a flag was not given.

    Returns:
        The changed experiment, and the suffix of its store's name.
    """
    suffix = ""
    for flag, (section_name, key) in _SECTIONS.items():
        value = flags.get(flag)
        if flag == "sampler" and value is not None:
            find_solver(value)
        if flag == "record" and value is not None:
            value = parse_record(value)
        if flag == "labels" and value is not None:
            value = parse_labels(value)
        section: Any = getattr(experiment, section_name)
        if value is None or value == getattr(section, key):
            continue
        if flag == "teacher":  # another one has a revision and files of its own
            section = TeacherConfig(source=value)
        section = dataclasses.replace(section, **{key: value})
        experiment = dataclasses.replace(experiment, **{section_name: section})
        if flag in _NAMING:
            suffix += _label(flag, value)
    return experiment, suffix


def _label(flag: str, value: Any) -> str:
    if flag == "teacher":
        return f"-{Path(value).name}"
    if flag == "prompts":
        return f"-{Path(value).stem}"
    if flag in ("record", "labels"):
        return f"-{flag}{'_'.join(map(str, value)) if isinstance(value, list) else value}"
    return f"-{_PREFIXES.get(flag, '')}{value}"


def parse_record(text: str) -> int | list[int]:
    """Read `--record`: a count, or a comma-separated list of solver steps.

    Raises:
        UsageError: neither.
    """
    try:
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise UsageError(f"record {text!r}: expected a number of states, or steps such as 10,20,50") from None


def parse_labels(text: str) -> str | list[int]:
    """Read `--labels`: `all`, or a comma-separated list of class labels.

    Raises:
        UsageError: neither.
    """
    try:
        return text if text == "all" else [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"labels {text!r}: expected all, or labels such as 0,3") from None


def needs_pretraining(experiment: Experiment) -> bool:
    """Whether stage 0 makes the teacher and has not run yet."""
    source = Path(experiment.teacher.source)
    return experiment.pretrain is not None and experiment.teacher_folder in source.parents and not source.is_dir()
