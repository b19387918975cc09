"""How the unrolled student and its critics take in prompts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from advkd.stages.student.prompts import PromptForm

_HEAD_WIDTH = 32


class PromptTokens(nn.Module):
    """The rows of a prompt's matrix as tokens of one width: each embedding has its own normalisation and projection.

    Encoders differ in scale by orders of magnitude, which the normalisation takes away.
    """

    def __init__(self, form: PromptForm, width: int) -> None:
        super().__init__()
        self.rows = [(rows.start, rows.stop, rows.width) for rows in form.rows]
        self.norms = nn.ModuleList(nn.LayerNorm(rows.width) for rows in form.rows)
        self.projections = nn.ModuleList(nn.Linear(rows.width, width) for rows in form.rows)
        pooled = [rows.stop for rows in form.rows if rows.pooled]
        self.num_pooled = max(pooled, default=0)

    def forward(self, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Matrices (N, rows, columns) → tokens (N, rows, width), which of them count (N, rows), and their summary.

        The summary, shape (N, width), is the mean of the pooled embeddings, or of the tokens where there are none.
        """
        parts = zip(self.rows, self.norms, self.projections, strict=True)
        tokens = torch.cat(
            [project(norm(prompts[:, start:stop, :width])) for (start, stop, width), norm, project in parts], dim=1
        )
        counts = prompts[:, :, -1] > 0
        chosen = slice(0, self.num_pooled or None)
        weights = counts[:, chosen, None].to(tokens.dtype)
        summary = (tokens[:, chosen] * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return tokens, counts, summary


class PromptSummary(nn.Module):
    """One vector for a prompt; starts at zero."""

    def __init__(self, form: PromptForm, width: int) -> None:
        super().__init__()
        self.tokens = PromptTokens(form, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, prompts: Tensor) -> Tensor:
        """Matrices (N, rows, columns) → shape (N, width)."""
        summary: Tensor = self.out(F.silu(self.tokens(prompts)[2]))
        return summary


class CrossAttention(nn.Module):
    """Attention of the trunk's positions to a prompt's tokens, around a skip; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // _HEAD_WIDTH) if width % _HEAD_WIDTH == 0 else 1
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.query = nn.Conv2d(width, width, 1)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        """Shape (N, width, h, w) in and out; tokens are (N, T, width), `counts`, (N, T), says which of them count."""
        batch, width, height, breadth = x.shape
        query = self._heads(self.query(self.norm(x)).flatten(2).transpose(1, 2))
        key, value = map(self._heads, self.key_value(tokens).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=counts[:, None, None, :])
        mixed = mixed.transpose(1, 2).reshape(batch, height * breadth, width)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, width, height, breadth))  # type: ignore[no-any-return]

    def _heads(self, values: Tensor) -> Tensor:
        """(N, length, width) → (N, heads, length, width of a head)."""
        batch, length, width = values.shape
        return values.reshape(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)
