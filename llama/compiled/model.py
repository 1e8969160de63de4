"""LLaMA's Transformer in Meta's names, for the whole family and every device: this file is never forked. In what its
relatives differ (Mistral, Qwen2, Qwen3, Phi-3) is told by ModelArgs.

Patched from meta-llama's ``model.py`` for static shapes: positions come as a tensor, a chunk's keys and values go
through a cache view that writes in place, and nothing reads a tensor's value on the host. It knows no checkpoint
format, no sampling and no text.

Shapes: B batch rows, T chunk length, S keys read, H query heads, K key/value heads, G = H / K queries a key head, D
head size.

Sources: LLaMA (Touvron et al. 2023), grouped-query attention (Ainslie et al. 2023), RMSNorm (Zhang and Sennrich 2019),
rotary embedding (Su et al. 2021), SwiGLU (Shazeer 2020), Llama 3.1's rotary scaling (llama-models), YaRN (Peng et al.
2023), LongRoPE (Ding et al. 2024), sliding windows (Mistral 7B, Jiang et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from llama.compiled.cache import CacheView, SlidingWindow, up_to
from llama.config import ModelArgs, RopeScaling
from llama.sharding import local_args
from llama.xla import mesh, transfers
from llama.xla.control_flow import Tensors, repeat
from llama.xla.linear import attention_scores, attention_values, choose_layers, linear
from llama.xla.quantized import dequantized
from llama.xla.stacks import LayerWeight, StackedWeight


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """The angle per position of each pair of the columns that are turned: [D / 2] float32.

    Args:
        head_dim: D, the number of these columns.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    freqs = 1.0 / (theta**exponents)
    if scaling is None or scaling.kind == "dynamic":
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    if scaling.kind == "longrope":
        return freqs / torch.tensor(scaling.short_factor, dtype=torch.float32)
    return yarn_frequencies(freqs, theta, scaling) if scaling.kind == "yarn" else scale_frequencies(freqs, scaling)


