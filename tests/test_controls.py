"""Every control: its declaration, and its effect through the whole engine, mixed in one batch and alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
from conftest import LLMFactory

from llama import Generation, LLaMA, SamplingParams
from llama.cli.flags import help_text, normalise, parser_for
from llama.cli.sampling import takes_controls
from llama.config import GenerationDefaults
from llama.errors import ConfigError, PromptError
from llama.sampling_params import Control, Number, control, controls, controls_table
from llama.xla.counters import counters, xla_compilations

pytestmark = pytest.mark.slow

PLAIN = SamplingParams(20, 1.0, 1.0, 11)
PROMPTS = [
    "the cat",
    "once upon a time there was",
    "",
    "they sang and the dog ran home",
    "a",
    "green",
    "the house",
    "upon",
]
# eight rows, eight settings: every control occurs
EIGHT = [
    replace(PLAIN, temperature=0.0),
    replace(PLAIN, top_k=7, seed=1),
    replace(PLAIN, top_p=0.6, min_p=0.05, seed=2, max_gen_len=13),
    replace(PLAIN, typical_p=0.5, logit_bias={5: 4.0, 200: -100.0}, seed=3),
    replace(PLAIN, repetition_penalty=1.5, presence_penalty=0.8, frequency_penalty=0.3, seed=4),
    replace(
        PLAIN,
        allowed_token_ids=tuple(range(100, 200)),
        bad_words=((101, 102), (150,)),
        min_tokens=5,
        stop_token_ids=(120,),
        seed=5,
    ),
    replace(PLAIN, regex=" ?[a-z]{2,5}( [a-z]{1,4})*", seed=6, max_gen_len=12),
    replace(PLAIN, stop=("e", "cat"), ignore_eos=True, logprobs=3, seed=7, include_stop=True),
]


def ids(results: Sequence[Generation]) -> list[list[int]]:
    return [result.token_ids for result in results]


def outcome(result: Generation) -> tuple[Any, ...]:
    return result.token_ids, result.generation, result.finish_reason, result.stop_reason


@pytest.fixture(scope="module")
def alone(make_llm: LLMFactory) -> list[Generation]:
    """Each of the eight by itself in a batch of one."""
    llm = make_llm()
    return [llm.generate([prompt], params=params)[0] for prompt, params in zip(PROMPTS, EIGHT, strict=True)]


# --- declarations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Warmer(SamplingParams):
    """SamplingParams with one more field."""

    warmth: float | None = control(
        0.5, group="Sampling", help="How warm it is.", range=Number("a number from 0 to 1", 0, 1), same_in="nothing"
    )


def test_a_control_that_is_declared_is_checked_documented_and_a_flag() -> None:
    """One more field, and nothing else: its check, its row of the table, its flag with its help, and its value."""
    seen: dict[str, Any] = {}

    @takes_controls(params=Warmer, without=("n",), warmth=0.25)
    def command(*, sampling: dict[str, Any], quiet: bool = False) -> None:
        """Do it.

        {sampling}

        Output:
            quiet: Log nothing.
        """
        seen.update(sampling)

    assert Warmer().warmth == 0.5
    with pytest.raises(ConfigError, match=r"^warmth: got 2, expected a number from 0 to 1$"):
        Warmer(warmth=2)
    assert "| `warmth` | 0.5 | a number from 0 to 1 | How warm it is. | nothing |\n" in controls_table(Warmer)
    shown = help_text("command", command)
    assert "\n  --warmth X                   How warm it is. A number from 0 to 1. [0.25]\n" in shown
    assert shown.index("Sampling:") < shown.index("--warmth") < shown.index("Penalties and constraints:")
    parameters = inspect.signature(command).parameters
    assert "n" not in parameters
    (flag,) = normalise(command, ["--warmth", "0.75"])
    name, _, text = flag.removeprefix("--").partition("=")
    command(**{name: parser_for(name, str(parameters[name].annotation))(text)})
    assert seen == dict.fromkeys(controls(Warmer).keys() - {"n"}) | {
        name: p.default for name, p in parameters.items() if name != "quiet"
    } | {"warmth": 0.75}


def test_every_field_is_a_control() -> None:
    """The table and the class's documentation name each once, with its meaning; the first four keep their places."""
    names = [f.name for f in fields(SamplingParams)]
    assert names[:4] == ["max_gen_len", "temperature", "top_p", "seed"]
    assert sorted(controls()) == sorted(names)
    assert re.findall(r"^\| `(\w+)`", controls_table(), re.MULTILINE) == list(controls())
    documented = inspect.getdoc(SamplingParams) or ""
    for name, each in controls().items():
        assert isinstance(each, Control)
        assert each.help.endswith("."), name
        assert each.same_in, name
        assert len(re.findall(rf"^    {name}: {re.escape(each.help[:40])}", documented, re.MULTILINE)) == 1, name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 2.0),
        ("typical_p", 1.5),
        ("repetition_penalty", 0),
    ],
)
def test_a_checkpoint_s_defaults_have_the_ranges_of_the_controls(field: str, value: float) -> None:
    """The same check, with the same words, for a request and for generation_config.json."""
    with pytest.raises(ConfigError) as of_request:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as of_checkpoint:
        GenerationDefaults(**{field: value})  # type: ignore[arg-type]
    assert str(of_request.value) == str(of_checkpoint.value)
    for wrong in ("x", True, [1]):
        with pytest.raises(ConfigError, match=f"^{field}: got "):
            GenerationDefaults(**{field: wrong})  # type: ignore[arg-type]


