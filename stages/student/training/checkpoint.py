"""Checkpoints: one safetensors file, scalars as JSON in its header. Atomic, and no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from advkd.cache.errors import TrainingError
from advkd.cache.files.durable import write_atomically

Modules = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Optimizer]


def save_checkpoint(path: Path, modules: Modules, optimizers: Optimizers, scalars: Mapping[str, Any]) -> None:
    """Write the whole state of a training run; the previous checkpoint stays until this one is durable."""
    tensors: dict[str, Tensor] = {}
    groups: dict[str, Any] = {}
    for name, module in modules.items():
        tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()
        groups[name] = state["param_groups"]
        for index, values in state["state"].items():
            tensors |= {f"{name}/{index}/{key}": value for key, value in values.items()}
    header = {"scalars": json.dumps(dict(scalars)), "groups": json.dumps(groups)}
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, [save(contiguous, metadata=header)])


def read_scalars(path: Path) -> dict[str, Any]:
    """The scalars of a checkpoint.

    Raises:
        TrainingError: it can't be read.
    """
    return dict(_open(path)[0])


def load_checkpoint(path: Path, modules: Modules, optimizers: Optimizers) -> None:
    """Load a checkpoint's state into modules and optimizers of the same structure.

    Raises:
        TrainingError: it can't be read, or belongs to another structure.
    """
    _, groups, tensors = _open(path)
    try:
        for name, module in modules.items():
            prefix = f"{name}/"
            module.load_state_dict(
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            )
        for name, optimizer in optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"{name}/"):
                    _, index, field = key.split("/")
                    state.setdefault(int(index), {})[field] = value
            optimizer.load_state_dict({"state": state, "param_groups": groups[name]})
    except (KeyError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{path} is the checkpoint of another run ({str(error)[:160]})") from None


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(header["scalars"]), json.loads(header["groups"]), tensors
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(f"{path} can't be read as a checkpoint ({error})") from None
