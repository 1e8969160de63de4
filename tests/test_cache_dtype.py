"""The cache's dtype: half the memory as bfloat16, every equality within a dtype, and what rounding does to logits."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from commands import ROOT, Run, refused_at_once
from conftest import TINY, LLMFactory
from test_equivalence import PROMPTS, assert_any_order, ids as texts
from test_parity_transformers import (
    GROUPED_QUERY,
    MULTI_HEAD,
    ODD,
    TIED,
    Shape,
    random_prompts,
    reference,
    write_checkpoint,
)
from test_prefix import ids, nearly, run as run_prompts
from transformers.models.llama import modeling_llama

from llama import DraftConfig, EngineConfig, Generation, LLaMA, ModelArgs, SamplingParams, planning
from llama.compiled import cache as kv_cache
from llama.compiled.memory import cache_dtype_for, check_fits, plan_memory
from llama.compiled.state import CACHE
from llama.config import DEMO_DIR, DTYPES, LONGEST_FLOAT32_CACHE, CacheDType
from llama.engine.programs import Program
from llama.engine.runner import XlaRunner
from llama.errors import ConfigError
from llama.xla import backend, ops

F32, BF16 = torch.float32, torch.bfloat16
SEVEN_B = ModelArgs(vocab_size=32000)
WISHES = [
    SamplingParams(25, t, p, seed)
    for t, p, seed in [(0.0, 1.0, 1), (0.8, 0.9, 7), (1.0, 1.0, 7), (1.3, 0.5, 2**40 + 5), (0.6, 0.95, 0)]
]
STORY = "Once upon a time there was a dog. The dog was big. Once upon a time there was a dog. The dog was big. Once"
MOST_OFF, MEAN_OFF = 0.25, 0.02  # of the demo model's logits, bfloat16's from float32's; 0.13 and 0.0097 were found
HALF: Any = {"cache_dtype": "bfloat16"}


def runner_of(llm: LLaMA) -> XlaRunner:
    assert isinstance(llm.engine.runner, XlaRunner)
    return llm.engine.runner


def logits_of(results: list[Generation]) -> list[np.ndarray]:
    found = [r.logits for r in results]
    assert all(each is not None for each in found)
    return cast("list[np.ndarray]", found)


# ------------------------------------------------------------------------------------------------------- the setting


@pytest.mark.parametrize(
    ("positions", "on_cpu", "expected"),
    [
        (2, True, "float32"),
        (2048, True, "float32"),
        (2049, True, "bfloat16"),
        (131072, True, "bfloat16"),
        (2, False, "bfloat16"),
        (2048, False, "bfloat16"),
        (2049, False, "bfloat16"),
    ],
)
def test_auto_settles_by_device_and_length(positions: int, on_cpu: bool, expected: str) -> None:
    """At the border itself, whatever the weights are; slack positions do not count. Weights that are kept in float32 on
    another device have activations in float32, and the cache follows them.
    """
    assert LONGEST_FLOAT32_CACHE == 2048
    config = EngineConfig(max_seq_len=positions, draft_lens=() if positions < 9 else (7,))
    for dtype in DTYPES:
        _, activation = planning.choose_dtypes(replace(config, dtype=dtype), on_cpu=on_cpu)
        wanted = "float32" if dtype == "float32" and positions <= 2048 else expected
        assert planning.choose_cache_dtype(config, activation) == wanted
        assert cache_dtype_for(config, getattr(torch, activation)) == getattr(torch, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["float32", "bfloat16"])
def test_a_named_dtype_is_taken_at_any_length(dtype: CacheDType, activation: str) -> None:
    for positions in (2, 2048, 2049):
        config = EngineConfig(max_seq_len=positions, cache_dtype=dtype)
        assert planning.choose_cache_dtype(config, activation) == dtype


@pytest.mark.parametrize("value", ["int8", "float16", "", "BFLOAT16", None, 16, ["bfloat16"]])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"cache_dtype: got .*, expected one of auto, float32, bfloat16"):
        EngineConfig(cache_dtype=value)


@pytest.mark.parametrize(
    "command",
    [
        "generate x",
        "chat --ckpt_dir {demo}",
        "score x",
        "batch --input x --output y",
        "eval --tasks x",
        "bench",
        "plan --tensor_parallel 1",
        "inspect {demo}",
    ],
)
def test_every_command_refuses_them(run: Run, command: str) -> None:
    """Before anything is loaded, with what is expected; a near word is suggested."""
    arguments = command.format(demo=DEMO_DIR).split()
    refused_at_once(run(*arguments, "--cache_dtype", "bfloat61"), "--cache_dtype", "'bfloat61'", "bfloat16", "float32")


# ------------------------------------------------------------------------------------------------------------ memory


def test_bfloat16_takes_half_of_the_bytes() -> None:
    """By the plan, and by the tensors: the cache halves, and as many bytes keep twice as many prefixes."""
    config = EngineConfig(max_batch_size=3, max_seq_len=300, prefix_cache_bytes=2**20, cache_dtype="float32")
    narrow = replace(config, cache_dtype="bfloat16")
    wide_plan, plan = (plan_memory(TINY, each, F32, F32, None) for each in (config, narrow))
    assert (plan.cache, plan.weights, plan.activations) == (
        wide_plan.cache // 2,
        wide_plan.weights,
        wide_plan.activations,
    )
    rows = [kv_cache.kept_rows(TINY, each, dtype) for each, dtype in ((config, F32), (narrow, BF16))]
    assert rows[0] > 1
    assert rows[1] in (2 * rows[0], 2 * rows[0] + 1)
    for each, dtype, told in ((config, F32, wide_plan), (narrow, BF16, plan)):
        made = kv_cache.allocate(TINY, each, dtype, torch.device("cpu"))
        assert {tensor.dtype for tensor in made} == {dtype}
        assert sum(tensor.nbytes for tensor in made) == told.cache + told.prefixes
    assert " (bfloat16) + prefixes " in str(plan)
    assert " (float32) + prefixes " in str(wide_plan)


@pytest.mark.slow
def test_the_tensor_on_the_device_halves(make_llm: LLMFactory) -> None:
    """To the byte what the plan says; the CPU device holds bfloat16 as its bits."""
    held = {}
    for dtype in ("float32", "bfloat16"):
        llm = make_llm(max_batch_size=3, prefix_cache=True, prefix_cache_bytes=2**20, cache_dtype=dtype)
        llm.generate(["x"], max_gen_len=1)
        tensors = [runner_of(llm).tensor(name) for name in CACHE]
        plan = plan_memory(TINY, llm.config, F32, F32, None)
        assert sum(each.nbytes for each in tensors) == plan.cache + plan.prefixes
        held[dtype] = sum(each[:, :3].numel() * each.element_size() for each in tensors)
        assert held[dtype] == plan.cache
        for each in tensors:
            assert each.dtype == {"float32": F32, "bfloat16": torch.int16}[dtype]
            assert runner_of(llm).kept_rows == each.shape[1] - 3
    assert held["float32"] == 2 * held["bfloat16"]


def test_only_the_cpu_device_holds_bits() -> None:
    assert ops.held_as(BF16, torch.device("cpu")) == BF16
    assert ops.held_as(BF16, backend.init()) == torch.int16
    assert ops.held_as(F32, backend.init()) == F32


def test_a_narrower_cache_is_a_cure() -> None:
    """Where the model fits with it: named first; where it does not, or the cache is narrow already, not at all."""
    config = EngineConfig(max_seq_len=2048, max_batch_size=8)
    needed = plan_memory(SEVEN_B, config, BF16, F32, None)
    halved = needed.total - needed.cache // 2
    with pytest.raises(ConfigError, match="it takes cache_dtype bfloat16, or max_seq_len"):
        check_fits(SEVEN_B, config, BF16, F32, halved)
    assert check_fits(SEVEN_B, replace(config, cache_dtype="bfloat16"), BF16, F32, halved).fits
    for settings, available in ((config, halved - 1), (replace(config, cache_dtype="bfloat16"), halved - 1)):
        with pytest.raises(ConfigError, match="it takes max_seq_len"):
            check_fits(SEVEN_B, settings, BF16, F32, available)


@pytest.mark.parametrize("share", [0.05, 0.49, 0.52, 0.75, 0.999])
@pytest.mark.parametrize("positions", [2050, 3000, 4300])
def test_the_advised_positions_fit_with_auto(positions: int, share: float) -> None:
    """Also where a shorter cache, in float32, takes more than a longer one in bfloat16: of many lengths none above the
    advice fits.
    """
    args = replace(TINY, n_layers=200)
    config = EngineConfig(max_seq_len=positions, buckets=(1,))

    def plan(value: int) -> planning.MemoryPlan:
        return plan_memory(args, replace(config, max_seq_len=value), F32, F32, available)

    available = None
    whole = plan(positions)
    available = whole.total - int((1 - share) * whole.cache)
    with pytest.raises(ConfigError, match="does not fit") as error:
        check_fits(args, config, F32, F32, available)
    found = re.search(r"max_seq_len (\d+) at most", str(error.value))
    advised = 1 if found is None else int(found[1])
    assert advised == 1 or plan(advised).fits
    tried = {advised + 1, 2048, 2049, 2050, positions - 1, *range(2, positions, 61)}
    assert not any(plan(value).fits for value in tried if advised < value < positions)


def test_advice_where_kept_rows_would_be_too_few() -> None:
    """The bug: bytes of one row of 2,049 positions hold none of 2,048, which are wider; the search broke off with that
    error instead of its own.
    """
    config = EngineConfig(max_seq_len=2049, prefix_cache=True)
    row = planning.row_bytes(TINY, config, "bfloat16")
    config = replace(config, prefix_cache_bytes=row)
    needed = plan_memory(TINY, config, F32, F32, None)
    assert needed.prefixes == row
    with pytest.raises(ConfigError, match=r"does not fit.*prefix_cache_bytes 0, or max_seq_len \d+ at most") as error:
        check_fits(TINY, config, F32, F32, needed.total - 1)
    found = re.search(r"max_seq_len (\d+) at most", str(error.value))
    assert found is not None
    assert plan_memory(TINY, replace(config, max_seq_len=int(found[1])), F32, F32, needed.total - 1).fits


def test_plan_shows_the_cache(run: Run) -> None:
    """Its dtype and bytes, as a table and as JSON, by the device and by the flag."""

    def planned(*flags: str) -> dict[str, Any]:
        (found,) = run("plan", "--tensor_parallel", "1", "--json", *flags).objects
        return found

    default, cpu, long = planned(), planned("--accelerator", "cpu"), planned("--max_seq_len", "512")
    assert (default["cache_dtype"], cpu["cache_dtype"], long["cache_dtype"]) == ("bfloat16", "float32", "bfloat16")
    narrow = planned("--accelerator", "cpu", "--cache_dtype", "bfloat16")
    assert (narrow["cache_dtype"], narrow["activation_dtype"]) == ("bfloat16", "float32")
    assert 2 * narrow["held"]["cache"] == cpu["held"]["cache"]
    assert (
        2 * planned("--cache_dtype", "bfloat16")["held"]["cache"]
        == planned("--cache_dtype", "float32")["held"]["cache"]
    )
    told = run("plan", "--tensor_parallel", "1", "--accelerator", "cpu", "--cache_dtype", "bfloat16").out
    assert "activations float32, cache bfloat16, max_seq_len" in told


def test_a_batch_that_fits_is_counted_in_the_cache_s_dtype(run: Run) -> None:
    """Twice as many slots fit, nearly, where slots take most of the memory."""
    flags = ["--tensor_parallel", "1", "--accelerator", "cpu", "--memory", "1", "--json", "--buckets", "1"]
    wide, narrow = (
        run("plan", *flags, "--cache_dtype", dtype).objects[0]["largest_batch"] for dtype in ("float32", "bfloat16")
    )
    assert 1.5 * wide < narrow <= 2.2 * wide


def test_plan_of_chunks_has_no_cache(run: Run) -> None:
    outcome = run("plan", "--prompt_len", "9", "--cache_dtype", "float32")
    refused_at_once(outcome, "--prompt_len", "--cache_dtype", "leave one of them out")


def test_inspect_shows_the_cache(run: Run) -> None:
    """For this machine's CPU device: float32 up to 2,048 positions."""
    found = {}
    for flags in ((), ("--cache_dtype", "bfloat16"), ("--cache_dtype", "float32")):
        (told,) = run("inspect", str(DEMO_DIR), "--json", "--max_seq_len", "512", *flags).objects
        found[flags[-1:]] = told["memory_plan"]
    auto, narrow, wide = found.values()
    assert (auto["cache_dtype"], narrow["cache_dtype"]) == ("float32", "bfloat16")
    assert auto["cache"] == wide["cache"]
    assert 2 * narrow["cache"] == auto["cache"]
    people = run("inspect", str(DEMO_DIR), "--max_seq_len", "512", "--cache_dtype", "bfloat16").out
    assert re.search(r"for 1 x 512 positions: weights [^,]*, cache [\d.]+ MiB \(bfloat16\), activations ", people)


