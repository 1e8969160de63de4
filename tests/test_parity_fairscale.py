"""A second oracle, nearer to the origin: the layers of fairscale that Meta's model is made of, in the structure of
Meta's forward.

Its model-parallel embedding and linear layers in a group of one process, rotation as multiplication of complex numbers,
keys and values repeated for each query head, and a full causal mask; written for this test. The same state dict must
give the same logits as ours, which runs in chunks through the stacked cache on the XLA device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from llama import EngineConfig, ModelArgs, checkpoint
from llama.compiled import cache as kv_cache
from llama.compiled.cache import CacheView
from llama.compiled.model import Transformer
from llama.xla import backend, programs, transfers

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
CHUNKS = (16, 16, 4, 1)
PROMPT_LEN = sum(CHUNKS)
BATCH = 2
CONFIG = EngineConfig(max_batch_size=BATCH, max_seq_len=40)

MULTI_HEAD = ModelArgs(dim=48, n_layers=2, n_heads=4, vocab_size=320, multiple_of=32)
GROUPED_QUERY = ModelArgs(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=320, multiple_of=16, ffn_dim_multiplier=1.3, norm_eps=1e-3
)

every_shape = pytest.mark.parametrize("args", [MULTI_HEAD, GROUPED_QUERY], ids=["multi-head", "grouped-query"])


@pytest.fixture
def model_parallel(tmp_path: Path) -> Iterator[None]:
    """fairscale's groups over a world of one process, taken down afterwards."""
    from fairscale.nn.model_parallel import initialize as groups

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        groups.initialize_model_parallel(1)
        yield
    finally:
        groups.destroy_model_parallel()
        dist.destroy_process_group()


