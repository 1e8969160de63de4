"""Medusa heads: small heads beside the model's own, each of which guesses one token further ahead.

The model's own head reads the hidden state of position p and predicts token p + 1. Head i reads the same hidden state
and predicts token p + 2 + i, so H heads guess the H tokens after the one that the model chooses. They know nothing of
each other's guesses.

A head is ``n_layers`` residual blocks, x + silu(W x + b), and a vocabulary layer without bias. The names are those of
the published files: ``i.j.linear.weight`` and ``i.j.linear.bias`` of head i's block j, then ``i.n_layers.weight``.

(Source: Cai et al. 2024, arXiv 2401.10774, and the repository FasterDecoding/Medusa.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llama.compiled.model import Linear


class ResidualBlock(nn.Module):
    """``x + silu(W x + b)``: of zeros the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = Linear(dim, dim, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] in, [..., dim] out."""
        return x + F.silu(self.linear(x))


class MedusaHeads(nn.ModuleList):
    """H heads that guess the tokens after the next one.

    Args:
        n_heads: H.
        n_layers: residual blocks of each head; 0 is a vocabulary layer alone.
        dim: numbers of a hidden state.
        vocab_size: of the model.
    """

    def __init__(self, n_heads: int, n_layers: int, dim: int, vocab_size: int) -> None:
        super().__init__(
            nn.Sequential(*(ResidualBlock(dim) for _ in range(n_layers)), Linear(dim, vocab_size))
            for _ in range(n_heads)
        )

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Logits of every head.

        Args:
            hidden: [..., dim], the last layer's output after the model's final norm, as the model's own head reads it.

        Returns:
            H tensors [..., vocab] float32, the nearest token's first. To stack them took no time at a vocabulary of
            32,000, and to leave them apart saved none.
        """
        return [head(hidden).float() for head in self]