# --- one batch --------------------------------------------------------------------------------------------------------


def test_eight_settings_in_one_batch_compile_nothing_and_equal_eight_single_runs(
    make_llm: LLMFactory, alone: list[Generation]
) -> None:
    llm = make_llm(max_batch_size=8, fail_on_recompile=True)
    llm.warm_up()
    before = xla_compilations(), counters.compiled
    together = llm.generate(PROMPTS, params=EIGHT)
    assert (xla_compilations(), counters.compiled) == before
    assert list(map(outcome, together)) == list(map(outcome, alone))
    assert len({tuple(each) for each in ids(together)}) == 8
    order = [3, 6, 0, 7, 5, 1, 4, 2]
    moved = llm.generate([PROMPTS[i] for i in order], params=[EIGHT[i] for i in order])
    assert list(map(outcome, moved)) == [outcome(alone[i]) for i in order]
    for count in (1, 2, 5):  # other mates, other heads: most of these batches need less than the whole
        some = llm.generate(PROMPTS[:count], params=EIGHT[:count])
        assert list(map(outcome, some)) == list(map(outcome, alone[:count]))
    assert (xla_compilations(), counters.compiled) == before


def test_defaults_change_nothing(make_llm: LLMFactory) -> None:
    """Every control at the value that its documentation calls unused, beside the same request without them; greedy and
    sampled.
    """
    llm = make_llm(max_batch_size=2)
    unused: dict[str, Any] = {
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
    }
    unused |= {
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "bad_words": (),
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "n": 1,
    }
    every_id = tuple(range(llm.engine.runner.model.args.vocab_size))
    for temperature in (0.0, 1.0):
        plain = replace(PLAIN, temperature=temperature)
        expected = llm.generate(PROMPTS, params=plain)
        assert list(map(outcome, llm.generate(PROMPTS, params=replace(plain, **unused)))) == list(
            map(outcome, expected)
        )
        through_all = replace(
            plain, allowed_token_ids=every_id, logit_bias={3: 0.0}, logprobs=0
        )  # the longest way through the programs
        assert list(map(outcome, llm.generate(PROMPTS, params=through_all))) == list(map(outcome, expected))


