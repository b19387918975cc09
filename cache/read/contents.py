"""What a store holds, as its metadata and ledger say: states, other arrays, committed blocks, and their files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import CacheError, DamagedError, NotCachedError
from advkd.cache.files.strict_json import in_line
from advkd.cache.format.array_record import ArrayRecord
from advkd.cache.format.arrays import ArraySpec, read_spec, required_specs, state_spec
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.ledger import HOW_TO_FIX, BlockRecord
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.records import Records
from advkd.cache.format.source import Source
from advkd.cache.format.store_paths import provenance_path
from advkd.cache.read.chunk_cache import Scratch, default_scratch
from advkd.cache.read.chunks import ArrayRows, ChunkFiles

if TYPE_CHECKING:
    from advkd.cache.codec.unpacked_source import UnpackedSource


class Contents:
    """Identity, arrays, ledger and chunk files of a store.

    Attributes:
        source: the files of the raw store.
        recipe: what determines its numbers.
        layout: which states it holds and how they are stored.
        num_seeds: seeds that the arrays declare; some may not be committed.
        states: the recorded states that are present, by solver steps done.
        packed: the source of a packed store, which has the packed layout and records; None for a raw store.
        records: the ledger.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        layout: Layout,
        num_seeds: int,
        states: dict[int, State],
        packed: UnpackedSource | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.layout = layout
        self.num_seeds = num_seeds
        self.states = states
        self.packed = packed
        self.records = Records(source, recipe, layout, BlockRecord)
        self._scratch = None if source.root is not None else Scratch(source, scratch or default_scratch())
        self._files = ChunkFiles(source, self._scratch)
        self._further_rows: dict[str, ArrayRows] = {}

    @property
    def address(self) -> str:
        """The path or URL that was opened."""
        return self.source.address

    @property
    def files(self) -> Source:
        """The store's own files; those of a packed store are packed."""
        return self.source if self.packed is None else self.packed.files

    @property
    def stored_layout(self) -> Layout:
        """The layout of the store's own files; `layout` is always raw."""
        return self.layout if self.packed is None else self.packed.layout

    def is_drawn_again(self, state: State) -> bool:
        """Whether a state is x_T of a packed store, which is drawn from the seeds and has no chunk files."""
        packing = self.stored_layout.packing
        return packing is not None and packing.is_predictive and state == self.layout.states[0]

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one state, (C, H, W)."""
        return self.recipe.item_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored states, little-endian."""
        return np.dtype(self.layout.dtype).newbyteorder("<")

    @property
    def is_remote(self) -> bool:
        """Whether chunks are fetched to the scratch folder first: from a URL, or decoded from a packed store."""
        return self._scratch is not None

    @property
    def num_blocks(self) -> int:
        """Blocks that the arrays declare."""
        return self.num_seeds // self.layout.block_size

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Committed blocks, ascending: those with a ledger record, valid or not."""
        return self.source.blocks(self.num_blocks)

    def check_begun(self) -> None:
        """Refuse an empty cache.

        Raises:
            NotCachedError: no block is committed.
        """
        if not self.blocks:
            raise NotCachedError(
                f"{self.address} is empty (0 of {self.num_blocks} blocks): finish it with the `advkd-cache build` "
                "command that began it"
            )

    @property
    def digest(self) -> str:
        """The content digest of all committed blocks."""
        return self.digest_of(self.blocks)

    def digest_of(self, blocks: Sequence[int]) -> str:
        """The content digest of some committed blocks, each record checked against its own hash.

        Raises:
            NotCachedError: a block was never committed.
            DamagedError: a record is torn or altered.
        """
        return self.records.digest_of(blocks)

    def seeds(self) -> npt.NDArray[np.int64]:
        """Every committed seed, ascending, int64."""
        size = self.layout.block_size
        starts = np.asarray(self.blocks, dtype=np.int64)[:, None] * size
        return (starts + np.arange(size, dtype=np.int64)).ravel()

    def record(self, block: int) -> BlockRecord:
        """The ledger record of a committed block.

        Raises:
            NotCachedError: the block was never committed.
            DamagedError: its record is torn, altered or of another cache.
        """
        return self.records[block]

    def provenance(self, block: int) -> bytes:
        """Who made a block, when and where, as a sealed file; empty where this copy doesn't say."""
        try:
            return self.source.read(provenance_path(block))
        except FileNotFoundError:
            return b""

    def state(self, step: int) -> State:
        """A recorded state that is present, by solver steps done.

        Raises:
            NotCachedError: it is absent or was never recorded.
        """
        if step in self.states:
            return self.states[step]
        known = [state.step for state in self.layout.states]
        if step in known:
            raise NotCachedError(
                f"{self.address}: state {step:04d} is not here (a partial copy?): `dvc pull` it, or choose among "
                f"{sorted(self.states)}"
            )
        raise NotCachedError(f"{self.address} records the states after {known} steps, not after {step}")

    def state_array(self, step: int) -> ArraySpec:
        """The array of a recorded state that is present, as a reader sees it.

        Raises:
            NotCachedError: it is absent or was never recorded.
        """
        return state_spec(self.recipe, self.layout, self.state(step))

    @cached_property
    def further_names(self) -> tuple[str, ...]:
        """Paths of the arrays besides the states that every block has, by the ledger; some may not be here."""
        return self.records.further_names(self.blocks)

    @cached_property
    def further(self) -> tuple[ArraySpec, ...]:
        """Arrays besides the states that are here, such as `conditions/label`.

        Raises:
            DamagedError: the metadata of one are damaged, or differ from what the recipe generates.
        """
        found = []
        required = {spec.path: spec for spec in required_specs(self.recipe, self.layout.block_size)}
        for name in self.further_names:
            with suppress(FileNotFoundError):  # a partial copy
                spec = read_spec(self.source, name, self.layout.block_size)[0]
                if spec != required.get(name, spec):
                    raise DamagedError(
                        f"{self.address}/{spec.metadata_path} doesn't fit the recipe in {self.address}/zarr.json"
                    )
                found.append(spec)
        return tuple(found)

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every array that is here: the states as a reader sees them, then the others."""
        return (*map(self.state_array, self.states), *self.further)

    def array_records(self, block: int) -> dict[str, ArrayRecord]:
        """The ledger's entries of every array of one block, by array path.

        Raises:
            NotCachedError: the block was never committed.
            DamagedError: its record names other arrays than those of other blocks, or of another size.
        """
        record = self.record(block)
        if odd := set(record.further_names) ^ set(self.further_names):
            raise DamagedError(
                f"{self.address}: the ledger record of block {block} {'has' if min(odd) in record.arrays else 'lacks'} "
                f"an array {in_line(min(odd))}, unlike those of other blocks"
            )
        for spec in self.further:
            if not spec.fits(record.arrays[spec.path]):
                raise DamagedError(
                    f"{self.address}: the ledger record of block {block} doesn't fit {spec.metadata_path}"
                )
        return record.arrays

    def further_rows(self, spec: ArraySpec) -> ArrayRows:
        """What reads rows of an array besides the states.

        Raises:
            NotCachedError: it is not in this copy.
        """
        if spec.path not in self._further_rows:
            if spec.path not in {here.path for here in self.further}:
                raise NotCachedError(f"{self.address}: {spec.path} is not here (a partial copy?): pull it, too")
            self._further_rows[spec.path] = ArrayRows(self._files, self.records, spec, self.num_blocks)
        return self._further_rows[spec.path]

    def array_file(self, spec: ArraySpec, block: int) -> Path:
        """The local file of one block of an array, of the recorded size; a remote one is fetched to scratch first.

        Raises:
            NotCachedError: the block was never committed.
            DamagedError: the file is missing or has another size.
        """
        return self._files.path(spec.chunk_path(block), self.array_records(block)[spec.path])

    def array_bytes(self, spec: ArraySpec, block: int) -> bytes:
        """The whole chunk file of one block of an array, as a raw store has it.

        Raises:
            NotCachedError: the block was never committed.
            DamagedError: the file is missing or differs from the ledger.
        """
        chunk, expected = spec.chunk_path(block), self.array_records(block)[spec.path]
        with self._files.open(chunk, expected) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise DamagedError(f"{self.address}/{chunk} differs from what its ledger says; {HOW_TO_FIX}")
        return data

    def fetch(
        self, steps: Sequence[int], blocks: Sequence[int], fetched: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        """Fetch some states of some blocks of a remote store to the scratch folder; does nothing for a local one.

        Args:
            steps: solver steps done.
            blocks: committed blocks.
            fetched: called with the bytes of each chunk that was fetched.

        Raises:
            UsageError: they don't fit on the disk.
            DamagedError: bytes differ from the ledger.
        """
        specs = [self.state_array(step) for step in steps]
        chunks = [(spec.chunk_path(block), self.record(block).arrays[spec.path]) for block in blocks for spec in specs]
        self._files.fetch(chunks, fetched)


def local_root(cache: Contents) -> Path:
    """The folder of a local cache.

    Raises:
        CacheError: it is remote.
    """
    if cache.files.root is None:
        raise CacheError(f"{cache.address} is read only: copy it to a folder first (`advkd-cache subset --out STORE`)")
    return cache.files.root
