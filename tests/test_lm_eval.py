"""lm-evaluation-harness: item by item as its own ``hf`` model, the traps of other adapters, and the command.

The oracle is lm-eval's HFLM on the same weights in Hugging Face's format. Tasks are small files; nothing reads the
network.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when these libraries are imported

import importlib
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import lm_eval.evaluator
import pytest
import torch
from checkpoint_files import TINY, random_weights, write_meta
from commands import Outcome, Run, finished, process, refused, refused_at_once
from hf_files import write_hugging_face
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval_tasks import TASKS, write_task, write_tasks

from llama import EngineConfig, Tokenizer, load_tokenizer
from llama.cli.evaluate import _save
from llama.config import DEMO_DIR
from llama.errors import ChatError, ConfigError, FlagError, InterruptedRunError, LibraryError, PromptError
from llama.integrations.lm_eval import LlamaXLA
from llama.scoring import Score

TOLERANCE = 1e-4  # of an item's log-likelihood
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m.content | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NO_TEXT = [0, *range(3, 259)]  # of the fixture's tokenizer: the unknown token, and bytes
BAR = re.compile(r"[^\n]*it/s\]\n")
SHAPES = {  # few programs, because compiling is most of the time
    "demo": EngineConfig(max_batch_size=4, max_seq_len=512, buckets=(64, 8, 1)),
    "random-hf": EngineConfig(max_batch_size=4, max_seq_len=384, buckets=(64, 8, 1)),
    "random": EngineConfig(max_batch_size=2, max_seq_len=64, buckets=(64, 8, 1)),  # shorter than most contexts
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No description of the machine, which takes seconds, and no log or bar that outlives a test."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: "")
    logger = logging.getLogger("lm_eval")
    kept = logger.handlers, logger.propagate, logger.level
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    logger.handlers, logger.propagate = kept[:2]
    logger.setLevel(kept[2])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


# --- item by item as hf


class Models(NamedTuple):
    """The same weights in ours and in lm-eval's own adapter."""

    ours: LlamaXLA
    hf: Any


def hf_model(directory: Path, max_length: int, **options: Any) -> Any:
    """lm-eval's ``hf`` on a directory in Hugging Face's format.

    It adds up in float64: in float32, its default, the sum of a text of 1400 nats is wrong by 1e-4.
    """
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=4,
        device="cpu",
        softmax_dtype="float64",
        **options,
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> dict[str, Path]:
    """The demo model and a random one, each in Meta's format and, with ``-hf``, in Hugging Face's; the latter have a
    chat template.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    args = replace(TINY, vocab_size=320)
    weights = {name: 3 * t if t.dim() > 1 else t for name, t in random_weights(args).items()}  # logits that differ
    weights["output.weight"][NO_TEXT] = 0  # unlikely, because libraries write what is no character differently
    found = {"demo": DEMO_DIR, "random": write_meta(root / "random", args, [weights])}
    (found["random"] / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    for name, directory in list(found.items()):
        found[f"{name}-hf"] = write_hugging_face(directory, root / f"{name}-hf", 512, chat_template=TEMPLATE)
    return found


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> Callable[[str], Models]:
    made: dict[str, Models] = {}

    def build(name: str) -> Models:
        if name not in made:
            ours = LlamaXLA.build(checkpoints[name], config=SHAPES[name], progress=False)
            hf = hf_model(checkpoints[f"{name.removesuffix('-hf')}-hf"], ours.max_length)
            made[name] = Models(ours, hf)
        return made[name]

    return build


def evaluated(model: Any, tasks: Path, names: Sequence[str] = tuple(TASKS), **options: Any) -> dict[str, Any]:
    """lm-eval's results."""
    index = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=model, tasks=list(names), task_manager=index, bootstrap_iters=0, **options)
    assert found is not None
    return dict(found)


