"""Hugging Face's LlamaForCausalLM as an independent oracle: the same random weights give the same logits and the same
greedy text.

Weights travel as users' do: converted to Meta's names and order here, written as a checkpoint in Meta's format, loaded
by ``LLaMA.build``. Logits are compared at every position of a prompt, once without a cache on the host and once in
compiled chunks through the stacked cache on the XLA device.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama import EngineConfig, LLaMA, ModelArgs, RopeScaling, checkpoint, load_tokenizer
from llama.compiled import cache as kv_cache
from llama.compiled.cache import CacheView
from llama.compiled.model import Transformer, rotary_frequencies
from llama.config import BUCKET_POLICIES, BucketPolicy
from llama.engine import chunks as buckets
from llama.engine.engine import Engine
from llama.engine.runner import XlaRunner
from llama.xla import backend, programs, transfers

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # absolute, between logits that spread over several units
DECISIVE = 1e-3  # a greedy choice by less than this could fall either way and would prove nothing
EOS = 2  # the fixture's tokenizer
PROMPT_LEN = 73  # 64 + 8 + 1: with the usual buckets each length occurs
ROWS = 2  # of the batches that generate; the prompts of one differ in length
GENERATED = 20
POSITIONS = 128


@dataclass(frozen=True)
class Shape:
    """A tiny model."""

    name: str
    dim: int
    n_heads: int
    n_kv_heads: int
    hidden: int
    n_layers: int = 2
    vocab_size: int = 320
    norm_eps: float = 1e-5
    theta: float = 10000.0
    tied: bool = False
    rope_factor: float | None = None
    original_context: int = (
        8192  # of Llama 3.1; params.json cannot say another one, so such a model is built without a checkpoint
    )
    deviation: float = 0.15

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary part of a Hugging Face configuration."""
        return rope_parameters(self.theta, self.rope_factor, self.original_context)

    @property
    def args(self) -> ModelArgs:
        """Our description of the shape."""
        args = ModelArgs.from_params(self.params)
        scaling = args.rope_scaling and replace(args.rope_scaling, original_max_seq_len=self.original_context)
        return replace(args, rope_scaling=scaling)

    @property
    def params(self) -> dict[str, Any]:
        """The content of params.json."""
        params: dict[str, Any] = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
        }
        params |= {
            "vocab_size": self.vocab_size,
            "ffn_hidden_dim": self.hidden,
            "norm_eps": self.norm_eps,
            "rope_theta": self.theta,
        }
        if self.tied:
            params["tie_word_embeddings"] = True
        if self.rope_factor is not None:
            params["use_scaled_rope"] = True
            if self.rope_factor != RopeScaling().factor:
                params["rope_scaling_factor"] = self.rope_factor
        return params


MULTI_HEAD = Shape("multi-head", dim=48, n_heads=4, n_kv_heads=4, hidden=96)
GROUPED_QUERY = Shape("grouped-query", dim=64, n_heads=8, n_kv_heads=2, hidden=112)
TIED = Shape(
    "tied-llama32-rope",
    dim=64,
    n_heads=4,
    n_kv_heads=1,
    hidden=96,
    theta=500000.0,
    rope_factor=32.0,
    tied=True,
    deviation=0.3,
)
LLAMA31 = Shape("llama31-rope", dim=64, n_heads=4, n_kv_heads=2, hidden=96, theta=500000.0, rope_factor=8.0)
SHORT_ROPE = Shape(
    "scaled-rope-of-short-context", dim=64, n_heads=4, n_kv_heads=4, hidden=96, rope_factor=8.0, original_context=64
)
ODD = Shape("odd-sizes", dim=30, n_heads=3, n_kv_heads=1, hidden=53, vocab_size=331, norm_eps=1e-3, deviation=0.2)
SHAPES = (MULTI_HEAD, GROUPED_QUERY, TIED, LLAMA31, SHORT_ROPE, ODD)
SCALED = (TIED, LLAMA31, SHORT_ROPE)

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def rope_parameters(theta: float, factor: float | None, original_context: int = 8192) -> dict[str, Any]:
    """Hugging Face's words for Llama's rotary embedding, with Llama 3.1's scaling where there is a factor."""
    if factor is None:
        return {"rope_type": "default", "rope_theta": theta}
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original_context,
    }
    return {"rope_type": "llama3", "rope_theta": theta, **scaling}


