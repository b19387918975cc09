"""Stage 0 with classes: a network that is told the digits' labels, and a row for none."""

from pathlib import Path

import pytest
import torch
from torch import nn

from advkd.cache.errors import ConfigError
from advkd.stages.pretrain.config import ClassifierConfig, PretrainConfig
from advkd.stages.pretrain.run import sample_pipeline
from advkd.stages.pretrain.teacher import save_pipeline, train_teacher
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.config import TeacherConfig
from advkd.stages.teacher.load.loader import load_teacher

CPU = torch.device("cpu")
LABELS = torch.arange(24) % 10


def config(**changes: object) -> PretrainConfig:
    small = {"size": 8, "channels": [8, 16], "steps": 3, "batch_size": 8, "classes": True}
    return PretrainConfig(**{**small, **changes})  # type: ignore[arg-type]


def trained(settings: PretrainConfig, labels: torch.Tensor = LABELS) -> nn.Module:
    images = torch.linspace(-1, 1, 24)[:, None, None, None].expand(24, 1, 8, 8)
    return train_teacher(images, labels, settings, SilentReporter(), CPU)[0]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_labels_are_learned_reproducibly(path: str) -> None:
    settings = config(path=path)
    first = trained(settings)
    assert same(first, trained(settings))
    assert not same(first, trained(settings, LABELS.flip(0)))


def test_without_classes_labels_change_nothing() -> None:
    assert same(trained(config(classes=False)), trained(config(classes=False), LABELS.flip(0)))


@pytest.mark.parametrize(("null_share", "rows"), [(0.5, 11), (0.0, 10)])
def test_every_row_of_the_table_learns_the_null_row_too(null_share: float, rows: int) -> None:
    fresh, after = (trained(config(null_share=null_share, steps=steps, ema=0.0)) for steps in (1, 12))
    before, table = (network.get_parameter("class_embedding.weight") for network in (fresh, after))
    assert table.shape[0] == rows
    moved = (table - before).abs().amax(1)
    assert bool((moved > 2e-4).all())  # weight decay alone: a tenth


def test_its_folder_is_a_conditional_teacher(tmp_path: Path) -> None:
    from advkd.stages.pretrain.teacher import make_scheduler

    settings = config()
    save_pipeline(tmp_path, trained(settings), make_scheduler(settings))
    teacher = load_teacher(TeacherConfig(source=str(tmp_path), null_class=10), CPU)
    assert (teacher.num_classes, teacher.null_class) == (11, 10)
    images = sample_pipeline(tmp_path, 12, SilentReporter(), CPU, num_classes=10)
    assert images.shape == (12, 1, 8, 8) and bool(torch.isfinite(images).all())


def test_its_classes_are_compared_with_as_many_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real images hold few of most classes here; the teacher makes as many of each, and loses nothing by it."""
    from advkd.stages.pretrain import run

    data = run.load_dataset("digits", 8)
    rank = torch.stack([(data.labels[: row + 1] == label).sum() for row, label in enumerate(data.labels)])
    equal = data.images[rank <= 40]
    few = (data.labels < 2) | (rank <= 40)
    unequal = type(data)(*(values[few] for values in data))
    monkeypatch.setattr(run, "load_dataset", lambda *_: unequal)
    monkeypatch.setattr(run, "sample_pipeline", lambda *_: equal)
    settings = config(steps=1, classifier=ClassifierConfig(epochs=2, held_out=100))
    report = run.pretrain(settings, tmp_path / "classes")
    assert report.frechet_to_real < report.frechet_real_to_real
    monkeypatch.setattr(run, "_balanced", lambda labels: torch.ones(len(labels)))
    unweighted = run.pretrain(settings, tmp_path / "unweighted")
    assert unweighted.frechet_to_real > 2.0 * unweighted.frechet_real_to_real


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="null_share"):
        config(null_share=1.0)