def assert_same_items(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The same questions, answered alike; returns the largest difference of a log-likelihood."""
    largest = 0.0
    assert ours["samples"].keys() == theirs["samples"].keys()
    for task, samples in ours["samples"].items():
        assert len(samples) == len(theirs["samples"][task])
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            assert mine["doc_hash"] == other["doc_hash"]
            for (answer,), (expected,) in zip(mine["resps"], other["resps"], strict=True):
                if isinstance(answer, str):
                    assert answer == expected
                    continue
                pair = answer if isinstance(answer, tuple) else (answer, None), expected
                (logprob, greedy), found = pair[0], expected if isinstance(expected, tuple) else (expected, None)
                assert greedy == found[1], (task, mine["arguments"])
                largest = max(largest, abs(logprob - found[0]))
    assert largest < TOLERANCE
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            exact = not isinstance(value, float) or "perplexity" in name
            assert exact or ours["results"][task][name] == value, (task, name)
    return largest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_fewshot"), [("demo", 0), ("demo", 2), ("random-hf", 1), ("random", 3)], ids=lambda value: str(value)
)
def test_items_are_those_of_hf(models: Callable[[str], Models], tasks: Path, name: str, num_fewshot: int) -> None:
    """Every output type: log-likelihoods within the tolerance, equal choices of greedy decoding, equal texts, equal
    accuracies, in the order of the documents. Contexts that are too long are cut from the left, texts go on in windows.
    """
    pair = models(name)
    ours, theirs = (evaluated(model, tasks, num_fewshot=num_fewshot) for model in pair)
    assert_same_items(ours, theirs)
    if (name, num_fewshot) == ("demo", 0):  # the comparison is not of things that are all alike
        answers = {resp[0] for sample in ours["samples"]["tiny_answer"] for resp in sample["resps"]}
        greedy = {resp[0][1] for sample in ours["samples"]["tiny_word"] for resp in sample["resps"]}
        assert len(answers) > 2
        assert greedy == {True, False}
    assert ours["config"]["model"] == "LlamaXLA"
    assert ours["config"]["model_num_parameters"] == theirs["config"]["model_num_parameters"]
    assert ours["config"]["model_dtype"] == "torch.float32"
    assert (ours["max_length"], ours["eot_token_id"]) == (theirs["max_length"], theirs["eot_token_id"])
    assert ours["tokenizer_bos_token"] == theirs["tokenizer_bos_token"]


@pytest.mark.slow
@pytest.mark.parametrize("multiturn", [True, False])
def test_chats_are_those_of_hf(models: Callable[[str], Models], tasks: Path, multiturn: bool) -> None:
    """The checkpoint's template gives the prompts that transformers renders, and BOS comes once."""
    options = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": "Be brief."}
    names = ("tiny_choice", "tiny_answer")
    ours, theirs = (evaluated(model, tasks, names, num_fewshot=2, **options) for model in models("random-hf"))
    assert_same_items(ours, theirs)
    prompt = ours["samples"]["tiny_choice"][0]["arguments"][0][0]
    assert prompt.startswith("<s>[system] Be brief.\n[user]")
    assert models("random-hf").ours.tok_encode(prompt).count(1) == 1


@pytest.mark.slow
def test_without_bos_as_hf(models: Callable[[str], Models], checkpoints: dict[str, Path], tasks: Path) -> None:
    """``add_bos_token=False`` leaves BOS out of contexts, and scores a whole text after one BOS only."""
    ours = LlamaXLA(models("random-hf").ours.llm, add_bos_token=False, progress=False)
    theirs = hf_model(checkpoints["random-hf"], ours.max_length, add_bos_token=False)
    names = ("tiny_choice", "tiny_story", "tiny_answer")
    assert_same_items(*(evaluated(model, tasks, names) for model in (ours, theirs)))


@pytest.mark.slow
def test_a_cache_of_answers(models: Callable[[str], Models], tasks: Path, tmp_path: Path) -> None:
    """What lm-eval keeps of one run answers the next one, in this version's form of each request."""
    ours = models("random-hf").ours
    first = evaluated(ours, tasks, use_cache=str(tmp_path / "kept"))
    nobody = LlamaXLA(Listening(load_tokenizer(DEMO_DIR / "tokenizer.model")))  # type: ignore[arg-type]  # asks nothing
    again = evaluated(nobody, tasks, use_cache=str(tmp_path / "kept"))
    assert nobody.llm.asked == []  # type: ignore[attr-defined]
    assert_same_items(again, first)


# --- what is asked of the engine


class Listening:
    """Stands for a LLaMA: notes what it is asked, and answers the last pair first."""

    def __init__(self, tokenizer: Tokenizer, longest: int = 41, directory: Path = DEMO_DIR) -> None:
        self.tokenizer, self.longest_scored, self.directory = tokenizer, longest, directory
        self.config = EngineConfig(max_batch_size=2, max_seq_len=longest - 1)
        self.engine = SimpleNamespace(runner=None)
        self.asked: list[Any] = []
        self.answers: int | None = None

    def score_each(self, contexts: Any, continuations: Any, *, too_long: str) -> Iterator[Score]:
        assert too_long == "truncate"
        self.asked = list(zip(map(list, contexts), map(list, continuations), strict=True))
        for index in reversed(range(len(self.asked))[: self.answers]):
            ids = tuple(self.asked[index][1])
            yield Score(index, -float(sum(ids)), index % 2 == 0, ids, tuple(-float(i) for i in ids), 1, 0, 0)

    def pieces(self, prompts: Any, params: Any, *, stop_ids: Any = ()) -> Iterator[Any]:
        self.asked = list(zip(prompts, params, strict=True))
        self.stop_ids = stop_ids
        for index in reversed(range(len(prompts))):
            ids = self.tokenizer.encode("one two. three", bos=False)
            result = SimpleNamespace(index=index, token_ids=ids, finish_reason="stop")
            yield SimpleNamespace(result=None)
            yield SimpleNamespace(result=result)


class Hook:
    """Notes what lm-eval would keep."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.kept.append((kind, request, answer))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_DIR / "tokenizer.model")


def listening(tokenizer: Tokenizer, **options: Any) -> tuple[LlamaXLA, Listening, Hook]:
    llm, hook = Listening(tokenizer, **{k: options.pop(k) for k in ("longest", "directory") if k in options}), Hook()
    model = LlamaXLA(llm, progress=False, **options)  # type: ignore[arg-type]
    model.set_cache_hook(hook)
    return model, llm, hook


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    """Requests as either version of lm-eval makes them."""
    made = []
    for index, each in enumerate(arguments):
        named: dict[str, Any] = {"task_name": "t", "doc_id": index, "metadata": ("t", index, 1)}
        made.append(Instance(request_type=kind, doc={}, arguments=each, idx=0, **named))  # type: ignore[arg-type]
    return made


def test_pairs_are_encoded_by_lm_eval_s_rules(tokenizer: Tokenizer) -> None:
    """BOS once, also before a text that begins with it; spaces move to the continuation; no context is BOS."""
    model, llm, _ = listening(tokenizer)
    pairs = [
        ("The cat", " ran"),
        ("The cat ", "ran"),
        ("<s>The cat", " ran"),
        ("", "The cat"),
        ("  ", "ran"),
        ("", "<s> a"),
    ]
    model.loglikelihood(requests("loglikelihood", *pairs))
    whole, cat = tokenizer.encode("The cat ran"), tokenizer.encode("The cat")
    assert llm.asked[0] == llm.asked[1] == llm.asked[2] == (cat, whole[len(cat) :])
    assert llm.asked[3] == ([1], cat[1:])
    assert llm.asked[4] == ([1], tokenizer.encode("  ran", bos=False))
    assert llm.asked[5] == ([1], tokenizer.encode(" a", bos=False))
    bare, llm, _ = listening(tokenizer, add_bos_token=False)
    bare.loglikelihood(requests("loglikelihood", *pairs))
    assert llm.asked[0] == (cat[1:], whole[len(cat) :])
    assert llm.asked[4] == ([1], tokenizer.encode("  ran", bos=False))  # a context must have a token


def test_answers_come_back_in_order_and_are_kept_as_they_come(tokenizer: Tokenizer) -> None:
    """The engine answers in its own order. Requests that are equal are asked, and answered, each."""
    model, llm, hook = listening(tokenizer)
    pairs = [("a", " b"), ("c", " d e"), ("a", " b"), ("", "f")]
    answers = model.loglikelihood(requests("loglikelihood", *pairs))
    assert answers == [(-float(sum(ids)), i % 2 == 0) for i, (_, ids) in enumerate(llm.asked)]
    assert hook.kept == [
        ("loglikelihood", pair, answer) for pair, answer in list(zip(pairs, answers, strict=True))[::-1]
    ]
    assert model.loglikelihood([]) == model.generate_until([]) == model.loglikelihood_rolling([]) == []


@pytest.mark.parametrize("is_new", [False, True], ids=["0.4", "0.5"])
def test_whole_texts_are_scored_once_in_windows(tokenizer: Tokenizer, is_new: bool) -> None:
    """Each token once, the first after BOS, in the form that either version asks for and expects."""
    model, llm, hook = listening(tokenizer, longest=8, add_bos_token=False)
    texts = ["The old sailor sat by the harbour.", "", "A"]
    asked = [("", text) if is_new else (text,) for text in texts]
    answers = model.loglikelihood_rolling(requests("loglikelihood_rolling", *asked))
    ids = [tokenizer.encode(text, bos=False) if text else [] for text in texts]
    assert [i for _, scored in llm.asked for i in scored] == [*ids[0], *ids[2]]
    assert all(len(context) + len(scored) <= 8 for context, scored in llm.asked)
    assert llm.asked[0][0] == llm.asked[-1][0] == [1]
    sums = [-float(sum(each)) for each in ids]
    assert answers == ([(each, False) for each in sums] if is_new else sums)
    assert sorted(hook.kept) == sorted(
        ("loglikelihood_rolling", asked[i], (sums[i], False) if is_new else sums[i]) for i in (0, 2)
    )


def test_a_whole_text_follows_hf_in_scoring_bos(tokenizer: Tokenizer) -> None:
    """hf scores what its tokenizer returns, BOS included, after BOS."""
    model, llm, _ = listening(tokenizer)
    model.loglikelihood_rolling(requests("loglikelihood_rolling", ("The cat",)))
    assert llm.asked == [([1], tokenizer.encode("The cat"))]


@pytest.mark.parametrize(
    ("pair", "options", "words"),
    [
        (
            ("a", " b" * 41),
            {},
            ["request 1: its continuation has 41 tokens, expected 1 to 40; max_seq_len 41 at least"],
        ),
        (("a", ""), {}, ["request 1 of t: got an empty continuation"]),
        (("", "<s>"), {}, ["request 1: its continuation has 0 tokens, expected 1 to 40"]),
        (
            ("a" * 60, " b"),
            {"too_long": "refuse"},
            ["request 1 does not fit: ", "at most 41 together", "too_long truncate"],
        ),
    ],
    ids=["long", "empty", "bos", "refused"],
)
def test_what_cannot_be_scored_is_refused(
    tokenizer: Tokenizer, pair: tuple[str, str], options: dict[str, Any], words: list[str]
) -> None:
    """Before anything is run, by the request's place; hf ends in an assertion, or scores something else."""
    model, llm, _ = listening(tokenizer, **options)
    with pytest.raises(PromptError) as caught:
        model.loglikelihood(requests("loglikelihood", ("a", " b"), pair))
    assert all(word in str(caught.value) for word in words), caught.value
    assert llm.asked == []


def test_an_interrupt_is_no_answer(tokenizer: Tokenizer) -> None:
    """Requests that the engine has not answered get no made-up score."""
    model, llm, hook = listening(tokenizer)
    llm.answers = 1
    with pytest.raises(InterruptedRunError, match="interrupted after 1 of 2 requests"):
        model.loglikelihood(requests("loglikelihood", ("a", " b"), ("a", " c")))
    assert len(hook.kept) == 1


# --- answers


def test_a_text_ends_where_lm_eval_cuts_it(tokenizer: Tokenizer) -> None:
    """Before the first stop string, without the space of its first word, in the order of the requests."""
    model, llm, hook = listening(tokenizer)
    asked = [
        ("a", {"until": until, "max_gen_toks": 4}) for until in (["."], [], None, "two", [" ", "x"], ["", "three"])
    ]
    answers = model.generate_until(requests("generate_until", *asked))
    assert answers == ["one two", "one two. three", "one two. three", "one ", "one", "one two. "]
    assert [kept[:2] for kept in hook.kept] == [("generate_until", each) for each in asked[::-1]]
    prompts, params = zip(*llm.asked, strict=True)
    assert set(map(tuple, prompts)) == {tuple(tokenizer.encode("a"))}
    assert [each.stop for each in params] == [
        (".", "</s>"),
        ("</s>",),
        ("</s>",),
        ("two", "</s>"),
        ("x", "</s>"),
        ("three", "</s>"),
    ]
    assert all((each.max_gen_len, each.temperature, each.top_p) == (4, 0.0, 1.0) for each in params)


def test_settings_of_answers(tokenizer: Tokenizer) -> None:
    """lm-eval's defaults and other names; temperature counts unless sampling is off."""
    model, *_ = listening(tokenizer, longest=400)
    assert model.wish({}, "t").params.max_gen_len == 256
    assert model.wish({"max_new_tokens": 7}, "t").params.max_gen_len == 7
    assert model.wish({"max_tokens": "8"}, "t").params.max_gen_len == 8
    assert model.wish({"temperature": 0.5}, "t").params.temperature == 0.5
    assert model.wish({"temperature": "0.5", "do_sample": True}, "t").params.temperature == 0.5
    assert model.wish({"temperature": 0.5, "do_sample": False}, "t").params.temperature == 0
    assert model.wish({"do_sample": True}, "t").params.temperature == 0
    sampled = {"do_sample": True, "temperature": 1, "top_k": 3, "top_p": 0.5, "min_new_tokens": 2, "num_beams": 1}
    params = model.wish(sampled, "t").params
    assert (params.top_k, params.top_p, params.min_tokens) == (3, 0.5, 2)
    torch.manual_seed(5)
    seeds = [model.wish(sampled, "t").params.seed for _ in range(3)]
    torch.manual_seed(5)
    assert seeds == [model.wish(sampled, "t").params.seed for _ in range(3)]
    assert len(set(seeds)) == 3
    assert model.wish({**sampled, "seed": 4}, "t").params.seed == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_of": 2, "top_q": 1}, "generation_kwargs of t: got best_of, top_q, which llama-xla does not know"),
        ({"max_length": 9}, "got max_length, .* expected some of until, max_gen_toks"),
        ({"num_beams": 4}, "got num_beams=4, which"),
        ({"max_gen_toks": 40}, "got max_gen_toks 40, expected 1 to 39; .* max_seq_len 41 at least"),
        ({"max_gen_toks": 0}, "got max_gen_toks 0, expected 1 to 39"),
        ({"max_gen_toks": 4, "until": [3]}, r"until of t: got \[3\], expected texts"),
        ({"max_gen_toks": 4, "top_p": 2}, "top_p: got 2, expected a number above 0 and at most 1"),
    ],
)
def test_settings_that_are_refused(tokenizer: Tokenizer, settings: dict[str, Any], message: str) -> None:
    """By name, and never dropped in silence."""
    model, *_ = listening(tokenizer)
    with pytest.raises(ConfigError, match=message):
        model.wish(settings, "t")


