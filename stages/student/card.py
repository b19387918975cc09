"""A student's model card, written from its provenance; facts that are unknown are "not recorded".

huggingface_hub's `ModelCard` isn't used: saving a student works without that package. The provenance may come from an
untrusted folder, so text is cut to one line without markup, and numbers must be numbers.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import yaml

from advkd.stages.student.geometry import Geometry
from advkd.stages.student.provenance import Provenance

PAPER = "https://arxiv.org/abs/2405.20675"
MAX_ROWS = 40
COLUMNS = ("frechet", "precision", "recall")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]{1,39}")
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
        _use(name, geometry),
        _scores(_section(known, "scores")),
        _provenance(geometry, known),
        "## Limits\n\nThe student reproduces its teacher's images, including the teacher's faults and biases. It was "
        "trained on samples of the teacher, not on the teacher's training data. The teacher's licence says whether it "
        "restricts the use of its samples, and so of this student.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(geometry: Geometry, known: dict[str, Any]) -> dict[str, Any]:
    teacher = _section(known, "teacher")
    value: dict[str, Any] = {
        "library_name": "advkd",
        **({} if geometry.num_classes else {"pipeline_tag": "unconditional-image-generation"}),
        "tags": ["advkd", "diffusion-distillation", "one-step"],
    }
    license_id = str(teacher.get("license", "")).lower()
    if _LICENSE_ID.fullmatch(license_id):
        value["license"] = license_id
    if teacher.get("commit") and _HUB_ID.fullmatch(str(teacher.get("source"))):
        value["base_model"] = str(teacher["source"])
    return value


def _summary(kind: str, num_parameters: int, geometry: Geometry) -> str:
    channels, height, width = geometry.image_shape
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    return (
        f"A one-pass student of a diffusion model: **one** network evaluation makes a {height}×{width} {colours} image "
        f"where its teacher's sampler takes {geometry.steps[-1]} steps. Kind `{kind}`, {num_parameters:,} parameters, "
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
    teacher = _section(known, "teacher")
    cache, sampler, versions = (_section(known, name) for name in ("cache", "sampler", "versions"))
    commit = f", commit {_text(teacher['commit'])}" if teacher.get("commit") else ""
    rows = {
        "teacher": f"{_text(teacher.get('source', ''))}{commit}",
        "teacher's licence": _text(teacher.get("license", "")),
        "SHA-256 of the teacher's weights": _code(teacher.get("tensors_sha256")),
        "sampler": f"{_text(sampler['name'])}, {_text(sampler.get('steps'))} steps" if sampler.get("name") else "",
        "fingerprint of the cache": _code(cache.get("fingerprint")),
        "digest of its blocks": _code(cache.get("digest")),
        "seeds": _seeds(_section(known, "seeds"), cache),
        "noise": f"root seed {geometry.root_seed}, {geometry.noise_dtype}",
        "training steps": _text(known.get("step", "")),
        "training seed": _text(_section(known, "config").get("seed", "")),
        "versions": ", ".join(f"{_text(package)} {_text(number)}" for package, number in sorted(versions.items())),
    }
    lines = [f"| {label} | {value or 'not recorded'} |" for label, value in rows.items()]
    if known.get("config"):
        lines += ["", "`provenance.json` has the whole configuration."]
    return "\n".join(["## Provenance\n", "| | |", "|---|---|", *lines])


def _seeds(seeds: dict[str, Any], cache: dict[str, Any]) -> str:
    if {"first", "last", "num_training", "num_held_out"} <= seeds.keys():
        return (
            f"{_text(seeds['first'])} to {_text(seeds['last'])}: {_text(seeds['num_training'])} to train on, "
            f"{_text(seeds['num_held_out'])} held out"
        )
    blocks = cache.get("blocks")
    return f"blocks {_text(blocks[0])}:{_text(blocks[-1])}" if isinstance(blocks, list) and blocks else ""


def _scores(scores: dict[str, Any]) -> str:
    from advkd.stages.metrics.table import ScoreTable  # here, for a student without scores needs no SciPy

    protocol = _section(scores, "protocol")
    try:
        table = ScoreTable.from_json(dict(itertools.islice(_section(scores, "samplers").items(), MAX_ROWS)))
        rows = [cells[:-1] for cells in table.cells(COLUMNS)]  # without ahead or behind, which the interval says
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # they come from an untrusted folder
        return ""
    if not rows:
        return ""
    lines = [f"| {' | '.join([_text(name), *numbers])} |" for name, *numbers in rows]
    notes = [f"{_text(mark)} {_text(treatment)}." for mark, treatment in table.marks().items()]
    held_out = scores.get("held_out_mse")
    if isinstance(held_out, float):
        notes.append(f"Mean squared error to the teacher's images on held-out seeds: {held_out:.4f}.")
    return "\n\n".join(
        [
            "## Scores",
            "Fréchet distance to the teacher's own samples, mean ± standard deviation over "
            f"{_text(protocol.get('num_sets'))} sets of {_text(protocol.get('set_size'))} fresh seeds, against "
            f"{_text(protocol.get('num_reference'))} reference seeds, {_text(protocol.get('features'))} features; "
            "all samplers start from the same noise.",
            "| sampler | network evaluations | Fréchet distance | precision, % | recall, % "
            "| student minus this, 95 % |\n|---|---|---|---|---|---|\n" + "\n".join(lines),
            *notes,
        ]
    )


def _section(known: dict[str, Any], name: str) -> dict[str, Any]:
    value = known.get(name)
    return value if isinstance(value, dict) else {}


def _text(text: object) -> str:
    """One short line, without control characters and with markup escaped."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text)[:200])
    return _MARKUP.sub(lambda found: "\\" + found[0], " ".join(line.split()))


def _code(text: object) -> str:
    return f"`{text}`" if isinstance(text, str) and re.fullmatch(r"[0-9a-f]{8,128}", text) else ""


def _quoted(name: str) -> str:
    return "".join(letter for letter in name if letter.isprintable() and letter not in '"\\')
