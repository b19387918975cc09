"""What is known of a student, as text for people: the model card and the page show it.

The provenance may come from an untrusted folder, so each text is cut to one line without control characters, and
numbers must be numbers. Markup isn't escaped: that depends on where the text goes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

from advkd.stages.student.geometry import Geometry
from advkd.stages.student.provenance import Provenance

PAPER = "https://arxiv.org/abs/2405.20675"
NOT_RECORDED = "not recorded"
MAX_ROWS = 40
MAX_CHARACTERS = 200
COLUMNS = ("frechet", "precision", "recall")
SCORE_HEADINGS = (
    "sampler",
    "network evaluations",
    "Fréchet distance",
    "precision, %",
    "recall, %",
    "student minus this, 95 %",
)
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]{1,39}")
_HASH = re.compile(r"[0-9a-f]{8,128}")


def line(text: object) -> str:
    """One short line, without control characters and marks that turn the direction of what follows."""
    letters = "".join(letter if letter.isprintable() else " " for letter in str(text)[:MAX_CHARACTERS])
    return " ".join(letters.split())


def is_hash(text: object) -> bool:
    """Whether it is a digest in hexadecimal digits."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


def section(known: dict[str, Any], name: str) -> dict[str, Any]:
    """A member of the provenance that should be an object; empty if it isn't."""
    value = known.get(name)
    return value if isinstance(value, dict) else {}


def license_id(known: Provenance) -> str | None:
    """The teacher's licence as the Hub names it; None if it is unknown, or no such name."""
    name = str(section(known, "teacher").get("license", "")).lower()
    return name if _LICENSE_ID.fullmatch(name) else None


def attribution(known: Provenance) -> str | None:
    """Whom to name beside the student's images, as the teacher's licence asks; None if nothing is known."""
    return line(section(known, "teacher").get("attribution", "")) or None


def class_names(known: Provenance, labels: Iterable[int]) -> list[str]:
    """What to call classes: as the teacher does, else by their numbers."""
    names = section(section(known, "teacher"), "class_names")
    return [line(names.get(str(label), "")) or str(label) for label in labels]


def what_it_makes(geometry: Geometry) -> str:
    """Its images in words, such as "16×16 grey image"."""
    channels, height, width = geometry.image_shape
    return f"{height}×{width} {({1: 'grey', 3: 'RGB'}).get(channels, f'{channels}-channel')} image"


def provenance_facts(geometry: Geometry, known: Provenance) -> dict[str, str]:
    """Where the student comes from, by name; what is unknown is `NOT_RECORDED`."""
    teacher = section(known, "teacher")
    cache, sampler, versions = (section(known, name) for name in ("cache", "sampler", "versions"))
    commit = f", commit {line(teacher['commit'])}" if teacher.get("commit") else ""
    facts = {
        "teacher": f"{line(teacher.get('source', ''))}{commit}",
        "teacher's licence": line(teacher.get("license", "")),
        **({"attribution": said} if (said := attribution(known)) else {}),
        "SHA-256 of the teacher's weights": _hash(teacher.get("tensors_sha256")),
        "sampler": f"{line(sampler['name'])}, {line(sampler.get('steps'))} steps" if sampler.get("name") else "",
        "fingerprint of the cache": _hash(cache.get("fingerprint")),
        "digest of its blocks": _hash(cache.get("digest")),
        "seeds": _seeds(section(known, "seeds"), cache),
        "noise": f"root seed {geometry.root_seed}, {geometry.noise_dtype}",
        "training steps": line(known.get("step", "")),
        "training seed": line(section(known, "config").get("seed", "")),
        "versions": ", ".join(f"{line(package)} {line(number)}" for package, number in sorted(versions.items())),
    }
    return {name: value or NOT_RECORDED for name, value in facts.items()}


def _hash(text: object) -> str:
    return str(text) if is_hash(text) else ""


def _seeds(seeds: dict[str, Any], cache: dict[str, Any]) -> str:
    if {"first", "last", "num_training", "num_held_out"} <= seeds.keys():
        return (
            f"{line(seeds['first'])} to {line(seeds['last'])}: {line(seeds['num_training'])} to train on, "
            f"{line(seeds['num_held_out'])} held out"
        )
    blocks = cache.get("blocks")
    return f"blocks {line(blocks[0])}:{line(blocks[-1])}" if isinstance(blocks, list) and blocks else ""


def score_rows(known: Provenance) -> list[list[str]]:
    """The scores' table, a cell per heading of `SCORE_HEADINGS`; empty if the student has none that can be read."""
    from advkd.stages.metrics.table import ScoreTable  # here, for a student without scores needs no SciPy

    samplers = section(section(known, "scores"), "samplers")
    try:
        table = ScoreTable.from_json(dict(itertools.islice(samplers.items(), MAX_ROWS)))
        cells = table.cells(COLUMNS)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # they come from an untrusted folder
        return []
    return [[line(name), *numbers] for name, *numbers, _ in cells]  # without ahead or behind, which the interval says


def score_notes(known: Provenance) -> tuple[str, list[str]]:
    """How the scores were measured, and what the table doesn't say."""
    from advkd.stages.metrics.table import ScoreTable

    scores = section(known, "scores")
    protocol = section(scores, "protocol")
    table = ScoreTable.from_json(dict(itertools.islice(section(scores, "samplers").items(), MAX_ROWS)))
    notes = [f"{mark} {line(treatment)}." for mark, treatment in table.marks().items()]
    held_out = scores.get("held_out_mse")
    if isinstance(held_out, float):
        notes.append(f"Mean squared error to the teacher's images on held-out seeds: {held_out:.4f}.")
    how = (
        "Fréchet distance to the teacher's own samples, mean ± standard deviation over "
        f"{line(protocol.get('num_sets'))} sets of {line(protocol.get('set_size'))} fresh seeds, against "
        f"{line(protocol.get('num_reference'))} reference seeds, {line(protocol.get('features'))} features; "
        "all samplers start from the same noise."
    )
    return how, notes