def test_contexts_of_answers_are_cut_from_the_left(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """The question's end is kept, as many tokens as leave room for the answer; the log says how many were cut."""
    model, llm, _ = listening(tokenizer)
    text = "The old sailor sat by the harbour. " * 6
    with caplog.at_level(logging.WARNING, "llama"):
        model.generate_until(requests("generate_until", (text, {"max_gen_toks": 30}), ("a", {"max_gen_toks": 30})))
    assert llm.asked[0][0] == tokenizer.encode(text)[-10:]
    assert "Cut 1 of 2 contexts from the left" in caplog.text
    strict, llm, _ = listening(tokenizer, too_long="refuse")
    with pytest.raises(PromptError, match=r"request 0 does not fit: .* max_gen_toks 30, expected at most 40"):
        strict.generate_until(requests("generate_until", (text, {"max_gen_toks": 30})))
    assert llm.asked == []


@pytest.mark.parametrize(("option", "value"), [("too_long", "skip"), ("max_gen_toks", 0)])
def test_options_are_checked(tokenizer: Tokenizer, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option}: got "):
        listening(tokenizer, **{option: value})


# --- chat


def test_chat_formats_for_lm_eval(tokenizer: Tokenizer, checkpoints: dict[str, Path]) -> None:
    """A template of the checkpoint's own comes first; a name, a description and stop tokens go with it."""
    dialog: Any = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    plain, llm, _ = listening(tokenizer)
    assert plain.apply_chat_template(dialog) == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]"
    assert plain.chat_template(True) == "llama2"
    assert plain.chat_template(False) is None
    plain.generate_until(requests("generate_until", ("a", {"max_gen_toks": 4})))
    assert llm.stop_ids == (2,)
    own, *_ = listening(tokenizer, directory=checkpoints["random-hf"])
    assert own.apply_chat_template(dialog) == "<s>[system] S\n[user] Q\n[assistant]"
    assert own.apply_chat_template([*dialog, {"role": "assistant", "content": "It is "}], False).endswith(
        "[assistant] It is"
    )
    assert own.chat_template(True) == TEMPLATE
    names = {
        plain.tokenizer_name,
        own.tokenizer_name,
        listening(tokenizer, chat_format="llama2", directory=checkpoints["random-hf"])[0].tokenizer_name,
    }
    assert len(names) == 3
    assert all("/" not in name for name in names)
    with pytest.raises(ChatError, match="chat format: got 'other'"):
        plain.chat_template("other")


