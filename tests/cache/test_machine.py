"""Stores are built, extended, merged, cut, damaged and mended in any order, beside a model that is a dictionary."""

import functools
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from advkd.cache.care.repair import repair
from advkd.cache.care.verify import verify
from advkd.cache.errors import CacheError, MismatchError, NotCachedError, UsageError
from advkd.cache.format.layout import Layout
from advkd.cache.format.store_paths import chunk_path, record_path, states_path
from advkd.cache.read.compare import compare
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge, subset
from advkd.cache.write.writer import CacheWriter
from tests.cache.harm import content, files_of, flipped, put
from tests.stores import BLOCK_SIZE, ITEM_SHAPE, block_states, make_layout, make_recipe

MOST_BLOCKS = 7
MOST_STORES = 4
STEPS = (0, 2, 4)
CHOICE = st.integers(0, 1 << 16)


@dataclass
class Model:
    """What a store should hold."""

    path: Path
    steps: tuple[int, ...]
    blocks: set[int] = field(default_factory=set)
    num_seeds: int = 0
    damaged: dict[str, int] = field(default_factory=dict)
    """File → block: what was harmed since the last repair."""

    @property
    def layout(self) -> Layout:
        whole = make_layout()
        return replace(whole, states=tuple(state for state in whole.states if state.step in self.steps))

    @property
    def key(self) -> tuple[tuple[int, ...], frozenset[int], int]:
        return self.steps, frozenset(self.blocks), self.num_seeds

    def writer(self) -> CacheWriter:
        return CacheWriter.open(self.path, make_recipe(), self.layout)

    def declare(self, num_blocks: int) -> None:
        self.num_seeds = max(self.num_seeds, num_blocks * BLOCK_SIZE)


@functools.cache
def truth(block: int) -> dict[int, bytes]:
    """By solver steps done: the bytes of a block's values."""
    return {step: values.astype("<f2").tobytes() for step, values in block_states(make_layout(), block).items()}


