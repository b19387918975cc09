"""A student's model card, written from its provenance; facts that are unknown are "not recorded".

huggingface_hub's `ModelCard` isn't used: saving a student works without that package. Markup in texts of the
provenance, which may come from an untrusted folder, is escaped.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from advkd.stages.student.facts import (
    PAPER,
    SCORE_HEADINGS,
    attribution,
    is_hash,
    license_id,
    line,
    provenance_facts,
    score_notes,
    score_rows,
    section,
    what_it_makes,
)
from advkd.stages.student.geometry import Geometry
from advkd.stages.student.provenance import Provenance

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MARKUP = re.compile(r"[\\`*_|<>\[\]#]")


def model_card(name: str, kind: str, num_parameters: int, geometry: Geometry, known: Provenance) -> str:
    """The card as Markdown, with the Hub's metadata as front matter.

    Args:
        name: of the repository or folder.
        kind: of student.
        num_parameters: that a sample needs.
        geometry: of the student.
        known: its provenance; may be incomplete.
    """
    parts = [
        f"---\n{yaml.safe_dump(_metadata(geometry, known), sort_keys=False)}---",
        f"# {_text(name.split('/')[-1])}",
        _summary(kind, num_parameters, geometry),
        _escaped(attribution(known) or ""),
        _use(name, geometry),
        _scores(known),
        _provenance(geometry, known),
        "## Limits\n\nThe student reproduces its teacher's images, including the teacher's faults and biases. It was "
        "trained on samples of the teacher, not on the teacher's training data. The teacher's licence says whether it "
        "restricts the use of its samples, and so of this student.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(geometry: Geometry, known: dict[str, Any]) -> dict[str, Any]:
    teacher = section(known, "teacher")
    value: dict[str, Any] = {
        "library_name": "advkd",
        **({} if geometry.num_classes else {"pipeline_tag": "unconditional-image-generation"}),
        "tags": ["advkd", "diffusion-distillation", "one-step"],
    }
    license_name = license_id(known)
    if license_name:
        value["license"] = license_name
    if teacher.get("commit") and _HUB_ID.fullmatch(str(teacher.get("source"))):
        value["base_model"] = str(teacher["source"])
    return value


def _summary(kind: str, num_parameters: int, geometry: Geometry) -> str:
    return (
        f"A one-pass student of a diffusion model: **one** network evaluation makes a {what_it_makes(geometry)} where "
        f"its teacher's sampler takes {geometry.steps[-1]} steps. Kind `{kind}`, {num_parameters:,} parameters, "
        f"{len(geometry.levels) - 1} submodules, one per recorded state of the teacher's trajectories; trained with "
        f"advkd, after [Adv-KD]({PAPER})." + _classes_and_space(geometry)
    )


def _classes_and_space(geometry: Geometry) -> str:
    said = f" It draws the classes {geometry.known_labels}." if geometry.num_classes else ""
    if geometry.space is None:
        return said
    shape = "×".join(map(str, geometry.item_shape))
    return f"{said} It makes latents of {shape}; the teacher's own decoder (`{geometry.space.decoder}`) comes with it."


def _use(name: str, geometry: Geometry) -> str:
    shape = ", ".join(map(str, geometry.image_shape))
    call, network = "batch_size=4", "student(student.noise([0, 1]))"
    if geometry.num_classes:
        call = f"class_labels={[geometry.labels[index % len(geometry.labels)] for index in range(4)]}"
        network = "student(student.noise([0, 1]), student.labels([0, 1]))"
    if geometry.space is not None:
        network = f"student.decode({network})"
    return (
        "## Use\n\n```python\nfrom advkd.stages.student.pipeline import StudentPipeline\n\n"
        f'pipe = StudentPipeline.from_pretrained("{_quoted(name)}")\n'
        f"images = pipe({call}).images  # PIL images; the arguments are a DDPMPipeline's\n"
        "same = pipe(seeds=[0, 1, 2, 3]).images  # from the teacher's noise for these seeds\n```\n\n"
        "Or as a network:\n\n```python\nfrom advkd.stages.student.hub import Student\n\n"
        f'student = Student.from_pretrained("{_quoted(name)}")\n'
        f"x_0 = {network}  # (2, {shape}), about [-1, 1]\n```\n\n"
        "Loading runs no code from this repository: config.json names the architecture, the weights are safetensors."
    )


def _provenance(geometry: Geometry, known: Provenance) -> str:
    facts = provenance_facts(geometry, known).items()
    lines = [f"| {name} | {f'`{value}`' if is_hash(value) else _text(value)} |" for name, value in facts]
    if known.get("config"):
        lines += ["", "`provenance.json` has the whole configuration."]
    return "\n".join(["## Provenance\n", "| | |", "|---|---|", *lines])


def _scores(known: Provenance) -> str:
    rows = score_rows(known)
    if not rows:
        return ""
    how, notes = score_notes(known)
    lines = [
        f"| {' | '.join(SCORE_HEADINGS)} |",
        f"{'|---' * len(SCORE_HEADINGS)}|",
        *(f"| {' | '.join([_escaped(name), *numbers])} |" for name, *numbers in rows),
    ]
    return "\n\n".join(["## Scores", _escaped(how), "\n".join(lines), *map(_escaped, notes)])


def _text(text: object) -> str:
    """One short line with markup escaped."""
    return _escaped(line(text))


def _escaped(text: str) -> str:
    return _MARKUP.sub(lambda found: "\\" + found[0], text)


def _quoted(name: str) -> str:
    return "".join(letter for letter in name if letter.isprintable() and letter not in '"\\')
