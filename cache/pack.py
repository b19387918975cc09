"""Packing a store, and unpacking it: block by block, each committed by its ledger record, as `build` does.

Both resume where they were stopped or killed, divide the blocks with others who do the same, and extend what is
there. The packer decodes every chunk from the file that it wrote before the block counts.
"""

from __future__ import annotations

import functools
import hashlib
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache import plain
from advkd.cache.combine import carry, check_whole
from advkd.cache.durable import write_atomically
from advkd.cache.errors import CacheError, DamagedError, MismatchError, NotCachedError
from advkd.cache.layout import CRC_BYTES, chunk_path, provenance_path, states_path
from advkd.cache.ledger import ArrayRecord, crc32c
from advkd.cache.packed import PackedSource
from advkd.cache.packed_ledger import PackedArray, PackedRecord, error_of
from advkd.cache.packing import MAX_PACKED_BLOCK_BYTES, Packing
from advkd.cache.parallel import over_blocks
from advkd.cache.paths import safe_target
from advkd.cache.reader import TrajectoryCache
from advkd.cache.recipe import State
from advkd.cache.writer import CacheWriter

_NOTHING = hashlib.sha256(b"").hexdigest()
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """What packing or unpacking did."""

    store: Path
    num_added: int
    num_present: int
    """Blocks that were there already."""
    num_bytes: int
    """Of the packed chunk files of all these blocks."""
    num_values: int
    error_rms: float
    """Over all these blocks and all states that are stored."""
    error_max: float


@dataclass(frozen=True, slots=True)
class _Done:
    """One block."""

    added: bool
    record: PackedRecord


def pack(
    cache: TrajectoryCache,
    out: Path,
    packing: Packing,
    *,
    num_workers: int = 1,
    begin: Callable[[int], None] = lambda num_bytes: None,
    advance: Advance = lambda num_bytes: None,
) -> Packed:
    """Write a packed copy of a store, or extend one.

    Args:
        cache: the store, local or remote.
        out: a new store, or one that an earlier call of the same kind began.
        packing: codec and parameters.
        num_workers: processes that divide the blocks.
        begin: hears how many bytes of values there are.
        advance: hears of those that are done.

    Raises:
        MismatchError: `out` is of another recipe, layout or packing.
        NotCachedError: the store is a partial copy, or empty.
        CacheError: the codec can't keep its promise.
    """
    check_whole(cache)
    if not cache.blocks:
        raise NotCachedError(f"{cache.address} is empty: finish it with `advkd-cache build`")
    block_bytes = cache.layout.block_bytes(cache.item_shape)
    if block_bytes > MAX_PACKED_BLOCK_BYTES:
        raise CacheError(
            f"{cache.address} has blocks of {block_bytes:,} bytes a state, packing takes {MAX_PACKED_BLOCK_BYTES:,} "
            "at most: build with a smaller --block-size"
        )
    writer = CacheWriter(out, cache.recipe, cache.layout.packed(packing))
    problem = writer.mismatch()
    if problem:
        raise MismatchError(f"{out} holds something else ({problem}): choose another --out")
    writer = CacheWriter.open(out, cache.recipe, cache.layout.packed(packing))
    begin(len(cache.blocks) * len(cache.layout.states) * block_bytes)
    with writer.writing():
        writer.grow(range(cache.num_seeds))
        task = functools.partial(_pack_block, cache.address, uuid.uuid4().hex, out, packing)
        done = []
        for result in over_blocks(task, cache.blocks, num_workers):
            done.append(result)
            advance(len(cache.layout.states) * block_bytes)
    carry([cache], out)
    return _sum_up(out, cache, done)