@pytest.mark.slow
def test_generate_takes_the_flag_and_tells(run: Run) -> None:
    """The memory plan of --verbose names the dtype, and the model runs."""
    flags = ["--max_gen_len", "8", "--temperature", "0", "--verbose", "--max_seq_len", "64"]
    for dtype in ("float32", "bfloat16"):
        outcome = run("generate", "Once upon a time", *flags, "--cache_dtype", dtype)
        assert outcome.code == 0
        assert re.search(rf"^Memory: weights .* \+ cache .* \({dtype}\) \+ activations", outcome.err, re.MULTILINE)
        assert outcome.out.startswith(", ") or outcome.out.strip()


# --------------------------------------------------------------------------------------------- equal within bfloat16


@pytest.fixture(scope="module")
def alone(make_llm: LLMFactory) -> list[list[int]]:
    """Each prompt alone with its wishes, one row, default buckets: what every other route must reproduce."""
    llm = make_llm(**HALF)
    found = [llm.generate([p], params=[w])[0].token_ids for p, w in zip(PROMPTS, WISHES, strict=True)]
    assert len({tuple(each) for each in found}) == len(PROMPTS)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("buckets", "policy"), [((64, 8, 1), "pad"), ((32, 4, 1), "greedy"), ((128, 7, 1), "pad"), ((1,), "greedy")]
)
def test_every_chunk_plan_gives_the_same_text(
    make_llm: LLMFactory, alone: list[list[int]], buckets: tuple[int, ...], policy: str
) -> None:
    """Greedy and sampled requests beside each other, cut in every way."""
    llm = make_llm(**HALF, buckets=buckets, bucket_policy=policy, max_batch_size=5)
    assert texts(llm.generate(PROMPTS, params=WISHES)) == alone


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "key_buckets"), [(2, ()), (3, (16, 32, 64)), (8, ())])
def test_neighbours_change_no_text(
    make_llm: LLMFactory, alone: list[list[int]], slots: int, key_buckets: tuple[int, ...]
) -> None:
    """More prompts than slots, or fewer, in every order."""
    llm = make_llm(**HALF, max_batch_size=slots, key_buckets=key_buckets)
    assert_any_order(llm, WISHES, alone)