def test_a_format_without_system_messages(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As hf: what a template refuses is asked without them, which is said once."""
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    model, *_ = listening(tokenizer, directory=tmp_path)
    dialog: Any = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    with caplog.at_level(logging.WARNING, "llama"):
        assert [model.apply_chat_template(dialog) for _ in range(2)] == ["Q", "Q"]
    assert caplog.text.count("Left out system messages") == 1
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('nothing') }}")
    model, *_ = listening(tokenizer, directory=tmp_path)
    with pytest.raises(ChatError, match="nothing"):
        model.apply_chat_template(dialog[1:])


# --- the library is not there


def test_a_missing_lm_eval_is_named(monkeypatch: pytest.MonkeyPatch, run: Run, tasks: Path) -> None:
    """An error of ours that says what to install, and an ImportError; the command shows it before it loads anything."""
    monkeypatch.delitem(sys.modules, "llama.integrations.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(LibraryError, match=r"needs lm-eval: pip install -e \.\[eval\]"):
        importlib.import_module("llama.integrations.lm_eval")
    assert issubclass(LibraryError, ImportError)
    refused_at_once(run("eval", "--tasks", "tiny_choice", "--include_path", str(tasks)), "pip install -e .[eval]")


# --- the command


@pytest.fixture
def command(run: Run, tasks: Path) -> Run:
    """``command("--tasks", "tiny_choice")``: the command in this process, on the demo model."""

    def call(*given: str) -> Outcome:
        outcome = run("eval", *given, "--include_path", str(tasks), "--bootstrap_iters", "0")
        return outcome._replace(err=BAR.sub("", outcome.err))  # tqdm has been imported before it could be switched off

    return call


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_lm_eval_s_files(command: Run, tmp_path: Path) -> None:
    """stdout is lm-eval's table; results and samples are where its users look for them."""
    where = tmp_path / "out"
    outcome = command("--tasks", "tiny_choice,tiny_story", "--limit", "4", "--output_path", str(where), "--log_samples")
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    rows = [line.split("|")[1].strip() for line in outcome.out.splitlines()]
    assert rows == ["Tasks", "-" * 11, "tiny_choice", "", "tiny_story", ""]
    (results,) = where.rglob("results_*.json")
    assert results.parent.name == "llama-xla-demo"
    found = json.loads(results.read_text())
    assert found["n-samples"]["tiny_choice"] == {"original": 8, "effective": 4}
    assert found["config"]["model_args"]["pretrained"] == "llama-xla-demo"
    (samples,) = where.rglob("samples_tiny_choice_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3]
    assert {"arguments", "resps", "filtered_resps", "target", "acc"} <= lines[0].keys()


def test_results_that_could_not_be_written(tmp_path: Path) -> None:
    """lm-eval only logs that; the command has printed its table by then."""
    silent = SimpleNamespace(
        output_path=str(tmp_path), save_results_aggregated=lambda **_: None, save_results_samples=lambda **_: None
    )
    with pytest.raises(FlagError, match=r"--output_path .* not all results could be written there"):
        _save(silent, {}, {"t": []})  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_prints_one_object(command: Run) -> None:
    """--json: lm-eval's results and nothing else; examples are chosen by the seed, --gen_kwargs reaches the tasks."""
    flags = ["--tasks", "tiny_answer", "--json", "--quiet", "--num_fewshot", "1", "--seed", "3"]
    outcome = command(*flags, "--gen_kwargs", "max_gen_toks=3,until=none,do_sample=True,temperature=0.5")
    assert (outcome.code, outcome.err) == (0, "")
    (found,) = outcome.objects
    assert found["n-shot"] == {"tiny_answer": 1}
    assert (found["config"]["fewshot_seed"], found["config"]["torch_seed"]) == (3, 3)
    assert found["configs"]["tiny_answer"]["generation_kwargs"]["max_gen_toks"] == 3
    assert 0 <= found["results"]["tiny_answer"]["exact_match,none"] <= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tasks ,", ["--tasks", "no name"]),
        ("--tasks t --limit 0", ["--limit", "0", "above 0"]),
        ("--tasks t --limit nan", ["--limit", "nan"]),
        ("--tasks t --num_fewshot -1", ["--num_fewshot", "-1"]),
        ("--tasks t --max_gen_toks 0", ["--max_gen_toks", "0", "1 or more"]),
        ("--tasks t --bootstrap_iters -1", ["--bootstrap_iters", "-1"]),
        ("--tasks t --log_samples", ["--log_samples", "--output_path"]),
        ("--tasks t --chat_format llama2", ["--chat_format", "--apply_chat_template"]),
        ("--tasks t --apply_chat_template --chat_format template", ["has no chat template"]),
        ("--tasks t --too_long skip", ["--too_long", "'skip'", "truncate, refuse"]),
        ("--tasks t --gen_kwargs a", ["--gen_kwargs", "name=value"]),
        ('--tasks t --gen_kwargs {"a', ["--gen_kwargs", "not JSON"]),
        ("--tasks t --include_path nowhere", ["--include_path nowhere", "no such directory"]),
        ("--tasks t --output_path setup.py/x", ["--output_path setup.py/x", "Not a directory"]),
        ("--tasks t --max_batch_size 0", ["--max_batch_size", "0", "at least 1"]),
        ("--limit 3", ["--tasks is needed"]),
        ("--taks t", ["--taks", "did you mean --tasks?"]),
    ],
)
def test_flags_are_checked_before_anything_is_loaded(run: Run, flags: str, words: list[str]) -> None:
    refused_at_once(run("eval", *flags.split()), *words)