def unpack(
    cache: TrajectoryCache,
    out: Path,
    *,
    num_workers: int = 1,
    begin: Callable[[int], None] = lambda num_bytes: None,
    advance: Advance = lambda num_bytes: None,
) -> Packed:
    """Write the raw store that a packed one stands for, or what is missing of it.

    Raises:
        MismatchError: `out` is of another recipe or layout.
        NotCachedError: the packed store is a partial copy, or no packed store.
        DamagedError: a file is missing or not what the ledger says; no block of it was written.
    """
    source = _packed(cache)
    check_whole(cache)
    writer = CacheWriter(out, cache.recipe, cache.layout)
    problem = writer.mismatch()
    if problem:
        raise MismatchError(f"{out} holds something else ({problem}): choose another --out")
    writer = CacheWriter.open(out, cache.recipe, cache.layout)
    block_bytes = cache.layout.block_bytes(cache.item_shape)
    begin(len(cache.blocks) * len(cache.layout.states) * block_bytes)
    with writer.writing():
        if cache.num_seeds:
            writer.grow(range(cache.num_seeds))
        task = functools.partial(_unpack_block, cache.address, uuid.uuid4().hex, out)
        num_added = 0
        for added in over_blocks(task, cache.blocks, num_workers):
            num_added += added == "added"
            advance(len(cache.layout.states) * block_bytes)
    carry([cache], out)
    done = [_Done(False, source.records[block]) for block in cache.blocks]
    return replace(_sum_up(out, cache, done), num_added=num_added, num_present=len(done) - num_added)


def _sum_up(out: Path, cache: TrajectoryCache, done: list[_Done]) -> Packed:
    arrays = [array for one in done for array in one.record.arrays.values()]
    return Packed(
        store=out,
        num_added=sum(one.added for one in done),
        num_present=sum(not one.added for one in done),
        num_bytes=sum(array.num_bytes for array in arrays),
        num_values=len(arrays) * cache.layout.block_size * math.prod(cache.item_shape),
        error_rms=math.sqrt(sum(array.error_rms**2 for array in arrays) / max(1, len(arrays))),
        error_max=max((array.error_max for array in arrays), default=0.0),
    )


def _packed(cache: TrajectoryCache) -> PackedSource:
    if not isinstance(cache.source, PackedSource):
        raise NotCachedError(f"{cache.address} is no packed store: nothing to unpack")
    return cache.source


@functools.lru_cache(maxsize=1)
def _open(address: str, call: str) -> TrajectoryCache:
    """Kept from block to block by a process, not from one call to the next."""
    return TrajectoryCache.open(address)


def _pack_block(address: str, call: str, out: Path, packing: Packing, block: int) -> _Done | None:
    """Pack a block unless it is there; None if somebody else is at it."""
    cache = _open(address, call)
    writer = _PackedWriter(out, cache.recipe, cache.layout.packed(packing))
    with writer.claim(block) as claimed:
        if not claimed:
            return None
        present = writer.present(block, cache)
        return _Done(False, present) if present else _Done(True, writer.pack(block, cache, packing))


def _unpack_block(address: str, call: str, out: Path, block: int) -> str | None:
    """Unpack a block unless it is there; None if somebody else is at it."""
    cache = _open(address, call)
    source, writer = _packed(cache), CacheWriter(out, cache.recipe, cache.layout)
    with writer.claim(block) as claimed:
        if not claimed:
            return None
        if writer.is_committed(block):
            return "present"
        chunks = source.states(block, {state.step for state in cache.layout.states})
        writer.restore(block, chunks, cache.record(block), _provenance(cache, block))
        return "added"


def _provenance(cache: TrajectoryCache, block: int) -> bytes:
    try:
        return cache.source.read(provenance_path(block))
    except FileNotFoundError:
        return b""  # a copy without it


