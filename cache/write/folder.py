"""A store's folder as a whole: created, compared with what is to be written, extended, renamed out of the way."""

from __future__ import annotations

import errno
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from advkd.cache.errors import DamagedError, MismatchError, NotACacheError, UsageError
from advkd.cache.files.durable import PARTIAL_SUFFIX, fsync_folder, holds_something, write_atomically, write_json
from advkd.cache.files.locks import StoreLocks
from advkd.cache.files.paths import safe_target, walk
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.arrays import ArraySpec, read_spec, required_specs, store_metadata
from advkd.cache.format.differences import differences
from advkd.cache.format.equivalence import equivalent
from advkd.cache.format.layout import Layout
from advkd.cache.format.ledger import BlockRecord
from advkd.cache.format.metadata import read_metadata
from advkd.cache.format.packed_ledger import PackedRecord
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.records import Records
from advkd.cache.format.seeds import blocks_of
from advkd.cache.format.source import LocalSource, check_num_blocks
from advkd.cache.format.space import DECODER_PATH
from advkd.cache.format.store_paths import TEACHER_PATH
from advkd.cache.format.zarr_metadata import MAX_BLOCKS
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.read.weights import check_decoder, check_teacher

OnMismatch = Literal["stop", "set-aside"]
SWEEP_SECONDS = 2.0
PARTIAL = re.compile(r".*(\.[0-9a-f]{12}\.partial)")
"""A file or folder that was being written; its end is unique to one write."""


