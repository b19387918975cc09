"""Coding the states of one block in order, each predicted from x_T, which is drawn from the seeds, and earlier states.

A chunk of `lossless` or `archive` is: the bytes `akc1`; the numbers of weights and of streams (uint32); the weights
(float32), in time by channel, then in space by phase and channel; the length of each stream (uint32); the streams, by
phase and channel. All little-endian. A stream is PCodec's coding of int32 by group of seeds, then (y, x, seed).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from advkd.cache.codec.float16 import Floats, to_float16, to_float32
from advkd.cache.codec.predict import (
    BORDER,
    HISTORY,
    Phase,
    Values,
    fit_in_time,
    least_squares,
    num_time_weights,
    phases_of,
    predict_in_time,
)
from advkd.cache.codec.residual import Exact, Integers, Quantised, Residual, integers_from_bytes, integers_to_bytes
from advkd.cache.errors import CacheError
from advkd.cache.format.encoding import Packing, quantisation_step
from advkd.cache.format.layout import Layout
from advkd.cache.format.noise import NOISE_RULE, standard_normal
from advkd.cache.format.recipe import Recipe
from advkd.cache.format.seeds import seeds_of

MAGIC = b"akc1"
_HEAD = struct.Struct("<4sII")
_GROUP_VALUES = 1 << 18
"""Values of one group of seeds: float32 arrays of this size (1 MiB) stay in a processor's cache."""
_FITTED_VALUES = 1 << 17
"""Values that an encoder fits weights to, at least eight seeds."""
Stored = npt.NDArray[Any]