def test_tasks_that_cannot_be_loaded(command: Run, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, with what is wrong, before the weights are loaded; without a traceback."""
    documents, config = TASKS["tiny_choice"]
    write_task(tmp_path, "good", documents, **config)
    write_task(tmp_path, "gone", documents, **config)
    (tmp_path / "gone.jsonl").unlink()
    write_task(tmp_path, "nothing", [], **config)
    write_task(tmp_path, "split", documents, **{**config, "test_split": "validation"})
    (tmp_path / "broken.yaml").write_text("task: broken\n  a: [1\n")
    place = ["--include_path", str(tmp_path)]
    refused_at_once(run("eval", "--tasks", "good,gone", *place), "cannot load gone: FileNotFoundError", "--verbose")
    refused_at_once(run("eval", "--tasks", "good,nothing", *place), "cannot load nothing", "no documents")
    refused_at_once(run("eval", "--tasks", "split", *place), "cannot load split", "validation")
    outcome = run("eval", "--tasks", "gone", *place, "--verbose")
    assert outcome.code == 2
    assert "Traceback" in outcome.err

    from lm_eval.tasks import TaskManager

    everything = TaskManager.__init__
    monkeypatch.setattr(  # lm-eval's own tasks take 10 s to read
        TaskManager, "__init__", lambda self, **options: everything(self, **{**options, "include_defaults": False})
    )
    reading = "Reading the index of lm-eval's tasks"
    for task, words in (
        ("god", ["got 'god'", "did you mean good?"]),
        ("broken", ["got 'broken'", "left out of --include_path", "broken.yaml", "mapping values"]),
        ("zzz.yaml", ["--tasks zzz.yaml: no such file"]),
    ):
        outcome = run("eval", "--tasks", task, *place)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(reading)
        assert all(word in outcome.message for word in words), outcome.message


@pytest.mark.slow
def test_tasks_that_cannot_be_asked(run: Run, tmp_path: Path) -> None:
    """Settings are checked before the first question; what is found later is one line, too."""
    documents, config = TASKS["tiny_answer"]
    settings = {"generation_kwargs": {"num_beams": 4}}
    write_task(tmp_path, "beams", documents, **{**config, **settings})
    documents, config = TASKS["tiny_word"]
    write_task(tmp_path, "long", [{"context": "a", "word": " the cat" * 400}], **config)
    for task, words in (("beams", ["generation_kwargs of beams: got num_beams=4"]), ("long", ["--max_seq_len"])):
        outcome = run("eval", "--tasks", task, "--include_path", str(tmp_path), "--quiet")
        refused(outcome._replace(err=BAR.sub("", outcome.err)), *words)


@pytest.mark.slow
def test_ctrl_c_ends_an_evaluation(tasks: Path, tmp_path: Path) -> None:
    """With 130 and one line, while requests are answered; nothing is printed as if it were a result."""
    documents, config = TASKS["tiny_choice"]
    many = [{**each, "question": f"{i} {each['question'] * 3}"} for i in range(60) for each in documents]
    write_task(tmp_path, "many", many, **config)
    arguments = ["-m", "llama.cli", "eval", "--tasks", "many", "--include_path", str(tmp_path)]
    with process(arguments) as running:
        assert running.stderr is not None
        line = ""
        while "Running loglikelihood" not in line:
            line += running.stderr.read(1)
        time.sleep(1)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err.rstrip().endswith("llama-xla: interrupted")
    assert "Traceback" not in err


def test_help_imports_no_library() -> None:
    """Neither lm-eval nor torch: the help comes at once."""
    code = "import sys; from llama.cli import main\ntry: main(['eval', '--help'])\nexcept SystemExit: pass\n"
    outcome = finished(["-c", code + "print([n for n in ('lm_eval', 'torch', 'datasets') if n in sys.modules])"])
    assert outcome.out.rstrip().endswith("[]")
