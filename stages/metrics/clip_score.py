"""CLIP score (Hessel et al. 2021): how well images fit their prompts, by a CLIP model that someone else trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """100 · max(cos(image, text), 0) of N images in about [−1, 1], shape (N, 1 or 3, H, W): shape (N,)."""
        side, limit = self.model.config.vision_config.image_size, self.model.config.text_config.max_position_embeddings
        scores = []
        for start in range(0, len(images), LOOK_BATCH):
            part = slice(start, start + LOOK_BATCH)
            words = self.tokenizer(
                list(texts[part]), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
            ).to(self.model.device)
            pixels = prepared(clipped(images[part]).to(self.model.device), side, _MEAN, _STD)
            seen = self.model(**words, pixel_values=pixels)
            cosine = (seen.image_embeds * seen.text_embeds).sum(1)  # the model normalises them
            scores.append(100.0 * cosine.clamp(min=0.0))
        return torch.cat(scores)


CLIP_SCORE = Measure(
    name="clip_score",
    title="CLIP score",
    label="how well images fit their prompts, by CLIP: 100 times the cosine",
    better="higher",
    observed="clip_scores",
    prepare=mean_of_set,
)