class StoreFolder:
    """The folder of a store of one recipe in one layout.

    Args:
        path: of the store.
        recipe: what its numbers follow from.
        layout: which states it holds, raw or packed.
        further: its arrays besides the states; those that the recipe requires if none are given.
    """

    def __init__(self, path: Path, recipe: Recipe, layout: Layout, further: tuple[ArraySpec, ...] = ()) -> None:
        self.path = path
        self.recipe = recipe
        self.layout = layout
        self.further = further or required_specs(recipe, layout.block_size)
        self.set_aside: Path | None = None
        """Where a store of another recipe was moved to make room, if one was."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        recipe: Recipe,
        layout: Layout,
        on_mismatch: OnMismatch = "stop",
        *,
        further: tuple[ArraySpec, ...] = (),
    ) -> Self:
        """One whose store is there: see `begin`.

        A store whose recipe differs in neutral options only (`advkd.cache.format.equivalence`) is there already, and
        keeps its recipe: its fingerprint goes into all records.
        """
        path = Path(path)
        folder = cls(path, equivalent_there(path, recipe), layout, further)
        folder.begin(on_mismatch)
        return folder

    def begin(self, on_mismatch: OnMismatch = "stop") -> None:
        """Create the store unless it is there; one of another recipe or layout is renamed first, if that was asked for.

        Raises:
            MismatchError: a cache of another recipe or layout is there, and `on_mismatch` is "stop".
            NotACacheError: something that is no cache is there.
            UsageError: no store can be created there.
            LockedError: the store is to be set aside, but another process writes to it.
        """
        if not self.continues(on_mismatch) and self.exists():
            # Alone with the old store: a builder that still writes it must not find another in its place.
            with StoreLocks(self.path).alone():
                if self.mismatch():  # another build may have made room just now
                    self.set_aside = _set_aside(self.path)
        if not self.exists():
            self._create()

    def continues(self, on_mismatch: OnMismatch) -> bool:
        """Whether a store of this very recipe and layout is there.

        Raises:
            MismatchError: another one is, and `on_mismatch` is "stop".
        """
        problem = self.mismatch()
        if problem and on_mismatch == "stop":
            raise MismatchError(
                f"{self.path} was built otherwise ({problem}): choose another --out, or `advkd-cache build` renames it "
                "with --on-mismatch set-aside"
            )
        return problem is None and self.exists()

    def exists(self) -> bool:
        """Whether a store is there; an empty folder counts as nothing."""
        return holds_something(self.path)

    def mismatch(self) -> str | None:
        """In words, how the store that is there differs from what is to be written; None if it doesn't.

        Raises:
            NotACacheError: something that is no cache is there.
        """
        if not self.exists():
            return None
        recipe, layout = read_metadata(LocalSource(self.path))
        lines = differences(recipe.to_json(), self.recipe.to_json()) + differences(
            layout.to_json(), self.layout.to_json()
        )
        lines = lines or self._array_differences()
        if not lines:
            return None
        return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")

    def _array_differences(self) -> list[str]:
        """How the arrays besides the states differ; a store without blocks has none yet."""
        source, wanted = LocalSource(self.path), {spec.path: spec for spec in self.further}
        records = Records(source, self.recipe, self.layout, PackedRecord if self.layout.packing else BlockRecord)
        blocks = source.blocks(MAX_BLOCKS)
        found = set(records.further_names(blocks))
        lines = [f"array {name}: present → absent" for name in sorted(found - wanted.keys())]
        lines += [f"array {name}: absent → present" for name in sorted(wanted.keys() - found) if blocks]
        for name in sorted(found & wanted.keys()):
            try:
                template = read_spec(source, name, self.layout.block_size)[0].template
            except (FileNotFoundError, DamagedError):
                continue  # `grow` writes it again
            lines += [f"{name}.{line}" for line in differences(template, wanted[name].template)]
        return lines

    def _create(self) -> None:
        self._check_place()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
        try:
            partial.mkdir()
            for name, value in self._metadata(0).items():
                write_json(safe_target(partial, name), value)
            partial.rename(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not self.exists():
                raise
            if self.mismatch():  # another process made another store there just now
                raise NotACacheError(
                    f"{self.path} appeared while it was being created; run the command again"
                ) from None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync_folder(self.path.parent)

    def _check_place(self) -> None:
        """Refuse a place where no store can be.

        Raises:
            UsageError: it is inside another store, a dangling symlink, or below a file.
        """
        if self.path.is_symlink():
            where = "" if self.path.exists() else " to nothing"
            raise UsageError(f"{self.path} is a symlink{where}: remove it, or choose another --out")
        for folder in self.path.absolute().parents:
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"{self.path}: {folder} is a file: choose another --out")
            if (folder / "zarr.json").is_file() and (folder / "states").is_dir() and (folder / "blocks").is_dir():
                raise UsageError(f"{self.path} is inside the cache {folder}: choose another --out")

    def _metadata(self, num_seeds: int) -> dict[str, dict[str, Any]]:
        return store_metadata(self.recipe, self.layout, self.further, num_seeds)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store for adding blocks, beside others who do the same.

        Raises:
            LockedError: another process moves or repairs it.
        """
        with StoreLocks(self.path).present(self._sweep):
            yield

    def _sweep(self) -> None:
        """Remove what a killed writer left half-written; only called while nobody else writes.

        Others wait meanwhile, so a large store isn't walked to its end: making a block sweeps its own folders too.
        """
        deadline = time.monotonic() + SWEEP_SECONDS
        for path in walk(self.path):
            if PARTIAL.fullmatch(path):
                (self.path / path).unlink(missing_ok=True)
            if time.monotonic() > deadline:
                break
        for beside in self.path.parent.glob("*" + PARTIAL_SUFFIX):  # left by a process killed while creating the store
            found = PARTIAL.fullmatch(beside.name)
            if found and beside.name == self.path.name + found[1]:
                shutil.rmtree(beside, ignore_errors=True)

    def grow(self, seeds: range) -> None:
        """Let the arrays declare at least these seeds, widened to whole blocks. Never shrinks.

        Raises:
            LockedError: another process changes what they declare, and doesn't end.
        """
        wanted = blocks_of(seeds, self.layout.block_size).stop * self.layout.block_size
        check_num_blocks(str(self.path), wanted, self.layout.block_size)
        with StoreLocks(self.path).metadata():
            num_seeds = max(wanted, TrajectoryCache.open(self.path).num_seeds)
            for name, value in self._metadata(num_seeds).items():
                path, data = safe_target(self.path, name), pretty_json(value)
                if not self._is_file(name, data):
                    write_atomically(path, [data])

    def write_decoder(self, weights: bytes) -> None:
        """Put the decoder of a store of latents into it, unless it is there.

        Args:
            weights: a safetensors file.

        Raises:
            DamagedError: it is another decoder than the recipe names.
        """
        assert self.recipe.space is not None
        path = safe_target(self.path, DECODER_PATH)
        if not path.is_file():
            check_decoder(weights, self.recipe.space, "the decoder that was given")
            write_atomically(path, [weights])

    def write_teacher(self, weights: bytes) -> None:
        """Put the teacher's network into the store, unless it is there.

        Args:
            weights: a safetensors file.

        Raises:
            DamagedError: it is another network than the recipe names.
        """
        path = safe_target(self.path, TEACHER_PATH)
        if not path.is_file():
            check_teacher(weights, self.recipe, "the network that was given")
            write_atomically(path, [weights])

    def _is_file(self, name: str, data: bytes) -> bool:
        try:
            return LocalSource(self.path).read(name) == data
        except (FileNotFoundError, DamagedError):
            return False


def equivalent_there(path: Path, recipe: Recipe) -> Recipe:
    """The recipe of the store at a path if it is equivalent to another, else that other."""
    if not holds_something(path):
        return recipe
    found, _ = read_metadata(LocalSource(path))
    return found if equivalent(found, recipe) else recipe


def _set_aside(path: Path) -> Path:
    """Rename a store out of the way, never over anything."""
    recipe, layout = read_metadata(LocalSource(path))
    label = f"{path.stem}.stale-{recipe.fingerprint[:8]}-{layout.layout_hash[:4]}"
    target = path.with_name(f"{label}{path.suffix}")
    attempt = 1
    while target.exists():
        attempt += 1
        target = path.with_name(f"{label}.{attempt}{path.suffix}")
    path.rename(target)
    fsync_folder(path.parent)
    return target