def test_top_k_1_is_greedy(make_llm: LLMFactory) -> None:
    llm = make_llm(max_batch_size=2)
    greedy = ids(llm.generate(PROMPTS, params=replace(PLAIN, temperature=0.0)))
    assert ids(llm.generate(PROMPTS, params=replace(PLAIN, top_k=1))) == greedy
    assert ids(llm.generate(PROMPTS, params=replace(PLAIN, min_p=1.0))) == greedy


# --- what may come ----------------------------------------------------------------------------------------------------


def test_penalties_work_on_what_was_generated(make_llm: LLMFactory) -> None:
    """Greedy with a strong frequency penalty: no token comes again while an unused one is anywhere near."""
    llm = make_llm()
    (plain,) = llm.generate(["a"], 40, 0.0, ignore_eos=True)
    (penalised,) = llm.generate(["a"], 40, 0.0, ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0)
    assert len(set(plain.token_ids)) < len(set(penalised.token_ids))


def test_bad_words_are_never_written(make_llm: LLMFactory) -> None:
    """As text, in the middle of a word and behind a space; a run without them writes them."""
    llm = make_llm()
    wish = replace(PLAIN, temperature=0.0, max_gen_len=60, ignore_eos=True)
    (free,) = llm.generate(["the cat"], params=wish)
    words = [llm.tokenizer.decode(free.token_ids[i : i + 2]) for i in (3, 9)]
    words = [word for word in words if word.strip() and "\ufffd" not in word]
    assert words
    pairs = tuple(tuple(free.token_ids[i : i + 2]) for i in (0, 5))
    (without,) = llm.generate(["the cat"], params=replace(wish, bad_words=(*words, *pairs)))
    assert all(pair not in list(zip(without.token_ids, without.token_ids[1:], strict=False)) for pair in pairs)
    assert without.token_ids != free.token_ids


def test_allowed_ids_and_bias(make_llm: LLMFactory) -> None:
    llm = make_llm()
    (some,) = llm.generate(["x"], 30, 1.0, allowed_token_ids=[40, 50, 60], seed=1)
    assert set(some.token_ids) == {40, 50, 60}
    (forced,) = llm.generate(["x"], 5, 0.0, logit_bias={77: 100})
    assert forced.token_ids == [77] * 5


# --- where it ends ----------------------------------------------------------------------------------------------------


def test_eos_is_ignored_or_delayed(make_llm: LLMFactory) -> None:
    llm = make_llm()
    eos = llm.tokenizer.eos_id
    (ended,) = llm.generate(["x"], 10, 0.0, logit_bias={eos: 100})
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([], "stop", eos)
    (delayed,) = llm.generate(["x"], 10, 0.0, logit_bias={eos: 100}, min_tokens=4)
    assert (len(delayed.token_ids), delayed.finish_reason) == (4, "stop")
    (ignored,) = llm.generate(["x"], 10, 0.0, logit_bias={eos: 100}, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason, ignored.stop_reason) == ([eos] * 10, "length", None)
    (kept,) = llm.generate(["x"], 10, 0.0, logit_bias={eos: 100}, include_stop=True)
    assert kept.token_ids == [eos]


@pytest.mark.parametrize("read_every", [1, 7, 16])
def test_stop_strings_across_tokens(make_llm: LLMFactory, read_every: int) -> None:
    """Any stretch of a text, also one that begins or ends within a token, ends it where it first appears, streamed or
    not.
    """
    llm = make_llm(read_every=read_every)
    (whole,) = llm.generate(["once"], 40, 1.0, 1.0, seed=4, ignore_eos=True)
    text = whole.generation
    tried = 0
    for start in range(1, len(text) - 4, 3):
        stop = text[start : start + 4]
        if "\ufffd" in stop:
            continue
        tried += 1
        (cut,) = llm.generate(["once"], 40, 1.0, 1.0, seed=4, ignore_eos=True, stop=stop)
        first = text.index(stop)
        assert (cut.generation, cut.finish_reason, cut.stop_reason) == (text[:first], "stop", stop)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert stop in llm.tokenizer.decode([*llm.tokenizer.encode("once"), *cut.token_ids])
        assert stop not in llm.tokenizer.decode([*llm.tokenizer.encode("once"), *cut.token_ids[:-1]])
        pieces = list(llm.stream("once", 40, 1.0, 1.0, seed=4, ignore_eos=True, stop=stop))
        assert "".join(pieces) == text[:first]
    assert tried > 5


