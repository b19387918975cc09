"""Caches for other tools: read back by the tools themselves, equal to what the cache holds."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from webdataset.autodecode import Decoder, handle_extension
from webdataset.tariterators import group_by_keys, tar_file_expander

from advkd.cache.errors import NotCachedError, UsageError
from advkd.cache.files.durable import write_atomically
from advkd.cache.read.reader import TrajectoryCache
from advkd.pipeline.cli.cache import main as cache_command
from advkd.stages.exchange import export as module
from advkd.stages.exchange.export import export_cache
from advkd.stages.reporter import SilentReporter
from advkd.stages.teacher.config import SamplerConfig
from tests.conftest import Invoke
from tests.stages.teachers import save_conditional
from tests.stages.test_conditional_teachers import record
from tests.stores import tree, write_store


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    """16 seeds of a class-conditional teacher by Euler, whose states are stored in other units than its own."""
    folder = tmp_path_factory.mktemp("exchange")
    save_conditional(folder / "teacher")
    return record(folder / "teacher", folder / "a.zarr", SamplerConfig(name="euler", steps=5))


def read(folder: Path) -> list[dict[str, Any]]:
    """The samples of all shards, as webdataset's own loader gives them; tensors without pickled code."""
    tensor = handle_extension("pth", lambda data: torch.load(io.BytesIO(data), weights_only=True))
    decode, samples = Decoder([tensor]), []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as shard:
            samples += [
                decode(sample) for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": shard}]))
            ]
    return samples


def values(cache: TrajectoryCache, step: int) -> np.ndarray:
    return cache.rows(step, np.arange(16)) * np.float32(cache.states[step].scale)


def test_webdataset_reads_whole_paths(cache: TrajectoryCache, tmp_path: Path) -> None:
    export_cache(cache, tmp_path / "out", "webdataset", SilentReporter())
    samples = read(tmp_path / "out")
    assert [sample["json"]["seed"] for sample in samples] == [*range(16)]
    assert [sample["cls"] for sample in samples] == cache.labels(np.arange(16)).tolist()
    paths = np.stack([sample["path.npy"] for sample in samples])
    for place, step in enumerate(cache.states):
        np.testing.assert_array_equal(paths[:, place], values(cache, step))
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["path_steps"] == [0, 1, 2, 3, 4, 5] and index["path_timesteps"][-1] == -1
    alpha, sigma = np.array(index["path_levels"]).T
    assert sigma[0] > 10 and alpha[-1] == 1.0 and sigma[-1] == 0.0
    assert index["fingerprint"] == cache.recipe.fingerprint and index["path_kind"] == "variance exploding"


def test_fastgen_gets_the_names_and_shapes_that_it_documents(cache: TrajectoryCache, tmp_path: Path) -> None:
    """Paths of four states for its multi-step distillation: the first is the noise, the image isn't among them."""
    export_cache(cache, tmp_path / "out", "fastgen", SilentReporter(), steps=[0, 1, 2, 4, 5])
    assert all(path.stem.isdigit() for path in (tmp_path / "out").glob("*.tar"))
    samples = read(tmp_path / "out")
    assert len(samples) == 16 and samples[0]["path.pth"].shape == (4, 1, 8, 8)
    latents, noise, labels = (
        torch.stack([one[f"{key}.pth"] for one in samples]) for key in ("latent", "noise", "label")
    )
    np.testing.assert_array_equal(latents.numpy(), values(cache, 5))
    np.testing.assert_array_equal(noise.numpy(), cache.rows(0, np.arange(16)))
    assert labels.dtype == torch.int64 and labels.tolist() == cache.labels(np.arange(16)).tolist()
    paths = torch.stack([sample["path.pth"] for sample in samples]).numpy()
    for place, step in enumerate([0, 1, 2, 4]):
        np.testing.assert_array_equal(paths[:, place], values(cache, step))
    assert json.loads((tmp_path / "out/index.json").read_text())["path_steps"] == [0, 1, 2, 4]


def test_pairs_are_npz(cache: TrajectoryCache, tmp_path: Path) -> None:
    exported = export_cache(cache, tmp_path / "out", "npz", SilentReporter(), seeds="3:11")
    assert (exported.num_seeds, exported.num_shards) == (8, 2)
    parts = [dict(np.load(path, allow_pickle=False)) for path in sorted((tmp_path / "out").glob("*.npz"))]
    assert [len(part["seed"]) for part in parts] == [5, 3]
    seeds = np.concatenate([part["seed"] for part in parts])
    assert seeds.tolist() == [*range(3, 11)]
    np.testing.assert_array_equal(np.concatenate([part["noise"] for part in parts]), cache.rows(0, seeds))
    np.testing.assert_array_equal(np.concatenate([part["image"] for part in parts]), cache.rows(5, seeds))
    assert np.concatenate([part["label"] for part in parts]).tolist() == cache.labels(seeds).tolist()


@pytest.mark.parametrize("form", ["npz", "webdataset", "fastgen"])
def test_a_killed_export_goes_on_to_the_same_bytes(
    cache: TrajectoryCache, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_cache(cache, tmp_path / "whole", form, SilentReporter())
    written = []

    def killed(path: Path, parts: list[bytes]) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_atomically(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            export_cache(cache, tmp_path / "parts", form, SilentReporter())
    again = export_cache(cache, tmp_path / "parts", form, SilentReporter())
    assert (again.num_shards, again.num_present) == (2, 1)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_without_classes_there_are_no_labels(tmp_path: Path) -> None:
    write_store(tmp_path / "a.zarr", "0:64")
    export_cache(TrajectoryCache.open(tmp_path / "a.zarr"), tmp_path / "out", "fastgen", SilentReporter())
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"latent.pth", "noise.pth", "path.pth"}


def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    cache: TrajectoryCache, tmp_path: Path, invoke: Invoke
) -> None:
    with pytest.raises(UsageError, match="must include x_T and x_0, the states after 0 and 5 steps"):
        export_cache(cache, tmp_path / "out", "webdataset", SilentReporter(), steps=[0, 3])
    with pytest.raises(NotCachedError, match="none of the seeds 40:50"):
        export_cache(cache, tmp_path / "out", "npz", SilentReporter(), seeds="40:50")
    assert not (tmp_path / "out").exists()
    arguments = (cache_command, "export", cache.address, "--out", "mine", "--format")
    assert invoke(*arguments, "npz").output == "mine: 16 seeds in 2 shards\n"
    assert invoke(*arguments, "npz").output == "mine: 16 seeds in 2 shards, 2 of which were there\n"
    other = invoke(*arguments, "fastgen")
    assert other.exit_code == 2 and "holds something other than this export" in other.output
    Path("theirs").mkdir()
    Path("theirs/file").write_text("x")
    assert invoke(cache_command, "export", cache.address, "--out", "theirs", "--format", "npz").exit_code == 2
    assert [path.name for path in Path("theirs").iterdir()] == ["file"]
