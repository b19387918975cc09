"""Format 2: class labels and latents, in golden stores, through every operation, and harmed."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from advkd.cache.care.repair import repair
from advkd.cache.care.summary import summarize
from advkd.cache.care.verify import verify
from advkd.cache.errors import AdvkdError, DamagedError, NewerCacheError, NotACacheError, NotCachedError, UsageError
from advkd.cache.files.sealed_json import seal
from advkd.cache.format.array_record import with_crc
from advkd.cache.format.condition import LABELS_PATH, ClassCondition
from advkd.cache.format.encoding import Packing
from advkd.cache.format.recipe import Recipe, digest
from advkd.cache.format.space import DECODER_PATH
from advkd.cache.read.compare import compare
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.read.weights import decoder_weights
from advkd.cache.write.combine import merge, subset
from advkd.cache.write.pack import pack, unpack
from tests.cache import golden
from tests.stores import make_recipe, tree, write_store

PAGE = (Path(__file__).resolve().parents[2] / "docs/cache-format.md").read_text()
CONDITION = ClassCondition(num_classes=5, labels=(0, 1, 3), guidance=2.5, null_class=4)
DIGESTS = {
    golden.CLASSES: "b796563dd7872a6ab9b7eb7d44423c3e682afbd9e5cb7c515d409bbf045bf08c",
    golden.LATENTS: "4ead55b6279cdcdeb25f78f919d30b0aac8ac6a05e00335b0c5c92fd09890a3d",
}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A store of 64 seeds with labels."""
    write_store(tmp_path / "a.zarr", condition=CONDITION)
    return tmp_path / "a.zarr"


@pytest.mark.parametrize("store", list(DIGESTS))
def test_the_golden_stores_read_for_ever(store: Path, tmp_path: Path) -> None:
    cache = TrajectoryCache.open(store)
    assert (cache.blocks, cache.num_seeds, cache.digest) == (golden.BLOCKS, 12, DIGESTS[store])
    assert (cache.recipe, cache.layout) == (golden.RECIPES[store], golden.LAYOUT)
    assert json.loads((store / "zarr.json").read_text())["attributes"]["advkd"]["format"] == 2
    assert verify(cache).findings == ()
    golden.write(tmp_path / "again.zarr", golden.RECIPES[store])
    assert tree(tmp_path / "again.zarr") == tree(store)
    if store == golden.LATENTS:
        assert decoder_weights(cache) == golden.decoder()
        assert summarize(cache)["space"]["decoder"] == "AutoencoderKL"


def test_the_rule_of_labels_is_the_pages() -> None:
    """Labels, seeds, then the labels of those seeds."""
    (block,) = re.findall(r"```text label vectors\n(.*?)```", PAGE, re.S)
    lines = [[list(map(int, part.split(","))) for part in line.split()] for line in block.splitlines()]
    assert len(lines) >= 3
    for labels, seeds, expected in lines:
        condition = ClassCondition(num_classes=max(labels) + 1, labels=tuple(labels))
        assert condition.labels_of(seeds).tolist() == expected == [labels[seed % len(labels)] for seed in seeds]
    runs = CONDITION.labels_of(range(300))
    assert [int((runs == label).sum()) for label in CONDITION.labels] == [100, 100, 100]


def test_plain_zarr_reads_labels_and_fills_what_was_never_committed() -> None:
    by_zarr = zarr.open_group(golden.CLASSES, mode="r")[LABELS_PATH]
    assert isinstance(by_zarr, zarr.Array)
    assert np.asarray(by_zarr[:]).tolist() == [0, 1, 3, 0, -1, -1, -1, -1, 3, 0, 1, 3]
    with pytest.raises(NotCachedError, match="4:8"):
        TrajectoryCache.open(golden.CLASSES).labels([5])


def test_stores_without_a_condition_say_so(store: Path) -> None:
    cache = TrajectoryCache.open(store)
    assert "condition" not in summarize(cache) and cache.recipe.format == 1
    with pytest.raises(UsageError, match="unconditional"):
        cache.labels([0])


