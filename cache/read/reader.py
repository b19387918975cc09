"""Reading a cache: states by seed, memory-mapped, checked against the ledger at their first use.

A raw chunk file is the C-order array followed by a CRC, so random rows come from memory maps
(`advkd.cache.read.mapping`), about 100 times as fast as through zarr. Readers obey the ledger: an uncommitted seed is
an error, never zeros or NaN.
"""

from __future__ import annotations

import hashlib
import math
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
from advkd.cache.format.arrays import ArraySpec, further_names, read_spec, state_spec
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.ledger import HOW_TO_FIX, BlockRecord
from advkd.cache.format.metadata import read_arrays, read_metadata
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.records import Records
from advkd.cache.format.source import Source, open_source
from advkd.cache.format.store_paths import states_path
from advkd.cache.read.chunk_cache import Scratch, default_scratch
from advkd.cache.read.chunks import ChunkFiles, StateRows

if TYPE_CHECKING:
    import dask.array
    from zarr import Group

    from advkd.cache.codec.unpacked_source import UnpackedSource

Values = npt.NDArray[Any]


class TrajectoryCache:
    """A trajectory cache opened for reading.

    `rows` gives float16 (or float32, as the store's `dtype` is) in **stored units**, x_t / scale at unit variance. The
    solver's own state, x_t = alpha · x_0 + sigma · ε, of some seeds:

        x_t = cache.rows(step, seeds).astype(np.float32) * cache.states[step].scale

    Images have scale 1, so that x_0 is in [−1, 1] up to what the sampler overshoots.

    Attributes:
        source: the files of the raw store.
        recipe: what determines its numbers.
        layout: which states it holds and how they are stored.
        num_seeds: seeds that the arrays declare; some may not be committed.
        states: the recorded states that are present, by solver steps done.
        records: the ledger.
        packed: the source of a packed store, which has the packed layout and records; None for a raw store.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        layout: Layout,
        num_seeds: int,
        states: dict[int, State],
        scratch: Path | None = None,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.layout = layout
        self.num_seeds = num_seeds
        self.states = states
        self._scratch = None if source.root is not None else Scratch(source, scratch or default_scratch())
        self.packed: UnpackedSource | None = None
        self.records = Records(source, recipe, layout, BlockRecord)
        self._files = ChunkFiles(source, self._scratch)
        self._rows: dict[int, StateRows] = {}

    @classmethod
    def open(cls, address: str | Path, *, scratch: Path | None = None) -> TrajectoryCache:
        """Open a store; reads only its metadata.

        Args:
            address: a folder, or a URL that fsspec reads (`s3://`, `gs://`, `hf://`, `http(s)://`).
            scratch: folder for chunks of a remote store; `ADVKD_SCRATCH` or the user's cache folder if not given.

        Raises:
            CacheNotFoundError: nothing is there.
            NotACacheError: something else is there, or a newer format.
            DamagedError: its metadata are inconsistent.
        """
        source = open_source(address)
        recipe, layout = read_metadata(source)
        states, num_seeds = read_arrays(source, recipe, layout)
        if layout.packing is None:
            return cls(source, recipe, layout, num_seeds, states, scratch)
        from advkd.cache.codec.unpacked_source import UnpackedSource

        unpacked = UnpackedSource(source, recipe, layout, num_seeds)
        cache = cls(unpacked, recipe, unpacked.raw_layout, num_seeds, states, scratch)
        cache.packed = unpacked
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address: another process opens the store again."""
        return _reopen, (self.address, None if self._scratch is None else self._scratch.folder)

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
    def item_bytes(self) -> int:
        """Bytes of one state of one seed."""
        return math.prod(self.item_shape) * self.dtype.itemsize

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

    @cached_property
    def further_names(self) -> tuple[str, ...]:
        """Paths of the arrays besides the states that every block has, by the ledger; some may not be here."""
        return further_names(self.records, self.layout, self.blocks)

    @cached_property
    def further(self) -> tuple[ArraySpec, ...]:
        """Arrays besides the states that are here, such as `conditions/label`.

        Raises:
            DamagedError: the metadata of one are damaged.
        """
        found = []
        for name in self.further_names:
            with suppress(FileNotFoundError):  # a partial copy
                found.append(read_spec(self.source, name, self.layout.block_size)[0])
        return tuple(found)

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every array that is here: the states as a reader sees them, then the others."""
        return (*(state_spec(self.recipe, self.layout, state) for state in self.states.values()), *self.further)

    def array_records(self, block: int) -> dict[str, ArrayRecord]:
        """The ledger's entries of every array of one block, by array path.

        Raises:
            NotCachedError: the block was never committed.
            DamagedError: its record names other arrays than those of other blocks, or of another size.
        """
        arrays = self.record(block).arrays
        odd = (arrays.keys() - {states_path(state) for state in self.layout.states}) ^ set(self.further_names)
        if odd:
            raise DamagedError(
                f"{self.address}: the ledger record of block {block} {'has' if min(odd) in arrays else 'lacks'} an "
                f"array {in_line(min(odd))}, unlike those of other blocks"
            )
        for spec in self.further:
            if not spec.fits(arrays[spec.path]):
                raise DamagedError(
                    f"{self.address}: the ledger record of block {block} doesn't fit {spec.metadata_path}"
                )
        return arrays

    def array_file(self, spec: ArraySpec, block: int) -> Path:
        """The local file of one block of any array; see `chunk_file`."""
        return self._files.path(spec.chunk_path(block), self.array_records(block)[spec.path])

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

    def chunk(self, step: int, block: int) -> tuple[str, ArrayRecord]:
        """Path and ledger entry of one block of one state."""
        return self.records.chunk(self.state(step), block)

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
        self._files.fetch([self.chunk(step, block) for block in blocks for step in steps], fetched)

    def chunk_file(self, step: int, block: int) -> Path:
        """The local file of one block of one state, of the recorded size; a remote one is fetched to scratch first.

        Raises:
            DamagedError: it is missing or has another size.
        """
        return self._files.path(*self.chunk(step, block))

    def _rows_of(self, step: int) -> StateRows:
        if step not in self._rows:
            self._rows[step] = StateRows(
                self._files, self.records, self.state(step), self.num_blocks, self.layout.block_size, self.item_bytes
            )
        return self._rows[step]

    def block_view(self, step: int, block: int) -> Values:
        """One block of one state without copying: a read-only map of the file, wholly checked.

        Returns:
            Stored dtype, shape (block_size, *item_shape); `torch.from_numpy` accepts it.

        Raises:
            NotCachedError: the block or state is absent.
            DamagedError: bytes differ from the ledger.
        """
        return self._rows_of(step).block(block).view(self.dtype).reshape(-1, *self.item_shape)

    def rows(self, step: int, seeds: npt.ArrayLike, out: Values | None = None) -> Values:
        """Read the stored values of some seeds at one recorded state.

        Args:
            step: solver steps done; 0 is x_T, the last is x_0.
            seeds: seeds in any order, repeats allowed.
            out: destination, such as pinned memory: stored dtype, C-contiguous, of the shape below.

        Returns:
            Stored dtype, float16 unless the store says float32, and stored units x_t / scale; shape
            (len(seeds), *item_shape), in the order of `seeds`. For x_t convert to float32 and multiply by the state's
            `scale`.

        Raises:
            NotCachedError: a seed or state is absent.
            DamagedError: bytes differ from the ledger.
        """
        wanted = np.asarray(seeds, dtype=np.int64).ravel()
        if wanted.size and wanted.view(np.uint64).max() >= self.num_seeds:  # negative seeds are large, too
            outside = wanted[(wanted < 0) | (wanted >= self.num_seeds)][0]
            raise NotCachedError(f"{self.address} declares seeds 0:{self.num_seeds}; seed {outside} is outside")
        into = None if out is None else out.reshape(wanted.size, -1).view(np.uint8)
        values = self._rows_of(step).gather(wanted, into)
        return values.view(self.dtype).reshape(wanted.size, *self.item_shape) if out is None else out

    def array_bytes(self, spec: ArraySpec, block: int) -> bytes:
        """The whole chunk file of one block of any array, as a raw store has it.

        Raises:
            NotCachedError: the block is absent.
            DamagedError: the file is missing or differs from the ledger.
        """
        chunk, expected = spec.chunk_path(block), self.array_records(block)[spec.path]
        with self._files.open(chunk, expected) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise DamagedError(f"{self.address}/{chunk} differs from what its ledger says; {HOW_TO_FIX}")
        return data

    @cached_property
    def zarr(self) -> Group:
        """The store as a read-only zarr group, such as `cache.zarr["states/0050"][:8]`.

        Local, remote and packed stores look like the raw store. Reading a block that was never committed raises
        NotCachedError, reading a damaged one DamagedError. For random rows `rows` is about 100 times faster.
        """
        import zarr

        from advkd.cache.read.zarr_store import CommittedFiles, CommittedStore

        return zarr.open_group(CommittedStore(CommittedFiles(self)), mode="r", zarr_format=3)

    def dask_array(self, step: int) -> dask.array.Array:
        """A lazy dask view of one state over all declared seeds, for analysis; one dask chunk per block.

        Returns:
            Stored dtype, shape (num_seeds, *item_shape). Rows of uncommitted blocks are NaN.

        Raises:
            NotCachedError: the state is absent.
        """
        import dask.array
        import zarr

        from advkd.cache.read.zarr_store import CommittedFiles, CommittedStore

        store = CommittedStore(CommittedFiles(self, fill_uncommitted=True))
        return dask.array.from_zarr(zarr.open_array(store, path=states_path(self.state(step)), mode="r"))


def _reopen(address: str, scratch: Path | None) -> TrajectoryCache:
    return TrajectoryCache.open(address, scratch=scratch)


def local_root(cache: TrajectoryCache) -> Path:
    """The folder of a local cache.

    Raises:
        CacheError: it is remote.
    """
    if cache.files.root is None:
        raise CacheError(f"{cache.address} is read only: copy it to a folder first (`advkd-cache subset --out STORE`)")
    return cache.files.root
