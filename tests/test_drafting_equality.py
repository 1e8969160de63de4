"""Drafts on the real device: the same tokens, to the last bit, whatever is drafted by whom.

The number of tokens that each case compares is ``TOKENS``; set the variable LLAMA_XLA_DRAFTED_TOKENS for more.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence as Sequences
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLMFactory
from test_controls import EIGHT, PROMPTS
from test_sampling import chi_square, critical_chi_square

from llama import DraftConfig, Drafter, Drafts, EngineConfig, Generation, LLaMA, SamplingParams
from llama.compiled import sampling
from llama.config import DEMO_DIR
from llama.drafting import fingerprint
from llama.drafting.datastore import build
from llama.drafting.opening import open_drafting
from llama.engine.drafting import Drafting
from llama.engine.runner import XlaRunner
from llama.engine.sequence import Sequence
from llama.xla.counters import counters

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from demo_text import LONGER_SHARES, TextMaker

pytestmark = pytest.mark.slow

TOKENS = int(os.environ.get("LLAMA_XLA_DRAFTED_TOKENS", "256"))  # of each drafter, batch size and way to choose
NEAR = 1e-4  # logits that differ by less may change places where shapes differ
GEN_LEN = 64
KINDS = ("recite", "rewrite", "story", "question")


class Garbage(Drafter):
    """Random tokens; or, where it was told the truth, the right ones with a chance."""

    def __init__(self, truth: dict[tuple[int, int], list[int]] | None = None, right: float = 0.0) -> None:
        self._chooser, self._truth, self._right = random.Random(3), truth or {}, right

    def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
        return Drafts.of([self._guess(s, draft_len) for s in sequences], draft_len)

    def _guess(self, sequence: Sequence, draft_len: int) -> list[int]:
        known = self._truth.get((sequence.index, sequence.sample), [])
        at = len(sequence.ids) - len(sequence.prompt_ids)
        guess = []
        for place in range(at, at + self._chooser.randint(0, draft_len)):
            is_right = place < len(known) and self._chooser.random() < self._right
            guess.append(known[place] if is_right else self._chooser.randrange(3, 320))
        return guess


class Nothing(Drafter):
    """No guess, ever: under ``batch_invariant`` every step is the one that checks drafts, with none in it."""

    def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
        return Drafts.of([()] * len(sequences), draft_len)


@pytest.fixture(scope="module")
def half_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's first three layers: a smaller model with the same vocabulary."""
    directory = tmp_path_factory.mktemp("half")
    params = json.loads((DEMO_DIR / "params.json").read_text())
    weights = torch.load(DEMO_DIR / "consolidated.00.pth", weights_only=True)
    kept = {k: v for k, v in weights.items() if not k.startswith("layers.") or int(k.split(".")[1]) < 3}
    (directory / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    torch.save(kept, directory / "consolidated.00.pth")
    (directory / "tokenizer.model").write_bytes((DEMO_DIR / "tokenizer.model").read_bytes())
    return directory


@pytest.fixture(scope="module")
def settings(half_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, DraftConfig]:
    """Every drafter with the files that it needs."""
    store = tmp_path_factory.mktemp("store") / "store"
    tokenizer = LLaMA.build(max_seq_len=64).tokenizer
    maker = TextMaker(11, LONGER_SHARES)
    build((tokenizer.encode(maker.document().text) for _ in range(300)), fingerprint(tokenizer), store)
    return {
        "lookup": DraftConfig(("lookup",)),
        "suffix": DraftConfig(("suffix",)),
        "auto": DraftConfig(("auto",)),
        "retrieval": DraftConfig(("retrieval",), datastore=store, word_bank=store.with_name("bank")),
        "model": DraftConfig(("model",), draft_ckpt_dir=half_model),
        "medusa": DraftConfig(("medusa",)),
        "lookahead": DraftConfig(("lookahead",)),
    }


NAMES = ("lookup", "suffix", "auto", "retrieval", "model", "medusa", "lookahead", "garbage")


@pytest.fixture(scope="module")
def engines(settings: dict[str, DraftConfig]) -> Iterator[Callable[..., LLaMA]]:
    """``engines(drafter, batch, invariant)``: the demo model with that drafter; None drafts nothing.

    One warm model for each batch size serves every drafter: the programs are the same.
    """
    models: dict[tuple[int, bool], LLaMA] = {}
    drafters: dict[tuple[object, ...], Drafter] = {}

    def drafter_of(name: str | None, llm: LLaMA) -> Drafter:
        if name is None or name == "garbage":
            return Garbage() if name else Nothing()
        runner = llm.engine.runner
        assert isinstance(runner, XlaRunner)
        opened = open_drafting(settings[name], runner.model.args, llm.tokenizer, llm.config, is_demo=True)
        return opened.drafter(runner)

    def make(name: str | None, batch: int, invariant: bool) -> LLaMA:
        if (batch, invariant) not in models:
            shapes = {"max_batch_size": batch, "max_seq_len": 512, "draft_lens": (3, 7), "lookahead": (5, 3)}
            models[batch, invariant] = LLaMA.build(config=EngineConfig(**shapes, batch_invariant=invariant))
            models[batch, invariant].warm_up()
        llm = models[batch, invariant]
        key = name, batch, invariant
        if key not in drafters:
            drafters[key] = drafter_of(name, llm)
            drafters[key].prepare(None)
        adaptive = name == "auto" and not invariant
        drafting = Drafting.of(drafters[key], llm.config, llm.vocab_size, adaptive=adaptive)
        llm.engine.drafting = None if name is None and not invariant else drafting
        return llm

    yield make
    for drafter in drafters.values():
        drafter.close()


def requests(temperature: float, batch: int) -> tuple[list[str], list[SamplingParams]]:
    """Prompts of every kind, enough for TOKENS tokens; none ends early."""
    maker = TextMaker(5, LONGER_SHARES)
    count = max(-(-TOKENS // GEN_LEN), batch)
    texts = [maker.of_kind(KINDS[i % len(KINDS)]) for i in range(count)]
    prompts = [each.prompt or " ".join(each.text.split()[:4]) for each in texts]
    return prompts, [SamplingParams(GEN_LEN, temperature, 0.95, seed=i, ignore_eos=True) for i in range(count)]


# --- equal bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_bits_are_those_of_a_step_without_drafts(
    engines: Callable[..., LLaMA], temperature: float, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every drafter, and garbage, against the same program with nothing drafted: equal tokens, and for a few requests
    equal logits. Nothing is compiled after a warm-up.
    """
    prompts, params = requests(temperature, batch)
    wanted = engines(None, batch, True).generate(prompts, params=params)
    few = [SamplingParams(24, temperature, 0.95, seed=1, ignore_eos=True, logits=True)] * batch
    wanted_logits = engines(None, batch, True).generate(prompts[:batch], params=few)
    for name in NAMES:
        llm = engines(name, batch, True)
        compiled = counters.compiled
        found = llm.generate(prompts, params=params)
        assert [r.token_ids for r in found] == [r.token_ids for r in wanted], name
        for one, other in zip(llm.generate(prompts[:batch], params=few), wanted_logits, strict=True):
            assert one.logits is not None
            assert np.array_equal(one.logits, other.logits), name
        assert counters.compiled == compiled
        counts = llm.engine.drafting.counts  # type: ignore[union-attr]
        assert counts.draft_tokens > 0
        with capsys.disabled():
            total = sum(len(r.token_ids) for r in found)
            print(f"\n{name:10} batch {batch} temperature {temperature}: {total} tokens equal, {counts}", end="")


# --- against plain decoding -------------------------------------------------------------------------------------------


def is_near_tie(result: Generation, place: int, params: SamplingParams) -> bool:
    """Whether logits that differ by less than NEAR could have led to another token there."""
    assert result.logits is not None
    logits = torch.from_numpy(result.logits[place : place + 1])
    if params.temperature == 0:
        best, second = logits.topk(2).values[0].tolist()
        return best - second < NEAR
    generator = torch.Generator().manual_seed(0)
    noisy = logits + NEAR * (2 * torch.rand(400, logits.shape[1], generator=generator) - 1)
    each = torch.ones(400)
    filters = sampling.Filters(params.temperature * each, 0 * each.int(), params.top_p * each, 0 * each)
    seed = torch.tensor([[params.seed or 0, 0]], dtype=torch.int32).expand(400, 2)
    position = torch.full((400,), result.prompt_tokens + place, dtype=torch.int32)
    return len(set(sampling.choose(noisy, filters, seed, position).tolist())) > 1


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_that_of_plain_decoding(
    engines: Callable[..., LLaMA], temperature: float, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other programs sum in another order, so tokens whose logits are nearly equal may change places; each such case
    is counted, and nothing else may differ.
    """
    prompts, params = requests(temperature, batch)
    wanted = engines(None, batch, False).generate(prompts, params=params)
    for name in NAMES:
        found = engines(name, batch, False).generate(prompts, params=params)
        ties, compared = 0, 0
        for one, other, given in zip(found, wanted, params, strict=True):
            pairs = zip(one.token_ids, other.token_ids, strict=True)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            compared += len(other.token_ids) if place is None else place
            if place is not None:
                (again,) = engines(None, batch, False).generate([other.prompt], params=SamplingParams(
                    place + 1, given.temperature, given.top_p, given.seed, ignore_eos=True, logits=True
                ))  # fmt: skip
                assert is_near_tie(again, place, given), (name, one.index, place)
                ties += 1
        with capsys.disabled():
            print(f"\n{name:10} batch {batch} temperature {temperature}: {compared} tokens, {ties} near-ties", end="")


# --- every control ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lens", [(3,), (7,)])
@pytest.mark.parametrize("right", [0.0, 0.8, 1.0])
def test_every_control_holds_for_drafted_tokens(make_llm: LLMFactory, lens: tuple[int, ...], right: float) -> None:
    """Penalties count drafted tokens before a position, grammars and bans mask it, stop tokens end the row there, and
    log-probabilities are told of every accepted token.
    """
    wanted = make_llm(max_batch_size=8).generate(PROMPTS, params=EIGHT)
    llm = make_llm(max_batch_size=8, draft_lens=lens)
    truth = {(r.index, r.sample): r.token_ids for r in wanted}
    llm.engine.drafting = Drafting.of(Garbage(truth, right), llm.config, llm.vocab_size)
    for order in (range(8), reversed(range(8))):
        chosen = list(order)
        llm.engine.drafting.drafter = Garbage({(chosen.index(i), 0): truth[i, 0] for i in chosen}, right)
        found = llm.generate([PROMPTS[i] for i in chosen], params=[EIGHT[i] for i in chosen])
        for one, i in zip(found, chosen, strict=True):
            other = wanted[i]
            assert one.token_ids == other.token_ids
            assert (one.generation, one.finish_reason, one.stop_reason) == (
                other.generation,
                other.finish_reason,
                other.stop_reason,
            )
            if other.logprobs is not None:
                assert one.logprobs is not None
                assert len(one.logprobs) == len(other.logprobs)
                for a, b in zip(one.logprobs, other.logprobs, strict=True):
                    assert (a.token_id, a.rank) == (b.token_id, b.rank)
                    assert abs(a.logprob - b.logprob) < 1e-4
    assert right == 0.0 or llm.engine.drafting.counts.accepted_tokens > 20


def test_details_of_drafted_tokens_are_theirs(make_llm: LLMFactory) -> None:
    """Hidden states, logits and log-probabilities of rows beside each other that accept different numbers."""
    params = [
        SamplingParams(30, 0.0, hidden_states=True, logits=True, logprobs=5, prompt_logprobs=True),
        SamplingParams(25, 0.7, seed=3, logits=True),
        SamplingParams(28, 0.0),
        SamplingParams(20, 0.0, logprobs=2, n=1),
    ]
    wanted = make_llm(max_batch_size=4).generate(PROMPTS[:4], params=params)
    llm = make_llm(max_batch_size=4, draft_lens=(3, 7))
    truth = {(r.index, r.sample): r.token_ids for r in wanted}
    llm.engine.drafting = Drafting.of(Garbage(truth, 0.7), llm.config, llm.vocab_size)
    found = llm.generate(PROMPTS[:4], params=params)
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids == other.token_ids
        for name in ("hidden_states", "logits"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None)
            assert a is None or np.allclose(a, b, atol=1e-4)
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.token_id == b.token_id
            assert abs(a.logprob - b.logprob) < 1e-4


def test_best_of_and_n_with_drafts(make_llm: LLMFactory) -> None:
    """Samples that share a prompt, ranked or not."""
    params = SamplingParams(16, 0.9, seed=5, n=2, best_of=4)
    wanted = make_llm(max_batch_size=4).generate([PROMPTS[1]], params=params)
    llm = make_llm(max_batch_size=4, draft_lens=(3, 7))
    llm.engine.drafting = Drafting.of(
        Garbage({(0, i): r.token_ids for i, r in enumerate(wanted)}, 0.9), llm.config, 320
    )
    found = llm.generate([PROMPTS[1]], params=params)
    assert [r.token_ids for r in found] == [r.token_ids for r in wanted]


# --- the distribution -------------------------------------------------------------------------------------------------


def test_drafted_samples_follow_the_distribution(make_llm: LLMFactory) -> None:
    """The second token of 4,000 samples, for which one and the same token is always drafted, right or wrong.

    Its place in its own exact distribution (after the first token that was drawn), the drafted token first, is uniform:
    chi-square over 20 classes, false alarms once in a million.
    """
    llm = make_llm(max_batch_size=8, draft_lens=(3,))
    temperature, count = 0.7, 4000
    llm.engine.drafting = None
    one_token = SamplingParams(1, 0.0, logits=True)
    prompt = llm.tokenizer.encode(PROMPTS[0])
    (known,) = llm.generate([prompt], params=SamplingParams(2, 0.0, logits=True))
    assert known.logits is not None
    guess = int(known.logits[1].argmax())

    class Stubborn(Drafter):
        def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
            return Drafts.of([[guess] * draft_len] * len(sequences), draft_len)

    llm.engine.drafting = Drafting.of(Stubborn(), llm.config, llm.vocab_size)
    params = [SamplingParams(3, temperature, 1.0, seed=seed, ignore_eos=True) for seed in range(count)]
    drawn = [r.token_ids for r in llm.generate([prompt] * count, params=params)]
    assert 0 < llm.engine.drafting.counts.accepted_tokens < llm.engine.drafting.counts.draft_tokens
    llm.engine.drafting = None
    firsts = sorted({ids[0] for ids in drawn})
    after = llm.generate([[*prompt, first] for first in firsts], params=one_token)
    shares = {}
    for first, result in zip(firsts, after, strict=True):
        assert result.logits is not None
        shares[first] = torch.softmax(torch.from_numpy(result.logits[0]).double() / temperature, -1).numpy()
    order = [guess, *(i for i in range(llm.vocab_size) if i != guess)]
    chooser, places = np.random.default_rng(0), []
    for first, second, *_ in drawn:
        share = shares[first][order]
        before = share[: order.index(second)].sum()
        places.append(before + chooser.random() * share[order.index(second)])
    counts, _ = np.histogram(places, bins=20, range=(0, 1))
    assert chi_square(counts, np.full(20, count / 20)) < critical_chi_square(19)
