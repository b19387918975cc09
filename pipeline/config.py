"""One YAML or JSON file per experiment, mapped one to one onto the stages' dataclasses.

msgspec converts and checks types; an unknown key fails with the nearest known name. The files in `configs/` ship with
the package, so `--config configs/cifar10.yaml` (or `--config cifar10`) works outside a clone too.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml
from msgspec.inspect import DataclassType, Type, UnionType, type_info

from advkd.cache.errors import ConfigError
from advkd.stages.evaluate.config import EvaluateConfig
from advkd.stages.pretrain.config import PretrainConfig
from advkd.stages.student.config import TrainConfig
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig

DEFAULT_EXPERIMENT = "digits"
T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WORDS = {"object": "keys and values", "array": "a list", "float": "a finite number", "str": "text"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One experiment: a teacher, how its cache is built, how a student is trained and scored."""

    name: str
    """Names the experiment's files: `teachers/NAME`, `cache/NAME.zarr`, `runs/NAME`."""
    pretrain: PretrainConfig | None = None
    """How stage 0 trains the teacher; null if the teacher comes from elsewhere."""
    teacher: TeacherConfig
    """Which pipeline is the teacher."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the teacher is sampled."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Which seeds and states the cache records, and how it stores them."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the student is trained."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How the student is scored."""
    rebuild: bool = False
    """Allows `dvc repro` to remake a teacher or a cache that dvc.lock records but that is missing here. Without it the
    stage stops and names the `dvc pull` that fetches the files."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name: {self.name!r} can't name files; use letters, digits, '-', '_' and '.'")

    @property
    def store(self) -> Path:
        """The cache's default path."""
        return Path("cache") / f"{self.name}.zarr"

    @property
    def run(self) -> Path:
        """The training run's default path."""
        return Path("runs") / self.name

    @property
    def teacher_folder(self) -> Path:
        """The folder that stage 0 writes."""
        return Path("teachers") / self.name


def load_experiment(source: str | Path | None, overrides: Sequence[str] = ()) -> Experiment:
    """Load an experiment from a path or a shipped name; None loads the default one.

    Args:
        source: path of a YAML or JSON file, or the name of a shipped experiment.
        overrides: `KEY=VALUE` with dotted keys, as `--set` takes them; the result is that of editing the file.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown or a value invalid.
    """
    text, name = _read(str(source or DEFAULT_EXPERIMENT))
    try:
        value = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if name.endswith(".json") else "YAML"
        raise ConfigError(f"{name} is not {kind} ({' '.join(str(error).split())[:160]})") from None
    return _overridden(value, name, overrides)


def default_settings(overrides: Sequence[str] = ()) -> Experiment:
    """Every key's default, for commands without `--config`; name and teacher are placeholders."""
    return _overridden({"name": "defaults", "teacher": {"source": "none"}}, "the defaults", overrides)


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
    raise ConfigError(
        f"no configuration {source}: give a YAML or JSON file, or one of {', '.join(shipped_experiments())}"
    )


def _overridden(value: Any, name: str, overrides: Sequence[str]) -> Experiment:
    if overrides and isinstance(value, dict):
        for override in overrides:
            _override(value, override)
        name = f"{name} with {' '.join(f'--set {override}' for override in overrides)}"
    return from_dict(Experiment, value, name)


def _override(value: dict[str, Any], override: str) -> None:
    """Set one dotted key; the value is JSON where it parses as JSON (`0.5`, `[0, 50]`, `null`), else text."""
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    if not equals or not last:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as train.steps=500")
    for section in sections:
        if value.get(section) is None:
            value[section] = {}
        value = value[section]
        if not isinstance(value, dict):
            raise ConfigError(f"--set {override}: {section} holds {_as_json(value)}, no keys")
    try:
        value[last] = json.loads(text)
    except (ValueError, RecursionError):
        value[last] = text


def from_dict(cls: type[T], value: Any, where: str) -> T:
    """Build a dataclass from the values of a YAML or JSON file, checking keys and types.

    Raises:
        ConfigError: names the key, what was found and what was expected.
    """
    try:
        _check_keys(type_info(cls), value, "")
        return msgspec.convert(value, cls)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, value)}") from None


def _check_keys(kind: Type | None, value: Any, path: str) -> None:
    """Refuse what msgspec accepts in dataclasses: unknown keys, and numbers that are not finite."""
    at = f"{path}: " if path else ""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{at}expected a finite number, found {value}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_keys(None, item, f"{path}[{index}]")
    if not isinstance(value, dict):
        return
    options = kind.types if isinstance(kind, UnionType) else (kind,)
    section = next((option for option in options if isinstance(option, DataclassType)), None)
    fields = {item.name: item for item in section.fields} if section else {}
    for key, item in value.items():
        if section and key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            names = ", ".join(item.name for item in dataclasses.fields(section.cls))
            hint = f"did you mean {near[0]!r}?" if near else f"known are {names}"
            raise ConfigError(f"{at}unknown key {key!r}; {hint}")
        _check_keys(fields[key].type if section else None, item, f"{path}.{key}" if path else str(key))
    for name, known in fields.items():
        if known.required and name not in value:
            raise ConfigError(f"{at}{name!r} is missing")


def _explain(error: msgspec.ValidationError, value: Any) -> str:
    """msgspec's message in our words: the dotted key, what was expected, what was found."""
    message, _, path = str(error).partition(" - at `$")
    path = path.strip("`.")
    if isinstance(error.__cause__, ConfigError):
        # These messages often begin with their section's own name: "objective.huber_width: …" at train.objective.
        parent, _, section = path.rpartition(".")
        message = str(error.__cause__)
        return f"{parent}.{message}".lstrip(".") if message.startswith(section) else f"{path}: {message}"
    found = value
    for key, index in re.findall(r"([A-Za-z_]\w*)|\[(\d+)\]", path):
        found = found[key] if key else found[int(index)]
    kinds = re.findall(r"\w+", message.partition("`")[2].partition("`")[0])
    expected = " or ".join(_WORDS.get(kind, kind) for kind in kinds)
    at = f"{path}: " if path else ""
    return f"{at}expected {expected}, found {_as_json(found)}{_hint(kinds, found, path)}"


def _as_json(value: Any) -> str:
    """A value as files have it, cut to 100 characters; YAML's dates as text."""
    return json.dumps(value, ensure_ascii=False, default=str)[:100]


def _hint(kinds: list[str], found: Any, path: str) -> str:
    """How to write what was probably meant, where YAML read something else."""
    if "str" in kinds and isinstance(found, int | float):
        base_60 = path.endswith("seeds") and isinstance(found, int) and found >= 60
        meant = f"; unquoted, YAML reads {found // 60}:{found % 60:02d} as {found}" if base_60 else ""
        return f": quote it{meant}"
    if "array" in kinds and isinstance(found, str) and re.fullmatch(r"\d+(,\s*\d+)*", found):
        return f": write [{found}]"
    try:
        number = float(found)
    except (TypeError, ValueError):
        return ""
    if "int" in kinds and number.is_integer() and not isinstance(found, bool):
        return f": write {int(number)}"
    if "float" in kinds and isinstance(found, str) and math.isfinite(number):
        mantissa, e, exponent = found.lower().partition("e")
        if not e:
            return ": write it without quotes"
        point, sign = "" if "." in mantissa else ".0", "" if exponent[0] in "+-" else "+"
        return f": write {mantissa}{point}e{sign}{exponent}, which YAML reads as a number"
    return ""