@pytest.mark.slow
def test_bits_do_not_depend_on_neighbours(make_llm: LLMFactory) -> None:
    """``batch_invariant``: raw logits of a request alone and beside others are equal to the last bit."""
    llm = make_llm(**HALF, max_batch_size=4, batch_invariant=True, seed=55)
    prompts = [[1, *ids(length, length)] for length in (3, 17, 64, 90)]
    params = [SamplingParams(12, 0.0, logits=True, ignore_eos=True)] * 4
    single = [logits_of(llm.generate([prompt], params=params[:1]))[0] for prompt in prompts]
    for seed in range(3):
        order = list(range(4))
        random.Random(seed).shuffle(order)
        together = logits_of(llm.generate([prompts[i] for i in order], params=params))
        assert all(np.array_equal(single[i], each) for i, each in zip(order, together, strict=True))


@pytest.mark.slow
def test_steps_grow_narrower_and_rows_move(make_llm: LLMFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of different lengths; the programs ``move`` and ``copy`` run, and nobody's text changes."""
    llm, single = make_llm(**HALF, max_batch_size=4, seed=6), make_llm(**HALF, seed=6)
    runner, moved = runner_of(llm), []
    copies = [Program("copy", key_len=count) for count in llm.config.copy_lens]
    runner.compile([Program("decode", rows=2, key_len=128), Program("move"), *copies])
    move = runner.move

    def counted(source: int, target: int, count: int) -> None:
        moved.append((source, target))
        move(source, target, count)

    monkeypatch.setattr(runner, "move", counted)
    prompts = [[1, *ids(4 + n, n)] for n in range(4)]
    params = [SamplingParams(limit, 0.0, ignore_eos=True) for limit in (90, 4, 4, 90)]
    found = llm.generate(prompts, params=params)
    assert moved
    assert texts(found) == [
        single.generate([prompt], params=[wish])[0].token_ids for prompt, wish in zip(prompts, params, strict=True)
    ]


@pytest.mark.slow
def test_shared_beginnings_give_the_same_text(make_llm: LLMFactory) -> None:
    """A slot that goes on, a copy of a slot in use, and kept rows: tokens are found, and texts are those of a cold
    start.
    """
    row = planning.row_bytes(TINY, EngineConfig(max_seq_len=128, buckets=(64, 8, 1)), "bfloat16")
    warm = make_llm(**HALF, seed=5, max_batch_size=2, prefix_cache=True, prefix_cache_bytes=4 * row)
    cold = make_llm(**HALF, seed=5, max_batch_size=2)
    assert runner_of(warm).kept_rows == 4
    system = [1, *ids(50, 11)]
    run_prompts(warm, [system], reuse=True)
    turns = [[*system, *ids(4, 12)], [*system, *ids(9, 13)]]
    found, cached, _ = run_prompts(warm, turns, reuse=True)
    assert nearly(cached, [len(system)] * 2)
    assert found == run_prompts(cold, turns, reuse=False)[0]
    others = [[1, *ids(40, 20 + n)] for n in range(4)]
    run_prompts(warm, others, reuse=True)  # what the slots held goes to kept rows
    found, cached, _ = run_prompts(warm, turns, reuse=True)
    assert min(cached) >= len(system) - 8
    assert found == run_prompts(cold, turns, reuse=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["lookup", "suffix", "lookahead", "medusa", "model"])
def test_drafts_change_no_text(drafter: str) -> None:
    """Every drafter on the demo model, greedy and sampled; the draft model's cache has the dtype, too."""
    own = {"draft_ckpt_dir": DEMO_DIR} if drafter == "model" else {}
    config = EngineConfig(**HALF, max_batch_size=2, max_seq_len=192, buckets=(8, 1))
    params = [SamplingParams(40, 0.0, ignore_eos=True), SamplingParams(40, 0.8, seed=3, ignore_eos=True)]
    drafted = LLaMA.build(config=config, drafting=DraftConfig(drafter=(drafter,), **own))  # type: ignore[arg-type]
    found = drafted.generate([STORY, STORY], params=params)
    assert found[0].drafting is not None
    assert found[0].drafting.accepted_tokens > 0
    if drafter == "model":
        second = drafted.engine.drafting.drafter._runner  # type: ignore[union-attr]
        assert second.tensor("key_cache").dtype == torch.int16
    drafted.engine.drafting = None
    assert texts(found) == texts(drafted.generate([STORY, STORY], params=params))


# ---------------------------------------------------------------------------------------------- what rounding changes


@pytest.mark.slow
def test_float32_stays_what_it_is(make_llm: LLMFactory) -> None:
    """Named or by default, to the last bit; and with no rounding in it: bfloat16's logits are others."""
    params = [SamplingParams(20, 0.0, logits=True, ignore_eos=True)] * 2
    prompts = [[1, *ids(70, 1)], [1, *ids(20, 2)]]
    auto, named, narrow = (
        logits_of(make_llm(max_batch_size=2, **more).generate(prompts, params=params))
        for more in ({}, {"cache_dtype": "float32"}, HALF)
    )
    assert all(np.array_equal(one, other) for one, other in zip(auto, named, strict=True))
    assert not any(np.array_equal(one, other) for one, other in zip(auto, narrow, strict=True))


@pytest.mark.slow
def test_logits_of_the_demo_model_are_near_float32_s() -> None:
    """Over more than 300 tokens of a text, which both are given; a position's logits span 22 on average."""
    wide, narrow = (
        LLaMA.build(config=EngineConfig(max_seq_len=512, cache_dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    (told,) = wide.generate([STORY], params=[SamplingParams(300, 0.8, seed=1, ignore_eos=True)])
    text = [*wide.tokenizer.encode(STORY), *told.token_ids]
    wish = SamplingParams(1, 0.0, logits=True, prompt_logprobs=True)
    both = [logits_of(llm.generate([text], params=[wish]))[0] for llm in (wide, narrow)]
    assert both[0].shape[0] > 300
    off = np.abs(both[0] - both[1])
    assert off.mean() < MEAN_OFF
    assert 0 < off.max() < MOST_OFF


@contextmanager
def rounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within: Hugging Face's model attends to keys and values that are rounded to bfloat16."""
    turn = modeling_llama.apply_rotary_pos_emb

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float()

    def turned(q: torch.Tensor, k: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = turn(q, k, *rest, **more)
        return q, narrow(k)

    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda module, given, out: narrow(out))
        for layer in model.model.layers
    ]
    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama, "apply_rotary_pos_emb", turned)
        yield
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MULTI_HEAD, GROUPED_QUERY, TIED, ODD], ids=lambda shape: shape.name)
def test_logits_are_those_of_rounded_keys_and_values(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Shape
) -> None:
    """Against transformers, whose keys (turned) and values are rounded: what we differ by is a fraction of what the
    rounding itself does, which is there because a sum in another order may round to the neighbour.
    """
    llm = LLaMA.build(
        write_checkpoint(shape, tmp_path / shape.name, tokenizer_path),
        config=EngineConfig(max_seq_len=128, buckets=(64, 8, 1), cache_dtype="bfloat16", dtype="float32"),
    )
    (prompt,) = random_prompts(shape, 1, 73, seed=3).tolist()
    (result,) = llm.generate([prompt], params=[SamplingParams(20, 0.0, logits=True, ignore_eos=True)])
    whole = torch.tensor([[*prompt, *result.token_ids[:-1]]])
    model = reference(shape)
    with torch.no_grad():
        plain = model(whole).logits[0, 72:].numpy()
        with rounded(model, monkeypatch):
            expected = model(whole).logits[0, 72:].numpy()
        assert np.array_equal(model(whole).logits[0, 72:].numpy(), plain)  # the oracle is what it was
    (ours,) = logits_of([result])
    off, by_rounding = np.abs(ours - expected), np.abs(plain - expected)
    assert off.mean() < by_rounding.mean() / 20
    assert off.max() < by_rounding.max() / 10


