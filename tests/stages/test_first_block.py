"""A build stops before hours are spent on what can't be images."""

import json
from pathlib import Path

import pytest
import torch

from advkd.cache.errors import CacheError, TeacherError
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.teacher.build import recorder
from advkd.stages.teacher.build.build import build
from tests.stages.plans import plan_for
from tests.stores import tree


def test_nan_stops_the_build_and_leaves_the_committed_blocks(pipeline_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    build(plan_for(pipeline_folder, store, seeds="0:8"))
    before = tree(store)
    plan = plan_for(pipeline_folder, store, seeds="0:16")
    torch.nn.init.constant_(next(plan.teacher.network.parameters()), float("nan"))
    with pytest.raises(TeacherError, match=r"seeds 8:13 is not finite"):
        build(plan)
    assert TrajectoryCache.open(store).blocks == (0,)
    assert {name: data for name, data in tree(store).items() if "states/0" not in name or "/c/" in name}.items() <= (
        before.items()
    )


def test_constant_output_stops_at_the_first_block(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = recorder.record_states

    def constant(*arguments: object, **options: object) -> dict[int, torch.Tensor]:
        kept = original(*arguments, **options)  # type: ignore[arg-type]
        return {step: torch.full_like(states, 0.25) for step, states in kept.items()}

    monkeypatch.setattr(recorder, "record_states", constant)
    with pytest.raises(TeacherError, match=r"x_0 is constant over 8 seeds"):
        build(plan_for(pipeline_folder, tmp_path / "a.zarr"))
    assert not (tmp_path / "a.zarr").exists()


def with_images(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let the sampler's x_0 be this many times as large, in some pixels."""
    original = recorder.record_states

    def larger(*arguments: object, **options: object) -> dict[int, torch.Tensor]:
        kept = original(*arguments, **options)  # type: ignore[arg-type]
        images = kept[max(kept)].clone()
        images[..., 0] = factor
        return {**kept, max(kept): images}

    monkeypatch.setattr(recorder, "record_states", larger)


def test_values_that_are_no_images_stop_at_the_first_block(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One column of eight is 12.5 % of the values."""
    with_images(monkeypatch, 1.99)
    build(plan_for(pipeline_folder, tmp_path / "a.zarr", seeds="0:8"))
    for factor in (2.5, -600.0, 1e6):  # the last is infinite in float16
        with_images(monkeypatch, factor)
        with pytest.raises(TeacherError, match=r"12\.5% of x_0's values lie beyond ±2 .*--accept-range"):
            build(plan_for(pipeline_folder, tmp_path / "b.zarr"))
        assert not (tmp_path / "b.zarr").exists()


def test_a_range_that_was_accepted_is_in_the_provenance(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_images(monkeypatch, -600.0)
    build(plan_for(pipeline_folder, tmp_path / "a.zarr", seeds="0:8", accept_range=True))
    note = json.loads((tmp_path / "a.zarr/provenance/block-000000.json").read_text())
    accepted = note["accepted_range"]
    assert (accepted["minimum"], accepted["share_beyond_2"]) == (-600.0, 0.125) and accepted["maximum"] <= 2.0


def test_an_accepted_range_ends_at_what_float16_holds(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_images(monkeypatch, 1e6)
    with pytest.raises(CacheError, match="states/0004 of seeds 0:8 has 64 values that are not finite"):
        build(plan_for(pipeline_folder, tmp_path / "a.zarr", seeds="0:8", accept_range=True))
    assert TrajectoryCache.open(tmp_path / "a.zarr").blocks == ()
