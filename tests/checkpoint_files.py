"""Checkpoints for tests: random tiny models in every format, and what a model computes from an opened one, on plain CPU
tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llama import ModelArgs, checkpoint
from llama.checkpoint import Source
from llama.compiled.model import Transformer

TINY = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=320, multiple_of=32)


def random_weights(args: ModelArgs, seed: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights of a model, its norms random, too, so that mixing them up is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(args, 8).named_parameters()}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (0.05 * t if t.dim() > 1 else 1 + 0.1 * t).to(dtype) for name, t in made.items()}


def write_meta(directory: Path, args: ModelArgs, shards: Iterable[dict[str, torch.Tensor]], **params: Any) -> Path:
    """A directory in Meta's format; ``params`` replace what params.json says."""
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps({**args.to_params(), **params}))
    for rank, shard in enumerate(shards):
        torch.save({name: tensor.clone() for name, tensor in shard.items()}, directory / f"consolidated.{rank:02}.pth")
    return directory


def logits_of(source: Source, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, vocab] of a whole sequence [B, T], computed by our model without a cache."""
    with torch.device("meta"):
        model = Transformer(source.args, ids.shape[1])
    for _ in checkpoint.place(model, checkpoint.checked(source), torch.float32, torch.device("cpu")):
        pass
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    with torch.no_grad():
        return model.head(model(ids, positions))


def assert_equal(found: Iterable[tuple[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    """The same tensors by the same names, bit by bit."""
    tensors = dict(found)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
