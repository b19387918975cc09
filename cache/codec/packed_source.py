"""A packed store, read as the raw store that it unpacks to.

`PackedSource` has the paths of a raw store. Metadata and ledger records are derived, chunks are decoded when they are
read, so that everything which reads a remote store (training by way of the scratch folder, `preview`, `diff`, `subset`,
`merge`) reads a packed one too, and a run trained from it has the digest of the unpacked store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache.codec import standard as plain
from advkd.cache.errors import DamagedError, NeedsDamagedError
from advkd.cache.files.paths import MAX_METADATA_BYTES
from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.encoding import Packing
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.ledger import crc32c
from advkd.cache.format.packed_ledger import HOW_TO_MEND, PackedArray, PackedRecord
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.records import Records
from advkd.cache.format.source import Source, read_each
from advkd.cache.format.store_paths import block_of_record, chunk_path, metadata_path, states_path
from advkd.cache.format.zarr_metadata import CRC_BYTES, array_metadata, root_metadata


class _MissingError(DamagedError, FileNotFoundError):
    """A packed file is not there: to readers of the raw store its chunk isn't."""


@dataclass(slots=True)
class _Kept:
    """Decoded chunks of the block that was read last, of states that were asked for before."""

    block: int = -1
    chunks: dict[int, bytes] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)


class PackedSource:
    """The raw store that a packed one stands for; satisfies `Source`.

    Attributes:
        address: the packed store's.
        files: where the packed store's own files come from.
        layout: the packed layout; `raw_layout` is what readers see.
        records: the packed store's ledger.
    """

    def __init__(self, files: Source, recipe: Recipe, layout: Layout, num_seeds: int) -> None:
        assert layout.packing is not None
        self.address = files.address
        self.files = files
        self.recipe = recipe
        self.layout = layout
        self.packing: Packing = layout.packing
        self.raw_layout = layout.packed(None)
        self.records = Records(files, recipe, layout, PackedRecord)
        self._num_seeds = num_seeds
        self._steps = {metadata_path(states_path(state)): state for state in layout.states}
        self._kept = _Kept()

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that have a ledger record."""
        return self.files.blocks(num_blocks)

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        """Whole files in order, None for one that isn't there."""
        return read_each(self.read, paths)

    def read(self, path: str, limit: int = MAX_METADATA_BYTES) -> bytes:
        """A file of the raw store."""
        folder, _, name = path.rpartition("/")
        if path == "zarr.json":
            return pretty_json(root_metadata(self.recipe, self.raw_layout))
        if path in self._steps:
            self.files.read(path)  # there, or FileNotFoundError
            return pretty_json(array_metadata(self.recipe, self.raw_layout, self._steps[path], self._num_seeds))
        if folder == "blocks":
            block = block_of_record(name)
            self.files.read(path)
            assert block is not None
            return seal(self.records[block].unpacked(self.raw_layout.layout_hash).to_json())
        for state in self.layout.states:
            if path.startswith(f"{states_path(state)}/c/"):
                return self._chunk(state, int(path.split("/")[3]))
        return self.files.read(path, limit)

    def states(self, block: int, steps: Collection[int]) -> Iterator[tuple[State, bytes]]:
        """Chunks as the raw store has them, of some states of a block, in the order of the layout.

        Raises:
            DamagedError: a packed file is missing, or not what the ledger says; no chunk after it can be decoded.
        """
        if not self.packing.redraws:
            for state in self.layout.states:
                if state.step in steps:
                    yield state, self._plain(state, block)
            return
        from advkd.cache.codec.state_codec import Chain

        chain, arrays = Chain(self.recipe, self.layout, self.packing, block), self.records[block].arrays
        for index, state in enumerate(self.layout.states):
            if state.step > max(steps, default=-1):
                break
            record = arrays[states_path(state)]
            if index == 0:
                chunk = _with_crc(chain.first())
                if hashlib.sha256(chunk).hexdigest() != record.raw.sha256:
                    raise DamagedError(f"{self.address}: x_T of block {block}, drawn again, is not what was recorded")
            else:
                data = self._packed_file(state, block, record)
                try:
                    values = chain.decode(data)
                except ValueError as error:
                    raise self._damaged(state, block, f"can't be decoded ({error})") from None
                chunk = _with_crc(values) if state.step in steps else b""
            if state.step in steps:
                yield state, chunk

    def _chunk(self, state: State, block: int) -> bytes:
        """A chunk that is read by itself; in chains those asked for before are decoded along with it."""
        kept = self._kept
        kept.asked.add(state.step)
        if not self.packing.redraws:
            return self._plain(state, block)
        if kept.block != block or state.step not in kept.chunks:
            self._kept = _Kept(block=block, asked=kept.asked)
            try:
                for found, chunk in self.states(block, kept.asked):
                    self._kept.chunks[found.step] = chunk
            except DamagedError as error:
                if state.step not in self._kept.chunks:
                    self._refuse(state, block, error)
        return self._kept.chunks[state.step]

    def _refuse(self, state: State, block: int, error: DamagedError) -> None:
        """Name the state that is damaged, and whether it is this one or one that this one needs."""
        own = chunk_path(states_path(state), block, len(self.recipe.item_shape))
        if own in str(error) or state == self.layout.states[0]:
            raise error
        raise NeedsDamagedError(f"{self.address}/{own} is predicted from what is damaged: {error}")

    def _plain(self, state: State, block: int) -> bytes:
        data = self._packed_file(state, block, self.records[block].arrays[states_path(state)])
        shape = (self.layout.block_size, *self.recipe.item_shape)
        try:
            values = plain.decode(data, self.packing, np.dtype(self.layout.dtype).newbyteorder("<"), shape)
        except ValueError as error:
            raise self._damaged(state, block, f"can't be decoded ({error})") from None
        return _with_crc(values)

    def _packed_file(self, state: State, block: int, record: PackedArray) -> bytes:
        """A packed chunk file without its CRC, checked against the ledger."""
        path = chunk_path(states_path(state), block, len(self.recipe.item_shape))
        try:
            data = self.files.read(path, record.num_bytes)
        except FileNotFoundError:
            raise _MissingError(str(self._damaged(state, block, "is missing, but the ledger has it"))) from None
        if len(data) != record.num_bytes:
            raise self._damaged(state, block, f"has {len(data)} bytes, the ledger says {record.num_bytes}")
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise self._damaged(state, block, "differs from what the ledger says")
        return data[:-CRC_BYTES]

    def _damaged(self, state: State, block: int, problem: str) -> DamagedError:
        path = chunk_path(states_path(state), block, len(self.recipe.item_shape))
        return DamagedError(f"{self.address}/{path} {problem}; {HOW_TO_MEND}")


def _with_crc(values: npt.NDArray[Any]) -> bytes:
    """A chunk file as a raw store has it."""
    body = values.tobytes()
    return body + crc32c(body).to_bytes(CRC_BYTES, "little")