def test_a_stop_string_ends_its_row_and_leaves_the_others(make_llm: LLMFactory) -> None:
    """The batch ends when no row is left: rows that a stop string has ended do not keep it going."""
    llm = make_llm(max_batch_size=2, read_every=4)
    plain = llm.generate(["once", "the"], 60, 1.0, 1.0, seed=4, ignore_eos=True)
    windows = ([r.generation[i : i + 3] for i in range(5, 60)] for r in plain)
    found = [next(w for w in of_row if len(w) == 3 and "\ufffd" not in w) for of_row in windows]
    stops = [replace(PLAIN, max_gen_len=60, seed=4, ignore_eos=True, stop=(each,)) for each in found]
    results = llm.generate(["once", "the"], params=stops)
    assert [r.finish_reason for r in results] == ["stop", "stop"]
    assert results[0].programs.runs < plain[0].programs.runs
    one = llm.generate(["once", "the"], params=[stops[0], replace(stops[1], stop=())])
    assert outcome(one[0]) == outcome(results[0])
    assert one[1].token_ids == plain[1].token_ids


def test_min_tokens_holds_for_stop_strings(make_llm: LLMFactory) -> None:
    llm = make_llm()
    (whole,) = llm.generate(["once"], 30, 1.0, 1.0, seed=4, ignore_eos=True)
    letter = next(c for c in whole.generation if c.isalpha())
    (cut,) = llm.generate(["once"], 30, 1.0, 1.0, seed=4, ignore_eos=True, stop=[letter], min_tokens=10)
    assert len(cut.token_ids) > 10 or cut.finish_reason == "length"


# --- several samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_samples_are_those_of_the_seeds_that_follow(make_llm: LLMFactory, batch: int) -> None:
    """n samples of two prompts in any batch size: each is the single run of its own seed, and its result says which."""
    single = make_llm()
    prompts = [PROMPTS[1], PROMPTS[0]]
    expected = [single.generate([p], 15, 1.0, 1.0, seed=20 + k)[0] for p in prompts for k in range(5)]
    results = make_llm(max_batch_size=batch).generate(prompts, 15, 1.0, 1.0, seed=20, n=5)
    assert [(r.index, r.sample, r.seed) for r in results] == [(i, k, 20 + k) for i in range(2) for k in range(5)]
    assert list(map(outcome, results)) == list(map(outcome, expected))


def test_a_prompt_is_prefilled_once_for_all_its_samples(make_llm: LLMFactory) -> None:
    """Its chunks are run for one sample; the others, however many slots there are, run its last token again and nothing
    more.
    """
    prompt = [1] + [7] * 72  # 64 + 8 + 1
    llm = make_llm(max_batch_size=4)
    llm.generate([prompt], 1, 1.0, n=8)
    before = counters.runs
    results = llm.generate([prompt], 1, 1.0, n=8)
    assert [r.programs.runs for r in results] == [3] + [1] * 7
    assert [r.cached_tokens for r in results] == [0] + [len(prompt) - 1] * 7
    assert counters.runs - before <= 3 + 7
    first, second = results[:2]
    assert first.timing.prefill_tok_s == pytest.approx(len(prompt) / first.timing.prefill_s)
    assert second.timing.prefill_tok_s == pytest.approx(1 / second.timing.prefill_s)  # and not the whole prompt again
    assert first.totals.prompt_tokens == len(prompt) + 7
    (together,) = llm.generate([prompt], 1, 1.0)
    assert together.programs.runs == 3


