"""One YAML file per experiment, mapped one to one onto the stages' dataclasses.

An unknown key fails with the nearest known name; a wrong type says what was expected. The files in `configs/` ship
with the package, so `--config configs/cifar10.yaml` (or `--config cifar10`) works outside a clone too.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from advkd.cache.errors import ConfigError
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.pretrain.config import PretrainConfig
from advkd.stages.student.config import TrainConfig
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig

DEFAULT_EXPERIMENT = "digits"
T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Everything that one experiment says."""

    name: str
    """Names its files: cache/NAME.zarr, runs/NAME, teachers/NAME."""
    pretrain: PretrainConfig | None = None
    """How stage 0 makes the teacher; null where the teacher comes from elsewhere."""
    teacher: TeacherConfig
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rebuild: bool = False
    """The yes that lets `dvc repro` make a teacher or a cache again that dvc.lock says was made before and that is
    merely not here. Without it such a stage says how to fetch it."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name: {self.name!r} can't name files; use letters, digits, '-', '_' and '.'")

    @property
    def store(self) -> Path:
        """Where the cache goes unless told otherwise."""
        return Path("cache") / f"{self.name}.zarr"

    @property
    def run(self) -> Path:
        """Where the student goes unless told otherwise."""
        return Path("runs") / self.name

    @property
    def teacher_folder(self) -> Path:
        """What stage 0 writes."""
        return Path("teachers") / self.name


def load_experiment(source: str | Path | None) -> Experiment:
    """Load an experiment from a path or a shipped name; the default one from None.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or an impossible value.
    """
    text, name = _read(str(source or DEFAULT_EXPERIMENT))
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name} is not YAML ({' '.join(str(error).split())[:160]})") from None
    return from_plain(Experiment, value, name)


def shipped_experiments() -> list[str]:
    """Names of the experiments in the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in resources.files("advkd.configs").iterdir()
        if path.name.endswith(".yaml")
    )


def _read(source: str) -> tuple[str, str]:
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(), source
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source} can't be read ({error})") from None
    name = path.name.removesuffix(".yaml")
    if name in shipped_experiments() and source in (name, f"{name}.yaml", f"configs/{name}.yaml"):
        return (resources.files("advkd.configs") / f"{name}.yaml").read_text(), source
    raise ConfigError(f"no configuration {source}: give a YAML file, or one of {', '.join(shipped_experiments())}")


def from_plain(cls: type[T], value: Any, where: str) -> T:
    """Build a dataclass from plain YAML values, checking keys and types.

    Raises:
        ConfigError: naming the key, what was found and what was expected.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected keys and values, found {value!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{where}: {name!r} is missing")
    arguments = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in value.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        matching = [option for option in options if option is not type(None) and _fits(option, value)]
        if not matching:
            raise ConfigError(f"{where}: expected {_describe(hint)}, found {value!r}")
        return _convert(matching[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where)
    if not _fits(hint, value):
        raise ConfigError(f"{where}: expected {_describe(hint)}, found {value!r}")
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    origin = typing.get_origin(hint)
    if origin is list:
        (item,) = typing.get_args(hint)
        return isinstance(value, list) and all(_fits(item, element) for element in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if hint is float:
        return "a finite number"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def to_plain(value: Any) -> Any:
    """The resolved configuration as plain values, for JSON beside a result."""
    return dataclasses.asdict(value)
