"""What is known of tokens, beside transformers' logits and hidden states of the same weights; and that it costs nothing
unasked.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLMFactory
from test_parity_transformers import GROUPED_QUERY, PROMPT_LEN, TIED, random_prompts, reference, write_checkpoint
from test_sampling import on_device

from llama import EngineConfig, Generation, LLaMA, SamplingParams, outputs
from llama.compiled import token_info
from llama.engine.runner import REPORT_WINDOW
from llama.outputs import TokenLogprob
from llama.xla.counters import counters

pytestmark = pytest.mark.slow

GENERATED = 12
CLOSE = 1e-4
WISH = SamplingParams(
    GENERATED, 0.9, 0.8, 3, top_k=40, repetition_penalty=1.2, ignore_eos=True, logprobs=20, prompt_logprobs=True
)


@pytest.fixture(scope="module", params=[GROUPED_QUERY, TIED], ids=lambda shape: shape.name)
def shape(request: pytest.FixtureRequest) -> object:
    return request.param


@pytest.fixture(scope="module", params=[1, 3], ids=["batch-1", "batch-3"])
def llm(
    shape: object, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path
) -> LLaMA:
    directory = write_checkpoint(shape, tmp_path_factory.mktemp("known") / "model", tokenizer_path)  # type: ignore[arg-type]
    return LLaMA.build(
        directory,
        tokenizer_path,
        config=EngineConfig(max_seq_len=128, max_batch_size=request.param, buckets=(64, 8, 1)),
    )


@pytest.fixture(scope="module")
def prompts(shape: object) -> list[list[int]]:
    """Of several lengths: cut into one chunk and into many."""
    return [random_prompts(shape, 1, length, seed=length)[0].tolist() for length in (PROMPT_LEN, 5, 1)]  # type: ignore[arg-type]


def outputs_of(shape: object, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' logits and last hidden states at every position: [T, V] and [T, dim]."""
    with torch.no_grad():
        out = reference(shape)(torch.tensor([ids]), output_hidden_states=True)  # type: ignore[arg-type]
    return out.logits[0], out.hidden_states[-1][0]


def assert_described(told: list[TokenLogprob], ids: list[int], logits: torch.Tensor) -> None:
    """Each token's log-probability, rank and the 20 likeliest are those of the raw logits before it."""
    logp = logits.log_softmax(-1)
    assert [each.token_id for each in told] == ids
    for each, row in zip(told, logp, strict=True):
        assert abs(each.logprob - row[each.token_id]) < CLOSE
        rank = 1 + int((row > row[each.token_id]).sum())
        assert each.rank == rank or (row - row[each.token_id]).abs().sort().values[1] < 1e-3
        expected = row.topk(20).values
        assert [top.logprob for top in each.top] == pytest.approx(expected.tolist(), abs=CLOSE)
        assert all(abs(top.logprob - row[top.token_id]) < CLOSE for top in each.top)


def test_log_probabilities_are_those_of_transformers(llm: LLaMA, shape: object, prompts: list[list[int]]) -> None:
    """Of generated and of prompt tokens, sampled with filters and penalties that must not show: the raw logits are
    meant.
    """
    results = llm.generate(prompts, params=WISH)
    for prompt, result in zip(prompts, results, strict=True):
        ids = [*prompt, *result.token_ids]
        logits, _ = outputs_of(shape, ids)
        assert result.prompt_logprobs is not None
        assert result.logprobs is not None
        assert len(result.token_ids) == GENERATED
        assert result.prompt_logprobs[0] is None
        before = [each for each in result.prompt_logprobs if each is not None]
        assert_described([*before, *result.logprobs], ids[1:], logits[:-1])
        assert result.cumulative_logprob == pytest.approx(sum(each.logprob for each in result.logprobs))
        likelier = [each.rank for each in result.logprobs]
        assert max(likelier) > 1, "sampling that always takes the likeliest would prove little"


def test_hidden_states_and_logits_are_those_of_transformers(
    llm: LLaMA, shape: object, prompts: list[list[int]]
) -> None:
    """One row a token of the prompt but the first, then one a generated token; without the prompt, the generated ones
    alone.
    """
    whole = SamplingParams(GENERATED, 0.0, ignore_eos=True, hidden_states=True, logits=True, prompt_logprobs=True)
    results = llm.generate(prompts, params=whole)
    own = llm.generate(prompts, GENERATED, 0.0, ignore_eos=True, logits=True)
    for prompt, result, short in zip(prompts, results, own, strict=True):
        logits, hidden = outputs_of(shape, [*prompt, *result.token_ids])
        assert result.logits is not None
        assert result.hidden_states is not None
        np.testing.assert_allclose(result.logits, logits[:-1], atol=CLOSE)
        np.testing.assert_allclose(result.hidden_states, hidden[:-1], atol=CLOSE)
        assert result.logprobs is result.prompt_logprobs is short.hidden_states is None
        assert short.logits is not None
        np.testing.assert_allclose(short.logits, logits[len(prompt) - 1 : -1], atol=CLOSE)