def test_samples_of_one_prompt_beside_another_prompt(make_llm: LLMFactory) -> None:
    llm, single = make_llm(max_batch_size=4), make_llm()
    wishes = [replace(PLAIN, n=3, seed=5), replace(PLAIN, seed=9)]
    results = llm.generate([PROMPTS[3], PROMPTS[1]], params=wishes)
    expected = [single.generate([PROMPTS[3]], params=replace(PLAIN, seed=5 + k))[0] for k in range(3)]
    expected += single.generate([PROMPTS[1]], params=wishes[1])
    assert list(map(outcome, results)) == list(map(outcome, expected))


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_the_best_of_several_samples(make_llm: LLMFactory, batch: int) -> None:
    """The n with the highest mean log-probability, best first, and nothing of the others; the stop token counts."""
    single = make_llm()
    runs = [single.generate(["once"], 12, 1.0, 1.0, seed=30 + k, logprobs=0, include_stop=True)[0] for k in range(6)]
    means = {r.seed: (r.cumulative_logprob or 0.0) / len(r.token_ids) for r in runs}
    best = sorted(means, key=lambda seed: -means[seed])[:2]
    llm = make_llm(max_batch_size=batch)
    params = SamplingParams(12, 1.0, 1.0, 30, n=2, best_of=6)
    results = llm.generate(["once"], params=params)
    assert [(r.seed, r.sample) for r in results] == [(seed, k) for k, seed in enumerate(best)]
    assert results[0].logprobs is None
    pieces = list(llm.pieces(["once"], [params]))
    assert {p.sample for p in pieces} == {0, 1}
    assert "".join(p.text for p in pieces if p.sample == 0) == results[0].generation


def test_samples_share_what_is_known_of_their_prompt(make_llm: LLMFactory) -> None:
    for batch in (1, 2, 5):
        results = make_llm(max_batch_size=batch).generate(
            [PROMPTS[1]], 3, 1.0, seed=1, n=3, logprobs=1, prompt_logprobs=True
        )
        known = [
            [each and (each.token_id, round(each.logprob, 4)) for each in r.prompt_logprobs or ()] for r in results
        ]
        assert known[0] == known[1] == known[2]
        assert len(known[0]) == results[0].prompt_tokens