def scale_frequencies(freqs: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's scaling: keep the fast frequencies, divide the slow ones, blend between them.

    Args:
        freqs: [D / 2] float32, angles per position.
    """
    turns = scaling.original_max_seq_len * freqs / (2 * math.pi)  # full turns within the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * freqs + (1.0 - keep) * freqs / scaling.factor


def yarn_frequencies(freqs: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """YaRN's scaling: keep the pairs that turn fast, divide those that turn slowly, blend by columns between them.

    Args:
        freqs: [D / 2] float32, angles per position.
    """
    width = 2 * len(freqs)

    def column(turns: float) -> float:
        """The column, of ``width``, that turns so many times within the original context."""
        wavelength = math.log(scaling.original_max_seq_len) - math.log(turns)
        return width * (wavelength - math.log(2 * math.pi)) / (2 * math.log(theta))

    first, last = column(scaling.beta_fast), column(scaling.beta_slow)
    if scaling.truncate:
        first, last = float(math.floor(first)), float(math.ceil(last))
    first, last = max(first, 0.0), min(last, width - 1.0)
    pairs = torch.arange(len(freqs), dtype=torch.float32)
    divided = ((pairs - first) / (last - first if last != first else 1e-3)).clamp(0.0, 1.0)
    return divided * freqs / scaling.factor + (1.0 - divided) * freqs


def rotary_table(args: ModelArgs, max_seq_len: int) -> torch.Tensor:
    """Cosine and sine of every position and pair: [max_seq_len, D] float32, cosines first.

    Pairs behind ``rotary_dim`` columns have the angle 0, which leaves them as they are.
    """
    freqs = rotary_frequencies(args.turned, args.rope_theta, args.rope_scaling)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), freqs)
    scale = 1.0 if args.rope_scaling is None else args.rope_scaling.attention_factor
    still = angles.new_zeros(max_seq_len, (args.head_dim - args.turned) // 2)
    return torch.cat((angles.cos() * scale, still + 1.0, angles.sin() * scale, still), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbouring columns (Meta's order) by its position's angle.

    Args:
        x: [B, T, heads, D].
        cos, sin: [B, T, 1, D / 2] float32.
    """
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)  # [B, T, heads, D / 2] each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Linear(nn.Module):
    """A linear layer.

    Attributes:
        weight: [out, in] as checkpoints keep it, in the storage dtype; int4 as [out, in / 2] uint8, two numbers a byte
            (checkpoint/quantize.py).
        scale: float32 beside a quantised weight: [out], or [out, in / G] for groups of G numbers; else None.
        bias: [out], or None.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.scale: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = linear(x, self.weight, self.scale)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class RowParallelLinear(Linear):
    """A linear layer whose input features are split over T devices: the sum of their products is its result.

    (Names as in fairscale and Megatron. A column-parallel layer is a ``Linear`` with some of its output features.)
    """

    def __init__(self, in_features: int, out_features: int, parts: int) -> None:
        super().__init__(in_features, out_features)
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if self.parts == 1 else mesh.all_reduce(out)


class Embedding(nn.Module):
    """A table of one vector a token id: ``weight`` is [vocab, dim], quantised with its ``scale`` as in ``Linear``.

    With its ids split over T devices, ``weight`` is [ceil(vocab / T), dim] and ``first_id`` [1] int64 the id of its
    first row: the devices' vectors are summed, of which one is not zero.
    """

    first_id: torch.Tensor

    def __init__(self, vocab_size: int, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(vocab_size, dim), requires_grad=False)
        self.scale: nn.Parameter | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.parts == 1:
            return self._rows(ids)
        rows = ids - self.first_id.to(ids.dtype)
        is_here = (rows >= 0) & (rows < len(self.weight))
        found = self._rows(rows.clamp(0, len(self.weight) - 1))
        return mesh.all_reduce(torch.where(is_here.unsqueeze(-1), found, torch.zeros_like(found)))

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors of ids that are all in the table: [..., dim]."""
        if self.scale is None:
            return F.embedding(ids, self.weight)
        ids, shape = ids.reshape(-1), ids.shape
        scale = self.scale.index_select(0, ids)
        return dequantized(F.embedding(ids, self.weight), scale, scale.dtype).reshape(*shape, -1)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, the mean in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over the chunk and everything cached before it."""

    def __init__(self, args: ModelArgs, parts: int) -> None:
        super().__init__()
        local = local_args(args, parts)
        self.n_heads, self.kv_heads, self.head_dim = local.n_heads, local.kv_heads, args.head_dim
        self.window = SlidingWindow.of(args)
        self.wq = Linear(args.dim, self.n_heads * self.head_dim, args.qkv_bias)
        self.wk = Linear(args.dim, self.kv_heads * self.head_dim, args.qkv_bias)
        self.wv = Linear(args.dim, self.kv_heads * self.head_dim, args.qkv_bias)
        self.q_norm = RMSNorm(self.head_dim, args.norm_eps) if args.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, args.norm_eps) if args.qk_norm else None
        self.wo = RowParallelLinear(self.n_heads * self.head_dim, args.dim, parts)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rotary: torch.Tensor,
        layer: int | torch.Tensor,
        cache: CacheView | None,
    ) -> torch.Tensor:
        """Attend from each position of ``x`` [B, T, dim] to all positions up to its own, or to those of them within the
        sliding window; ``positions`` [B, T], ``rotary`` [B, T, D].
        """
        bsz, seqlen, _ = x.shape
        cos, sin = rotary.unsqueeze(2).chunk(2, dim=-1)  # [B, T, 1, D / 2]
        xq = self.wq(x).view(bsz, seqlen, self.n_heads, self.head_dim)
        xq = apply_rotary(xq if self.q_norm is None else self.q_norm(xq), cos, sin)
        xk = self.wk(x).view(bsz, seqlen, self.kv_heads, self.head_dim)
        xk = apply_rotary(xk if self.k_norm is None else self.k_norm(xk), cos, sin)
        xv = self.wv(x).view(bsz, seqlen, self.kv_heads, self.head_dim)
        keys, values = xk.transpose(1, 2), xv.permute(0, 2, 3, 1)  # [B, K, T, D] and [B, K, D, T]
        if cache is not None:
            cache.write(layer, keys, values)
            attended = cache.attend(layer, self._attend, xq, positions, self.window)
        else:
            seen = up_to(positions, seqlen)
            if self.window is not None:
                seen = self.window.limit(seen, positions, torch.arange(seqlen, device=x.device).view(1, 1, -1), layer)
            attended = self._attend(xq, keys, values.unsqueeze(2), seen)
        out: torch.Tensor = self.wo(attended)
        return out

    def _attend(self, xq: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Attend from queries [B, T, H, D] to those keys [B, K, S, D] that ``seen`` [B, T, S] bool says; their values
        are blocks [B, K, N, D, W] of W positions each, S in all or more.
        """
        bsz, seqlen, _ = seen.shape
        group = self.n_heads // self.kv_heads
        # head h reads key head h // G: put the G queries of a key head side by side in the time axis
        xq = xq.view(bsz, seqlen, self.kv_heads, group, self.head_dim).permute(0, 2, 3, 1, 4)  # [B, K, G, T, D]
        xq = xq.reshape(bsz, self.kv_heads, group * seqlen, self.head_dim)
        scores = attention_scores(xq, keys) * (self.head_dim**-0.5)
        seen = seen.unsqueeze(1).expand(bsz, group, seqlen, -1).reshape(bsz, 1, group * seqlen, -1)
        scores = scores.float().masked_fill(~seen, float("-inf"))
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))  # softmax, divided by its sum at the end
        out = attention_values(weights.to(xq.dtype), values) / weights.sum(dim=-1, keepdim=True)  # [B, K, G T, D]
        out = out.to(xq.dtype)
        out = out.view(bsz, self.kv_heads, group, seqlen, self.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(bsz, seqlen, self.n_heads * self.head_dim)


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, args: ModelArgs, parts: int) -> None:
        super().__init__()
        hidden_dim = local_args(args, parts).hidden_dim
        self.w1 = Linear(args.dim, hidden_dim)
        self.w2 = RowParallelLinear(hidden_dim, args.dim, parts)
        self.w3 = Linear(args.dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after its norm and added to the stream."""

    def __init__(self, layer: int | torch.Tensor, args: ModelArgs, parts: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.attention = Attention(args, parts)
        self.feed_forward = FeedForward(args, parts)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, rotary: torch.Tensor, cache: CacheView | None
    ) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), positions, rotary, self.layer, cache)
        out: torch.Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


def block_with(
    args: ModelArgs, layer: int | torch.Tensor, weights: Mapping[str, torch.Tensor | LayerWeight], parts: int = 1
) -> TransformerBlock:
    """A block that computes with these weights, by their names in a layer; where they come from is the caller's."""
    with torch.device("meta"):
        block = TransformerBlock(layer, args, parts)
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        owner = block.get_submodule(path)
        delattr(owner, leaf)
        setattr(owner, leaf, weight)
    return block


class Transformer(nn.Module):
    """The model without its cache: ``forward`` yields the residual stream, ``head`` the logits of the positions that
    are wanted.

    Args:
        args: the checkpoint's shape, ``vocab_size`` settled.
        max_seq_len: how many positions the rotary table holds.
        activation_dtype: dtype of the residual stream; float32 on the CPU device, where bfloat16 arithmetic is slow.
        parts: T, over how many devices it is split; each has ``local_args`` of it, and computes as if that were all.

    Attributes:
        stacks: the weights of all layers by their name in a layer, for a loop; none where the layers must be unrolled.
            ``stack_layers`` makes them when the weights are on the device.
        layers_as: ``loop`` or ``unrolled``; None leaves it to ``linear.choose_layers``.
    """

    rotary: torch.Tensor
    stacks: dict[str, StackedWeight]
    layers_as: str | None = None

    def __init__(
        self, args: ModelArgs, max_seq_len: int, activation_dtype: torch.dtype = torch.float32, parts: int = 1
    ) -> None:
        super().__init__()
        self.args, self.parts = args, parts
        self.activation_dtype = activation_dtype
        self.stacks = {}
        vocab_size = local_args(args, parts).vocab
        self.tok_embeddings = Embedding(vocab_size, args.dim, parts)
        self.layers = nn.ModuleList(TransformerBlock(layer, args, parts) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        if not args.tie_word_embeddings:
            self.output = Linear(args.dim, vocab_size)
        with torch.device("cpu"):
            table = rotary_table(args, max_seq_len)
        self.register_buffer("rotary", table, persistent=False)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: CacheView | None = None) -> torch.Tensor:
        """Run a chunk through all layers.

        Args:
            ids: [B, T] int, token ids.
            positions: [B, T] int, the position of each in its row.
            cache: the view that the layers write and read; without one the chunk attends to itself alone, which is how
                the model is trained and how tests compute the whole sequence at once.

        Returns:
            [B, T, dim] in the activations' dtype, before the last norm.
        """
        h: torch.Tensor = self.tok_embeddings(ids).to(self.activation_dtype)
        rotary = F.embedding(positions, self.rotary)  # [B, T, D]
        if cache is not None and self.stacks and (self.layers_as or choose_layers(h.device)) == "loop":
            return self._loop(h, positions, rotary, cache)
        for block in self.layers:
            h = block(h, positions, rotary, cache)
        return h

    def _loop(self, h: torch.Tensor, positions: torch.Tensor, rotary: torch.Tensor, cache: CacheView) -> torch.Tensor:
        """The layers as one loop of the program, which is compiled in the same time whatever their number."""

        def one_layer(layer: torch.Tensor, h: torch.Tensor, *given: torch.Tensor) -> Tensors:
            key_cache, value_cache, positions, rotary, *access = given
            view = cache.with_tensors(key_cache, value_cache, *access)
            h = self._block_at(layer)(h, positions, rotary, view)
            return h, *view.cache

        constants = (positions, rotary, *cache.tensors)
        h, *changed = repeat(self.args.n_layers, one_layer, (h, *cache.cache), constants)
        cache.key_cache, cache.value_cache = changed
        return h

    def _block_at(self, layer: torch.Tensor) -> TransformerBlock:
        """The block of the layer that the loop is at."""
        weights: dict[str, torch.Tensor | LayerWeight] = {}
        for name, stack in self.stacks.items():
            weight = stack.at(layer)
            weights[name] = weight if len(weight.shape) > 1 else weight.taken()
        return block_with(self.args, layer, weights, self.parts)

    @contextmanager
    def as_parts(self) -> Iterator[None]:
        """Within: on a mesh, the weights are one device's parts of them, as a program computes with them."""
        with mesh.parts_of(self, tables=map(vars, self.stacks.values())):
            yield

    def stack_layers(self) -> None:
        """Make the stacks, after the weights have come to the CPU device; they copy nothing but norms and scales.

        Where weights of one name differ in dtype there are none, and the layers are unrolled.
        """
        blocks = [dict(block.named_parameters()) for block in self.layers]
        if len({tuple((name, weight.dtype) for name, weight in sorted(block.items())) for block in blocks}) > 1:
            return
        for name, weight in blocks[0].items():
            each = [block[name] for block in blocks]
            if weight.dim() > 1:
                self.stacks[name] = StackedWeight.spanning(each)
            else:
                whole = torch.stack([transfers.fetch(one) for one in each])
                self.stacks[name] = StackedWeight.of_one_tensor(transfers.upload(whole, weight.device))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] float32 of the residual stream ``hidden`` [..., dim]."""
        normed = self.norm(hidden)
        tied = self.tok_embeddings if self.args.tie_word_embeddings else None
        logits = self.output(normed) if tied is None else linear(normed, tied.weight, tied.scale)
        if self.parts > 1:  # the last device's part is filled up
            logits = mesh.all_gather(logits)[..., : self.args.vocab_size]
        return logits.float()