def test_another_condition_is_another_recipe() -> None:
    recipes = [
        make_recipe(),
        make_recipe(condition=CONDITION),
        make_recipe(condition=replace(CONDITION, guidance=3.0)),
        make_recipe(condition=replace(CONDITION, labels=(0, 1))),
        make_recipe(condition=ClassCondition(num_classes=5, labels=(0, 1, 3))),
    ]
    assert len({recipe.fingerprint for recipe in recipes}) == len(recipes)
    for recipe in recipes:
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("codec", ["lossless", "zstd"])
def test_labels_go_wherever_states_go(labelled: Path, tmp_path: Path, codec: str) -> None:
    """Cut in two, merged, packed, unpacked, extended: byte for byte what was written at once."""
    whole = TrajectoryCache.open(labelled)
    halves = [tmp_path / "first.zarr", tmp_path / "second.zarr"]
    for half, seeds in zip(halves, ("0:32", "32:64"), strict=True):
        subset(whole, half, seeds=seeds)
        assert verify(TrajectoryCache.open(half)).findings == ()
    merge([TrajectoryCache.open(half) for half in halves], tmp_path / "merged.zarr")
    assert tree(tmp_path / "merged.zarr") == tree(labelled)
    pack(whole, tmp_path / "packed.zarr", Packing.of(codec, "float16"))
    packed = TrajectoryCache.open(tmp_path / "packed.zarr")
    assert verify(packed).findings == ()
    np.testing.assert_array_equal(packed.labels(range(64)), CONDITION.labels_of(range(64)))
    unpack(packed, tmp_path / "unpacked.zarr")
    assert tree(tmp_path / "unpacked.zarr") == tree(labelled)
    assert compare(whole, packed).same
    write_store(halves[0], "0:64", condition=CONDITION)  # extends
    assert tree(halves[0]) == tree(labelled)


def test_a_decoder_goes_wherever_latents_go(tmp_path: Path) -> None:
    whole = TrajectoryCache.open(golden.LATENTS)
    subset(whole, tmp_path / "subset.zarr", seeds="0:4", steps=[10])
    merge([TrajectoryCache.open(tmp_path / "subset.zarr")], tmp_path / "merged.zarr")
    pack(whole, tmp_path / "packed.zarr", Packing.of("archive", "float16", max_error=0.01))
    unpack(TrajectoryCache.open(tmp_path / "packed.zarr"), tmp_path / "unpacked.zarr")
    for name in ("subset", "merged", "packed", "unpacked"):
        cache = TrajectoryCache.open(tmp_path / f"{name}.zarr")
        assert decoder_weights(cache) == golden.decoder()
        assert verify(cache).findings == ()


def test_labels_are_read_over_a_network(labelled: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(labelled), "/labelled.zarr", recursive=True)
    cache = TrajectoryCache.open("memory://labelled.zarr", scratch=tmp_path / "scratch")
    np.testing.assert_array_equal(cache.labels([40, 3, 3]), CONDITION.labels_of([40, 3, 3]))
    assert verify(cache).findings == ()


def rewrite_labels(store: Path, values: np.ndarray[Any, Any], **entry: object) -> None:
    """Block 1's labels, with a record that fits them."""
    data = with_crc(values.tobytes())
    (store / f"{LABELS_PATH}/c/1").write_bytes(data)
    file = store / "blocks/000001.json"
    record = json.loads(file.read_text())
    del record["record_sha256"]
    record["arrays"][LABELS_PATH] |= {
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "segments": f"{int.from_bytes(data[-4:], 'little'):08x}",
        "minimum": int(values.min()),
        "maximum": int(values.max()),
        **entry,
    }
    file.write_bytes(seal(record))


def change_recipe(store: Path, **condition: object) -> None:
    """Members of the condition, with a fingerprint that fits them."""
    root = json.loads((store / "zarr.json").read_text())
    ours = root["attributes"]["advkd"]
    ours["recipe"]["condition"] |= condition
    ours["fingerprint"] = digest(ours["recipe"])
    (store / "zarr.json").write_text(json.dumps(root))


def change_array(store: Path, **members: object) -> None:
    path = store / LABELS_PATH / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))


def drop_entry(store: Path) -> None:
    file = store / "blocks/000001.json"
    record = json.loads(file.read_text())
    del record["record_sha256"], record["arrays"][LABELS_PATH]
    file.write_bytes(seal(record))


def flip(store: Path) -> None:
    file = store / f"{LABELS_PATH}/c/1"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