class _PackedWriter(CacheWriter):
    """A packed store opened for writing blocks of a raw one."""

    def present(self, block: int, cache: TrajectoryCache) -> PackedRecord | None:
        """The record of a block that is there, made of this very content."""
        try:
            found = TrajectoryCache.open(self.path)
            record = _packed(found).records[block]
        except (DamagedError, NotCachedError):
            return None
        for state in self.layout.states:
            array = record.arrays[states_path(state)]
            file = self.path / chunk_path(states_path(state), block, len(cache.item_shape))
            whole = not array.num_bytes or (file.is_file() and file.stat().st_size == array.num_bytes)
            if not whole or array.packed_from != cache.chunk(state.step, block)[1].sha256:
                return None
        return record

    def pack(self, block: int, cache: TrajectoryCache, packing: Packing) -> PackedRecord:
        """Encode, write, decode what was written, compare, commit."""
        self._prepare(block)
        arrays = {}
        encode, decode = _chains(cache, packing, block) if packing.redraws else _plain_codec(cache, packing)
        for index, state in enumerate(self.layout.states):
            values, entry = cache.block_view(state.step, block), cache.chunk(state.step, block)[1]
            if packing.redraws and index == 0:
                arrays[states_path(state)] = self._drawn(block, cache, encode(values), entry)
                continue
            body = encode(values)
            data = body + crc32c(body).to_bytes(CRC_BYTES, "little")
            path = self._chunk(state.name, block)
            write_atomically(path, [data])
            back = path.read_bytes()
            if back != data:
                raise CacheError(f"{path} reads back differently from what was written: is the disk failing?")
            decoded = decode(back[:-CRC_BYTES])
            arrays[states_path(state)] = _describe(state, block, data, decoded, values, entry, packing)
        provenance = _provenance(cache, block)
        if provenance:
            write_atomically(safe_target(self.path, provenance_path(block)), [provenance])
        record = PackedRecord(
            block=block, fingerprint=self.recipe.fingerprint, layout_hash=self.layout.layout_hash, arrays=arrays
        )
        record.write(self.path)
        return record

    def _drawn(self, block: int, cache: TrajectoryCache, drawn: bytes, entry: ArrayRecord) -> PackedArray:
        if hashlib.sha256(drawn + crc32c(drawn).to_bytes(CRC_BYTES, "little")).hexdigest() != entry.sha256:
            raise DamagedError(
                f"{cache.address}: x_T of block {block} is not what its seeds draw, so it can't be left out: "
                "`advkd-cache verify` the store, or choose --codec pcodec"
            )
        return PackedArray(
            num_bytes=0, sha256=_NOTHING, packed_from=entry.sha256, error_rms=0.0, error_max=0.0, raw=entry
        )


Encode = Callable[[npt.NDArray[Any]], bytes]
Decode = Callable[[bytes], npt.NDArray[Any]]


def _chains(cache: TrajectoryCache, packing: Packing, block: int) -> tuple[Encode, Decode]:
    """The encoder, which draws x_T first, and a decoder that sees nothing but the files."""
    from advkd.cache.chain import Chain

    encoder, decoder = (Chain(cache.recipe, cache.layout, packing, block) for _ in range(2))
    begun = False

    def encode(values: npt.NDArray[Any]) -> bytes:
        nonlocal begun
        if begun:
            return encoder.encode(values)
        begun = True
        drawn = encoder.first()
        decoder.begin_like(encoder)
        return drawn.tobytes()

    return encode, decoder.decode


def _plain_codec(cache: TrajectoryCache, packing: Packing) -> tuple[Encode, Decode]:
    shape, first = (cache.layout.block_size, *cache.item_shape), True

    def encode(values: npt.NDArray[Any]) -> bytes:
        nonlocal first
        rounded = values if first else plain.round_mantissas(values, packing)  # x_T stays what the seeds draw
        first = False
        return plain.encode(rounded, packing)

    return encode, lambda data: plain.decode(data, packing, cache.dtype, shape)


def _describe(
    state: State,
    block: int,
    data: bytes,
    decoded: npt.NDArray[Any],
    values: npt.NDArray[Any],
    entry: ArrayRecord,
    packing: Packing,
) -> PackedArray:
    """The ledger's entry of a packed chunk.

    Raises:
        CacheError: what was decoded is further from the values than the codec promises, or not finite.
    """
    rms, largest = error_of(decoded, values)
    bound, raw = packing.error_bound, entry
    if not np.isfinite(decoded).all() or (bound is not None and largest > bound):
        raise CacheError(
            f"state {state.name} of block {block}, decoded again, is off by {largest:.3g}, more than {packing} allows; "
            "nothing of the block was kept: use `--codec lossless`"
        )
    body = decoded.tobytes()
    chunk = body + crc32c(body).to_bytes(CRC_BYTES, "little")
    if hashlib.sha256(chunk).hexdigest() != entry.sha256:
        if bound == 0.0:
            raise CacheError(f"state {state.name} of block {block} decodes to other bytes, which lossless must not")
        rounding = ArrayRecord.of(chunk, decoded, decoded)
        # Stored minus computed value is what storing cost and what packing cost, together no more than their sum.
        raw = replace(
            rounding,
            rounding_rms=_three_digits_up(entry.rounding_rms + rms),
            rounding_max=_three_digits_up(entry.rounding_max + largest),
        )
    return PackedArray(
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        packed_from=entry.sha256,
        error_rms=float(f"{rms:.2e}"),
        error_max=largest,
        raw=raw,
    )


def _three_digits_up(value: float) -> float:
    shown = float(f"{value:.2e}")
    return shown if shown >= value or value == 0 else float(f"{value * 1.005:.2e}")