class Stores(RuleBasedStateMachine):
    """Up to four stores in one folder."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")))
        self.models: list[Model] = []
        self.open: dict[Path, TrajectoryCache] = {}
        self.digests: dict[tuple[tuple[int, ...], frozenset[int]], str] = {}
        self.fresh: dict[tuple[tuple[int, ...], frozenset[int], int], dict[str, bytes]] = {}
        self.made = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def new(self, steps: tuple[int, ...] = STEPS) -> Model:
        self.made += 1
        return Model(self.folder / f"store-{self.made}.zarr", steps)

    def pick(self, choice: int, *, sound: bool = True) -> Model | None:
        models = [model for model in self.models if bool(model.damaged) is not sound]
        return models[choice % len(models)] if models else None

    @initialize()
    def begin_with_two(self) -> None:
        self.begin()
        self.begin()

    @precondition(lambda self: len(self.models) < MOST_STORES)
    @rule()
    def begin(self) -> None:
        model = self.new()
        model.writer()
        self.models.append(model)

    @rule(choice=CHOICE, first=st.integers(0, MOST_BLOCKS - 1), count=st.integers(1, 3), backwards=st.booleans())
    def build(self, choice: int, first: int, count: int, backwards: bool) -> None:
        """A range of seeds, block by block in either order; those that are there stay."""
        model = self.pick(choice)
        if model is None:
            return
        blocks = range(first, min(first + count, MOST_BLOCKS))
        seeds = range(blocks.start * BLOCK_SIZE, blocks.stop * BLOCK_SIZE)
        writer = model.writer()
        with writer.writing():
            writer.grow(seeds)
            missing = writer.missing(seeds)
            assert missing == sorted(set(blocks) - model.blocks)
            for block in reversed(missing) if backwards else missing:
                with writer.claim(block) as claimed:
                    assert claimed
                    writer.commit(block, block_states(make_layout(), block))
        model.blocks |= set(blocks)
        model.declare(blocks.stop)

    @rule(one=CHOICE, other=CHOICE, into=st.sampled_from(["new", "one", "other"]))
    def merge_two(self, one: int, other: int, into: str) -> None:
        sources = [self.pick(one), self.pick(other)]
        if sources[0] is None or sources[1] is None or (into == "new" and len(self.models) >= MOST_STORES):
            return
        first, second = sources[0], sources[1]
        out = {"new": self.new(first.steps), "one": first, "other": second}[into]
        caches = [TrajectoryCache.open(model.path) for model in (first, second)]
        if first.steps != second.steps:
            with pytest.raises(MismatchError):
                merge(caches, out.path)
            return
        combined = merge(caches, out.path)
        union = first.blocks | second.blocks
        assert (combined.num_added, combined.num_replaced) == (len(union - out.blocks), 0)
        assert sum(combined.how.values()) == len(union - out.blocks) * len(out.steps)
        # Only blocks that came from elsewhere make the target declare more.
        out.declare(max((block + 1 for block in union - out.blocks), default=0))
        out.blocks |= union
        if into == "new":
            self.models.append(out)

    @precondition(lambda self: len(self.models) < MOST_STORES)
    @rule(choice=CHOICE, steps=st.sets(st.sampled_from(STEPS)), first=st.integers(0, MOST_BLOCKS), whole=st.booleans())
    def cut(self, choice: int, steps: set[int], first: int, whole: bool) -> None:
        source = self.pick(choice)
        if source is None:
            return
        out = self.new(tuple(sorted({0, *steps})))
        seeds = None if whole else f"{first * BLOCK_SIZE}:{(first + 3) * BLOCK_SIZE}"
        wanted = source.blocks if whole else source.blocks & set(range(first, first + 3))
        cache = TrajectoryCache.open(source.path)
        if not set(out.steps) <= set(source.steps) or (not whole and not wanted):
            with pytest.raises((NotCachedError, UsageError)):
                subset(cache, out.path, seeds=seeds, steps=sorted(steps))
            return
        combined = subset(cache, out.path, seeds=seeds, steps=sorted(steps))
        assert combined.num_added == len(wanted)
        out.blocks = set(wanted)
        out.declare(max((block + 1 for block in wanted), default=0))
        self.models.append(out)

    @rule(choice=CHOICE, again=CHOICE, kind=st.sampled_from(["flip", "cut", "remove"]), where=CHOICE)
    def damage(self, choice: int, again: int, kind: str, where: int) -> None:
        model = self.pick(choice, sound=bool(again % 2)) or self.pick(choice)
        if model is None or not model.blocks:
            return
        block = sorted(model.blocks)[again % len(model.blocks)]
        files = [chunk_path(states_path(state), block, len(ITEM_SHAPE)) for state in model.layout.states]
        file = [*files, record_path(block)][where % (len(files) + 1)]
        if file in model.damaged or (file == record_path(block) and kind == "remove"):
            return  # a block without a record was never made, which is no damage
        data = (model.path / file).read_bytes()
        put(model.path / file, {"flip": flipped(data, where % (8 * len(data))), "cut": data[:-1], "remove": None}[kind])
        model.damaged[file] = block

    @rule(choice=CHOICE)
    def mend(self, choice: int) -> None:
        model = self.pick(choice, sound=False)
        if model is None:
            return
        cache = TrajectoryCache.open(model.path)
        repair(cache, verify(cache).findings)
        model.blocks -= set(model.damaged.values())
        model.damaged = {}
        # What is left of the blocks that were given up lies about until they are made again.
        left = verify(TrajectoryCache.open(model.path)).findings
        assert {finding.kind for finding in left} <= {"stray"}
        for finding in left:
            assert finding.block not in model.blocks
            (model.path / finding.file).unlink()

    @rule(choice=CHOICE)
    def crash(self, choice: int) -> None:
        """A writer dies: what it leaves half-written counts for nothing and is swept."""
        model = self.pick(choice)
        if model is None:
            return
        litter = model.path / "states/0000/c/0/0/0/0.0123456789ab.partial"
        put(litter, b"half")
        assert verify(TrajectoryCache.open(model.path)).findings == ()
        with model.writer().writing():
            assert not litter.exists()

    @rule(choice=CHOICE, sound=st.booleans())
    def reopen(self, choice: int, sound: bool) -> None:
        """A reader that stays open while the store changes."""
        model = self.pick(choice, sound=sound)
        if model is not None:
            self.open[model.path] = TrajectoryCache.open(model.path)

    @rule(choice=CHOICE, sound=st.booleans())
    def forget(self, choice: int, sound: bool) -> None:
        model = self.pick(choice, sound=sound)
        if model is not None:
            self.models.remove(model)
            self.open.pop(model.path, None)
            shutil.rmtree(model.path)

    def fresh_files(self, model: Model) -> dict[str, bytes]:
        """What somebody gets who makes a new store of the same blocks at once."""
        if model.key not in self.fresh:
            new = self.new(model.steps)
            writer = new.writer()
            if model.num_seeds:
                writer.grow(range(model.num_seeds))
            for block in sorted(model.blocks):
                writer.commit(block, block_states(make_layout(), block))
            self.fresh[model.key] = content(files_of(new.path))
            shutil.rmtree(new.path)
        return self.fresh[model.key]

    @invariant()
    def sound_stores_are_what_they_should_be(self) -> None:
        for model in self.models:
            if model.damaged:
                continue
            cache = TrajectoryCache.open(model.path)
            assert (cache.blocks, cache.num_seeds) == (tuple(sorted(model.blocks)), model.num_seeds)
            assert tuple(cache.states) == model.steps
            for block in cache.blocks:
                for step in model.steps:
                    assert cache.block_view(step, block).tobytes() == truth(block)[step]
            assert content(files_of(model.path)) == self.fresh_files(model)
            of_content = (model.steps, frozenset(model.blocks))
            assert self.digests.setdefault(of_content, cache.digest) == cache.digest
            assert verify(cache).findings == ()

    @invariant()
    def other_content_has_another_digest(self) -> None:
        assert len(set(self.digests.values())) == len({key for key in self.digests if key[1]}) + any(
            not key[1] for key in self.digests
        )

    @invariant()
    def damage_is_named_and_never_read(self) -> None:
        for model in self.models:
            if model.damaged:
                cache = TrajectoryCache.open(model.path)
                found = {finding.file: finding.block for finding in verify(cache).findings}
                # That a file is gone is known from its record only.
                known = {file for file in model.damaged if (model.path / file).exists()}
                known |= {file for file, block in model.damaged.items() if record_path(block) not in model.damaged}
                assert known <= found.keys()
                assert set(found.values()) == set(model.damaged.values())
                for block in model.blocks:
                    check_rows(cache, model.steps, block)

    @invariant()
    def open_readers_read_the_truth_or_nothing(self) -> None:
        for cache in self.open.values():
            for block in cache.blocks:
                check_rows(cache, tuple(cache.states), block)

    @invariant()
    def stores_of_one_layout_agree_where_both_have_blocks(self) -> None:
        sound = [model for model in self.models if not model.damaged][:2]
        if len(sound) == 2:
            one, other = sound
            found = compare(TrajectoryCache.open(one.path), TrajectoryCache.open(other.path))
            assert not found.apart and not found.recipe
            assert found.num_equal == len(one.blocks & other.blocks)
            assert found.same == ((one.steps, one.blocks) == (other.steps, other.blocks))


def check_rows(cache: TrajectoryCache, steps: tuple[int, ...], block: int) -> None:
    for step in steps:
        try:
            rows = cache.rows(step, range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE))
        except CacheError:
            continue
        assert rows.tobytes() == truth(block)[step]


def run(max_examples: int, num_steps: int, phases: Collection[Phase] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        Stores,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=num_steps,
            phases=phases,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_whatever_is_done_stores_hold_what_a_dictionary_would() -> None:
    run(max_examples=16, num_steps=20)


@pytest.mark.slow
def test_whatever_is_done_for_long_stores_hold_what_a_dictionary_would() -> None:
    run(max_examples=400, num_steps=40, phases=[Phase.generate])
