"""Caches made of other tools' files: what was exported comes back, the noise is data, and foreign files are refused."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkd.cache.care.summary import summarize
from advkd.cache.care.verify import verify
from advkd.cache.errors import CacheError, MismatchError, UsageError
from advkd.cache.format.recipe import NOT_RECORDED
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge
from advkd.cache.write.writer import CacheWriter
from advkd.pipeline.cli.cache import main as cache_command
from advkd.pipeline.cli.evaluate import main as evaluate_command
from advkd.pipeline.cli.train import main as train_command
from advkd.stages.exchange.export import export_cache
from advkd.stages.exchange.forms import FORMS, Rows
from advkd.stages.exchange.importing import import_cache
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.config import SamplerConfig
from tests.conftest import Invoke, settings
from tests.stages.teachers import save_conditional, save_ldm
from tests.stages.test_conditional_teachers import record
from tests.stores import tree, write_store

QUIET = SilentReporter()
SEEDS = np.arange(16)
VALUES = np.random.default_rng(0).normal(size=(24, 2, 1, 8, 8)).astype(np.float32)
LABELS = np.array([5, 0, 0, 2, 5, 5, 2, 0] * 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    """16 seeds of a class-conditional teacher by Euler, whose states are stored in other units than its own."""
    folder = tmp_path_factory.mktemp("importing")
    save_conditional(folder / "teacher")
    return record(folder / "teacher", folder / "a.zarr", SamplerConfig(name="euler", steps=5))


def save_pairs(folder: Path, **changes: Any) -> Path:
    """24 pairs in two shards, as another tool writes them."""
    folder.mkdir()
    arrays = {"noise": VALUES[:, 0], "image": np.tanh(VALUES[:, 1]), "label": LABELS, **changes}
    for name, rows in (("b", slice(10, 24)), ("a", slice(0, 10))):
        np.savez(folder / f"{name}.npz", **{key: value[rows] for key, value in arrays.items() if value is not None})
    return folder


@pytest.mark.parametrize("form", ["fastgen", "webdataset"])
def test_an_exported_path_comes_back_with_its_levels(cache: TrajectoryCache, tmp_path: Path, form: str) -> None:
    export_cache(cache, tmp_path / "out", form, QUIET, steps=[0, 1, 3, 5])
    import_cache(tmp_path / "out", tmp_path / "b.zarr", QUIET, block_size=8, accept_range=True)
    back = TrajectoryCache.open(tmp_path / "b.zarr")
    found, known = list(back.states.values()), [cache.states[step] for step in (0, 1, 3, 5)]
    assert [state.timestep for state in found] == [state.timestep for state in known]
    np.testing.assert_allclose(
        [[s.alpha, s.sigma, s.scale] for s in found], [[s.alpha, s.sigma, s.scale] for s in known], rtol=1e-4
    )
    for one, other in zip(found, known, strict=True):  # the way there and back rounds to the stored dtype twice
        np.testing.assert_allclose(back.rows(one.step, SEEDS), cache.rows(other.step, SEEDS), rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(back.labels(SEEDS), cache.labels(SEEDS))
    assert back.recipe.format == 2 and back.recipe.noise["rule"] == "stored" and not verify(back).findings
    assert back.recipe.teacher["tensors_sha256"] == NOT_RECORDED


def test_pairs_keep_their_bits_and_their_own_labels(tmp_path: Path) -> None:
    imported = import_cache(save_pairs(tmp_path / "pairs"), tmp_path / "a.zarr", QUIET, block_size=8)
    assert (imported.num_seeds, imported.num_present, imported.num_dropped) == (24, 0, 0)
    cache, seeds = TrajectoryCache.open(tmp_path / "a.zarr"), np.arange(24)
    assert cache.layout.dtype == "float32" and not verify(cache).findings
    np.testing.assert_array_equal(cache.rows(0, seeds), VALUES[:, 0])
    np.testing.assert_array_equal(cache.rows(1, seeds), np.tanh(VALUES[:, 1]))
    np.testing.assert_array_equal(cache.labels(seeds[::-1]), LABELS[::-1])
    condition = cache.recipe.condition
    assert condition is not None and (condition.num_classes, condition.labels) == (6, (0, 2, 5))


def test_pixels_of_eight_bits_become_minus_one_to_one(tmp_path: Path) -> None:
    pixels = np.arange(24 * 64, dtype=np.uint8).reshape(24, 1, 8, 8)
    import_cache(save_pairs(tmp_path / "pairs", image=pixels, label=None), tmp_path / "a.zarr", QUIET, block_size=8)
    cache = TrajectoryCache.open(tmp_path / "a.zarr")
    np.testing.assert_allclose(cache.rows(1, np.arange(24)), pixels / 127.5 - 1.0, atol=1e-6)
    assert cache.recipe.condition is None
    assert summarize(cache)["path"] == "not recorded"  # both ends lie on every path


def test_a_path_without_known_levels_gives_its_pairs_and_with_them_all(tmp_path: Path) -> None:
    rows = Rows(
        seeds=np.arange(16),
        path=np.stack([80 * VALUES[:16, 0], VALUES[:16, 1], np.tanh(VALUES[:16, 1])], axis=1),
        noise=VALUES[:16, 0],
        labels=None,
    )
    (tmp_path / "fg").mkdir()
    (tmp_path / "fg/00000.tar").write_bytes(FORMS["fastgen"].make(rows))
    import_cache(tmp_path / "fg", tmp_path / "pairs.zarr", QUIET, block_size=8)
    pairs = TrajectoryCache.open(tmp_path / "pairs.zarr")
    assert list(pairs.states) == [0, 1]
    np.testing.assert_array_equal(pairs.rows(0, SEEDS), VALUES[:16, 0])
    import_cache(tmp_path / "fg", tmp_path / "all.zarr", QUIET, levels=[(1.0, 80.0), (1.0, 2.0)], block_size=8)
    whole = TrajectoryCache.open(tmp_path / "all.zarr")
    assert list(whole.states) == [0, 1, 2]
    np.testing.assert_allclose(whole.rows(1, SEEDS) * whole.states[1].scale, VALUES[:16, 1], rtol=1e-6)
    labels = [[state.label for state in cache.states.values()] for cache in (pairs, whole)]
    assert labels == [["x_T", "x_0"], ["x_T", "σ=2", "x_0"]]
    assert whole.recipe.fingerprint != pairs.recipe.fingerprint
    for levels in ([(1.0, 80.0)], [(1.0, 2.0), (1.0, 80.0)]):
        with pytest.raises(UsageError, match="--levels"):
            import_cache(tmp_path / "fg", tmp_path / "none.zarr", QUIET, levels=levels, block_size=8)
    assert not (tmp_path / "none.zarr").exists()


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = save_pairs(tmp_path / "pairs")
    import_cache(pairs, tmp_path / "whole.zarr", QUIET, block_size=8)
    commit = CacheWriter.commit

    def killed(self: CacheWriter, block: int, *values: Any) -> Any:
        if block == 1:
            raise KeyboardInterrupt
        return commit(self, block, *values)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            import_cache(pairs, tmp_path / "parts.zarr", QUIET, block_size=8)
    assert import_cache(pairs, tmp_path / "parts.zarr", QUIET, block_size=8).num_present == 8
    assert tree(tmp_path / "parts.zarr") == tree(tmp_path / "whole.zarr")


def test_two_sources_are_never_one_cache(tmp_path: Path) -> None:
    for name, image in (("a", VALUES[:, 0]), ("b", VALUES[:, 1])):
        import_cache(save_pairs(tmp_path / name, image=np.tanh(image)), tmp_path / f"{name}.zarr", QUIET, block_size=8)
    a, b = (TrajectoryCache.open(tmp_path / f"{name}.zarr") for name in "ab")
    with pytest.raises(MismatchError, match="source_sha256"):
        merge([a, b], tmp_path / "both.zarr")
    with pytest.raises(MismatchError, match="source_sha256"):
        import_cache(tmp_path / "a", tmp_path / "b.zarr", QUIET, block_size=8)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"noise": 80 * VALUES[:, 0]}, CacheError, "standard deviation"),
        ({"image": 9 * VALUES[:, 1]}, CacheError, "beyond ±2"),
        ({"image": VALUES[:, 1, :, :4]}, CacheError, r"shape \(10, 1, 8, 8\), image \(10, 1, 4, 8\)"),
        ({"image": None}, CacheError, "expected noise and image"),
        ({"noise": np.array([{}] * 24)}, CacheError, "allow_pickle"),
        ({"label": LABELS * 0.5}, CacheError, "labels are float64"),
        ({"label": LABELS - 1}, CacheError, "class label -1"),
        ({"image": np.where(VALUES[:, 1] > 3, np.nan, np.tanh(VALUES[:, 1]))}, CacheError, "not finite"),
    ],
)
def test_what_can_not_be_a_trajectory_is_refused(tmp_path: Path, changes: Any, error: Any, named: str) -> None:
    with pytest.raises(error, match=named):
        import_cache(save_pairs(tmp_path / "pairs", **changes), tmp_path / "a.zarr", QUIET, block_size=8)


def test_nothing_in_a_shard_is_executed(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harmed",)

    (tmp_path / "fg").mkdir()
    with tarfile.open(tmp_path / "fg/0.tar", "w") as tar:
        for name in ("0.latent.pth", "0.noise.pth"):
            data = io.BytesIO()
            torch.save(Harm(), data) if name.startswith("0.l") else pickle.dump(Harm(), data)
            info = tarfile.TarInfo(name)
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    with pytest.raises(CacheError, match=r"0\.tar: no trajectories"):
        import_cache(tmp_path / "fg", tmp_path / "a.zarr", QUIET, block_size=8)
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "a.zarr").exists()


def test_what_no_student_can_learn_from_is_named(tmp_path: Path, invoke: Invoke) -> None:
    prompts = np.array(["a cat"] * 24)
    save_pairs(tmp_path / "pairs", prompt=prompts, label=None)
    said = invoke(cache_command, "import", tmp_path / "pairs", "--out", tmp_path / "a.zarr")
    assert said.exit_code == 0 and "left out, for no student learns from it: prompt" in said.output
    for name, members in (("a", {"0.latent.pth": b""}), ("b", {"0.txt": b"a cat", "0.cls": b"3"})):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        refused = invoke(cache_command, "import", tmp_path / name, "--out", tmp_path / "b.zarr")
        assert refused.exit_code == 1 and "no trajectories can be read from it" in refused.output
    assert "expected latent.pth and noise.pth, or path.npy" in refused.output


def test_latents_want_their_decoder_and_get_images(tmp_path: Path) -> None:
    save_ldm(tmp_path / "teacher")
    cache = record(tmp_path / "teacher", tmp_path / "a.zarr", SamplerConfig(steps=5))
    export_cache(cache, tmp_path / "out", "fastgen", QUIET)
    with pytest.raises(UsageError, match="--decoder"):
        import_cache(tmp_path / "out", tmp_path / "b.zarr", QUIET, block_size=8)
    import_cache(tmp_path / "out", tmp_path / "b.zarr", QUIET, block_size=8, decoder=str(tmp_path / "teacher"))
    back = TrajectoryCache.open(tmp_path / "b.zarr")
    assert back.recipe.space == cache.recipe.space and not verify(back).findings


def test_the_commands_train_and_score_from_an_imported_cache(tmp_path: Path, invoke: Invoke) -> None:
    store, run = str(tmp_path / "a.zarr"), str(tmp_path / "run")
    save_pairs(tmp_path / "pairs")
    imported = invoke(cache_command, "import", str(tmp_path / "pairs"), "--out", store)
    assert imported.exit_code == 0 and "24 seeds" in imported.output
    changes = ("student.width=4", "batch_size=4", "objective.adversarial.weight=0")
    small = settings(*(f"train.{change}" for change in changes))
    trained = invoke(train_command, "--cache", store, "--run", run, "--max-steps", "2", *small)
    assert trained.exit_code == 0, trained.output
    asked = ("set_size=8", "features=self", "real=null")
    scoring = settings(*(f"evaluate.{change}" for change in asked))
    scored = invoke(evaluate_command, "--run", run, "--cache", store, "--sets", "2", *scoring)
    assert scored.exit_code == 0 and "the cache was imported" in scored.output, scored.output
    assert TrajectoryCache.open(store).layout.block_size == 2
    assert "t not recorded, alpha = 0.0000" in invoke(cache_command, "info", store).output
    facts = json.loads(invoke(cache_command, "info", store, "--json").output)
    assert facts["noise"]["rule"] == "stored" and facts["teacher"]["source"] == NOT_RECORDED


def test_what_needs_the_rule_of_the_noise_says_why(tmp_path: Path, invoke: Invoke) -> None:
    store = str(tmp_path / "a.zarr")
    import_cache(save_pairs(tmp_path / "pairs"), Path(store), QUIET, block_size=8)
    before = tree(Path(store))
    for arguments in (["pack", store, "--out", str(tmp_path / "b.zarr")], ["verify", store, "--recompute", "1"]):
        refused = invoke(cache_command, *arguments)
        assert refused.exit_code == 2 and "x_T doesn't follow from the seeds" in refused.output
    assert tree(Path(store)) == before and not (tmp_path / "b.zarr").exists()


def test_a_folder_without_shards_is_no_source(tmp_path: Path, invoke: Invoke) -> None:
    write_store(tmp_path / "store.zarr")
    for folder in ("absent", "store.zarr"):
        refused = invoke(cache_command, "import", str(tmp_path / folder), "--out", str(tmp_path / "a.zarr"))
        assert refused.exit_code == 2 and refused.output.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"path_levels": [[1.0, "a"]]},
        {"path_levels": 3},
        {"path_steps": [0]},
        {"space": {}},
        {"path_timesteps": [None] * 6},
    ],
)
def test_an_index_that_was_changed_is_named(
    cache: TrajectoryCache, tmp_path: Path, invoke: Invoke, changes: dict[str, Any]
) -> None:
    export_cache(cache, tmp_path / "out", "webdataset", QUIET)
    index = tmp_path / "out/index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    refused = invoke(cache_command, "import", tmp_path / "out", "--out", tmp_path / "b.zarr")
    assert refused.exit_code == 2 and "is not what `advkd-cache export` wrote" in refused.output
    assert not (tmp_path / "b.zarr").exists()
