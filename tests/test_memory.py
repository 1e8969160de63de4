"""The memory plan: what it counts is what is allocated, and what it advises fits."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import TINY, LLMFactory

from llama import EngineConfig, ModelArgs
from llama.compiled.memory import check_fits, plan_memory
from llama.errors import ConfigError

SEVEN_B = ModelArgs(vocab_size=32000)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.slow
def test_weights_and_cache_are_counted_to_the_byte(make_llm: LLMFactory) -> None:
    """Against the tensors that a built model and its engine really hold."""
    llm = make_llm(max_batch_size=3)
    llm.generate(["x"], max_gen_len=1)
    plan = plan_memory(TINY, llm.config, F32, F32, None)
    assert plan.weights == sum(p.numel() * p.element_size() for p in llm.engine.runner.model.parameters())
    runner = llm.engine.runner
    assert plan.cache == runner.tensor("key_cache").nbytes + runner.tensor("value_cache").nbytes


def test_known_sizes() -> None:
    """LLaMA 7B: 6,738,415,616 parameters, and half a gibibyte of bfloat16 keys and values per 1,024 positions; 7 more
    at the end, because a chunk of 8 may be padded. Values fill whole blocks of 128, and one more.
    """
    plan = plan_memory(SEVEN_B, EngineConfig(max_seq_len=1024), BF16, BF16, None)
    assert plan.weights == 6_738_415_616 * 2
    assert plan.cache == 32 * 4096 * (1024 + 7 + 9 * 128) * 2
    assert plan.fits
    assert "of" not in str(plan)


def test_activations_cover_the_largest_tensors() -> None:
    """The estimate is at least the scores and the logits of the largest chunk."""
    config = EngineConfig(max_batch_size=4, max_seq_len=4096)
    plan = plan_memory(SEVEN_B, config, BF16, BF16, None)
    assert plan.activations > 4 * 512 * 32 * 4096 * 4 + 4 * 32000 * 4


@pytest.mark.slow
@pytest.mark.parametrize("available", [14 * 2**30, 16 * 2**30, 20 * 2**30])
def test_what_is_advised_fits_and_one_more_does_not(available: int) -> None:
    """The largest max_seq_len and the largest max_batch_size of the message, each with the other as it was."""
    config = EngineConfig(max_batch_size=16, max_seq_len=32768, buckets=(64, 8, 1))
    with pytest.raises(ConfigError, match="does not fit") as error:
        check_fits(SEVEN_B, config, BF16, BF16, available)
    advised = {name: int(value) for name, value in re.findall(r"(max_\w+) (\d+) at most", str(error.value))}
    assert advised
    for name, value in advised.items():
        settings = {"max_batch_size": 16, "max_seq_len": 32768, "buckets": (64, 8, 1), name: value}
        assert plan_memory(SEVEN_B, EngineConfig(**settings), BF16, BF16, available).fits  # type: ignore[arg-type]
        assert not plan_memory(SEVEN_B, EngineConfig(**{**settings, name: value + 1}), BF16, BF16, available).fits  # type: ignore[arg-type]


def test_where_neither_alone_is_enough_both_are_named() -> None:
    """One row, and the most positions that then fit."""
    shapes = {"max_batch_size": 1024, "max_seq_len": 1 << 20, "buckets": (64, 8, 1)}
    with pytest.raises(ConfigError, match="does not fit") as error:
        check_fits(SEVEN_B, EngineConfig(**shapes), BF16, BF16, 13 * 2**30)  # type: ignore[arg-type]
    found = re.search(r"it takes max_batch_size 1 with max_seq_len (\d+) at most$", str(error.value))
    assert found is not None
    for more, fits in ((0, True), (1, False)):
        config = EngineConfig(max_batch_size=1, max_seq_len=int(found[1]) + more, buckets=(64, 8, 1))
        assert plan_memory(SEVEN_B, config, BF16, BF16, 13 * 2**30).fits is fits


def test_weights_alone_too_large() -> None:
    """No other shape would help, and the message says so."""
    with pytest.raises(ConfigError, match="the weights alone are too large"):
        check_fits(SEVEN_B, EngineConfig(), F32, F32, 2**30)


@pytest.mark.slow
def test_kept_rows_are_counted_to_the_byte(make_llm: LLMFactory) -> None:
    """As many whole rows as the bytes have room for; the plan shows them."""
    config = EngineConfig(max_seq_len=128, max_batch_size=2)
    row = plan_memory(TINY, config, F32, F32, None).cache // 2
    llm = make_llm(max_batch_size=2, prefix_cache=True, prefix_cache_bytes=3 * row + row // 2)
    llm.generate(["x"], max_gen_len=1)
    plan = plan_memory(TINY, llm.config, F32, F32, None)
    assert (plan.cache, plan.prefixes) == (2 * row, 3 * row)
    runner = llm.engine.runner
    held = runner.tensor("key_cache").nbytes + runner.tensor("value_cache").nbytes
    assert plan.cache + plan.prefixes == held
    assert " + prefixes " in str(plan)


def test_bytes_that_keep_nothing_are_refused() -> None:
    """Less than a row, with the least that would do; and any where the prefix cache is off."""
    row = plan_memory(TINY, EngineConfig(max_seq_len=128), F32, F32, None).cache
    with pytest.raises(ConfigError, match=rf"prefix_cache_bytes: got {row - 1}, expected 0, or {row} at least"):
        plan_memory(TINY, EngineConfig(max_seq_len=128, prefix_cache_bytes=row - 1), F32, F32, None)
    with pytest.raises(ConfigError, match="prefix_cache is off"):
        EngineConfig(prefix_cache=False, prefix_cache_bytes=row)
    with pytest.raises(ConfigError, match="prefix_cache_bytes: got -1, expected 0 or more"):
        EngineConfig(prefix_cache_bytes=-1)


def test_fewer_kept_rows_are_a_cure() -> None:
    """What is left beside everything else is named, and fits."""
    config = EngineConfig(max_seq_len=1024, prefix_cache_bytes=8 * 2**30)
    needed = plan_memory(SEVEN_B, config, BF16, BF16, None)
    available = needed.total - 5 * 2**30
    with pytest.raises(ConfigError, match=r"prefix_cache_bytes (\d+) at most, or 0") as error:
        check_fits(SEVEN_B, config, BF16, BF16, available)
    advised = int(re.findall(r"prefix_cache_bytes (\d+) at most", str(error.value))[0])
    assert plan_memory(SEVEN_B, EngineConfig(max_seq_len=1024, prefix_cache_bytes=advised), BF16, BF16, available).fits
