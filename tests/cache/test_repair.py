"""Repairing removes what is damaged and nothing else, and a rebuild makes the store as it was."""

from hypothesis import given
from hypothesis import strategies as st

from advkd.cache.care.repair import repair
from advkd.cache.care.verify import verify
from advkd.cache.read.reader import TrajectoryCache
from tests.cache.damage import IN_PLACE, WHERE, check_mended, harm_of, look, quick
from tests.cache.harm import (
    Pristine,
    content,
    files_of,
    rebuild,
)


@quick
@given(kind=IN_PLACE | st.just("stray"), where=WHERE)
def test_a_repaired_and_rebuilt_store_is_what_it_was(pristine: Pristine, kind: str, where: int) -> None:
    check_mended(pristine, harm_of(pristine, kind, where))


def test_what_is_gone_comes_back(pristine: Pristine) -> None:
    for path in pristine.names:
        if not path.startswith("provenance/"):
            check_mended(pristine, {path: None})


def test_a_repair_keeps_valid_blocks_when_an_array_declares_too_little(pristine: Pristine) -> None:
    """The smaller number would make readers and repairs believe that the blocks beyond it don't belong."""
    path = "states/0002/zarr.json"
    smaller = pristine.files[path].replace(b"    48,", b"    16,")
    assert smaller != pristine.files[path]
    with pristine.harmed({path: smaller}) as store:
        cache = TrajectoryCache.open(store)
        assert cache.num_seeds == 16
        assert repair(cache, verify(cache).findings) == [f"{path} is written anew from the recipe"]
        assert content(files_of(store)) == content(pristine.files)


def test_an_interrupted_growth_is_no_loss(pristine: Pristine) -> None:
    """A crash leaves some arrays larger: readers take the smallest, a repair and a build agree."""
    for grown in (("0000",), ("0000", "0002")):
        harm = {
            path: pristine.files[path].replace(b"    48,", b"    96,")
            for path in (f"states/{name}/zarr.json" for name in grown)
        }
        with pristine.harmed(harm) as store:
            cache = TrajectoryCache.open(store)
            assert (cache.num_seeds, cache.blocks) == (48, (0, 1, 2))
            repair(cache, verify(cache).findings)
            assert look(store) == ()
            assert rebuild(store) == []


def test_a_repair_of_notes_removes_only_them(pristine: Pristine) -> None:
    harm = {path: b"torn" for path in pristine.names if path.startswith("provenance/")}
    with pristine.harmed(harm) as store:
        cache = TrajectoryCache.open(store)
        repair(cache, verify(cache).findings)
        assert look(store) == ()
        assert content(files_of(store)) == content(pristine.files)
        assert not [path for path in harm if (store / path).exists()]
