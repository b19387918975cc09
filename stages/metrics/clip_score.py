"""CLIP score (Hessel et al. 2021): how well images fit their prompts, by a CLIP model that someone else trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkd.stages.metrics.base import Measure, mean_of_set
from advkd.stages.metrics.features import LOOK_BATCH, clipped
from advkd.stages.metrics.pretrained import load_network, load_part, prepared

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on (Radford et al. 2021)."""


@dataclass(frozen=True, kw_only=True)
class ClipScorer:
    """A CLIP model with its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> ClipScorer:
        """That of a folder that transformers saved, such as a copy of `openai/clip-vit-large-patch14`.

        Raises:
            UsageError: transformers isn't installed, or it can't be loaded.
        """
        model = load_network(folder, "CLIPModel", "evaluate.clip").to(device)
        return cls(model=model, tokenizer=load_part(folder, "CLIPTokenizer", "evaluate.clip"))

    @torch.no_grad()
    def asked(self, texts: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """What scores images of N texts, which are looked at once.

        Returns:
            Images in about [−1, 1], shape (N, 1 or 3, H, W) → 100 · max(cos(image, text), 0), shape (N,).
        """
        limit = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.model.device)
        wanted = self.model.text_projection(self.model.text_model(**words).pooler_output)
        return partial(self._score, wanted)

    @torch.no_grad()
    def _score(self, wanted: Tensor, images: Tensor) -> Tensor:
        side, scores = self.model.config.vision_config.image_size, []
        for part, some in zip(torch.split(images, LOOK_BATCH), torch.split(wanted, LOOK_BATCH), strict=True):
            pixels = prepared(clipped(part).to(self.model.device), side, _MEAN, _STD)
            seen = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
            scores.append(100.0 * torch.cosine_similarity(seen, some).clamp(min=0.0))
        return torch.cat(scores)


CLIP_SCORE = Measure(
    name="clip_score",
    title="CLIP score",
    label="how well images fit their prompts, by CLIP: 100 times the cosine",
    better="higher",
    observed="clip_scores",
    prepare=mean_of_set,
)
