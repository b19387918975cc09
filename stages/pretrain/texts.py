"""A small text encoder with its tokenizer, for a teacher that is told names: a CLIP text model, trained from scratch.

diffusers' `StableDiffusionPipeline` takes both, so that such a teacher is one, only smaller.
"""

from __future__ import annotations

import re
import string
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkd.stages.transformers_api import transformers

TOKENS = 24
"""Per name, the marks at both ends included; longer ones are cut."""
VOCABULARY = 2048
"""Rows of the table of tokens: every word of the emoji's names is one."""
WIDTH, LAYERS, HEADS = 64, 2, 4
_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TextUNet(nn.Module):
    """A conditional UNet and the text encoder that tells it names, as they are trained together."""

    def __init__(self, unet: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.encoder = unet, encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Any:
        """The UNet's output for states (N, C, H, W) and token ids, int64, shape (N, TOKENS)."""
        return self.unet(noisy, timesteps, encoder_hidden_states=self.encoder(words)[0])


def make_tokenizer(names: Sequence[str]) -> Any:
    """A WordPiece tokenizer whose words are those of some names; other words are spelt. The same names give the same.

    Raises:
        UsageError: transformers is not installed.
    """
    letters = [*string.ascii_lowercase, *string.digits]
    known = dict.fromkeys([*_MARKS, *string.punctuation, *letters, *(f"##{letter}" for letter in letters)])
    found = Counter(word for name in names for word in _words(name) if word not in known)
    words = sorted(found, key=lambda word: (-found[word], word))[: VOCABULARY - len(known)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("".join(f"{word}\n" for word in [*known, *words]), encoding="utf-8")
        return transformers("pretrain.texts").BertTokenizer(str(vocabulary), model_max_length=TOKENS)


def _words(name: str) -> list[str]:
    """Words as a `BertTokenizer` splits them: lower case, without accents and punctuation."""
    return re.findall(r"[a-z0-9]+", unicodedata.normalize("NFD", name.lower()))


def make_encoder() -> nn.Module:
    """A CLIP text model, with fresh weights.

    Raises:
        UsageError: transformers is not installed.
    """
    library = transformers("pretrain.texts")
    config = library.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        pad_token_id=_MARKS.index("[PAD]"),
        bos_token_id=_MARKS.index("[CLS]"),
        eos_token_id=_MARKS.index("[SEP]"),
    )
    encoder: nn.Module = library.CLIPTextModel(config)
    return encoder


def tokenize(tokenizer: Any, names: Sequence[str]) -> Tensor:
    """Token ids as a Stable Diffusion pipeline makes them: int64, shape (N, TOKENS)."""
    found = tokenizer(list(names), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = found.input_ids
    return ids.to(torch.int64)
