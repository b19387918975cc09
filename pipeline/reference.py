"""Every configuration key with its type, default and meaning, read from the dataclasses and their docstrings.

python -m advkd.pipeline.reference > docs/configuration.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from advkd.pipeline.config import Experiment

_HEAD = """# Configuration

An experiment is one YAML or JSON file with the keys below; a key that is left out has its default. The shipped ones are
in `configs/`, and `advkd-config NAME` prints one with every key and its meaning, to start your own from. On any command
that takes `--config`, `--set KEY=VALUE` changes a key as editing the file would, with sections joined by dots:
`--set train.steps=500` (the value is JSON, or else text). An unknown key is an error that names the nearest known one.

`dvc repro` asks for every section of the file (`pretrain: null` where the teacher comes from elsewhere).

This page is generated: `python -m advkd.pipeline.reference > docs/configuration.md`.
"""
_TYPES = {"str": "text", "float": "number", "bool": "true or false", "None": "null"}
_WIDTH = 110


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a section."""

    name: str
    kind: str
    """In a reader's words, such as `list of int or null`."""
    section: type | None
    """The dataclass of a key that holds keys itself."""
    default: str
    """As YAML; empty for a required key and for sections."""
    meaning: str


def keys_of(section: type) -> list[Key]:
    """A dataclass's keys in order."""
    hints, meanings = typing.get_type_hints(section), _docstrings(section)
    return [_key(item, hints[item.name], meanings.get(item.name, "")) for item in dataclasses.fields(section)]


def _key(item: dataclasses.Field[Any], hint: Any, meaning: str) -> Key:
    options = typing.get_args(hint) or (hint,)
    sections = (option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option))
    section = next(sections, None)
    words = re.sub(r"list\[(\w+)\]", r"list of \1", str(item.type)).replace(" | ", " or ")
    words = re.sub("|".join(rf"\b{python}\b" for python in _TYPES), lambda match: _TYPES[match[0]], words)
    default = "" if section else _yaml(item.default) if item.default is not dataclasses.MISSING else ""
    if not section and item.default_factory is not dataclasses.MISSING:
        default = _yaml(item.default_factory())
    return Key(name=item.name, kind=words, section=section, default=default, meaning=meaning)


def _docstrings(section: type) -> dict[str, str]:
    """The string literal below each attribute, inherited ones included."""
    classes = [base for base in reversed(section.__mro__) if dataclasses.is_dataclass(base)]
    bodies = [ast.parse(textwrap.dedent(inspect.getsource(base))).body[0] for base in classes]
    return {
        above.target.id: " ".join(below.value.value.split())
        for definition in bodies
        if isinstance(definition, ast.ClassDef)
        for above, below in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def _yaml(value: Any) -> str:
    if isinstance(value, str) and ":" in value:
        return json.dumps(value, ensure_ascii=False)  # seeds: once 0:64 becomes 16:32, YAML would take it for a number
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def markdown() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_section_lines(Experiment, "")])


def _section_lines(section: type, path: str) -> Iterator[str]:
    if path:
        yield f"## {path}\n\n{inspect.getdoc(section)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    keys = keys_of(section)
    for key in keys:
        kind, default = key.kind, f"`{key.default}`" if key.default else ""
        if key.section:
            anchor = f"{path}{key.name}".replace(".", "")
            null = " or null" if "null" in key.kind else ""
            kind = f"[keys](#{anchor}){null}"
        yield f"| `{key.name}` | {kind} | {default or ('' if key.section else 'required')} | {key.meaning} |"
    yield ""
    for key in keys:
        if key.section:
            yield from _section_lines(key.section, f"{path}.{key.name}".lstrip("."))


def template(experiment: Experiment, head: str) -> str:
    """An experiment as commented YAML, with every key."""
    return "\n".join([*_comment(head, ""), *_key_lines(experiment, "")]) + "\n"


def _key_lines(values: Any, indent: str) -> Iterator[str]:
    for key in keys_of(type(values)):
        value = getattr(values, key.name)
        nested = key.section is not None and value is not None
        line = f"{indent}{key.name}:" if nested else f"{indent}{key.name}: {_yaml(value)}"
        if not indent:
            yield ""
        if key.meaning and len(line) + len(key.meaning) + 4 <= _WIDTH:
            yield f"{line}  # {key.meaning}"
        else:
            yield from _comment(key.meaning, indent)
            yield line
        if nested:
            yield from _key_lines(value, f"{indent}  ")


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


if __name__ == "__main__":
    print(markdown(), end="")