def test_asking_changes_no_token(llm: LLaMA, prompts: list[list[int]]) -> None:
    asked = llm.generate(prompts, params=WISH)
    unasked = llm.generate(
        prompts, params=SamplingParams(GENERATED, 0.9, 0.8, 3, top_k=40, repetition_penalty=1.2, ignore_eos=True)
    )
    assert [r.token_ids for r in asked] == [r.token_ids for r in unasked]
    assert [r.generation for r in asked] == [r.generation for r in unasked]


def test_asking_compiles_the_documented_programs_once(make_llm: LLMFactory) -> None:
    """For generated tokens one; for a prompt's one a chunk length."""
    llm = make_llm(seed=91)
    prompt = [1] * 9  # chunks of 8 and 1
    llm.generate([prompt], max_gen_len=4, temperature=0)
    assert llm.generate([prompt], max_gen_len=4, temperature=0, logprobs=2)[0].programs.compiled == 1
    assert llm.generate([prompt], max_gen_len=9, temperature=1, logprobs=5)[0].programs.compiled == 0
    assert (
        llm.generate([prompt], max_gen_len=4, temperature=0, logprobs=2, prompt_logprobs=True)[0].programs.compiled == 1
    )
    assert (
        llm.generate([prompt], max_gen_len=4, temperature=0, hidden_states=True, prompt_logprobs=True)[
            0
        ].programs.compiled
        == 0
    )


def counted(llm: LLaMA, params: SamplingParams) -> tuple[int, int, int, int]:
    """Program runs, fetches, bytes fetched and bytes uploaded for one prompt of 9 tokens, everything compiled."""
    llm.generate([[1] * 9], params=params)
    before = counters.runs, counters.fetches, counters.fetched_bytes, counters.uploaded_bytes
    assert llm.generate([[1] * 9], params=params)[0].finish_reason == "length"
    after = counters.runs, counters.fetches, counters.fetched_bytes, counters.uploaded_bytes
    return tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[return-value]


def test_nothing_is_computed_or_transferred_unasked(make_llm: LLMFactory) -> None:
    """Bytes and programs of 17 tokens: the report and nothing else, also where tokens are sampled; asking adds what it
    says.
    """
    llm = make_llm()
    report = (REPORT_WINDOW + 2) * 4
    reads = 1 + 16 // 8
    greedy, sampled = (counted(llm, SamplingParams(17, t, seed=1)) for t in (0.0, 1.0))
    assert greedy[:3] == sampled[:3] == (2 + 16, reads, reads * report)
    assert greedy[3] == sampled[3]
    told = counted(llm, SamplingParams(17, 0.0, seed=1, logprobs=3))
    assert told[:3] == (2 + 1 + 2 * 16, reads + 17, reads * report + 17 * 4 * token_info.WIDTH)
    everything = counted(llm, SamplingParams(17, 0.0, seed=1, logits=True))
    assert everything[2] == reads * report + 17 * 4 * llm.engine.runner.model.args.vocab_size


def test_rows_that_share_a_prompt_get_what_each_asks(make_llm: LLMFactory) -> None:
    """The bug: the prompt was fetched for the first row's wishes only. And ranking samples does not show
    log-probabilities unasked.
    """
    wishes = [
        SamplingParams(3, 0.0, logprobs=1, prompt_logprobs=True),
        SamplingParams(3, 0.0, logits=True, prompt_logprobs=True),
        SamplingParams(3, 0.0),
    ]
    prompt = [1, 7, 8, 9]
    told, shown, plain = make_llm(max_batch_size=3).generate([prompt] * 3, params=wishes)
    assert told.logits is shown.prompt_logprobs is plain.prompt_logprobs is None
    assert len(told.prompt_logprobs or ()) == len(prompt)
    assert shown.logits is not None
    assert len(shown.logits) == len(prompt) - 1 + 3
    ranked = SamplingParams(3, 1.0, best_of=2, hidden_states=True, prompt_logprobs=True)
    (best,) = make_llm(max_batch_size=3).generate([prompt], params=ranked)
    assert best.logprobs is best.prompt_logprobs is None


@pytest.mark.parametrize("rows", [1, 2])
def test_padding_is_not_scored(make_llm: LLMFactory, rows: int) -> None:
    """One chunk of which a third holds no token tells the same as five that are full, with fewer runs."""
    prompt = [1] + [5 + i % 90 for i in range(39)]
    wish = SamplingParams(3, 0.0, logprobs=1, logits=True, prompt_logprobs=True)
    exact, padded = (
        make_llm(buckets=buckets, max_batch_size=rows).generate([prompt], params=wish)[0]
        for buckets in ((8, 1), (64, 8, 1))
    )
    assert len(padded.prompt_logprobs or ()) == len(prompt)
    assert padded.token_ids == exact.token_ids
    assert exact.logits is not None
    np.testing.assert_allclose(padded.logits, exact.logits, atol=CLOSE)
    told = [[each.logprob for each in r.prompt_logprobs or () if each] for r in (exact, padded)]
    assert told[0] == pytest.approx(told[1], abs=CLOSE)
    assert padded.programs.runs < exact.programs.runs


