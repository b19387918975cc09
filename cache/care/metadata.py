"""What the `zarr.json` files of a store say, and what they should: for verifying and repairing.

The files of the states follow from recipe and layout; how many seeds they declare, from each other and the ledger.
Arrays besides the states describe themselves, so that only what fits neither Zarr nor the other arrays can be found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any

from advkd.cache.care.findings import Finding, Kind
from advkd.cache.errors import DamagedError, NotCachedError
from advkd.cache.files.paths import walk
from advkd.cache.files.strict_json import parse_json, pretty_json
from advkd.cache.format.arrays import ArraySpec, group_paths, read_spec, required_specs, state_spec, store_metadata
from advkd.cache.format.ledger import BlockRecord
from advkd.cache.format.store_paths import metadata_path
from advkd.cache.format.zarr_metadata import MAX_BLOCKS, group_metadata
from advkd.cache.read.reader import TrajectoryCache


class StoreMetadata:
    """The arrays of a store as its `zarr.json` files describe them.

    Attributes:
        blocks: that have a record; where they can be listed, also those beyond what the arrays declare.
        declared: seeds that each array declares, by array path; arrays whose metadata can't be read are left out.
        here: every array of which this copy has a file and which can be described.
        absent: paths of recorded arrays of which this copy has no file: a partial copy, which is no fault.
    """

    def __init__(self, cache: TrajectoryCache) -> None:
        self._cache = cache
        self.blocks = cache.blocks if cache.files.root is None else cache.files.blocks(sys.maxsize)
        self.declared: dict[str, int] = {}
        self._problems: dict[str, str] = {}
        here: list[ArraySpec] = []
        self.absent: list[str] = []
        required = required_specs(cache.recipe, cache.layout.block_size)
        for spec in (
            *(state_spec(cache.recipe, cache.stored_layout, state) for state in cache.layout.states),
            *required,
        ):
            with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
                num_rows = int(parse_json(cache.files.read(spec.metadata_path))["shape"][0])
                self.declared[spec.path] = num_rows * spec.seeds_per_row
            if spec.path in self.declared or self._has_files(spec.path):
                here.append(spec)
            else:
                self.absent.append(spec.path)
        self.further_names = cache.further_names
        for path in sorted(set(self.further_names) - {spec.path for spec in required}):
            try:
                spec, num_seeds = read_spec(cache.files, path, cache.layout.block_size)
                if not any(
                    spec.fits(record.arrays[path]) for record in self._records(self.blocks) if path in record.arrays
                ):
                    raise DamagedError("describes blocks of another size than the ledger")
                here.append(spec)
                self.declared[path] = num_seeds
            except FileNotFoundError:
                if self._has_files(path):
                    self._problems[metadata_path(path)] = "is not there"
                else:
                    self.absent.append(path)
            except DamagedError as error:
                self._problems[metadata_path(path)] = str(error)
        self.here = tuple(here)

    def _has_files(self, path: str) -> bool:
        root = self._cache.files.root
        return root is not None and next(walk(root / path), None) is not None

    @property
    def undescribed(self) -> list[str]:
        """Folders of arrays whose metadata are missing or damaged, so that their chunks can't be found."""
        return [path.removesuffix("zarr.json") for path in self._problems]

    @cached_property
    def num_seeds(self) -> int:
        """What all arrays should declare: what most do, if it has room for the ledger's last block."""
        last = next((block for block in reversed(self.blocks) if block < MAX_BLOCKS and self._is_recorded(block)), -1)
        needed = (last + 1) * self._cache.layout.block_size
        enough = sorted(num_seeds for num_seeds in self.declared.values() if num_seeds >= needed)
        return max(enough, key=enough.count, default=needed)

    def _is_recorded(self, block: int) -> bool:
        return next(self._records([block]), None) is not None

    def _records(self, blocks: Iterable[int]) -> Iterator[BlockRecord]:
        """The valid ones among the records of some blocks."""
        for block in blocks:
            with suppress(DamagedError, NotCachedError):
                yield self._cache.record(block)

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every `zarr.json` as it should be, by relative path, as far as that is known."""
        further = tuple(spec for spec in self.here if spec.path in self.further_names)
        groups = {path: group_metadata() for name in self.further_names for path in group_paths(name)}
        return groups | store_metadata(self._cache.recipe, self._cache.stored_layout, further, self.num_seeds)

    def findings(self) -> Iterator[Finding]:
        """What is wrong with the `zarr.json` files."""
        arrays = {spec.metadata_path: spec for spec in self.here}
        optional = {path for name in self.absent for path in (metadata_path(name), *group_paths(name))}
        optional -= {path for spec in self.here for path in group_paths(spec.path)}
        for path, expected in self.files.items():
            spec = arrays.get(path)
            value = spec.metadata(self.declared.get(spec.path, self.num_seeds)) if spec else expected
            try:
                if self._cache.files.read(path) != pretty_json(value):
                    yield _finding(path, "differs from what the recipe generates")
            except FileNotFoundError:
                if path not in optional:
                    yield _finding(path, "is not there")
            except DamagedError as error:
                yield _finding(path, str(error))
        for path, problem in self._problems.items():
            yield _finding(path, problem)
        for path, num_seeds in self.declared.items():
            if num_seeds != self.num_seeds:
                problem = f"declares {num_seeds} seeds; by the other arrays and the ledger it is {self.num_seeds}"
                yield _finding(metadata_path(path), problem)


def _finding(path: str, problem: str) -> Finding:
    parts = path.split("/")
    state = parts[1] if len(parts) > 2 and parts[0] == "states" else None
    kind: Kind = "missing" if problem == "is not there" else "damage"
    return Finding(kind=kind, file=path, problem=problem, state=state)