HARMS: dict[str, tuple[Callable[[Path], object], type[AdvkdError], str]] = {
    "label out of range": (lambda s: rewrite_labels(s, np.full(16, 7, "<i4")), DamagedError, "rule"),
    "labels of other seeds": (lambda s: rewrite_labels(s, CONDITION.labels_of(range(16))), DamagedError, "rule"),
    "too few labels": (lambda s: rewrite_labels(s, np.zeros(8, "<i4")), DamagedError, "doesn't fit"),
    "flipped bit": (flip, DamagedError, "damaged"),
    "no chunk": (lambda s: (s / f"{LABELS_PATH}/c/1").unlink(), DamagedError, "missing"),
    "no entry": (drop_entry, DamagedError, "doesn't fit"),
    "other dtype": (lambda s: change_array(s, data_type="int64"), DamagedError, "conditions/label/zarr.json"),
    "other fill value": (lambda s: change_array(s, fill_value=0), DamagedError, "conditions/label/zarr.json"),
    "no array": (lambda s: shutil.rmtree(s / "conditions"), NotCachedError, "not here"),
    "label beyond the table": (lambda s: change_recipe(s, labels=[0, 9]), NotACacheError, "labels"),
    "null class in use": (lambda s: change_recipe(s, null_class=0), NotACacheError, "null class"),
    "guidance of text": (lambda s: change_recipe(s, guidance="2"), NotACacheError, "guidance"),
    "guidance of an integer": (lambda s: change_recipe(s, guidance=2), NotACacheError, "guidance"),
    "newer rule": (lambda s: change_recipe(s, rule="shuffled"), NewerCacheError, "newer"),
    "newer kind": (lambda s: change_recipe(s, kind="prompt"), NewerCacheError, "newer"),
    "newer member": (lambda s: change_recipe(s, schedule=1), NewerCacheError, "newer"),
}


@pytest.mark.parametrize("harm", list(HARMS))
def test_harmed_conditions_are_refused_in_one_line(labelled: Path, harm: str) -> None:
    act, kind, expected = HARMS[harm]
    act(labelled)
    with pytest.raises(AdvkdError, match=expected) as caught:
        TrajectoryCache.open(labelled).labels(range(16, 32))
    assert type(caught.value) is kind and "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", [name for name, (_, kind, _) in HARMS.items() if kind is DamagedError])
def test_verify_finds_and_repair_fixes_harmed_labels(labelled: Path, harm: str, tmp_path: Path) -> None:
    before = tree(labelled)
    HARMS[harm][0](labelled)
    found = verify(TrajectoryCache.open(labelled)).findings
    assert found and all(one.kind != "stray" for one in found)
    repair(TrajectoryCache.open(labelled), found)
    write_store(labelled, condition=CONDITION)
    assert tree(labelled) == before


def test_a_format_that_its_recipe_does_not_have_is_altered(labelled: Path) -> None:
    root = json.loads((labelled / "zarr.json").read_text())
    root["attributes"]["advkd"]["format"] = 1
    (labelled / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(DamagedError, match="altered"):
        TrajectoryCache.open(labelled)


@pytest.mark.parametrize("harm", ["gone", "cut", "other", "no header"])
def test_a_harmed_decoder_is_named(harm: str, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    shutil.copytree(golden.LATENTS, store)
    path = store / DECODER_PATH
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[:-4])
    elif harm == "other":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(b"x" * 100)
    kind = NotCachedError if harm == "gone" else DamagedError
    with pytest.raises(kind, match=DECODER_PATH):
        decoder_weights(TrajectoryCache.open(store))
    (found,) = verify(TrajectoryCache.open(store)).findings
    assert found.file == DECODER_PATH and found.kind == ("missing" if harm == "gone" else "damage")
    repair(TrajectoryCache.open(store), (found,))
    golden.write(store, golden.LATENT_RECIPE)  # as a build does
    assert path.read_bytes() == golden.decoder()


@pytest.mark.parametrize(
    ("member", "value", "kind"),
    [("decoder", "AutoencoderOobleck", NewerCacheError), ("kind", "audio", NewerCacheError),
     ("scaling_factor", 0.0, NotACacheError), ("shift_factor", "x", NotACacheError),
     ("tensors_sha256", "../x", NotACacheError), ("image_shape", [3, 8, 1 << 20], NotACacheError),
     ("config", [], NotACacheError)],
)  # fmt: skip
def test_impossible_spaces_are_refused(member: str, value: object, kind: type[AdvkdError], tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    shutil.copytree(golden.LATENTS, store)
    root = json.loads((store / "zarr.json").read_text())
    ours = root["attributes"]["advkd"]
    ours["recipe"]["space"][member] = value
    ours["fingerprint"] = digest(ours["recipe"])
    (store / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(kind, match="space"):
        TrajectoryCache.open(store)
