"""Reading a cache: states by seed, memory-mapped, checked against the ledger at their first use.

A raw chunk file is the C-order array followed by a CRC, so random rows come from memory maps
(`advkd.cache.read.mapping`), about 100 times as fast as through zarr. Readers obey the ledger: an uncommitted seed is
an error, never zeros or NaN.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import DamagedError, NotCachedError, UsageError
from advkd.cache.format.arrays import label_spec
from advkd.cache.format.condition import LABELS_PATH, Labels
from advkd.cache.format.ledger import HOW_TO_FIX
from advkd.cache.format.metadata import read_arrays, read_metadata
from advkd.cache.format.seeds import seeds_of
from advkd.cache.format.source import open_source
from advkd.cache.format.store_paths import states_path
from advkd.cache.read.chunks import ArrayRows
from advkd.cache.read.contents import Contents
from advkd.cache.read.prompts import StoredPrompts

if TYPE_CHECKING:
    import dask.array
    from zarr import Group

Values = npt.NDArray[Any]


class TrajectoryCache(Contents):
    """A trajectory cache opened for reading.

    `rows` gives float16 (or float32, as the store's `dtype` is) in **stored units**, x_t / scale at unit variance. The
    solver's own state, x_t = alpha · x_0 + sigma · ε, of some seeds:

        x_t = cache.rows(step, seeds).astype(np.float32) * cache.states[step].scale

    Images have scale 1, so that x_0 is in [−1, 1] up to what the sampler overshoots.
    """

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
            return cls(source, recipe, layout, num_seeds, states, scratch=scratch)
        from advkd.cache.codec.unpacked_source import UnpackedSource

        packed = UnpackedSource(source, recipe, layout, num_seeds)
        return cls(packed, recipe, packed.raw_layout, num_seeds, states, packed, scratch)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address: another process opens the store again."""
        return _reopen, (self.address, None if self._scratch is None else self._scratch.folder)

    @cached_property
    def _rows(self) -> dict[int, ArrayRows]:
        return {}

    def _rows_of(self, step: int) -> ArrayRows:
        if step not in self._rows:
            self._rows[step] = ArrayRows(self._files, self.records, self.state_array(step), self.num_blocks)
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
        wanted = self._declared(seeds)
        into = None if out is None else out.reshape(wanted.size, -1).view(np.uint8)
        values = self._rows_of(step).gather(wanted, into)
        return values.view(self.dtype).reshape(wanted.size, *self.item_shape) if out is None else out

    def labels(self, seeds: npt.ArrayLike) -> Labels:
        """The class labels that the teacher was told for some seeds.

        A block's are compared with the recipe's rule, where it has one, at first use.

        Args:
            seeds: seeds in any order, repeats allowed.

        Returns:
            int32, shape (len(seeds),).

        Raises:
            UsageError: the teacher is unconditional.
            NotCachedError: a seed is absent, or the labels are not in this copy.
            DamagedError: bytes differ from the ledger, or the labels from the recipe's rule.
        """
        condition = self.recipe.condition
        if condition is None:
            raise UsageError(f"{self.address} has no labels: its teacher is unconditional")
        wanted = self._declared(seeds)
        if condition.stored:
            found: Labels = self._label_rows.gather(wanted).view("<i4").ravel()
            if not np.isin(found, condition.labels).all():
                raise DamagedError(f"{self.address}: {LABELS_PATH} has labels that the recipe doesn't; {HOW_TO_FIX}")
            return found
        blocks = wanted // self.layout.block_size
        checked = self._checked_labels[blocks]
        if not checked.all():
            for block in np.unique(blocks[~checked]).tolist():
                stored = self._label_rows.block(block).view("<i4").ravel()
                if not np.array_equal(stored, condition.labels_of(seeds_of(block, self.layout.block_size))):
                    raise DamagedError(f"{self.address}: {LABELS_PATH} differs from the recipe's rule; {HOW_TO_FIX}")
                self._checked_labels[block] = True
        return condition.labels_of(wanted)

    @cached_property
    def _checked_labels(self) -> npt.NDArray[np.bool_]:
        return np.zeros(self.num_blocks, dtype=np.bool_)

    @cached_property
    def _label_rows(self) -> ArrayRows:
        return self.further_rows(label_spec(self.layout.block_size))

    @cached_property
    def prompts(self) -> StoredPrompts:
        """The prompts that the teacher was told.

        Raises:
            UsageError: it is no text-to-image pipeline.
        """
        if self.recipe.prompts is None:
            raise UsageError(f"{self.address} has no prompts: its teacher is no text-to-image pipeline")
        return StoredPrompts(self, self.recipe.prompts)

    def told(self, seeds: npt.ArrayLike) -> list[str] | None:
        """What the teacher was told for some seeds, to write beside pictures: labels or prompts; None if nothing.

        Raises:
            NotCachedError: a seed is absent, or the array is not in this copy.
            DamagedError: bytes differ from the ledger.
        """
        if self.recipe.prompts is not None:
            return [prompt.text for prompt in self.prompts.texts(self.recipe.prompts.prompts_of(seeds))]
        return None if self.recipe.condition is None else [str(label) for label in self.labels(seeds)]

    def varied(self, seeds: npt.ArrayLike, most: int) -> npt.NDArray[np.int64]:
        """Up to `most` of some seeds, in their order, for a picture: one per prompt before a second of any."""
        given = np.asarray(seeds, dtype=np.int64)
        alike = self.recipe.prompts.seeds_per_prompt if self.recipe.prompts else 1
        return given[np.sort(np.argsort(given % alike, kind="stable")[:most])]

    def _declared(self, seeds: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Seeds as int64, shape (N,), each of which the arrays declare."""
        wanted = np.asarray(seeds, dtype=np.int64).ravel()
        if wanted.size and wanted.view(np.uint64).max() >= self.num_seeds:  # negative seeds are large, too
            outside = wanted[(wanted < 0) | (wanted >= self.num_seeds)][0]
            raise NotCachedError(f"{self.address} declares seeds 0:{self.num_seeds}; seed {outside} is outside")
        return wanted

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
