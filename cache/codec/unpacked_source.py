"""A packed store read as the raw store that it unpacks to.

`UnpackedSource` serves the paths of the raw store: it derives metadata and ledger records and decodes chunks when they
are read. So whatever reads a remote store (training through the scratch folder, `preview`, `diff`, `subset`, `merge`,
Zarr) reads a packed one too, and a run that was trained from it records the digest of the unpacked store.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from advkd.cache.codec import standard
from advkd.cache.errors import DamagedError, NeedsDamagedError
from advkd.cache.files.paths import MAX_METADATA_BYTES
from advkd.cache.files.sealed_json import seal
from advkd.cache.files.strict_json import pretty_json
from advkd.cache.format.array_record import with_crc
from advkd.cache.format.encoding import Packing
from advkd.cache.format.layout import Layout, State
from advkd.cache.format.packed_ledger import HOW_TO_FIX, PackedArray, PackedRecord
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.records import Records
from advkd.cache.format.source import Source, WholeFileSource
from advkd.cache.format.store_paths import block_of_record, chunk_path, metadata_path, states_path
from advkd.cache.format.zarr_metadata import CRC_BYTES, array_metadata, root_metadata


class _MissingError(DamagedError, FileNotFoundError):
    """A packed file is missing, so readers of the raw store find its chunk missing."""


@dataclass(slots=True)
class _LastBlock:
    """Decoded chunks of the block that was read last, of the states in `wanted`."""

    block: int = -1
    chunks: dict[int, bytes] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    """Every state that was ever read: the next block decodes all of them at once."""


class UnpackedSource(WholeFileSource):
    """The raw store that a packed one unpacks to; satisfies `Source`.

    Attributes:
        address: of the packed store.
        files: source of the packed store's own files.
        layout: the packed layout; readers see `raw_layout`.
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
        self._last = _LastBlock()
        self._lock = threading.Lock()  # zarr reads from threads: each would decode the same block again

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks that have a ledger record."""
        return self.files.blocks(num_blocks)

    def read(self, path: str, limit: int = MAX_METADATA_BYTES) -> bytes:
        """A file of the raw store."""
        folder, _, name = path.rpartition("/")
        if path == "zarr.json":
            return pretty_json(root_metadata(self.recipe, self.raw_layout))
        if path in self._steps:
            self.files.read(path)  # raises FileNotFoundError if the state is absent
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
        """Chunks of the raw store, of some states of a block, in the order of the layout.

        Raises:
            DamagedError: a packed file is missing or differs from the ledger; no chunk after it can be decoded.
        """
        if not self.packing.is_predictive:
            for state in self.layout.states:
                if state.step in steps:
                    yield state, self._decode_standard(state, block)
            return
        from advkd.cache.codec.state_codec import StateCodec

        codec, records = StateCodec(self.recipe, self.layout, self.packing, block), self.records[block]
        for index, state in enumerate(self.layout.states):
            if state.step > max(steps, default=-1):
                break
            record = records.of(state)
            if index == 0:
                chunk = with_crc(codec.draw_initial().tobytes())
                if hashlib.sha256(chunk).hexdigest() != record.raw.sha256:
                    raise DamagedError(f"{self.address}: x_T of block {block}, drawn again, differs from the ledger")
            else:
                data = self._packed_file(state, block, record)
                try:
                    values = codec.decode(data)
                except ValueError as error:
                    raise self._damaged(state, block, f"can't be decoded ({error})") from None
                chunk = with_crc(values.tobytes()) if state.step in steps else b""
            if state.step in steps:
                yield state, chunk

    def _chunk(self, state: State, block: int) -> bytes:
        """One chunk; predictive codecs decode with it the block's other states that were ever read."""
        if not self.packing.is_predictive:
            return self._decode_standard(state, block)
        with self._lock:
            return self._decode_predictive(state, block)

    def _decode_predictive(self, state: State, block: int) -> bytes:
        last = self._last
        last.wanted.add(state.step)
        if last.block != block or state.step not in last.chunks:
            self._last = last = _LastBlock(block=block, wanted=last.wanted)
            try:
                for found, chunk in self.states(block, last.wanted):
                    last.chunks[found.step] = chunk
            except DamagedError as error:
                if state.step not in last.chunks:
                    self._refuse(state, block, error)
        return last.chunks[state.step]

    def _refuse(self, state: State, block: int, error: DamagedError) -> None:
        """Raise for this state if its own file is damaged, else for an earlier state that it is predicted from."""
        own = chunk_path(states_path(state), block, len(self.recipe.item_shape))
        if own in str(error) or state == self.layout.states[0]:
            raise error
        raise NeedsDamagedError(f"{self.address}/{own} is predicted from what is damaged: {error}")

    def _decode_standard(self, state: State, block: int) -> bytes:
        data = self._packed_file(state, block, self.records[block].of(state))
        shape = (self.layout.block_size, *self.recipe.item_shape)
        try:
            values = standard.decode(data, self.packing, np.dtype(self.layout.dtype).newbyteorder("<"), shape)
        except ValueError as error:
            raise self._damaged(state, block, f"can't be decoded ({error})") from None
        return with_crc(values.tobytes())

    def _packed_file(self, state: State, block: int, record: PackedArray) -> bytes:
        """A packed chunk file without its CRC, checked against the ledger."""
        path = chunk_path(states_path(state), block, len(self.recipe.item_shape))
        try:
            data = self.files.read(path, record.num_bytes)
        except FileNotFoundError:
            raise _MissingError(str(self._damaged(state, block, "is missing, but the ledger has it"))) from None
        if len(data) != record.num_bytes:
            raise self._damaged(state, block, f"has {len(data)} bytes, the ledger says {record.num_bytes}")
        body = data[:-CRC_BYTES]
        if hashlib.sha256(data).hexdigest() != record.sha256 or data != with_crc(body):
            raise self._damaged(state, block, "differs from what the ledger says")
        return body

    def _damaged(self, state: State, block: int, problem: str) -> DamagedError:
        path = chunk_path(states_path(state), block, len(self.recipe.item_shape))
        return DamagedError(f"{self.address}/{path} {problem}; {HOW_TO_FIX}")
