"""Predicting a state from x_T, from earlier states and from its own pixels that are already decoded.

For a deterministic sampler x_k = c_k · x_T + smooth image, and the smooth images of neighbouring states are similar. A
state is predicted in two steps, each a weighted sum whose weights the encoder fits and the chunk carries:

    in time     P = Σ_v Σ_i a[v,i] · Bⁱ v + b        v: x_T and up to two earlier states, B: the 3×3 binomial blur
    in space    p = P + Σ_g s[g] · Σ_{n∈g} R(n) + Σ_{c'<c} e[c'] · E_{c'}

R = x̂ − P is the residual in time at decoded pixels, E = x̂ − p that of both steps in earlier channels of this pixel.
Pixels come in seven phases, coarse to fine: every fourth in both directions; then, at strides 4 and 2, the middles
of squares from their corners, and the middles of edges from their four neighbours.

All arithmetic is + and × on float32, element by element and in a fixed order, so that a decoder on any machine gets
exactly the encoder's values. Arrays have seeds last, (C, H, W, seeds), for long contiguous runs in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
"""float32, shape (C, H, W, seeds)."""
NUM_BLURS = 2
HISTORY = 2
"""Number of earlier states, besides x_T, that predict the next."""
BORDER = 2
"""Width of the zeros around R, for neighbours outside the image."""
_DIAGONAL = (((-1, -1), (-1, 1), (1, -1), (1, 1)),)
_CROSS = (((0, -1), (0, 1)), ((-1, 0), (1, 0)))


@dataclass(frozen=True, slots=True)
class Phase:
    """Pixels (y + i·stride, x + j·stride) and their neighbours that are decoded before them."""

    y: int
    x: int
    stride: int
    groups: tuple[tuple[tuple[int, int], ...], ...]
    """Offsets of neighbours that share a weight."""

    def pixels(self, values: Values, dy: int = 0, dx: int = 0, border: int = 0) -> Values:
        """A view of these pixels, or of their neighbours at (dy, dx); `values` ends in axes H, W, seeds."""
        height, width = values.shape[-3] - 2 * border, values.shape[-2] - 2 * border
        rows = slice(border + self.y + dy, border + height + dy, self.stride)
        columns = slice(border + self.x + dx, border + width + dx, self.stride)
        return values[..., rows, columns, :]

    def num_pixels(self, height: int, width: int) -> int:
        """Number of its pixels in an image."""
        return len(range(self.y, height, self.stride)) * len(range(self.x, width, self.stride))


def phases_of(height: int, width: int) -> tuple[Phase, ...]:
    """The phases that have pixels in an image, in decoding order."""
    found = [Phase(0, 0, 4, ())]
    for offset in (2, 1):
        diagonal = tuple(tuple((offset * dy, offset * dx) for dy, dx in group) for group in _DIAGONAL)
        cross = tuple(tuple((offset * dy, offset * dx) for dy, dx in group) for group in _CROSS)
        starts = ((offset, offset, diagonal), (0, offset, cross), (offset, 0, cross))
        found += [Phase(y, x, 2 * offset, groups) for y, x, groups in starts]
    return tuple(phase for phase in found if phase.num_pixels(height, width))


def blur(values: Values) -> Values:
    """The 3×3 binomial mean, edges repeated."""
    twice = values + values
    twice[:, 1:] += values[:, :-1]
    twice[:, :1] += values[:, :1]
    twice[:, :-1] += values[:, 1:]
    twice[:, -1:] += values[:, -1:]
    mean = twice + twice
    mean[:, :, 1:] += twice[:, :, :-1]
    mean[:, :, :1] += twice[:, :, :1]
    mean[:, :, :-1] += twice[:, :, 1:]
    mean[:, :, -1:] += twice[:, :, -1:]
    mean *= np.float32(1 / 16)
    return mean


def num_time_weights(num_known: int) -> int:
    """Number of weights in time per channel: a[v, i] by v, then i; then b."""
    return num_known * (NUM_BLURS + 1) + 1


def predict_in_time(known: Sequence[Values], weights: npt.NDArray[np.float32]) -> Values:
    """P by Horner's rule in B, with as many blurs as its highest power.

    Args:
        known: x_T and earlier states.
        weights: shape (C, num_time_weights).
    """
    by_channel = weights.astype(np.float32)[:, :, None, None, None]
    scratch = np.empty_like(known[0])
    total: Values | None = None
    for power in range(NUM_BLURS, -1, -1):
        part = blur(total) if total is not None else np.zeros_like(known[0])
        for index, values in enumerate(known):
            part += np.multiply(values, by_channel[:, index * (NUM_BLURS + 1) + power], out=scratch)
        total = part
    assert total is not None
    total += by_channel[:, -1]
    return total


def fit_in_time(known: Sequence[Values], target: Values) -> npt.NDArray[np.float32]:
    """Least-squares weights of shape (C, num_time_weights)."""
    features = []
    for values in known:
        features.append(values)
        for _ in range(NUM_BLURS):
            features.append(blur(features[-1]))
    features.append(np.ones_like(target))
    return np.stack([least_squares([f[c] for f in features], target[c]) for c in range(len(target))])


def least_squares(features: Sequence[npt.NDArray[Any]], target: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Weights of a sum of features, rounded to 2⁻¹⁶, so that another machine's order of summation rarely matters."""
    columns = np.stack([feature.reshape(-1) for feature in features], axis=1).astype(np.float64)
    gram = columns.T @ columns
    gram[np.diag_indices_from(gram)] += 1e-7 * len(columns)
    weights = np.linalg.solve(gram, columns.T @ target.reshape(-1).astype(np.float64))
    rounded: npt.NDArray[np.float32] = (np.rint(weights * 2**16) / 2**16).astype(np.float32)
    return rounded
