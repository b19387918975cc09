"""Everything that this package does with a store, done with one that may be anything: success or a `CacheError`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from advkd.cache.care.repair import repair
from advkd.cache.care.summary import summarize
from advkd.cache.care.verify import verify
from advkd.cache.errors import CacheError
from advkd.cache.files.locks import StoreLocks
from advkd.cache.read.compare import compare, tolerance_of
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.combine import merge, subset
from advkd.cache.write.writer import CacheWriter
from tests.cache.harm import Pristine
from tests.stores import block_states, make_layout, make_recipe

LONGEST = 1000
"""Letters of a message, the paths in it not counted."""
P = ParamSpec("P")
T = TypeVar("T")


class Attempts:
    """Does things, and keeps what the refusals said."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.said: list[str] = []

    def __call__(self, act: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T | None:
        """Do something; None if it was refused, which takes one line of bounded length."""
        try:
            return act(*arguments, **keywords)
        except CacheError as error:
            said = str(error)
        self.said.append(said)
        without_paths = said.replace(str(self.store.parent), "")
        assert len(without_paths.splitlines()) == 1, said
        assert len(without_paths) < LONGEST, said
        return None


def read_everything(store: Path, like: Path | None = None) -> Attempts:
    """Every way to read; `like` is a sound store to compare with."""
    attempt = Attempts(store)
    cache = attempt(TrajectoryCache.open, store)
    if cache is None:
        return attempt
    attempt(cache.seeds)
    attempt(lambda: cache.digest)
    attempt(lambda: json.dumps(summarize(cache)))
    attempt(tolerance_of, cache)
    attempt(lambda: json.dumps(dataclasses.asdict(verify(cache))))
    for block in (attempt(lambda: cache.blocks) or ())[:3]:
        attempt(cache.record, block)
        seed = block * cache.layout.block_size
        for step in list(cache.states)[:4]:
            attempt(cache.rows, step, [seed, seed])
        for spec in (attempt(lambda: cache.arrays) or ())[:4]:
            attempt(cache.array_file, spec, block)
    if like is not None:
        attempt(compare, cache, TrajectoryCache.open(like))
        attempt(compare, TrajectoryCache.open(like), cache)
    return attempt


def write_everything(store: Path, out: Path) -> Attempts:
    """Every way to write to a store, and from it to another one."""
    attempt = Attempts(store)
    layout = make_layout()
    writer = attempt(CacheWriter.open, store, make_recipe(), layout)
    if writer is not None:
        _write(attempt, writer)
        for block in (0, 1):
            attempt(writer.commit, block, block_states(layout, block))
    own = attempt(TrajectoryCache.open, store)
    if own is not None:
        _write(attempt, CacheWriter(store, own.recipe, own.layout))
    attempt(_alone, store)
    for combine in (_subset, _merge):
        shutil.rmtree(out, ignore_errors=True)
        attempt(combine, store, out)
    attempt(_repair, store)
    return attempt


def _write(attempt: Attempts, writer: CacheWriter) -> None:
    seeds = range(2 * writer.layout.block_size)
    attempt(writer.missing, seeds)
    attempt(writer.incomplete, seeds)
    attempt(writer.grow, seeds)
    attempt(_enter, writer)


def _enter(writer: CacheWriter) -> None:
    with writer.writing(), writer.claim(0):
        pass


def _alone(store: Path) -> None:
    with StoreLocks(store).alone():
        pass


def _subset(store: Path, out: Path) -> None:
    subset(TrajectoryCache.open(store), out, steps=[0])


def _merge(store: Path, out: Path) -> None:
    merge([TrajectoryCache.open(store)], out)


def _repair(store: Path) -> None:
    cache = TrajectoryCache.open(store)
    repair(cache, verify(cache).findings)


def adopt_into(store: Path, source: Path) -> Attempts:
    """Take another store's blocks into this one."""
    attempt = Attempts(store)
    attempt(_merge, source, store)
    attempt(CacheWriter(store, make_recipe(), make_layout()).adopt, 1, TrajectoryCache.open(source))
    return attempt


class Mutant:
    """A small store of which only the metadata change, and a fresh copy for every example."""

    def __init__(self, root: Path) -> None:
        self.pristine = Pristine(root)
        self.metadata = {name: data for name, data in self.pristine.files.items() if name.endswith(".json")}

    def check(self, changed: dict[str, bytes], like: Path, out: Path) -> None:
        """Everything that can be done with it ends well or is refused."""
        with self.pristine.harmed(changed) as store:
            read_everything(store, like)
            write_everything(store, out)
            read_everything(store)
