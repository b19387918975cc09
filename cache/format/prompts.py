"""Prompts: what a text-to-image teacher is told besides the noisy state.

Row i of a store has prompt ⌊i / k⌋ of a list, k seeds per prompt. Each prompt's text and embeddings are stored once, in
arrays with a row per prompt, so that a block holds its own prompts and blocks stay independent: a store can be extended
by a list that grew at its end, merged, and built by several processes at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from advkd.cache.errors import DamagedError, NewerCacheError, NotACacheError, UsageError
from advkd.cache.files.strict_json import canonical_json, integer, parse_json, shortened, unknown_members

TEXT_PATH = "conditions/prompt"
"""Array of the prompts' texts: uint8, one row of `MAX_TEXT_BYTES` per prompt, JSON in UTF-8 that ends in zeros."""
MAX_TEXT_BYTES = 2048
EMBEDDING_DTYPES = ("float16", "float32", "int64", "bool")
MAX_EMBEDDINGS, MAX_EMBEDDING_VALUES = 16, 1 << 26
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
Texts = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of a list of prompts."""

    text: str
    negative: str = ""
    """What guidance leads away from."""

    def to_row(self) -> Texts:
        """Its row of the array of texts: uint8, shape (MAX_TEXT_BYTES,).

        Raises:
            UsageError: it is too long.
        """
        data = canonical_json({"prompt": self.text, **({"negative": self.negative} if self.negative else {})})
        if len(data) > MAX_TEXT_BYTES:
            raise UsageError(
                f"prompt {self.text[:40]!r}… takes {len(data)} bytes, its negative one included; at most "
                f"{MAX_TEXT_BYTES} are stored"
            )
        return np.frombuffer(data.ljust(MAX_TEXT_BYTES, b"\0"), dtype=np.uint8)

    @classmethod
    def from_row(cls, row: Texts) -> Self:
        """Read what `to_row` wrote.

        Raises:
            DamagedError: it is none.
        """
        try:
            value = parse_json(row.tobytes().rstrip(b"\0"))
            if not all(isinstance(part, str) for part in value.values()):
                raise ValueError("not text")
            return cls(text=value["prompt"], negative=value.get("negative", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedError(f"{TEXT_PATH} holds a row that is no prompt") from None


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """One of the tensors that a prompt is encoded to."""

    name: str
    """As the pipeline's call names it, such as `prompt_embeds`; its array is `conditions/<name>`."""
    shape: tuple[int, ...]
    """Of one prompt's, such as (tokens, width)."""
    dtype: str
    """One of `EMBEDDING_DTYPES`; bfloat16 is stored as float32."""
    padded: bool = False
    """Whether prompts have different numbers of tokens: then rows of zeros follow their own, of which
    `conditions/<name>_length` says the number."""

    @property
    def path(self) -> str:
        """Of its array."""
        return f"conditions/{self.name}"

    @property
    def length_path(self) -> str:
        """Of the array of its lengths, int64, if it is padded."""
        return f"{self.path}_length"


@dataclass(frozen=True, kw_only=True)
class PromptCondition:
    """Prompts, and how strongly they guide the sampler."""

    seeds_per_prompt: int
    guidance: float
    """The pipeline's `guidance_scale`."""
    evaluations: int
    """Network evaluations per prediction: two where guidance takes one with the prompt and one without."""
    embeddings: tuple[Embedding, ...]

    def __post_init__(self) -> None:
        names = [embedding.name for embedding in self.embeddings]
        sizes = [math.prod(embedding.shape) for embedding in self.embeddings]
        fits = 1 <= len(names) == len(set(names)) <= MAX_EMBEDDINGS and all(map(_NAME.fullmatch, names))
        fits = fits and all(embedding.dtype in EMBEDDING_DTYPES for embedding in self.embeddings)
        fits = fits and all(1 <= size <= MAX_EMBEDDING_VALUES for size in sizes)
        fits = fits and all(len(embedding.shape) <= 4 for embedding in self.embeddings)
        numbers = 1 <= self.seeds_per_prompt <= 1 << 20 and 1 <= self.evaluations <= 64
        if not fits or not numbers or not math.isfinite(self.guidance):
            raise NotACacheError(
                f"its prompts are impossible: {shortened(self.seeds_per_prompt)} seeds per prompt, guidance "
                f"{self.guidance}, embeddings {shortened(names)}"
            )

    def prompts_of(self, seeds: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Which prompt each of some seeds has: int64, shape (N,)."""
        return np.asarray(seeds, dtype=np.int64).ravel() // self.seeds_per_prompt

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        embeddings = [{**asdict(embedding), "shape": list(embedding.shape)} for embedding in self.embeddings]
        return {**asdict(self), "embeddings": embeddings}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            NewerCacheError: it has a member that this version doesn't know.
            NotACacheError: a part is out of range.
        """
        unknown = unknown_members(value, [field.name for field in fields(cls)])
        for embedding in value["embeddings"]:
            unknown += unknown_members(embedding, [field.name for field in fields(Embedding)])
        if unknown:
            raise NewerCacheError(f"its prompts ({unknown[0]}) are of a newer advkd: upgrade advkd")
        embeddings = [
            Embedding(
                name=str(one["name"]),
                shape=tuple(integer(length) for length in one["shape"]),
                dtype=str(one["dtype"]),
                padded=one["padded"] is True,
            )
            for one in value["embeddings"]
        ]
        return cls(
            seeds_per_prompt=integer(value["seeds_per_prompt"]),
            guidance=float(value["guidance"]),
            evaluations=integer(value["evaluations"]),
            embeddings=tuple(embeddings),
        )