# ------------------------------------------------------------------------------------------- several models, devices


@pytest.mark.slow
def test_two_models_of_different_dtypes_in_one_process(make_llm: LLMFactory, alone: list[list[int]]) -> None:
    """In turns, token by token: each goes on as if it were alone."""
    wide, narrow = make_llm(max_batch_size=2, cache_dtype="float32"), make_llm(**HALF, max_batch_size=2)
    expected = texts(wide.generate(PROMPTS, params=WISHES))
    streams = [llm.pieces(PROMPTS, WISHES) for llm in (wide, narrow)]
    found: list[dict[int, list[int]]] = [{}, {}]
    while streams:
        for number, stream in enumerate(streams):
            piece = next(stream, None)
            if piece is not None and piece.result is not None:
                found[number][piece.result.index] = piece.result.token_ids
        if all(len(each) == len(PROMPTS) for each in found):
            break
    assert [found[0][i] for i in range(len(PROMPTS))] == expected
    assert [found[1][i] for i in range(len(PROMPTS))] == alone
    assert runner_of(wide).tensor("key_cache").dtype == F32


@pytest.mark.slow
def test_layers_without_a_loop_read_the_same(make_llm: LLMFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unrolled, with all slots and a layer that is known, the cache is read by another operation."""
    looped = make_llm(**HALF, max_batch_size=2, seed=9)
    unrolled = make_llm(**HALF, max_batch_size=2, seed=9, read_every=7)
    monkeypatch.setattr(runner_of(unrolled).model, "layers_as", "unrolled")
    prompts = [[1, *ids(30, 1)], [1, *ids(9, 2)]]
    params = [SamplingParams(20, 0.0, logits=True, ignore_eos=True)] * 2
    found, expected = (llm.generate(prompts, params=params) for llm in (unrolled, looped))
    assert texts(found) == texts(expected)
    assert all(np.allclose(a, b, atol=1e-2) for a, b in zip(logits_of(found), logits_of(expected), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 2), (4, 1)])
def test_a_mesh_computes_what_one_device_computes(tensor: int, data: int) -> None:
    """Texts equal, log-probabilities within 1e-3; each device holds half of float32's bytes."""
    found, expected = on_mesh(tensor, data), on_mesh(1, 1)
    for (token_ids, logprobs), (others, other_logprobs) in zip(found["texts"], expected["texts"], strict=True):
        assert token_ids == others
        assert logprobs == pytest.approx(other_logprobs, abs=1e-3)
    assert sum(found["cached"]) > 0
    assert found["bytes"]["float32"] == 2 * found["bytes"]["bfloat16"]


@cache
def on_mesh(tensor: int, data: int) -> dict[str, Any]:
    """What a process on a mesh returns."""
    command = [sys.executable, str(Path(__file__).with_name("mesh_child.py")), str(tensor), str(data), "halved"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)["halved"]
    return found
