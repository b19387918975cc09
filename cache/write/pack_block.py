"""Packing and unpacking one block: encode, write, decode again, compare, commit."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache.codec import standard
from advkd.cache.codec.unpacked_source import UnpackedSource
from advkd.cache.errors import CacheError, DamagedError, NotCachedError
from advkd.cache.files.durable import write_verified
from advkd.cache.format.array_record import ArrayRecord, with_crc
from advkd.cache.format.encoding import Packing
from advkd.cache.format.layout import State
from advkd.cache.format.packed_ledger import PackedArray, PackedRecord, error_of
from advkd.cache.format.store_paths import states_path
from advkd.cache.read.reader import TrajectoryCache
from advkd.cache.write.divide import Outcome
from advkd.cache.write.writer import CacheWriter

_NOTHING = hashlib.sha256(b"").hexdigest()
Encode = Callable[[npt.NDArray[Any]], bytes]
Decode = Callable[[bytes], npt.NDArray[Any]]


def packed_source(cache: TrajectoryCache) -> UnpackedSource:
    """The packed store that a cache is decoded from.

    Raises:
        NotCachedError: it is a raw one.
    """
    if cache.packed is None:
        raise NotCachedError(f"{cache.address} is no packed store: nothing to unpack")
    return cache.packed


@functools.lru_cache(maxsize=1)
def _open(address: str, call: str) -> TrajectoryCache:
    """Opened once per process and call of `pack` or `unpack`."""
    return TrajectoryCache.open(address)


def pack_block(address: str, call: str, writer: PackedWriter, packing: Packing, block: int) -> Outcome:
    """Pack a block unless it is there."""
    cache = _open(address, call)
    return writer.make(block, lambda claim: writer.pack(block, cache, packing), lambda: writer.is_present(block, cache))


def unpack_block(address: str, call: str, writer: CacheWriter, block: int) -> Outcome:
    """Unpack a block unless it is there."""
    cache = _open(address, call)

    def unpack(claim: ExitStack) -> None:
        states = packed_source(cache).states(block, {state.step for state in cache.layout.states})
        chunks = itertools.chain(
            ((states_path(state), data) for state, data in states),
            ((spec.path, cache.array_bytes(spec, block)) for spec in cache.further),
        )
        writer.restore(block, chunks, cache.record(block), cache.provenance(block))

    return writer.make(block, unpack)


class PackedWriter(CacheWriter):
    """A packed store opened for writing blocks of a raw one."""

    def is_present(self, block: int, cache: TrajectoryCache) -> bool:
        """Whether a packed block is there and was made from the raw block's present content."""
        try:
            found = packed_source(TrajectoryCache.open(self.path)).records[block].arrays
        except (DamagedError, NotCachedError):
            return False
        raw = cache.array_records(block)
        for spec in self.arrays:
            entry = found.get(spec.path)
            if entry is None or (entry.num_bytes and not self._holds(spec, block, entry.num_bytes)):
                return False
            made_from = entry.packed_from if isinstance(entry, PackedArray) else entry.sha256
            if made_from != raw[spec.path].sha256:
                return False
        return True

    def pack(self, block: int, cache: TrajectoryCache, packing: Packing) -> None:
        """Encode each state, write it and read it back, decode it, compare, commit."""
        self._prepare(block)
        raw = cache.array_records(block)
        arrays: dict[str, PackedArray | ArrayRecord] = {spec.path: raw[spec.path] for spec in self.further}
        encode, decode = _predictive(cache, packing, block) if packing.is_predictive else _standard(cache, packing)
        for state, spec in zip(self.layout.states, self.arrays, strict=False):
            values, entry = cache.block_view(state.step, block), raw[spec.path]
            body = encode(values)
            if packing.is_predictive and state == self.layout.states[0]:
                arrays[spec.path] = self._drawn(block, cache, body, entry)
                continue
            data = with_crc(body)
            write_verified(self._target(spec.chunk_path(block)), data)
            arrays[spec.path] = _describe(state, block, data, decode(body), values, entry, packing)
        for spec in self.further:
            write_verified(self._target(spec.chunk_path(block)), cache.array_bytes(spec, block))
        self._write_provenance(block, cache.provenance(block))
        record = PackedRecord(
            block=block, fingerprint=self.recipe.fingerprint, layout_hash=self.layout.layout_hash, arrays=arrays
        )
        record.write(self.path)

    def _drawn(self, block: int, cache: TrajectoryCache, drawn: bytes, entry: ArrayRecord) -> PackedArray:
        if hashlib.sha256(with_crc(drawn)).hexdigest() != entry.sha256:
            raise DamagedError(
                f"{cache.address}: x_T of block {block} is not what its seeds draw, so it can't be left out: "
                "`advkd-cache verify` the store, or choose --codec pcodec"
            )
        return PackedArray(
            num_bytes=0, sha256=_NOTHING, packed_from=entry.sha256, error_rms=0.0, error_max=0.0, raw=entry
        )


def _predictive(cache: TrajectoryCache, packing: Packing, block: int) -> tuple[Encode, Decode]:
    """An encoder, which returns x_T as drawn first, and a decoder that knows only what it returned."""
    from advkd.cache.codec.state_codec import StateCodec

    encoder, decoder = (StateCodec(cache.recipe, cache.layout, packing, block) for _ in range(2))
    begun = False

    def encode(values: npt.NDArray[Any]) -> bytes:
        nonlocal begun
        if begun:
            return encoder.encode(values)
        begun = True
        drawn = encoder.draw_initial()
        decoder.share_initial(encoder)
        return drawn.tobytes()

    def decode(data: bytes) -> npt.NDArray[Any]:
        values = decoder.decode(data)
        encoder.share_decoded(decoder)
        return values

    return encode, decode


def _standard(cache: TrajectoryCache, packing: Packing) -> tuple[Encode, Decode]:
    shape, first = (cache.layout.block_size, *cache.item_shape), True

    def encode(values: npt.NDArray[Any]) -> bytes:
        nonlocal first
        rounded = values if first else standard.round_mantissas(values, packing)  # x_T stays as drawn
        first = False
        return standard.encode(rounded, packing)

    return encode, lambda data: standard.decode(data, packing, cache.dtype, shape)


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
    chunk = with_crc(decoded.tobytes())
    if hashlib.sha256(chunk).hexdigest() != entry.sha256:
        if bound == 0.0:
            raise CacheError(f"state {state.name} of block {block} decodes to other bytes, which lossless must not")
        rounding = ArrayRecord.of(chunk, decoded, decoded)
        # The error against the computed value is at most that of storing plus that of packing.
        raw = replace(
            rounding,
            rounding_rms=_three_digits_up((entry.rounding_rms or 0.0) + rms),
            rounding_max=_three_digits_up((entry.rounding_max or 0.0) + largest),
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
