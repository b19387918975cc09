"""A cache on the Hub: pushed in commits of whole blocks, opened by its address, extended without sending twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from advkd.cache.format.condition import ClassCondition
from advkd.cache.read.reader import TrajectoryCache
from advkd.stages.exchange import push as module
from advkd.stages.exchange.card import cache_card
from tests.pipeline.servers import model_hub
from tests.stores import tree, write_store

ADDRESS = "hf://datasets/me/toy"
NOTES = {"README.md", "preview.png"}


def advkd_cache(folder: Path, hub: str, *arguments: object, token: str = "hf_secret") -> tuple[int, str]:
    """`advkd-cache` in a process, since huggingface_hub reads its environment when it is imported."""
    program = "from advkd.pipeline.cli.cache import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "downloads"), "HF_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_cache_goes_to_the_hub_and_back(tmp_path: Path) -> None:
    write_store(tmp_path / "toy.zarr", "0:128")
    there = tmp_path / "hub/datasets/me/toy"
    with model_hub(tmp_path / "hub") as (hub, commits):
        code, said = advkd_cache(tmp_path, hub, "push", "toy.zarr", ADDRESS)
        assert code == 0 and "in 1 commits" in said, said
        assert [commit["summary"] for commit in commits] == ["Blocks 0 to 7"]
        own = {name: data for name, data in tree(tmp_path / "toy.zarr").items() if "writer" not in name}
        found = tree(there)
        assert found.keys() == own.keys() | NOTES and own.items() <= found.items()
        code, said = advkd_cache(tmp_path, hub, "subset", ADDRESS, "--out", "copy.zarr")
        assert code == 0, said
        ours, copy = (TrajectoryCache.open(tmp_path / f"{name}.zarr") for name in ("toy", "copy"))
        assert copy.digest == ours.digest and copy.recipe.fingerprint == ours.recipe.fingerprint
        code, said = advkd_cache(tmp_path, hub, "push", "toy.zarr", ADDRESS)
        assert code == 0 and f"0 files in 0 commits; {len(found)} were there" in said
        write_store(tmp_path / "toy.zarr", "0:160")
        code, said = advkd_cache(tmp_path, hub, "push", "toy.zarr", ADDRESS)
        assert code == 0, said
        assert [commit["summary"] for commit in commits[1:]] == ["Blocks 8 to 9"]
        new = tree(there).keys() - found.keys()
        assert len(new) == 2 * (len(ours.states) + 1)  # two blocks' chunks and records
        assert TrajectoryCache.open(there).digest == TrajectoryCache.open(tmp_path / "toy.zarr").digest


def test_what_the_hub_must_not_get(tmp_path: Path) -> None:
    """Another cache, no address of a data set, no token: one line each, and nothing changes."""
    write_store(tmp_path / "toy.zarr", "0:32")
    write_store(tmp_path / "other.zarr", "0:32", precision={"compute": "bfloat16", "tf32": False})
    with model_hub(tmp_path / "hub") as (hub, _):
        assert advkd_cache(tmp_path, hub, "push", "toy.zarr", ADDRESS)[0] == 0
        before = tree(tmp_path / "hub")
        for store, address, expected in (
            ("other.zarr", ADDRESS, (2, "holds another cache than other.zarr")),
            ("toy.zarr", "hf://me/toy", (2, "expected hf://datasets/OWNER/NAME")),
            ("toy.zarr", "hf://datasets/refused/toy", (1, "the Hub did not accept hf://datasets/refused/toy")),
            ("none.zarr", ADDRESS, (1, "no cache at none.zarr")),
        ):
            code, said = advkd_cache(tmp_path, hub, "push", store, address)
            assert (code, expected[1] in said, "Traceback" in said) == (expected[0], True, False), said
        (tmp_path / "hub/datasets/me/photos").mkdir()
        (tmp_path / "hub/datasets/me/photos/cat.jpg").write_bytes(b"cat")
        code, said = advkd_cache(tmp_path, hub, "push", "toy.zarr", "hf://datasets/me/photos")
        assert code == 2 and "holds cat.jpg but no cache" in said
        assert {name: data for name, data in tree(tmp_path / "hub").items() if "photos" not in name} == before


def test_commits_hold_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata first; a record never goes without its chunks; unfinished writes and uncommitted blocks stay here."""
    write_store(tmp_path / "toy.zarr", "0:64")
    (tmp_path / "toy.zarr/blocks/000003.json").unlink()
    next((tmp_path / "toy.zarr/states").glob("*/c")).joinpath("9.partial").write_bytes(b"x")
    committed = set(TrajectoryCache.open(tmp_path / "toy.zarr").blocks)
    assert committed == {0, 1, 2}
    files = {
        path: tmp_path / "toy.zarr" / path for path in tree(tmp_path / "toy.zarr") if module._belongs(path, committed)
    }
    monkeypatch.setattr(module, "MAX_FILES", 12)
    parts = [*module._commits(files)]
    assert sorted(path for part in parts for path in part) == sorted(files)
    assert not any(path.endswith(".partial") or "/c/3/" in path or "writer" in path for path in files)
    assert "zarr.json" in parts[0] and len(parts) > 1 and all(len(part) <= 12 for part in parts)
    for part in parts:
        for block in committed:
            mine = [path for path in files if module.block_of(path.split("/")) == block]
            assert sum(path in part for path in mine) in (0, len(mine))


def test_its_card_says_what_it_is(tmp_path: Path) -> None:
    write_store(tmp_path / "toy.zarr", "0:32", condition=ClassCondition(num_classes=3, labels=(0, 1)))
    cache = TrajectoryCache.open(tmp_path / "toy.zarr")
    card = cache_card(cache, ADDRESS)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["advkd", "diffusion-distillation"]
    assert f"advkd-train --cache {ADDRESS}\n" in text and "![From noise to image](preview.png)" in text
    for known in (cache.recipe.fingerprint, cache.digest, "32, from 0 to 31", "not recorded"):
        assert known in text
    assert json.dumps(card)  # plain text