def build_reference(args: ModelArgs) -> nn.Module:
    """Meta's model on fairscale's layers: token ids [B, T] to logits [B, T, V], the whole sequence at once."""
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear

    def column(in_features: int, out_features: int, gather: bool = False) -> nn.Module:
        return ColumnParallelLinear(in_features, out_features, bias=False, gather_output=gather)

    def row(in_features: int, out_features: int) -> nn.Module:
        return RowParallelLinear(in_features, out_features, bias=False, input_is_parallel=True)

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(args.dim))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + args.norm_eps) * self.weight

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wq = column(args.dim, args.n_heads * args.head_dim)
            self.wk = column(args.dim, args.kv_heads * args.head_dim)
            self.wv = column(args.dim, args.kv_heads * args.head_dim)
            self.wo = row(args.n_heads * args.head_dim, args.dim)

        def forward(self, x: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            q, k, v = (w(x).unflatten(-1, (-1, args.head_dim)) for w in (self.wq, self.wk, self.wv))  # [B, T, heads, D]
            repeats = args.n_heads // args.kv_heads
            k, v = rotate(k, turns).repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
            q, k, v = (t.transpose(1, 2) for t in (rotate(q, turns), k, v))  # [B, H, T, D]
            scores = q @ k.transpose(2, 3) / math.sqrt(args.head_dim) + mask
            return self.wo((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = meta_hidden_dim(args)
            self.w1, self.w2, self.w3 = column(args.dim, hidden), row(hidden, args.dim), column(args.dim, hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.feed_forward = Attention(), FeedForward()
            self.attention_norm, self.ffn_norm = Norm(), Norm()

        def forward(self, x: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = x + self.attention(self.attention_norm(x), turns, mask)
            return x + self.feed_forward(self.ffn_norm(x))

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok_embeddings = ParallelEmbedding(args.vocab_size, args.dim)
            self.layers = nn.ModuleList(Block() for _ in range(args.n_layers))
            self.norm = Norm()
            self.output = column(args.dim, args.vocab_size, gather=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            length = ids.shape[1]
            turns = unit_turns(args.head_dim, args.rope_theta, length)
            mask = torch.full((length, length), float("-inf")).triu(diagonal=1)
            x = self.tok_embeddings(ids)
            for layer in self.layers:
                x = layer(x, turns, mask)
            return self.output(self.norm(x))

    return Reference()


def meta_hidden_dim(args: ModelArgs) -> int:
    """The feed-forward width by Meta's rule: two thirds of 4 dim, times the multiplier, up to the next multiple."""
    width = 8 * args.dim // 3
    if args.ffn_dim_multiplier is not None:
        width = int(args.ffn_dim_multiplier * width)
    return -(-width // args.multiple_of) * args.multiple_of


def unit_turns(head_dim: int, theta: float, length: int) -> torch.Tensor:
    """Complex numbers of absolute value 1, one a position and pair of columns: [T, 1, D / 2]."""
    freqs = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(-1) * freqs
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1).to(torch.complex64)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Each pair of neighbouring columns is a complex number; multiply it: [B, T, heads, D]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def random_weights(args: ModelArgs) -> dict[str, torch.Tensor]:
    """Weights by Meta's names, wide enough that logits differ well; the norms' differ too."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, parameter in Transformer(args, 8).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        weights[name] = 1 + 0.3 * noise if parameter.dim() == 1 else 0.15 * noise
    return weights


def device_logits(
    args: ModelArgs, weights: dict[str, torch.Tensor], ids: torch.Tensor, lags: tuple[int, ...]
) -> list[torch.Tensor]:
    """Our logits of each row, chunk by chunk through the cache on the device: [T - lag, V].

    A row with a lag of n runs every chunk but the first n positions earlier than the others do, over its own tokens:
        rows stand at
    different positions, as in a batch of prompts of different lengths.
    """
    device = backend.init()
    model = Transformer(args, CONFIG.max_seq_len)
    for _ in checkpoint.place(model, weights.items(), torch.float32, device):
        pass

    def run(ids: torch.Tensor, starts: torch.Tensor, *stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        positions = starts.unsqueeze(-1) + torch.arange(ids.shape[1], dtype=torch.int32, device=device)
        keys = starts.amax(dim=0, keepdim=True) + ids.shape[1]  # the first branch at the first chunks, then the last
        view = CacheView(*stacked, starts[:1] * 0, starts, keys, (PROMPT_LEN // 2, CONFIG.max_seq_len))
        logits = model.head(model(ids, positions, view))
        return logits, *view.cache

    stacked = list(kv_cache.allocate(args, CONFIG, torch.float32, device))
    compiled: dict[int, programs.Program] = {}
    found = torch.full((BATCH, PROMPT_LEN, args.vocab_size), float("nan"))
    for chunk, length in enumerate(CHUNKS):
        starts = [max(0, sum(CHUNKS[:chunk]) - lag) for lag in lags]
        pieces = torch.stack([ids[row, start : start + length] for row, start in enumerate(starts)])
        inputs = [transfers.upload(t.to(torch.int32), device) for t in (pieces, torch.tensor(starts))]
        if length not in compiled:
            compiled[length] = programs.compile_program(f"chunk of {length}", run, (*inputs, *stacked), donated=(2, 3))
        logits, *stacked = compiled[length](*inputs, *stacked)
        for row, (start, values) in enumerate(zip(starts, transfers.fetch(logits), strict=True)):
            found[row, start : start + length] = values
    return [found[row, : PROMPT_LEN - lag] for row, lag in enumerate(lags)]


@pytest.mark.usefixtures("model_parallel")
@every_shape
def test_logits_equal_those_of_fairscale_layers(args: ModelArgs) -> None:
    """Rotary pairs, head grouping, feed-forward width, norms, cache and masks, at every position of two rows out of
    step.
    """
    weights = random_weights(args)
    ids = torch.randint(0, args.vocab_size, (BATCH, PROMPT_LEN), generator=torch.Generator().manual_seed(8))
    reference = build_reference(args)
    reference.load_state_dict(weights)
    with torch.no_grad():
        expected = reference(ids)
    assert expected.std() > 0.5  # logits that hardly vary would agree whatever is computed
    for ours, theirs in zip(device_logits(args, weights, ids, lags=(0, 3)), expected, strict=True):
        assert len(ours) >= PROMPT_LEN - 3
        torch.testing.assert_close(ours, theirs[: len(ours)], atol=TOLERANCE, rtol=0)


@pytest.mark.usefixtures("model_parallel")
@every_shape
def test_oracle_sees_the_order_of_pairs(args: ModelArgs) -> None:
    """A control: with the columns of each head in the other usual order, first halves before second ones, the reference
    disagrees.
    """
    weights = random_weights(args)
    ids = torch.randint(0, args.vocab_size, (1, PROMPT_LEN), generator=torch.Generator().manual_seed(8))
    reference = build_reference(args)
    reference.load_state_dict(weights)
    for name in ("wq", "wk"):
        rows = weights[f"layers.0.attention.{name}.weight"].view(-1, args.head_dim // 2, 2, args.dim)
        weights[f"layers.0.attention.{name}.weight"] = rows.transpose(1, 2).reshape(-1, args.dim)
    model = Transformer(args, CONFIG.max_seq_len)
    model.load_state_dict(weights)
    with torch.no_grad():
        ours = model.head(model(ids, torch.arange(PROMPT_LEN).unsqueeze(0)))
        assert (ours - reference(ids)).abs().max() > 100 * TOLERANCE