@cache
def reference(shape: Shape) -> LlamaForCausalLM:
    """Hugging Face's model of a shape with random weights, wide enough that logits differ well; the norms' differ
    too.
    """
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        rms_norm_eps=shape.norm_eps,
        rope_parameters=shape.rope,
        max_position_embeddings=256,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.deviation,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
        model.lm_head.weight[EOS] *= 1.5  # some texts shall end by it
    assert model.dtype == torch.float32
    return model


def interleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of a query or key projection from Hugging Face's order in each head (all first halves of the pairs, then all
    second ones) to Meta's, where the two of a pair are neighbours.
    """
    out_features, in_features = weight.shape
    pairs = weight.view(n_heads, 2, out_features // n_heads // 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)


def meta_weights(shape: Shape) -> dict[str, torch.Tensor]:
    """The reference's weights by Meta's names, in Meta's order."""
    theirs = reference(shape).state_dict()
    weights = {"tok_embeddings.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    if not shape.tied:
        weights["output.weight"] = theirs["lm_head.weight"]
    for layer in range(shape.n_layers):
        ours, hf = f"layers.{layer}", f"model.layers.{layer}"
        weights[f"{ours}.attention.wq.weight"] = interleave(theirs[f"{hf}.self_attn.q_proj.weight"], shape.n_heads)
        weights[f"{ours}.attention.wk.weight"] = interleave(theirs[f"{hf}.self_attn.k_proj.weight"], shape.n_kv_heads)
        weights[f"{ours}.attention.wv.weight"] = theirs[f"{hf}.self_attn.v_proj.weight"]
        weights[f"{ours}.attention.wo.weight"] = theirs[f"{hf}.self_attn.o_proj.weight"]
        weights[f"{ours}.feed_forward.w1.weight"] = theirs[f"{hf}.mlp.gate_proj.weight"]
        weights[f"{ours}.feed_forward.w2.weight"] = theirs[f"{hf}.mlp.down_proj.weight"]
        weights[f"{ours}.feed_forward.w3.weight"] = theirs[f"{hf}.mlp.up_proj.weight"]
        weights[f"{ours}.attention_norm.weight"] = theirs[f"{hf}.input_layernorm.weight"]
        weights[f"{ours}.ffn_norm.weight"] = theirs[f"{hf}.post_attention_layernorm.weight"]
    return weights


def write_checkpoint(shape: Shape, directory: Path, tokenizer_path: Path) -> Path:
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(shape.params))
    torch.save(
        {name: weight.clone() for name, weight in meta_weights(shape).items()}, directory / "consolidated.00.pth"
    )
    (directory / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return directory


def build_directly(shape: Shape, config: EngineConfig, tokenizer_path: Path) -> LLaMA:
    """What ``LLaMA.build`` does, for a shape that params.json cannot express."""
    device = backend.init()
    model = Transformer(shape.args, config.max_seq_len)
    for _ in checkpoint.place(model, meta_weights(shape).items(), torch.float32, device):
        pass
    return LLaMA(Engine(config, XlaRunner(model, config, device)), load_tokenizer(tokenizer_path))


Builder = Callable[[Shape], LLaMA]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Builder:
    """``build(shape)``: our model with the reference's weights, loaded from a checkpoint; built once a shape."""
    config = EngineConfig(max_batch_size=ROWS, max_seq_len=POSITIONS, buckets=(64, 8, 1), dtype="float32")

    @cache
    def build_once(shape: Shape) -> LLaMA:
        if shape.original_context != RopeScaling().original_max_seq_len:
            return build_directly(shape, config, tokenizer_path)
        directory = write_checkpoint(shape, tmp_path_factory.mktemp("checkpoints") / shape.name, tokenizer_path)
        return LLaMA.build(ckpt_dir=directory, config=config)

    return build_once


def random_prompts(shape: Shape, rows: int, length: int, seed: int) -> torch.Tensor:
    """[rows, length] token ids, no control token among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, shape.vocab_size, (rows, length), generator=generator)


def host_logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """All positions at once, without a cache, uncompiled on the host: [B, T, V]."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    with torch.no_grad():
        return model.head(model(ids, positions))


def host_model(args: ModelArgs, weights: dict[str, torch.Tensor]) -> Transformer:
    model = Transformer(args, POSITIONS)
    model.load_state_dict(weights)
    return model


@cache
def chunk_program(model: Transformer, length: int, key_len: int) -> programs.Program:
    """One row's chunk: a program from (ids [1, T], starts [1], keys, values) to (logits [1, T, V], keys, values)."""

    def run(ids: torch.Tensor, starts: torch.Tensor, *stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        positions = starts.unsqueeze(-1) + torch.arange(length, dtype=torch.int32, device=starts.device)
        keys = starts * 0 + key_len  # the branch of exactly so many keys, beside one of all positions
        view = CacheView(*stacked, starts * 0, starts, keys, tuple(sorted({key_len, POSITIONS})))
        logits = model.head(model(ids, positions, view))
        return logits, *view.cache

    example = (*on_device(torch.zeros(1, length), torch.zeros(1)), *fresh_cache(model))
    return programs.compile_program(f"chunk of {length}, {key_len} keys", run, example, donated=(2, 3))


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [transfers.upload(tensor.to(torch.int32), backend.init()) for tensor in tensors]


def fresh_cache(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    return kv_cache.allocate(model.args, EngineConfig(max_seq_len=POSITIONS), torch.float32, backend.init())


def device_logits(model: Transformer, ids: torch.Tensor, plan: Sequence[buckets.Chunk]) -> torch.Tensor:
    """One prompt [1, T] in chunks, through the cache, on the device: [1, T, V]. A padded chunk is filled up with id
    0.
    """
    stacked, parts = list(fresh_cache(model)), []
    for chunk in plan:
        piece = torch.zeros(1, chunk.length)
        piece[:, : chunk.valid] = ids[:, chunk.start : chunk.end]
        inputs = on_device(piece, torch.full((1,), chunk.start))
        logits, *stacked = chunk_program(model, chunk.length, chunk.key_len)(*inputs, *stacked)
        parts.append(transfers.fetch(logits)[:, : chunk.valid])
    return torch.cat(parts, dim=1)


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


class Greedy(NamedTuple):
    """A reference's greedy continuation, cut before EOS, with its reason in our words and the smallest lead of a chosen
    token.
    """

    token_ids: list[int]
    finish_reason: str
    lead: float


def greedy(hf: LlamaForCausalLM, prompts: torch.Tensor, steps: int) -> list[Greedy]:
    """Hugging Face's own ``generate`` for prompts [B, T] of one length."""
    with torch.no_grad():
        out = hf.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=EOS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(out.logits, dim=1).topk(2).values
    leads = best[..., 0] - best[..., 1]
    results = []
    for row, lead in zip(out.sequences[:, prompts.shape[1] :].tolist(), leads, strict=True):
        ended = EOS in row
        ids = row[: row.index(EOS)] if ended else row
        results.append(Greedy(ids, "stop" if ended else "length", float(lead[: len(ids) + ended].min())))
    return results


@every_shape
def test_logits_without_cache(shape: Shape) -> None:
    """The model's arithmetic: norms, rotary pairs, scaling, head grouping and tying, at every position and with no
    device involved.
    """
    ids = random_prompts(shape, 2, PROMPT_LEN, seed=1)
    expected = reference(shape)(ids).logits
    assert expected.std() > 0.5  # logits that hardly vary would agree whatever is computed
    assert deviation(host_logits(host_model(shape.args, meta_weights(shape)), ids), expected) < TOLERANCE


@every_shape
def test_logits_in_chunks_on_the_device(shape: Shape, build: Builder) -> None:
    """The loading path, the compiled programs, the cache's writes and the masks: every position of a prompt, chunk
    after chunk.
    """
    llm = build(shape)
    ids = random_prompts(shape, 1, PROMPT_LEN, seed=2)
    plan = buckets.plan(PROMPT_LEN, llm.config)
    assert [chunk.length for chunk in plan] == [64, 8, 1]
    assert deviation(device_logits(llm.engine.runner.model, ids, plan), reference(shape)(ids).logits) < TOLERANCE


@every_shape
def test_greedy_text(shape: Shape, build: Builder) -> None:
    """``generate`` at temperature 0 against Hugging Face's, for prompts of several lengths that share batches."""
    choices = [decisive(shape, length, least=GENERATED // 2) for length in (5, PROMPT_LEN, 8, 72)]
    assert_same_text(build(shape), choices)


@every_shape
def test_greedy_text_ends_at_eos(shape: Shape, build: Builder) -> None:
    """A row whose likeliest token is EOS stops there, as Hugging Face's does, while its neighbour in the batch goes
    on.
    """
    assert_same_text(
        build(shape), [decisive(shape, 8, least=2, finish_reason="stop"), decisive(shape, 8, least=GENERATED)]
    )


def decisive(shape: Shape, length: int, least: int, finish_reason: str | None = None) -> tuple[list[int], Greedy]:
    """The first random prompt of ``length`` tokens, and the reference's text, that has ``least`` tokens and no choice
    on the brink.
    """
    prompts = random_prompts(shape, 32, length, seed=length)
    for prompt, text in zip(prompts.tolist(), greedy(reference(shape), prompts, GENERATED), strict=True):
        if len(text.token_ids) >= least and text.lead > DECISIVE and finish_reason in (None, text.finish_reason):
            return prompt, text
    raise AssertionError(f"no prompt of {length} tokens has such a text: take other weights")


def assert_same_text(llm: LLaMA, choices: Sequence[tuple[list[int], Greedy]]) -> None:
    results = llm.generate([prompt for prompt, _ in choices], max_gen_len=GENERATED, temperature=0)
    assert [(r.token_ids, r.finish_reason) for r in results] == [(e.token_ids, e.finish_reason) for _, e in choices]


@pytest.mark.parametrize("shape", SCALED, ids=lambda shape: shape.name)
def test_oracle_sees_rotary_scaling(shape: Shape) -> None:
    """A control: the same weights without scaling miss the tolerance by far, so the equalities above do test the
    scaling.
    """
    ids = random_prompts(shape, 2, PROMPT_LEN, seed=1)
    plain = host_model(replace(shape.args, rope_scaling=None), meta_weights(shape))
    assert deviation(host_logits(plain, ids), reference(shape)(ids).logits) > 10 * TOLERANCE


@pytest.mark.parametrize("damaged", ["wq", "wk"])
@every_shape
def test_oracle_sees_row_order(shape: Shape, damaged: str) -> None:
    """A control: a projection left in Hugging Face's row order misses the tolerance by far."""
    ids = random_prompts(shape, 2, PROMPT_LEN, seed=1)
    projection, heads = {"wq": ("q_proj", shape.n_heads), "wk": ("k_proj", shape.n_kv_heads)}[damaged]
    theirs = reference(shape).state_dict()[f"model.layers.0.self_attn.{projection}.weight"]
    assert not torch.equal(theirs, interleave(theirs, heads))
    weights = meta_weights(shape) | {f"layers.0.attention.{damaged}.weight": theirs}
    assert deviation(host_logits(host_model(shape.args, weights), ids), reference(shape)(ids).logits) > 100 * TOLERANCE


# The shapes of rotary embeddings that were released: head size, theta, factor of Llama 3.1's scaling.
RELEASED: dict[str, tuple[int, float, float | None]] = {
    "Llama 2 7B": (128, 10000.0, None),
    "Llama 3 8B": (128, 500000.0, None),
    "Llama 3.1 8B": (128, 500000.0, 8.0),
    "Llama 3.2 1B": (64, 500000.0, 32.0),
    "Llama 3.2 3B": (128, 500000.0, 32.0),
}


@pytest.mark.parametrize(("head_dim", "theta", "factor"), RELEASED.values(), ids=RELEASED.keys())
def test_frequencies_of_released_models(head_dim: int, theta: float, factor: float | None) -> None:
    """The rotary frequencies of real checkpoints, scaled or not, are those of transformers to float32's precision."""
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, rope_parameters=rope_parameters(theta, factor)
    )
    ours = rotary_frequencies(head_dim, theta, None if factor is None else RopeScaling(factor=factor))
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(config).inv_freq, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [(d, theta, RopeScaling(factor=f)) for d, theta, f in RELEASED.values() if f is not None]
    + [(s.args.head_dim, s.theta, s.args.rope_scaling) for s in SCALED],
)
def test_every_zone_of_the_scaling_is_met(head_dim: int, theta: float, scaling: RopeScaling) -> None:
    """The shapes compared here have frequencies that are kept, blended and divided: none of the three is left
    untested.
    """
    ratios = rotary_frequencies(head_dim, theta, scaling) / rotary_frequencies(head_dim, theta, None)
    kept, divided = torch.isclose(ratios, torch.ones(())), torch.isclose(ratios * scaling.factor, torch.ones(()))
    assert kept.any()
    assert divided.any()
    assert (~kept & ~divided).any()


# --- chunk plans ------------------------------------------------------------------------------------------------------

BUCKET_SETS = ((64, 8, 1), (32, 8, 1), (16, 4, 1), (73, 1), (128, 32, 1), (8, 1), (1,))

every_plan = pytest.mark.parametrize(("lengths", "policy"), list(itertools.product(BUCKET_SETS, BUCKET_POLICIES)))


@cache
def long_prompt() -> torch.Tensor:
    return random_prompts(GROUPED_QUERY, 1, POSITIONS, seed=6)


@cache
def greedy_after(length: int, steps: int) -> Greedy:
    """The reference's continuation of the long prompt's first ``length`` tokens."""
    return greedy(reference(GROUPED_QUERY), long_prompt()[:, :length], steps)[0]


@pytest.fixture(scope="module")
def planned(build: Builder) -> LLaMA:
    """A model for prompts one by one. Plans change under it: programs depend on lengths, so what two plans share is
    compiled once.
    """
    built = build(GROUPED_QUERY)
    config = EngineConfig(max_seq_len=POSITIONS, dtype="float32")
    runner = built.engine.runner
    return LLaMA(Engine(config, XlaRunner(runner.model, config, runner.device)), built.tokenizer)


@every_plan
def test_logits_of_every_plan(lengths: tuple[int, ...], policy: BucketPolicy, planned: LLaMA) -> None:
    """However a prompt is cut and padded, and whichever prefix of the cache a chunk reads, the logits of all positions
    are the same.
    """
    config = EngineConfig(max_seq_len=POSITIONS, buckets=lengths, bucket_policy=policy, key_buckets=(40, 80))
    ids, plan = long_prompt()[:, :PROMPT_LEN], buckets.plan(PROMPT_LEN, config)
    assert (
        deviation(device_logits(planned.engine.runner.model, ids, plan), reference(GROUPED_QUERY)(ids).logits)
        < TOLERANCE
    )


@every_plan
def test_greedy_text_of_every_plan(
    lengths: tuple[int, ...], policy: BucketPolicy, planned: LLaMA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts around each bucket's length, of one token, of 73, and the longest that leaves room for one token more."""
    config = replace(planned.config, buckets=lengths, bucket_policy=policy)
    monkeypatch.setattr(planned, "config", config)
    monkeypatch.setattr(planned.engine, "config", config)
    around = {b + d for b in lengths for d in (-1, 0, 1)}
    for length in sorted(n for n in around | {1, PROMPT_LEN, POSITIONS - 1} if 1 <= n < POSITIONS):
        steps = min(3, POSITIONS - length)
        expected = greedy_after(length, steps)
        assert expected.lead > DECISIVE
        result = planned.generate([long_prompt()[0, :length].tolist()], max_gen_len=steps, temperature=0)[0]
        assert (result.token_ids, result.finish_reason) == (expected.token_ids, expected.finish_reason), length


def test_plans_differ() -> None:
    """A control: the bucket sets and policies above really cut the prompt in different ways, padded chunks among
    them.
    """
    configs = [
        EngineConfig(max_seq_len=POSITIONS, buckets=b, bucket_policy=p)
        for b, p in itertools.product(BUCKET_SETS, BUCKET_POLICIES)
    ]
    plans = {buckets.plan(PROMPT_LEN, config) for config in configs}
    assert len(plans) > len(BUCKET_SETS)
    assert any(chunk.valid < chunk.length for plan in plans for chunk in plan)
