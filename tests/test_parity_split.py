"""The convention of a split is fairscale's, not ours: its own layers, in 2 and 4 processes, make the shards and compute
the logits.

Each process builds Meta's Transformer from ParallelEmbedding or VocabParallelEmbedding, ColumnParallelLinear and
RowParallelLinear. They draw the whole weights and keep their own parts, which are saved as consolidated.NN.pth. Our
merged load of these files must compute the same logits, and our reshard must cut the merged weights into the same files
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import logits_of
from torch import nn

from llama import ModelArgs
from llama.checkpoint import open_checkpoint
from llama.checkpoint.reshard import reshard

pytestmark = pytest.mark.slow

SEQUENCE = 24
WORLDS = (4, 2)
SHAPES = {
    # the embedding's vectors are split in LLaMA 1 and 2, its vocabulary in Llama 3
    "llama2": ({"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 96, "multiple_of": 32}, 1),
    "llama3": (
        {
            "dim": 64,
            "n_layers": 2,
            "n_heads": 8,
            "n_kv_heads": 4,
            "vocab_size": 96,
            "multiple_of": 16,
            "rope_theta": 5e5,
        },
        0,
    ),
}


class Norm(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.eps = args.norm_eps
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(args.dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def draw(weight: torch.Tensor) -> torch.Tensor:
    return weight.normal_(std=0.2)


class ParallelAttention(nn.Module):
    def __init__(self, args: ModelArgs, world: int) -> None:
        from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        self.head_dim, self.heads, self.kv_heads = args.head_dim, args.n_heads // world, args.kv_heads // world
        columns: dict[str, Any] = {"bias": False, "gather_output": False, "init_method": draw}
        self.wq = ColumnParallelLinear(args.dim, args.dim, **columns)
        self.wk = ColumnParallelLinear(args.dim, args.kv_heads * args.head_dim, **columns)
        self.wv = ColumnParallelLinear(args.dim, args.kv_heads * args.head_dim, **columns)
        self.wo = RowParallelLinear(args.dim, args.dim, bias=False, input_is_parallel=True, init_method=draw)

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor, count: int) -> torch.Tensor:
            return y.view(*y.shape[:2], count, self.head_dim)

        def turned(y: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns[:, None]).flatten(3)

        q = turned(heads(self.wq(x), self.heads)).transpose(1, 2)
        k, v = (
            turned(heads(self.wk(x), self.kv_heads)).transpose(1, 2),
            heads(self.wv(x), self.kv_heads).transpose(1, 2),
        )
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class ParallelFeedForward(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        columns: dict[str, Any] = {"bias": False, "gather_output": False, "init_method": draw}
        self.w1 = ColumnParallelLinear(args.dim, args.hidden_dim, **columns)
        self.w2 = RowParallelLinear(args.hidden_dim, args.dim, bias=False, input_is_parallel=True, init_method=draw)
        self.w3 = ColumnParallelLinear(args.dim, args.hidden_dim, **columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ParallelBlock(nn.Module):
    def __init__(self, args: ModelArgs, world: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = ParallelAttention(args, world), ParallelFeedForward(args)
        self.attention_norm, self.ffn_norm = Norm(args), Norm(args)

    def forward(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))


class ParallelTransformer(nn.Module):
    def __init__(self, args: ModelArgs, world: int, embedding_axis: int) -> None:
        from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, VocabParallelEmbedding

        super().__init__()
        embedding = ParallelEmbedding if embedding_axis == 1 else VocabParallelEmbedding
        self.tok_embeddings = embedding(args.vocab_size, args.dim, init_method=draw)
        self.layers = nn.ModuleList(ParallelBlock(args, world) for _ in range(args.n_layers))
        self.norm = Norm(args)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size, bias=False, init_method=draw)
        freqs = args.rope_theta ** -(torch.arange(0, args.head_dim, 2) / args.head_dim)
        self.turns = torch.polar(torch.ones(SEQUENCE, len(freqs)), torch.outer(torch.arange(SEQUENCE), freqs))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.tok_embeddings(ids)
        for layer in self.layers:
            h = layer(h, self.turns)
        return self.output(self.norm(h))


def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, SEQUENCE), generator=torch.Generator().manual_seed(2))


def run_rank(rank: int, root: str) -> None:
    """One process: build fairscale's part of every model, save it, and compute the logits together with the others."""
    from fairscale.nn.model_parallel.initialize import destroy_model_parallel, initialize_model_parallel

    for world in WORLDS:
        if rank >= world:
            continue
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{root}/{world}/store", rank=rank, world_size=world
        )
        initialize_model_parallel(world)
        for name, (params, embedding_axis) in SHAPES.items():
            torch.manual_seed(7)
            model = ParallelTransformer(ModelArgs(**params), world, embedding_axis)
            torch.save(model.state_dict(), Path(root, str(world), name, f"consolidated.{rank:02}.pth"))
            with torch.no_grad():
                logits = model(ids())
            if rank == 0:
                torch.save(logits, Path(root, str(world), f"{name}.logits"))
        destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def made_by_fairscale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory a number of processes, in it one a model with the shards, and its logits."""
    root = tmp_path_factory.mktemp("split")
    for world in WORLDS:
        for name, (params, _) in SHAPES.items():
            Path(root, str(world), name).mkdir(parents=True)
            Path(root, str(world), name, "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    torch.multiprocessing.spawn(run_rank, (str(root),), nprocs=max(WORLDS))
    return root


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world", WORLDS)
def test_merged_shards_compute_what_fairscales_layers_compute(
    made_by_fairscale: Path, tmp_path: Path, world: int, name: str
) -> None:
    """The logits, and the way back into the same shards."""
    params, embedding_axis = SHAPES[name]
    root = made_by_fairscale / str(world)
    source = open_checkpoint(root / name)
    assert (source.args, source.embedding_axis, len(source.files)) == (ModelArgs(**params), embedding_axis, world)
    expected = torch.load(root / f"{name}.logits", weights_only=True)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_of(source, ids()), expected, atol=1e-4, rtol=1e-4)

    reshard(root / name, tmp_path / "one", 1)
    again = reshard(tmp_path / "one", tmp_path / "again", world)
    for theirs, ours in zip(source.files, again, strict=True):
        one, other = torch.load(theirs, weights_only=True), torch.load(ours, weights_only=True)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), theirs.name