def group_size(item_size: int) -> int:
    """Seeds in a group, 32 to 512; part of the format, since it orders the streams."""
    return max(32, min(512, _GROUP_VALUES // item_size))


class StateCodec:
    """Encodes or decodes the states of one block and remembers those that predict the next.

    States are arrays of the stored dtype, shape (block_size, *item_shape). Call `draw_initial`, then `encode` or
    `decode` once for each further state in the order of the layout.
    """

    def __init__(self, recipe: Recipe, layout: Layout, packing: Packing, block: int) -> None:
        if recipe.noise["rule"] != NOISE_RULE:
            raise CacheError(
                f"the recipe has an unknown noise rule, so x_T can't be drawn again: expected {NOISE_RULE}"
            )
        self._recipe, self._dtype = recipe, np.dtype(layout.dtype).newbyteorder("<")
        self._seeds = seeds_of(block, layout.block_size)
        self._shape = (layout.block_size, *recipe.item_shape)
        size = group_size(math.prod(recipe.item_shape))
        starts = range(0, layout.block_size, size)
        self._groups = [slice(start, min(start + size, layout.block_size)) for start in starts]
        self._phases = phases_of(*recipe.item_shape[1:])
        self._num_pixels = [phase.num_pixels(*recipe.item_shape[1:]) for phase in self._phases]
        self._residual: Residual = Exact(layout.dtype)
        if packing.codec == "archive":
            self._residual = Quantised(quantisation_step(packing.parameters["max_error"], layout.dtype))
        self._initial: list[Values] = []
        self._earlier: list[list[Values]] = []

    def draw_initial(self) -> Stored:
        """x_T, drawn from the seeds and rounded to the stored dtype."""
        drawn = np.empty(self._shape, dtype=self._dtype)
        self._initial = []
        for group in self._groups:
            drawn[group] = standard_normal(self._recipe.root_seed, self._seeds[group], self._recipe.item_shape)
            self._initial.append(self._seeds_last(drawn[group]))
        return drawn

    def share_initial(self, other: StateCodec) -> None:
        """Begin with the x_T that another codec of the same block drew."""
        self._initial = other._initial

    def share_decoded(self, other: StateCodec) -> None:
        """Use the equal states that another codec of the same block decoded, so that memory holds them once."""
        self._earlier = other._earlier

    def encode(self, state: Stored) -> bytes:
        """The chunk of the next state."""
        targets = [self._seeds_last(state[group]) for group in self._groups]
        # Seeds are identically distributed: weights that fit some of them fit all.
        few = slice(0, min(targets[0].shape[-1], max(8, _FITTED_VALUES // targets[0][..., 0].size)))
        known, target = [np.ascontiguousarray(state[..., few]) for state in self._known(0)], targets[0][..., few]
        in_time = fit_in_time(known, target)
        in_space: list[npt.NDArray[np.float32]] = []
        self._code(predict_in_time(known, in_time), in_space, self._new_streams(few.stop), few, target)
        del known, target
        streams, decoded = self._new_streams(self._shape[0]), []
        for index, (group, target) in enumerate(zip(self._groups, targets, strict=True)):
            time = predict_in_time(self._known(index), in_time)
            decoded.append(self._code(time, in_space, streams, group, target))
        del targets
        self._keep(decoded)
        weights = np.concatenate([in_time.ravel(), *in_space]).astype("<f4")
        coded = [integers_to_bytes(stream) for stream in streams]
        lengths = np.array([len(stream) for stream in coded], dtype="<u4")
        return b"".join([_HEAD.pack(MAGIC, weights.size, len(coded)), weights.tobytes(), lengths.tobytes(), *coded])

    def decode(self, data: bytes) -> Stored:
        """The next state, from its chunk.

        Raises:
            ValueError: the bytes are no such chunk; the block's size bounds memory, whatever they say.
        """
        in_time, in_space, coded = self._split(data)
        counts = [count * self._shape[0] for count in self._num_pixels for _ in range(self._shape[1])]
        streams = [integers_from_bytes(part, count) for part, count in zip(coded, counts, strict=True)]
        state, decoded = np.empty(self._shape, dtype=self._dtype), []
        with np.errstate(over="ignore", invalid="ignore"):  # such values fail the check of the ledger's hash
            for index, group in enumerate(self._groups):
                time = predict_in_time(self._known(index), in_time)
                values = self._code(time, in_space, streams, group, None)
                state[group] = self._seeds_first(values)
                decoded.append(values)
        self._keep(decoded)
        return state

    def _known(self, index: int) -> list[Values]:
        return [self._initial[index], *(state[index] for state in self._earlier)]

    def _keep(self, decoded: list[Values]) -> None:
        self._earlier = [*self._earlier, decoded][-HISTORY:]

    def _seeds_last(self, values: Stored) -> Values:
        transposed = np.ascontiguousarray(values.reshape(len(values), -1).T)
        return to_float32(transposed).reshape(*self._shape[1:], len(values))

    def _seeds_first(self, values: Values) -> Stored:
        flat = values.reshape(-1, values.shape[-1])
        transposed = (to_float16(flat) if self._dtype.itemsize == 2 else flat).T
        return transposed.reshape(values.shape[-1], *self._shape[1:])

    def _new_streams(self, num_seeds: int) -> list[Integers]:
        """Uninitialised integers of a state of some seeds, by phase and channel."""
        return [
            np.empty(count * num_seeds, dtype=np.int32) for count in self._num_pixels for _ in range(self._shape[1])
        ]

    def _num_space_weights(self) -> list[int]:
        return [len(phase.groups) + channel for phase in self._phases for channel in range(self._shape[1])]

    def _split(self, data: bytes) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]], list[bytes]]:
        """Weights in time, weights in space by phase and channel, and coded streams of a chunk."""
        num_channels, of_space = self._shape[1], self._num_space_weights()
        of_time = num_channels * num_time_weights(1 + len(self._earlier))
        num_weights, num_streams = of_time + sum(of_space), len(of_space)
        if data[: _HEAD.size] != _HEAD.pack(MAGIC, num_weights, num_streams):
            raise ValueError("it has another header")
        lengths_at = _HEAD.size + 4 * num_weights
        at = lengths_at + 4 * num_streams
        if len(data) < at:
            raise ValueError("it is truncated")
        weights = np.frombuffer(data, "<f4", num_weights, _HEAD.size)
        lengths = np.frombuffer(data, "<u4", num_streams, lengths_at).tolist()
        if len(data) != at + sum(lengths) or not np.isfinite(weights).all():
            raise ValueError("its length doesn't match its streams, or a weight is not finite")
        ends = np.cumsum([at, *lengths]).tolist()
        coded = [data[start:stop] for start, stop in itertools.pairwise(ends)]
        in_space = np.split(weights[of_time:], np.cumsum(of_space)[:-1])
        return weights[:of_time].reshape(num_channels, -1), in_space, coded

    def _code(
        self,
        time: Values,
        weights: list[npt.NDArray[np.float32]],
        streams: Sequence[Integers],
        group: slice,
        target: Values | None,
    ) -> Values:
        """Encode or decode the pixels of a group of seeds, coarse to fine.

        Args:
            time: P, the prediction in time.
            weights: in space; an empty list is filled with weights fitted to `target`.
            streams: by phase and channel; written if there is a target, else read.
            group: the seeds.
            target: the state itself when encoding.

        Returns:
            The state as a decoder reconstructs it, float32.
        """
        num_channels, height, width, num_seeds = time.shape
        rest = np.zeros((num_channels, height + 2 * BORDER, width + 2 * BORDER, num_seeds), dtype=np.float32)
        found, fitting = np.empty_like(time), not weights
        for index, phase in enumerate(self._phases):
            count = self._num_pixels[index]
            errors: list[Floats] = []
            for channel in range(num_channels):
                in_time, number = phase.pixels(time[channel]), index * num_channels + channel
                features = [*_neighbours(rest[channel], phase), *errors]
                if fitting:
                    assert target is not None
                    left = phase.pixels(target[channel]) - in_time
                    weights.append(least_squares(features, left) if features else np.zeros(0, dtype=np.float32))
                predicted = in_time.copy()
                for weight, feature in zip(weights[number], features, strict=True):
                    predicted += feature * weight
                stream = streams[number][count * group.start : count * group.stop].reshape(in_time.shape)
                if target is not None:
                    stream[...] = self._residual.integers(phase.pixels(target[channel]), predicted)
                values = self._residual.values(stream, predicted)
                phase.pixels(found[channel])[...] = values
                np.subtract(values, in_time, out=phase.pixels(rest[channel], border=BORDER))
                if channel + 1 < num_channels:
                    errors.append(values - predicted)
        return found


def _neighbours(rest: Floats, phase: Phase) -> list[Floats]:
    """For each group of neighbours the sum of R there."""
    sums = []
    for group in phase.groups:
        (first, second, *others) = (phase.pixels(rest, dy, dx, BORDER) for dy, dx in group)
        total = first + second
        for other in others:
            total += other
        sums.append(total)
    return sums
