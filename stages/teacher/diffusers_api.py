"""What both doors to diffusers share: the library itself, and its configurations as JSON."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor


def diffusers() -> Any:
    """The library, without its log lines and progress bars; imported when first needed, since that takes seconds."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def json_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON values, without diffusers' own bookkeeping (`_class_name`, `_diffusers_version`, …)."""
    return {key: _json_value(value) for key, value in config.items() if not key.startswith("_")}


def recorded_config(config: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The same as JSON without what later versions of diffusers add when they save it, as long as it is neutral.

    Args:
        config: with its `_class_name`.
        known: the options that a recipe records whatever their values.
    """
    cls = getattr(diffusers(), str(config.get("_class_name")), object)
    defaults = {name: _json_value(option.default) for name, option in inspect.signature(cls).parameters.items()}
    missing = object()
    return {
        key: value for key, value in json_config(config).items() if key in known or value != defaults.get(key, missing)
    }


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, np.ndarray | Tensor):
        return _json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
