"""Calls from Python with arguments of another type: one of our errors that names the argument, never a TypeError from
within; and what looks odd but is right.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import fake_llm

from llama import EngineConfig, LLaMA, SamplingParams
from llama.config import DEMO_DIR
from llama.errors import ChatError, ConfigError, LLaMAError, PromptError

USER = {"role": "user", "content": "hi"}
FEW = {"max_gen_len": 2, "seed": 1}


@pytest.fixture(scope="module")
def llm() -> LLaMA:
    return fake_llm(DEMO_DIR / "tokenizer.model")


def generated(llm: LLaMA, prompts: Any, **controls: Any) -> list[str]:
    return [result.generation for result in llm.generate(prompts, **{**FEW, **controls})]


Call = Callable[[LLaMA], object]
PROMPTS: list[tuple[Call, type[LLaMAError], str]] = [
    (lambda llm: llm.generate(None), PromptError, "prompts: got NoneType"),
    (lambda llm: llm.generate(b"a"), PromptError, "prompts: got the bytes b'a'"),
    (lambda llm: llm.generate(True), PromptError, "prompts: got the bool True"),
    (lambda llm: llm.generate(3), PromptError, "prompts: got the int 3"),
    (lambda llm: llm.generate({"a": 1}), PromptError, "prompts: got the dict"),
    (lambda llm: llm.generate({"a"}), PromptError, "prompts: got the set"),
    (lambda llm: llm.generate(Path("a")), PromptError, "prompts: got the PosixPath"),
    (lambda llm: llm.generate([5, 6]), PromptError, r"prompt 0: got the int 5, .* is written \[\[1, 2\]\]"),
    (lambda llm: llm.generate(np.array([5, 6])), PromptError, r"prompt 0: got .*\[\[1, 2\]\]"),
    (lambda llm: llm.generate(["a", None]), PromptError, "prompt 1: got NoneType"),
    (lambda llm: llm.generate([b"a"]), PromptError, "prompt 0: got the bytes"),
    (lambda llm: llm.generate([{"a": 1}]), PromptError, "prompt 0: got the dict"),
    (lambda llm: llm.generate([["a"]]), PromptError, "prompt 0: got the str 'a' among its ids, .*brackets"),
    (lambda llm: llm.generate([[True]]), PromptError, "prompt 0: got the bool True among its ids"),
    (lambda llm: llm.generate([[1.5]]), PromptError, "prompt 0: got the float 1.5 among its ids"),
    (lambda llm: llm.generate([np.array([1.5])]), PromptError, "prompt 0: got the float 1.5 among its ids"),
    (lambda llm: llm.generate([np.array([[1]])]), PromptError, "prompt 0: got an array of 2 dimensions"),
    (lambda llm: llm.generate([[np.array([1, 2])]]), PromptError, "prompt 0: got .* among its ids"),
    (lambda llm: llm.generate([[-1]]), PromptError, "prompt 0: got id -1"),
    (lambda llm: llm.generate([[2**70]]), PromptError, "prompt 0: got id"),
    (lambda llm: llm.generate([[]]), PromptError, "prompt 0: got no ids"),
    (lambda llm: llm.generate([np.array([], dtype=int)]), PromptError, "prompt 0: got no ids"),
    (lambda llm: llm.generate(["\ud800"]), PromptError, "prompt 0 is not valid Unicode"),
    (lambda llm: list(llm.stream(None)), PromptError, "prompt 0: got NoneType"),
    (lambda llm: list(llm.stream(["a"])), PromptError, "prompt 0: got the str 'a' among its ids"),
    (lambda llm: list(llm.stream(b"a")), PromptError, "prompt 0: got the bytes"),
    (lambda llm: list(llm.pieces("ab", [SamplingParams(2)] * 2)), PromptError, "prompts: got one text"),
    (lambda llm: llm.score("a", [" b c"]), PromptError, r"contexts: got one text, .*\['a'\]"),
    (lambda llm: llm.score(["a"], " b c"), PromptError, "continuations: got one text"),
    (lambda llm: llm.score(None, [" b c"]), PromptError, "contexts: got NoneType"),
    (lambda llm: llm.score(["a"], None), PromptError, "continuations: got NoneType"),
    (lambda llm: llm.score([1], [" b c"]), PromptError, "context 0: got the int 1"),
    (lambda llm: llm.score(["a"], [b"b"]), PromptError, "continuation 0: got the bytes"),
    (lambda llm: llm.score(["a"], []), PromptError, "got 1 contexts and 0 continuations"),
    (lambda llm: llm.rolling("ab"), PromptError, "texts: got one text"),
    (lambda llm: llm.rolling([None]), PromptError, "text 0: got NoneType"),
    (lambda llm: llm.rolling([["a"]]), PromptError, "text 0: got the str 'a' among its ids"),
    (lambda llm: llm.text_completion("ab"), PromptError, "prompts: got one text"),
    (lambda llm: llm.text_completion([[5]]), PromptError, "prompts 0: got the list"),
    (lambda llm: llm.text_completion(["\ud800"]), PromptError, "prompt 0 is not valid Unicode"),
    (lambda llm: llm.text_completion([None]), PromptError, "prompts 0: got NoneType"),
    (lambda llm: llm.chat_completion("ab"), ChatError, "dialogs: got the str"),
    (lambda llm: llm.chat_completion(USER), ChatError, "dialogs: got the dict"),
    (lambda llm: llm.chat_completion([USER]), ChatError, r"dialog 0: got a message, .*\[\[...\]\]"),
    (lambda llm: llm.chat_completion(["ab"]), ChatError, "dialog 0: got the str"),
    (lambda llm: llm.chat_completion([None]), ChatError, "dialog 0: got NoneType"),
    (lambda llm: llm.chat_completion([[None]]), ChatError, "message 0: got None"),
    (lambda llm: llm.chat_completion([[{"role": "user", "content": None}]]), ChatError, "message 0"),
    (lambda llm: llm.chat_completion([[{"role": 1, "content": "a"}]]), ChatError, "message 0"),
    (lambda llm: llm.chat_completion([[]]), ChatError, "got no messages"),
]
SETTINGS: list[tuple[Call, str]] = [
    (lambda llm: llm.generate("a", temprature=1), "temprature: no such control; did you mean temperature"),
    (lambda llm: llm.generate("a", x=1), "x: no such control; expected one of max_gen_len, "),
    (lambda llm: list(llm.stream("a", top=1)), "top: no such control"),
    (lambda llm: llm.sampling(temp=1), "temp: no such control"),
    (lambda llm: llm.sampling("x"), "otherwise: got the str 'x'"),
    (lambda llm: llm.generate("a", max_gen_len=None), "max_gen_len: got None"),
    (lambda llm: llm.generate("a", max_gen_len="2"), "max_gen_len: got the str '2', expected a whole number"),
    (lambda llm: llm.generate("a", max_gen_len=2.0), "max_gen_len: got the float"),
    (lambda llm: llm.generate("a", max_gen_len=True), "max_gen_len: got the bool"),
    (lambda llm: llm.generate("a", max_gen_len=np.array([1, 2])), "max_gen_len: got .*, expected a whole number"),
    (lambda llm: llm.generate("a", min_tokens=[1]), "min_tokens: got the list"),
    (lambda llm: llm.generate("a", seed="1"), "seed: got the str"),
    (lambda llm: llm.generate("a", n=None), "n: got None"),
    (lambda llm: llm.generate("a", best_of="2"), "best_of: got the str"),
    (lambda llm: llm.generate("a", temperature="0"), "temperature: got '0'"),
    (lambda llm: llm.generate("a", temperature=None), "temperature: got None"),
    (lambda llm: llm.generate("a", top_p=float("nan")), "top_p: got nan"),
    (lambda llm: llm.generate("a", stop=3), "stop: got the int 3"),
    (lambda llm: llm.generate("a", stop=b"a"), "stop: got the bytes"),
    (lambda llm: llm.generate("a", stop=[3]), "stop: got the int 3, .*stop_token_ids"),
    (lambda llm: llm.generate("a", bad_words=[3]), "bad_words: got the int 3"),
    (lambda llm: llm.generate("a", bad_words=[[None]]), "bad_words: got NoneType"),
    (lambda llm: llm.generate("a", stop_token_ids=["a"]), "stop_token_ids: got the str"),
    (lambda llm: llm.generate("a", stop_token_ids=3), "stop_token_ids: got the int"),
    (lambda llm: llm.generate("a", allowed_token_ids=[True]), "allowed_token_ids: got the bool"),
    (lambda llm: llm.generate("a", logit_bias=[1]), "logit_bias: got the list"),
    (lambda llm: llm.generate("a", logprobs="2"), "logprobs: got '2'"),
    (lambda llm: llm.generate("a", ignore_eos="x"), "ignore_eos: got the str"),
    (lambda llm: llm.generate("a", cache_salt=3), "cache_salt: got the int"),
    (lambda llm: llm.generate("a", regex=3), "regex: got the int"),
    (lambda llm: llm.generate("a", json_schema=[1]), "json_schema: got the list"),
    (lambda llm: llm.generate("a", json_schema={"a": {1}}), "json_schema: got what cannot be written as JSON"),
    (lambda llm: llm.generate("a", params=3), "params: got the int 3"),
    (lambda llm: llm.generate("a", params="x"), "params: got the str"),
    (lambda llm: llm.generate("a", params={"n": 1}), "params: got the dict"),
    (lambda llm: llm.generate("a", params=["x"]), "params: got the str 'x' for prompt 0, expected SamplingParams"),
    (lambda llm: llm.generate("a", params=SamplingParams(2), n=2), "n: got it beside params"),
    (lambda llm: list(llm.pieces(["a"], None)), "params: got NoneType"),
    (lambda llm: list(llm.pieces(["a"], [SamplingParams(2)], stop_ids=3)), "stop_token_ids: got the int"),
    (lambda llm: llm.score(["a"], [" b c"], too_long=[]), "too_long: got"),
    (lambda llm: llm.score(["a"], [" b c"], prefix_cache="x"), "prefix_cache: got the str"),
    (lambda llm: llm.score(["a"], [" b c"], cache_salt=3), "cache_salt: got the int"),
    (lambda llm: llm.text_completion(["a"], max_gen_len="2"), "max_gen_len: got the str"),
    (lambda llm: llm.text_completion(["a"], logprobs=3), "logprobs: got the int 3, expected True or False"),
    (lambda llm: llm.chat_completion([[USER]], max_gen_len=None, temperature=None), "temperature: got None"),
    (lambda llm: llm.chat_completion([[USER]], logprobs=1), "logprobs: got the int"),
]
BUILDS: list[tuple[dict[str, Any], str]] = [
    ({"ckpt_dir": 3}, "ckpt_dir: got the int 3, expected a path"),
    ({"ckpt_dir": True}, "ckpt_dir: got the bool"),
    ({"ckpt_dir": b"a"}, "ckpt_dir: got the bytes"),
    ({"ckpt_dir": ["a"]}, "ckpt_dir: got the list"),
    ({"ckpt_dir": "a\0b"}, "ckpt_dir: got .*which is no path"),
    ({"ckpt_dir": "a" * 5000}, "ckpt_dir: got 5000 characters"),
    ({"tokenizer_path": 3}, "tokenizer_path: got the int"),
    ({"tokenizer_path": "a\0b"}, "tokenizer_path: got .*which is no path"),
    ({"tokenizer": "tokenizer.json"}, "tokenizer: got the str .*expected Tokenizer"),
    ({"max_seq_len": "64"}, "max_seq_len: got the str '64', expected a whole number"),
    ({"max_seq_len": 64.0}, "max_seq_len: got the float"),
    ({"max_seq_len": 0}, "max_seq_len: got 0"),
    ({"max_batch_size": None}, "max_batch_size: got NoneType"),
    ({"max_batch_size": True}, "max_batch_size: got the bool"),
    ({"max_batch_size": -1}, "max_batch_size: got -1"),
    ({"config": {"max_seq_len": 64}}, "config: got the dict .*expected EngineConfig"),
    ({"random_weights": {"dim": 64}}, "random_weights: got the dict .*expected ModelArgs"),
    ({"random_weights": True}, "random_weights: got the bool"),
    ({"seed": "1"}, "seed: got the str"),
    ({"seed": None}, "seed: got NoneType"),
    ({"allow_nan": "no"}, "allow_nan: got the str"),
    ({"progress": 1}, "progress: got the int"),
    ({"startup": 1}, "startup: got the int"),
    ({"drafting": "lookup"}, "drafting: got the str .*expected DraftConfig or Drafter"),
    ({"config": EngineConfig(max_seq_len=64), "drafting": []}, "drafting: got the list"),
]


@pytest.mark.parametrize(("call", "kind", "says"), PROMPTS, ids=[says for *_, says in PROMPTS])
def test_what_is_no_prompt(llm: LLaMA, call: Call, kind: type[LLaMAError], says: str) -> None:
    with pytest.raises(kind, match=f"^{says}") as raised:
        call(llm)
    assert raised.type is kind
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(("call", "says"), SETTINGS, ids=[says for _, says in SETTINGS])
def test_what_is_no_setting(llm: LLaMA, call: Call, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        call(llm)


@pytest.mark.parametrize(("given", "says"), BUILDS, ids=[says for _, says in BUILDS])
def test_what_builds_no_model(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        LLaMA.build(**given)


def test_a_schema_that_holds_itself(llm: LLaMA) -> None:
    schema: dict[str, Any] = {}
    schema["properties"] = schema
    with pytest.raises(ConfigError, match="json_schema: got what cannot be written as JSON: Circular"):
        llm.generate("a", json_schema=schema)
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(ConfigError, match="json_schema: got a dict that is nested too deeply"):
        llm.generate("a", json_schema=deep)


@pytest.mark.parametrize(
    "ids",
    [
        (5, 6),
        range(5, 7),
        np.array([5, 6]),
        np.array([5, 6], dtype=np.uint16),
        [np.int64(5), np.int32(6)],
        torch.tensor([5, 6]),
        [torch.tensor(5), 6],
    ],
)
def test_ids_of_every_kind(llm: LLaMA, ids: Any) -> None:
    assert generated(llm, [ids]) == generated(llm, [[5, 6]])
    assert llm.score([ids], [ids]) == llm.score([[5, 6]], [[5, 6]])
    assert llm.rolling([ids]) == llm.rolling([[5, 6]])


def test_lists_of_every_kind(llm: LLaMA) -> None:
    expected = generated(llm, ["a", "b"])
    for prompts in (("a", "b"), (each for each in "ab"), np.array(["a", "b"])):
        assert generated(llm, prompts) == expected
    assert generated(llm, np.array([[5, 6], [7, 8]])) == generated(llm, [[5, 6], [7, 8]])
    assert generated(llm, "a") == generated(llm, ["a"])


def test_nothing_to_do(llm: LLaMA) -> None:
    assert llm.generate([]) == llm.score([], []) == llm.rolling([]) == llm.text_completion([]) == []
    assert llm.chat_completion([]) == []


def test_numbers_of_numpy(llm: LLaMA) -> None:
    """A seed of numpy's would overflow where samples are counted."""
    numbers: dict[str, Any] = {
        "max_gen_len": np.int64(3),
        "seed": np.int64(2**62),
        "n": np.int32(2),
        "temperature": np.float32(1),
        "stop_token_ids": np.array([5]),
    }
    plain = {"max_gen_len": 3, "seed": 2**62, "n": 2, "temperature": 1.0, "stop_token_ids": [5]}
    assert generated(llm, "a", **numbers) == generated(llm, "a", **plain)
