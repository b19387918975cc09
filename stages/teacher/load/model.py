"""Making one of diffusers' models from a configuration and safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkd.cache.errors import TeacherError, first_line
from advkd.stages.teacher.diffusers_api import diffusers

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention layers' names in files of diffusers before 0.15, such as google/ddpm-cifar10-32's, and today's."""


def load_model(config: Mapping[str, Any], weights: tuple[Path, ...], what: str) -> nn.Module:
    """A model of the class that its configuration names, in the precision in which it was saved.

    Args:
        config: with its `_class_name`.
        weights: files that together hold all tensors.
        what: what it is and whose, for messages.

    Raises:
        TeacherError: it can't be made from them.
    """
    from safetensors.torch import load_file

    try:
        kind = getattr(diffusers(), str(config["_class_name"]))
        with torch.device("meta"):  # random weights would only take time; this thread's alone
            model: nn.Module = kind.from_config(dict(config))
        if any(buffer.is_meta for buffer in model.buffers()):  # fixed filters and positions, which no file holds
            model = kind.from_config(dict(config))
        # Copied: a file that changes while it is mapped would change the model.
        tensors = {name: tensor.clone() for path in weights for name, tensor in load_file(path).items()}
    except Exception as error:  # whatever a foreign configuration makes diffusers, torch and safetensors raise
        raise TeacherError(f"{what} can't be loaded ({first_line(error)})") from error
    expected = model.state_dict()
    tensors = {_todays_name(name, expected): tensor for name, tensor in tensors.items()}
    wrong = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "mismatched": {
            name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape
        },
    }
    if any(wrong.values()):
        found = ", ".join(f"{len(names)} {kind} keys" for kind, names in wrong.items() if names)
        raise TeacherError(f"{what} has weights that don't fit its configuration ({found})")
    model.load_state_dict(tensors, assign=True)
    return model


def _todays_name(name: str, expected: Mapping[str, Tensor]) -> str:
    *path, layer, kind = name.split(".") if name.count(".") else ("", name)
    return name if name in expected or layer not in _OLD_NAMES else ".".join([*path, _OLD_NAMES[layer], kind])
