"""Prompts as a student is told them: everything that the teacher's encoders make of one, as the rows of one matrix.

    row       a pooled embedding (P,), padded with zeros; then each token of each sequence of tokens (T, W), likewise
    column    the values; the last one is 1 where a row counts, and 0 for padding that the encoder's mask leaves out

One tensor, float32, shape (N, rows, columns), goes wherever class labels would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from advkd.cache.errors import UsageError
from advkd.cache.format.prompts import Embedding, PromptCondition
from advkd.cache.read.reader import TrajectoryCache

_NATIVE = {"float16": np.float32, "float32": np.float32, "int64": np.int64, "bool": np.bool_}
"""dtype of an array → of its values in memory."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a matrix that one embedding fills."""

    embedding: Embedding
    start: int
    stop: int
    width: int
    """Columns that its values fill, from the first on."""

    @property
    def pooled(self) -> bool:
        """Whether it is one vector for the whole prompt, instead of one for each token."""
        return len(self.embedding.shape) == 1


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """How the embeddings of a recipe fill a matrix."""

    rows: tuple[Rows, ...]
    masks: tuple[Embedding | None, ...]
    """Of each of `rows`, the embedding that says which of its tokens count; None if all do."""

    @classmethod
    def of(cls, condition: PromptCondition) -> PromptForm:
        """The form of a recipe's prompts.

        The k-th mask belongs to the k-th sequence of tokens, if there are as many.

        Raises:
            UsageError: no embedding has a form that students understand.
        """
        floats = [one for one in condition.embeddings if one.dtype.startswith("float")]
        pooled, tokens = ([one for one in floats if len(one.shape) == axes] for axes in (1, 2))
        masks: list[Embedding | None] = [one for one in condition.embeddings if one not in floats]
        strange = [one for one in floats if len(one.shape) > 2]
        fits = [mask.shape[:1] for mask in masks if mask] == [one.shape[:1] for one in tokens]
        if not floats or strange or (masks and not fits):
            names = ", ".join(f"{one.name} {list(one.shape)}" for one in condition.embeddings)
            raise UsageError(
                f"no student learns from prompts whose embeddings are {names or 'none'}; expected vectors, sequences "
                "of tokens, and a mask for each sequence or none"
            )
        rows, start = [], 0
        for one in (*pooled, *tokens):
            stop = start + (1 if len(one.shape) == 1 else one.shape[0])
            rows.append(Rows(embedding=one, start=start, stop=stop, width=one.shape[-1]))
            start = stop
        return cls(rows=tuple(rows), masks=(*[None] * len(pooled), *(masks or [None] * len(tokens))))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        return self.rows[-1].stop, max(rows.width for rows in self.rows) + 1

    def matrices(self, values: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> Tensor:
        """The matrices of some prompts.

        Args:
            values: by name of the embedding, shape (N, *embedding.shape).
            lengths: by name of a padded embedding, how many tokens each prompt has, shape (N,).

        Returns:
            float32, shape (N, *shape).
        """
        count = len(values[self.rows[0].embedding.name])
        made = torch.zeros(count, *self.shape)
        for rows, mask in zip(self.rows, self.masks, strict=True):
            name, length = rows.embedding.name, rows.stop - rows.start
            made[:, rows.start : rows.stop, : rows.width] = values[name].reshape(count, length, rows.width)
            counts = torch.ones(count, length) if mask is None else values[mask.name].bool().float()
            if rows.embedding.padded:
                counts = counts * (torch.arange(length) < lengths[name][:, None])
            counts[counts.sum(1) == 0, 0] = 1.0  # attention to nothing is NaN
            made[:, rows.start : rows.stop, -1] = counts
        return made

    def told(self, embeddings: Mapping[str, Tensor | Sequence[Tensor]]) -> Tensor:
        """The matrices of prompts that someone encoded, as the teacher's pipeline does.

        Args:
            embeddings: by the names that the pipeline's call has for them, shape (N, …); padded ones are N tensors, one
                for each prompt.

        Returns:
            float32, shape (N, *shape).

        Raises:
            UsageError: one is missing or surplus, or has another shape.
        """
        wanted = {one.name: one for one in (*(rows.embedding for rows in self.rows), *filter(None, self.masks))}
        if embeddings.keys() != wanted.keys():
            raise UsageError(f"the student is told {', '.join(wanted)}; found {', '.join(embeddings) or 'nothing'}")
        count = len(embeddings[self.rows[0].embedding.name])
        values: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        for name, one in wanted.items():
            rows = [row.detach().cpu().float() for row in embeddings[name]]
            lengths_fit = [len(row) == one.shape[0] or (one.padded and len(row) < one.shape[0]) for row in rows]
            fits = all(lengths_fit) and all(row.shape[1:] == one.shape[1:] for row in rows)
            if not rows or len(rows) != count or not fits:
                found = [list(row.shape) for row in rows[:1]]
                raise UsageError(f"{name}: {len(rows)} of shape {found}; expected {count} of shape {list(one.shape)}")
            if one.padded:
                lengths[name] = torch.tensor([len(row) for row in rows])
                rows = [F.pad(row, (0, 0, 0, one.shape[0] - len(row))) for row in rows]
            values[name] = torch.stack(rows)
        return self.matrices(values, lengths)


def read_prompts(cache: TrajectoryCache, numbers: npt.ArrayLike) -> Tensor:
    """The matrices of some of a cache's prompts, each read once: float32, shape (N, rows, columns).

    Raises:
        UsageError: the cache has none, or none that students understand.
        NotCachedError: a prompt is absent.
        DamagedError: bytes differ from the ledger.
    """
    stored = cache.prompts
    condition = cache.recipe.prompts
    assert condition is not None
    form = PromptForm.of(condition)
    once, places = np.unique(np.asarray(numbers, dtype=np.int64).ravel(), return_inverse=True)
    wanted = {rows.embedding for rows in form.rows} | {mask for mask in form.masks if mask is not None}
    values = {one.name: torch.from_numpy(stored.embedding(one, once).astype(_NATIVE[one.dtype])) for one in wanted}
    lengths = {one.name: torch.from_numpy(stored.lengths(one, once)) for one in wanted if one.padded}
    return form.matrices(values, lengths)[torch.from_numpy(places)]
