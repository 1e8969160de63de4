"""Medusa: heads beside the vocabulary head guess the tokens after the next one. (Source: Cai et al., arXiv 2401.10774.)

Each head reads the hidden state from which the last token was chosen. The draft is the top chain, the likeliest token
of each head, or where the request samples the one that the position's own noise draws from the head. A tree of several
candidates a head would be checked by a longer step (docs/decisions.md says why there is none).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from llama.compiled import steps
from llama.compiled.medusa import MedusaHeads
from llama.engine.drafting import Drafter, Drafts
from llama.engine.runner import XlaRunner
from llama.engine.sequence import Sequence
from llama.xla import mesh, programs


class Medusa(Drafter):
    """Drafts by heads on the model's own hidden states.

    Args:
        heads: with their weights on the device.
        runner: the engine's, whose slots hold the hidden states.
    """

    def __init__(self, heads: MedusaHeads, runner: XlaRunner) -> None:
        self._heads, self._runner = heads, runner
        self._program: programs.Program | None = None

    def prepare(self, sequences: SequenceOf[Sequence] | None) -> None:
        """See Drafter."""
        if self._program is None:
            self._program = programs.compile_program("(medusa)", self._guesses, self._inputs(), splits=[mesh.ROWS])

    def propose(self, sequences: SequenceOf[Sequence], draft_len: int) -> Drafts:
        """See Drafter. As many tokens as there are heads, at most."""
        self.prepare(sequences)
        assert self._program is not None
        found = self._runner.fetched(self._program(*self._inputs())[0])  # [slots, heads]
        return Drafts.of([found[s.slot].tolist() for s in sequences], draft_len)

    def _inputs(self) -> list[torch.Tensor]:
        return [self._runner.tensor(name) for name in ("hidden", "length", "controls")]

    def _guesses(self, hidden: torch.Tensor, length: torch.Tensor, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = self._runner.model
        with model.as_parts(), mesh.parts_of(self._heads):
            return (steps.medusa(model, self._heads, hidden, length, packed),)
