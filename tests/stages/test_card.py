"""What a teacher's model card tells: licence, attribution, names of classes; malformed cards tell nothing."""

from pathlib import Path
from typing import Any

import pytest

from advkd.stages.teacher.load.card import MAX_CHARACTERS, TeacherCard


def read(folder: Path, text: str | None = None, index: Any = None) -> TeacherCard:
    if text is not None:
        (folder / "README.md").write_text(text, encoding="utf-8")
    return TeacherCard.read(folder, index or {})


@pytest.mark.parametrize(
    "card",
    [
        TeacherCard(),
        TeacherCard(license="mit"),
        TeacherCard(license="cc-by-sa-4.0", attribution="By Ü: 5 – #1", class_names={0: "faces", 12: "yes"}),
    ],
)
def test_it_reads_what_it_writes(tmp_path: Path, card: TeacherCard) -> None:
    assert read(tmp_path, card.to_markdown("Some text.")) == card
    assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith("---\n\nSome text.\n")


def test_dit_pipelines_name_their_classes_in_the_index(tmp_path: Path) -> None:
    """As facebook/DiT-XL-2-256's model_index.json; a card goes before it."""
    index = {"_class_name": "DiTPipeline", "id2label": {"0": "tench, Tinca tinca", "999": "toilet tissue", "x": "y"}}
    assert read(tmp_path, None, index) == TeacherCard(class_names={0: "tench, Tinca tinca", 999: "toilet tissue"})
    assert read(tmp_path, "---\nid2label: {0: tench}\n---\n", index).class_names == {0: "tench"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# A teacher\n",
        "---\nlicense: [\n---\n",
        "---\n- license\n---\n",
        "text\n---\nlicense: mit\n---\n",
        "---\nid2label: [a]\n---\n",
        f"---\n{'[' * 5000}\n---\n",
    ],
)
def test_malformed_cards_tell_nothing(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == TeacherCard()


def test_long_texts_are_cut(tmp_path: Path) -> None:
    card = read(tmp_path, f"---\nlicense: {'m' * 5000}\nid2label: {{1: {'n' * 5000}}}\n---\n")
    assert card == TeacherCard(license="m" * MAX_CHARACTERS, class_names={1: "n" * MAX_CHARACTERS})