def test_an_interrupt_during_a_shared_prefill(make_llm: LLMFactory) -> None:
    """Nothing has been generated, every sample says so, and the next call is whole."""
    llm = make_llm(max_batch_size=3)
    expected = ids(llm.generate([PROMPTS[1]], 10, 1.0, seed=3, n=3))
    llm.interrupt()
    stopped = llm.generate([PROMPTS[1]], 10, 1.0, seed=3, n=3)
    assert [(r.token_ids, r.finish_reason) for r in stopped] == [([], "interrupted")] * 3
    assert ids(llm.generate([PROMPTS[1]], 10, 1.0, seed=3, n=3)) == expected


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": -2}, "top_k: got -2"),
        ({"min_p": 1.5}, "min_p: got 1.5"),
        ({"min_p": float("nan")}, "min_p: got nan"),
        ({"typical_p": 0.0}, "typical_p: got 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty: got inf"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty: got 1e-40"),
        ({"logit_bias": {"x": 1}}, "logit_bias: got {'x': 1}, expected a number for each token id"),
        ({"logit_bias": {5: None}}, "logit_bias: got {5: None}"),
        ({"presence_penalty": 2.5}, "presence_penalty: got 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: got nan"),
        ({"logit_bias": {5: 101}}, "logit_bias: got 101.0 for id 5"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias: got 301 ids"),
        ({"allowed_token_ids": ()}, "allowed_token_ids: got no ids"),
        ({"min_tokens": 21}, "min_tokens: got 21, expected 0 to max_gen_len=20"),
        ({"stop": ("a", "")}, "stop: got an empty one"),
        ({"bad_words": ("",)}, "bad_words: got an empty one"),
        ({"n": 0}, "n: got 0"),
        ({"n": 3, "best_of": 2}, "best_of: got 2, expected at least n=3"),
        ({"n": 2, "temperature": 0.0}, "n: got 2 at temperature 0"),
        ({"best_of": 2, "temperature": 0.0}, "best_of: got 2 at temperature 0"),
        ({"logprobs": 21}, "logprobs: got 21, expected 0 to 20"),
        ({"prompt_logprobs": True}, "prompt_logprobs: needs logprobs"),
        ({"json_schema": "{}", "regex": "a"}, "got both json_schema and regex"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos: with a regex"),
        ({"regex": "a", "allowed_token_ids": (1,)}, "allowed_token_ids: the regex says"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        replace(PLAIN, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logit_bias": {320: 1}}, "logit_bias: got id 320, expected 0 to 319"),
        ({"allowed_token_ids": (5, -1)}, "allowed_token_ids: got id -1"),
        ({"stop_token_ids": (1000,)}, "stop_token_ids: got id 1000"),
        ({"bad_words": ((1, 999),)}, "bad_words: got id 999"),
        ({"bad_words": ("x" * 40,)}, "bad_words: got one of"),
        ({"bad_words": tuple((1, i) for i in range(65))}, "bad_words: got more than 64"),
        ({"stop_token_ids": tuple(range(5, 25))}, "stop ids: got 21"),
        ({"allowed_token_ids": (2,), "min_tokens": 1}, "allowed_token_ids: got stop tokens only"),
    ],
)
def test_what_the_model_cannot_do_is_refused(make_llm: LLMFactory, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_llm().generate(["x"], params=replace(PLAIN, **fields))


def test_one_wish_for_all_prompts_or_one_for_each(make_llm: LLMFactory) -> None:
    llm = make_llm()
    with pytest.raises(PromptError, match="2 prompts and 1 sampling parameters"):
        llm.generate(["a", "b"], params=[PLAIN])
    with pytest.raises(ConfigError, match="n: got 2 samples to stream"):
        next(llm.stream("a", n=2))
    assert len(llm.generate(["a", "b"], params=replace(PLAIN, max_gen_len=2))) == 2


def test_other_ways_to_say_the_same() -> None:
    """vLLM's top_k of -1, JSON's ids as texts, lists for tuples, one text for several, None for nothing."""
    assert replace(PLAIN, top_k=-1) == PLAIN
    assert replace(PLAIN, logit_bias={"5": 1}) == replace(PLAIN, logit_bias={5: 1.0})
    assert replace(PLAIN, stop="x", allowed_token_ids=[1, 2]) == replace(PLAIN, stop=("x",), allowed_token_ids=(1, 2))
    assert replace(PLAIN, stop_token_ids=None, stop=None, bad_words=None) == PLAIN  # type: ignore[arg-type]
    assert replace(PLAIN, json_schema={"type": "null"}) == replace(PLAIN, json_schema='{"type": "null"}')


def test_a_checkpoint_wishes_are_defaults(make_llm: LLMFactory, caplog: pytest.LogCaptureFixture) -> None:
    """generation_config.json's top_k, min_p, typical_p and repetition_penalty count like its temperature; what is asked
    wins.
    """
    from llama.config import GenerationDefaults

    shared = make_llm()
    wishes = GenerationDefaults(temperature=0.5, top_k=9, min_p=0.1, typical_p=0.9, repetition_penalty=1.1)
    llm = LLaMA(shared.engine, shared.tokenizer, defaults=wishes)
    chosen = llm.sampling(SamplingParams(5), top_k=3, n=2)
    assert chosen == SamplingParams(5, 0.5, top_k=3, min_p=0.1, typical_p=0.9, repetition_penalty=1.1, n=2)
