"""The prompts of a store: their texts, and what the teacher's encoders made of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import NotCachedError
from advkd.cache.format.arrays import ArraySpec, prompt_specs
from advkd.cache.format.prompts import TEXT_PATH, Embedding, Prompt, PromptCondition
from advkd.cache.read.contents import Contents

Values = npt.NDArray[np.generic]


class StoredPrompts:
    """The prompts of a cache, by their numbers in the list: prompt p has the seeds p · k to (p + 1) · k.

    Args:
        cache: the store.
        condition: of its recipe.
    """

    def __init__(self, cache: Contents, condition: PromptCondition) -> None:
        self._cache = cache
        self._condition = condition
        self._specs = {spec.path: spec for spec in prompt_specs(condition, cache.layout.block_size)}

    @property
    def committed(self) -> npt.NDArray[np.int64]:
        """Every prompt that is there, ascending, int64."""
        rows = self._specs[TEXT_PATH].block_size
        starts = np.asarray(self._cache.blocks, dtype=np.int64)[:, None] * rows
        return (starts + np.arange(rows, dtype=np.int64)).ravel()

    def texts(self, prompts: npt.ArrayLike) -> list[Prompt]:
        """The texts of some prompts.

        Args:
            prompts: whole numbers, shape (P,), in any order.

        Raises:
            NotCachedError: a prompt is absent, or the texts are not in this copy.
            DamagedError: bytes differ from the ledger, or are no prompt.
        """
        return [Prompt.from_row(row) for row in self._gather(self._specs[TEXT_PATH], prompts)]

    def embedding(self, embedding: Embedding, prompts: npt.ArrayLike) -> Values:
        """One of the embeddings of some prompts.

        Args:
            embedding: one of the recipe's.
            prompts: whole numbers, shape (P,), in any order.

        Returns:
            In the stored dtype, shape (P, *embedding.shape); rows of zeros after the tokens of a padded one.

        Raises:
            NotCachedError: a prompt is absent, or the array is not in this copy.
            DamagedError: bytes differ from the ledger.
        """
        values = self._gather(self._specs[embedding.path], prompts).view(np.dtype(embedding.dtype).newbyteorder("<"))
        return values.reshape(len(values), *embedding.shape)

    def lengths(self, embedding: Embedding, prompts: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """How many tokens of a padded embedding are some prompts' own: int64, shape (P,).

        Raises:
            NotCachedError: a prompt is absent, or the array is not in this copy.
            DamagedError: bytes differ from the ledger.
        """
        return self._gather(self._specs[embedding.length_path], prompts).view("<i8").ravel()

    def _gather(self, spec: ArraySpec, prompts: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        wanted = np.asarray(prompts, dtype=np.int64).ravel()
        declared = self._cache.num_seeds // spec.seeds_per_row
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < declared:
            raise NotCachedError(f"{self._cache.address} declares prompts 0:{declared}; others were asked for")
        return self._cache.further_rows(spec).gather(wanted)


def first_difference(stored: StoredPrompts, given: Iterable[Prompt]) -> int | None:
    """The first prompt of a list that differs from the one that a store has; None if none of those it has does."""
    listed = list(given)
    numbers = [int(number) for number in stored.committed if number < len(listed)]
    texts = stored.texts(numbers)
    return next((number for number, text in zip(numbers, texts, strict=True) if listed[number] != text), None)