def test_describe_with_ties_and_infinities() -> None:
    """Equal tokens share the best rank and come lowest id first; impossible ones have -inf, which JSON writes as
    -9999.
    """
    logits = torch.tensor(
        [
            [1.0, 3.0, 3.0, -float("inf"), 0.0],
            [0.0] * 5,
            [-float("inf"), 2.0, -float("inf"), -float("inf"), -float("inf")],
        ]
    )
    (found,) = on_device(token_info.describe, logits, torch.tensor([0, 4, 0], dtype=torch.int32))
    exact = torch.log_softmax(logits.double(), -1)
    assert found[:, 0].tolist() == pytest.approx(exact[torch.arange(3), torch.tensor([0, 4, 0])].tolist())
    assert found[:, 1].tolist() == [3, 1, 2]
    top_ids = found[:, 2 + 20 : 2 + 20 + 5].int().tolist()
    assert top_ids[0][:4] == [1, 2, 0, 4]
    assert top_ids[1] == [0, 1, 2, 3, 4]
    assert top_ids[2][0] == 1
    assert outputs.finite(float(found[2, 0])) == -9999.0


def test_meta_signatures_return_tokens_and_log_probabilities(make_llm: LLMFactory) -> None:
    """text_completion(logprobs=True), with and without echo, as Meta's code returns them."""
    llm = make_llm(max_batch_size=2)
    (plain,) = llm.text_completion(["the cat"], 0.0, 1.0, 6, logprobs=True)
    (echoed,) = llm.text_completion(["the cat"], 0.0, 1.0, 6, logprobs=True, echo=True)
    (result,) = llm.generate(["the cat"], 6, 0.0, 1.0, logprobs=0, prompt_logprobs=True)
    assert result.logprobs is not None
    assert result.prompt_logprobs is not None
    assert plain["logprobs"] == pytest.approx([each.logprob for each in result.logprobs], abs=1e-5)
    assert "".join(plain["tokens"]) == plain["generation"] or "\ufffd" in plain["generation"]
    prompt_ids = llm.tokenizer.encode("the cat")
    assert len(echoed["tokens"]) == len(echoed["logprobs"]) == len(prompt_ids) + len(plain["tokens"])
    assert echoed["logprobs"][0] == 0.0
    assert echoed["logprobs"][1 : len(prompt_ids)] == pytest.approx(
        [e.logprob for e in result.prompt_logprobs[1:] if e], abs=1e-5
    )
    assert "logprobs" not in llm.text_completion(["the cat"], 0.0, 1.0, 6)[0]


def test_json_carries_them(make_llm: LLMFactory) -> None:
    """In the shape of OpenAI's chat completions; what was not asked for has no key."""
    llm = make_llm()
    (result,) = llm.generate(["the cat"], 4, 1.0, seed=1, logprobs=2, prompt_logprobs=True)
    found = json.loads(json.dumps(result.as_json()))
    assert found["prompt_logprobs"][0] is None
    assert len(found["logprobs"]) == len(found["token_ids"]) == 4
    for each in found["logprobs"]:
        assert list(each) == ["id", "token", "bytes", "logprob", "rank", "top_logprobs"]
        assert [list(top) for top in each["top_logprobs"]] == [["id", "token", "bytes", "logprob"]] * 2
        assert bytes(each["bytes"]).decode(errors="replace") == each["token"]
    assert found["cumulative_logprob"] == pytest.approx(sum(each["logprob"] for each in found["logprobs"]), abs=1e-5)
    (plain,) = llm.generate(["the cat"], 4, 1.0, seed=1)
    assert not {"logprobs", "prompt_logprobs", "cumulative_logprob"} & set(plain.as_json())


def test_a_stop_token_is_not_among_the_tokens(make_llm: LLMFactory) -> None:
    """Its log-probability counts for ranking samples, and is not returned, unless what stopped shall stay."""
    llm = make_llm()

    def cut(include: bool) -> Generation:
        (whole,) = llm.generate(["x"], 12, 0.0, ignore_eos=True)
        stop = whole.token_ids[7]
        first = whole.token_ids.index(stop)
        (found,) = llm.generate(["x"], 12, 0.0, stop_token_ids=(stop,), include_stop=include, logprobs=0, logits=True)
        assert found.token_ids == whole.token_ids[: first + include]
        assert found.stop_reason == stop
        return found

    for include in (False, True):
        result = cut(include)
        assert result.logprobs is not None
        assert result.logits is not None
        assert [each.token_id for each in result.logprobs] == result.token_ids
        assert len(result.logits) == len(result.token_ids)
