"""Conversations: what a turn adds, what the cache saves of it, what happens when it no longer fits; and the command
`llama-xla chat`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import TINY, random_weights, write_meta
from commands import Outcome, Run, refused, refused_at_once
from tokenizer_files import byte_level, write_ranks

from llama import EngineConfig, LLaMA, SamplingParams
from llama.chat import ChatFormat, Message, choose_format
from llama.conversation import Conversation
from llama.engine.sequence import common_prefix
from llama.errors import ChatError, ConfigError
from llama.generation import Generation

pytestmark = pytest.mark.slow

CHAT_ARGS = replace(TINY, vocab_size=768)
GREEDY = SamplingParams(10, 0.0, 1.0)
QUESTIONS = ("once upon a time", "and the dog ran home;", "was there a cat")
TURN_LINE = re.compile(r"\[(\d+) tokens kept, (\d+) new, (\d+) generated")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in Meta's format with a Llama 3 ranks file: its chat format is recognised by the tokenizer."""
    made = write_meta(tmp_path_factory.mktemp("chat") / "llama3", CHAT_ARGS, [random_weights(CHAT_ARGS)])
    write_ranks(byte_level(), made / "tokenizer.model")
    return made


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLaMA:
    return LLaMA.build(directory, config=EngineConfig(max_seq_len=256, buckets=(64, 8, 1)))


@pytest.fixture(scope="module")
def cold(directory: Path) -> LLaMA:
    """The same model with a cache of its own."""
    return LLaMA.build(directory, config=EngineConfig(max_seq_len=256, buckets=(64, 8, 1)))


@pytest.fixture
def chat_format(llm: LLaMA) -> ChatFormat:
    return choose_format(llm.tokenizer, llm.directory)


@pytest.fixture
def start(llm: LLaMA, chat_format: ChatFormat) -> Callable[..., Conversation]:
    """``start(system_prompt=...)``: a conversation that begins with an empty cache."""

    def make(**given: Any) -> Conversation:
        llm.generate([[5]], max_gen_len=1)  # no dialog begins so: the cache holds nothing of use
        llm.generate([[5]], max_gen_len=1)  # no dialog begins so: the cache holds nothing of use
        return Conversation(llm, chat_format, given.pop("params", GREEDY), **given)

    return make


def ended(conversation: Conversation, text: str) -> tuple[str, Generation]:
    """A whole turn: the answer as it was streamed, and its result."""
    streamed = "".join(conversation.say(text))
    assert conversation.result is not None
    return streamed, conversation.result


# --------------------------------------------------------------------------------------------------------------- a
# conversation


def test_every_turn_is_the_whole_dialog_and_the_cache_saves_its_beginning(
    start: Callable[..., Conversation], cold: LLaMA, chat_format: ChatFormat
) -> None:
    """Answers equal those of a model that runs each dialog from nothing; only what the cache does not hold is run."""
    conversation = start(system_prompt="It's a cat")
    dialog: list[Message] = [{"role": "system", "content": "It's a cat"}]
    held: list[int] = []
    for question in QUESTIONS:
        dialog.append({"role": "user", "content": question})
        prompt = chat_format.encode(dialog)
        (expected,) = cold.generate([prompt], params=[GREEDY])
        streamed, result = ended(conversation, question)
        assert (streamed, result.token_ids) == (expected.generation, expected.token_ids)
        assert result.prompt_tokens == len(prompt)
        shared = min(common_prefix(held, prompt), len(prompt) - 1)
        assert bool(held) <= result.cached_tokens <= shared  # a longer chunk may run some of it again
        assert not held or shared > len(held) - len(result.token_ids) - 2
        assert result.programs.runs <= expected.programs.runs
        dialog.append({"role": "assistant", "content": expected.generation.strip()})
        held = [*prompt, *result.token_ids[:-1]]
    assert conversation.messages == dialog


def test_undo_reset_and_system_change_the_dialog_and_nothing_stale_is_read(
    start: Callable[..., Conversation], cold: LLaMA, chat_format: ChatFormat
) -> None:
    """After each of them the next answer is that of the changed dialog."""

    def answer_is_right() -> None:
        dialog: list[Message] = [*conversation.messages, {"role": "user", "content": "and the cat"}]
        (expected,) = cold.generate([chat_format.encode(dialog)], params=[GREEDY])
        assert ended(conversation, "and the cat")[0] == expected.generation

    conversation = start()
    assert not conversation.undo()
    for question in QUESTIONS:
        ended(conversation, question)
    before = list(conversation.messages)
    assert conversation.undo()
    assert conversation.messages == before[:-2]
    answer_is_right()
    conversation.set_system("the dog")
    assert conversation.messages[0] == {"role": "system", "content": "the dog"}
    answer_is_right()
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "the dog"}]
    assert not conversation.undo()
    answer_is_right()
    conversation.set_system(None)
    assert conversation.messages[0]["role"] == "user"


def test_a_dialog_that_no_longer_fits_is_refused_and_stays_as_it_was(
    start: Callable[..., Conversation], chat_format: ChatFormat
) -> None:
    """The message says how many tokens, and what would help."""
    conversation = start(params=replace(GREEDY, max_gen_len=40))
    question = "once upon a time there was a dog " * 3
    while len(chat_format.encode([*conversation.messages, {"role": "user", "content": question}])) <= 256 - 16:
        ended(conversation, question)
    before = list(conversation.messages)
    assert len(before) >= 2
    with pytest.raises(
        ChatError,
        match=r"the dialog does not fit: \d+ tokens, and 16 for an answer, .* 256; "
        r"/undo .* on_overflow drop, or a larger max_seq_len$",
    ):
        ended(conversation, question)
    assert conversation.messages == before
    assert conversation.undo()


def test_the_oldest_turns_are_dropped_on_demand(
    start: Callable[..., Conversation], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As few as make room, never the system prompt, and the log says how many."""
    monkeypatch.setattr(logging.getLogger("llama"), "propagate", True)
    conversation = start(params=replace(GREEDY, max_gen_len=40), system_prompt="the cat", on_overflow="drop")
    for turn in range(6):
        ended(conversation, f"{turn} once upon a time there was a dog")
    assert conversation.messages[0] == {"role": "system", "content": "the cat"}
    assert conversation.messages[1]["content"][0] not in "01"
    assert conversation.messages[-2]["content"][0] == "5"
    assert re.search(r"Dropped the oldest (turn|[2-9] turns) to make room", caplog.text)


def test_a_message_that_can_never_fit_is_refused_also_where_turns_may_be_dropped(
    start: Callable[..., Conversation],
) -> None:
    """Dropping turns would not help, and does not happen."""
    conversation = start(on_overflow="drop")
    ended(conversation, "hello")
    before = list(conversation.messages)
    with pytest.raises(ChatError, match="the message alone does not fit"):
        ended(conversation, "dog " * 300)
    assert conversation.messages == before


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(start: Callable[..., Conversation]) -> None:
    """The reader closes the stream, as Ctrl-C's second press does; the dialog can go on."""
    conversation = start(params=replace(GREEDY, max_gen_len=60))
    pieces = conversation.say("once upon")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1]["content"] == first.strip()
    assert ended(conversation, "and then")[0]


def test_an_answer_takes_no_more_than_there_is_room_for(start: Callable[..., Conversation]) -> None:
    """max_gen_len is a wish: a long one is cut to the cache, not refused."""
    _, result = ended(start(params=SamplingParams(10_000, 1.0, 1.0, 3)), "dog " * 100)
    assert result.prompt_tokens + len(result.token_ids) <= 256


def test_save_writes_the_dialog_or_nothing(start: Callable[..., Conversation], tmp_path: Path) -> None:
    """A list of messages in JSON; a directory that is missing is named."""
    conversation = start(system_prompt="日本語")
    ended(conversation, "hello")
    conversation.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == conversation.messages
    with pytest.raises(ChatError, match=r"cannot save to .*nowhere"):
        conversation.save(tmp_path / "nowhere" / "talk.json")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_regenerate_answers_the_last_message_with_the_next_seed(
    start: Callable[..., Conversation], cold: LLaMA, chat_format: ChatFormat
) -> None:
    """The n-th time as the n-th sample of the prompt after the first; the dialog keeps its length."""
    params = SamplingParams(12, 1.0, 1.0, seed=7)
    conversation = start(params=params, system_prompt="the cat")
    ended(conversation, "hello")
    first = ended(conversation, "once upon")[1]
    prompt = chat_format.encode(conversation.messages[:-1])
    samples = cold.generate([prompt], params=[replace(params, n=3)])
    found = [first]
    for _ in range(2):
        assert conversation.last_message == "once upon"
        pieces = "".join(conversation.regenerate())
        assert conversation.result is not None
        found.append(conversation.result)
        assert conversation.messages[-1]["content"] == pieces.strip()
        assert len(conversation.messages) == 5
    assert [result.token_ids for result in found] == [sample.token_ids for sample in samples]
    assert len({tuple(result.token_ids) for result in found}) == 3


def test_an_edited_message_takes_the_place_of_the_last_one(
    start: Callable[..., Conversation], cold: LLaMA, chat_format: ChatFormat
) -> None:
    conversation = start()
    ended(conversation, "hello")
    ended(conversation, "once upon")
    streamed = "".join(conversation.edit("and the dog"))
    dialog: list[Message] = [*conversation.messages[:2], {"role": "user", "content": "and the dog"}]
    (expected,) = cold.generate([chat_format.encode(dialog)], params=[GREEDY])
    assert streamed == expected.generation
    assert conversation.messages == [*dialog, {"role": "assistant", "content": streamed.strip()}]


def test_a_new_answer_that_fails_leaves_the_old_one(start: Callable[..., Conversation]) -> None:
    """It does not fit, or was closed before its first text; the message that failed is the one to change next."""
    conversation = start()
    for action in (conversation.regenerate, lambda: conversation.edit("x")):
        with pytest.raises(ChatError, match="there is no message to answer again"):
            action()
    ended(conversation, "hello")
    before = list(conversation.messages)
    with pytest.raises(ChatError, match="the message alone does not fit"):
        conversation.edit("dog " * 300)
    assert conversation.messages == before
    assert conversation.unanswered == conversation.last_message == "dog " * 300
    with pytest.raises(ChatError, match="the message alone does not fit"):
        conversation.regenerate()
    conversation.edit("dog").close()  # type: ignore[attr-defined]  # nobody reads the answer
    assert conversation.messages == before
    conversation.set_system("the cat")
    "".join(conversation.regenerate())
    assert [message["content"] for message in conversation.messages[:-1]] == ["the cat", "dog"]
    assert conversation.unanswered is None


def test_an_interrupted_new_answer_takes_the_place_of_the_old_one(
    start: Callable[..., Conversation],
) -> None:
    """As far as it came, so the dialog is what the screen shows; without any text the old answer stays."""
    conversation = start(params=replace(GREEDY, max_gen_len=60))
    ended(conversation, "once upon")
    before = list(conversation.messages)
    pieces = conversation.regenerate()
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages == [before[0], {"role": "assistant", "content": first.strip()}]
    kept = list(conversation.messages)
    conversation._llm.interrupt()
    assert "".join(conversation.regenerate()) == ""
    assert conversation.messages == kept
    assert (conversation.unanswered, len(conversation.messages)) == ("once upon", 2)


def test_a_saved_dialog_goes_on(start: Callable[..., Conversation], tmp_path: Path) -> None:
    """With its system prompt; a file that is overwritten keeps its permissions."""
    conversation, path = start(system_prompt="日本語"), tmp_path / "talk.json"
    ended(conversation, "hello")
    path.write_text("old")
    path.chmod(0o600)
    conversation.save(path)
    assert (path.stat().st_mode & 0o777, len(list(tmp_path.iterdir()))) == (0o600, 1)
    other = start()
    ended(other, "something else")
    other.load(path)
    assert other.messages == conversation.messages
    assert ended(other, "and then")[0] == ended(conversation, "and then")[0]
    start().save(path)
    other.load(path)  # an empty dialog
    assert (other.messages, other.last_message) == ([], None)


def test_a_loaded_dialog_may_end_with_a_message_to_answer(start: Callable[..., Conversation], tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text('\ufeff[{"role": "user", "content": "hello"}]', encoding="utf-8")
    conversation = start()
    conversation.load(path)
    assert (conversation.messages, conversation.unanswered) == ([], "hello")
    answer = "".join(conversation.regenerate())
    assert conversation.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": answer.strip()},
    ]


HELLO, HI = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not JSON: Expecting value"),
        (b"[" * 100_000, "it is not JSON: too many levels of brackets"),
        (b"[" + b"1" * 5000 + b"]", "it is not JSON: Exceeds the limit"),
        (b'["\xff"]', "it is not UTF-8, byte 2"),
        ({"messages": []}, r'messages: got {"messages": \[\]}, expected a list of messages'),
        (["hello"], 'message 0: got "hello", expected an object with role and content'),
        ([{"role": "user"}], "message 0: .*expected role and content, both text"),
        ([{"role": "user", "content": None}], "message 0: .*expected role and content, both text"),
        ([{**HELLO, "tool_calls": []}], "message 0: unknown key 'tool_calls'"),
        ([HELLO, HELLO], "message 1: its role is 'user', expected 'assistant'"),
        ([HI], "message 0: its role is 'assistant', expected 'user'"),
        ([HELLO, {"role": "tool", "content": "x"}], "message 1: its role is 'tool', expected 'assistant'"),
        ([HELLO, HI, {"role": "system", "content": "x"}], "message 2: its role is 'system', expected 'user'"),
        (b'[{"role": "user", "content": "\\ud800"}]', "message 0 is not valid Unicode"),
        ([HELLO, {"role": "assistant", "content": "dog " * 300}], "the dialog does not fit: .*; on_overflow drop, or"),
    ],
)
def test_a_file_that_is_no_dialog_is_refused(
    start: Callable[..., Conversation], tmp_path: Path, content: Any, message: str
) -> None:
    """In one line that names the file; the conversation stays as it was."""
    path = tmp_path / "talk.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    conversation = start()
    ended(conversation, "hello")
    before = list(conversation.messages)
    with pytest.raises(ChatError, match=f"^cannot load {re.escape(str(path))}: {message}") as refusal:
        conversation.load(path)
    assert "\n" not in str(refusal.value)
    assert (conversation.messages, conversation.last_message) == (before, "hello")


def test_what_is_no_file_is_neither_loaded_nor_overwritten(start: Callable[..., Conversation], tmp_path: Path) -> None:
    """A device would be read forever, and a pipe would wait for its other end."""
    os.mkfifo(tmp_path / "pipe")
    conversation = start()
    for path, reason in (
        (tmp_path, "it is a directory, expected a file"),
        (Path("."), "it is a directory, expected a file"),
        (tmp_path / "pipe", "it is a device, a pipe or a socket, expected a file"),
        (Path("/dev/zero"), "it is a device, a pipe or a socket, expected a file"),
        (Path("a\0b"), "embedded null byte"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(ChatError, match=f"cannot load .*{reason}"):
            conversation.load(path)
        with pytest.raises(ChatError, match=f"cannot save to .*{reason}"):
            conversation.save(path)
    with pytest.raises(ChatError, match=r"cannot load .*nowhere: there is no such file"):
        conversation.load(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_long_dialog_is_shortened_on_demand_when_it_is_loaded(
    start: Callable[..., Conversation], tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([HELLO, {"role": "assistant", "content": "dog " * 300}, HELLO, HI]))
    conversation = start(on_overflow="drop")
    conversation.load(path)
    assert conversation.messages == [HELLO, HI]


def test_an_unknown_choice_for_overflow_is_refused(start: Callable[..., Conversation]) -> None:
    with pytest.raises(ConfigError, match="on_overflow: got 'keep', expected one of refuse, drop"):
        start(on_overflow="keep")


# ------------------------------------------------------------------------------------------------------------- Meta's
# signatures


def test_chat_completion_answers_as_generate_does(llm: LLaMA, chat_format: ChatFormat) -> None:
    """Meta's result type, for dialogs that end with a user's message."""
    dialogs: list[list[Message]] = [
        [{"role": "user", "content": "hello"}],
        [{"role": "system", "content": "the dog"}, {"role": "user", "content": "once upon"}],
    ]
    expected = llm.generate([chat_format.encode(d) for d in dialogs], max_gen_len=7, temperature=0)
    found = llm.chat_completion(dialogs, temperature=0, max_gen_len=7)
    assert found == [{"generation": {"role": "assistant", "content": e.generation.strip()}} for e in expected]
    with pytest.raises(ChatError, match="expected a user's message last"):
        llm.chat_completion([[*dialogs[0], {"role": "assistant", "content": "hi"}]])


def test_text_completion_answers_as_generate_does(llm: LLaMA) -> None:
    """Meta's result type; ``echo`` repeats the prompt; without ``max_gen_len`` an answer may fill the cache."""
    (expected,) = llm.generate("the cat", max_gen_len=7, temperature=0)
    assert llm.text_completion(["the cat"], temperature=0, max_gen_len=7) == [{"generation": expected.generation}]
    assert llm.text_completion(["the cat"], temperature=0, max_gen_len=7, echo=True) == [
        {"generation": "the cat" + expected.generation}
    ]
    (filled,) = llm.text_completion(["the cat " * 40], temperature=0)
    assert filled["generation"]


# -------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def chat(run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``chat("question", "--seed", "1")``: the command with that on stdin."""

    def call(stdin: str, *flags: str) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        given = [] if "--ckpt_dir" in flags else ["--ckpt_dir", str(directory)]
        return run("chat", *given, "--max_seq_len", "256", *flags)

    return call


def test_a_pipe_is_one_question(chat: Run, llm: LLaMA, chat_format: ChatFormat) -> None:
    """stdout is the answer and nothing else; the log says what the turn took."""
    outcome = chat("the cat\nran\n", "--max_gen_len", "9", "--temperature", "0", "--system_prompt", "the dog")
    dialog: list[Message] = [{"role": "system", "content": "the dog"}, {"role": "user", "content": "the cat\nran"}]
    prompt = chat_format.encode(dialog)
    (expected,) = llm.generate([prompt], params=[replace(GREEDY, max_gen_len=9)])
    assert (outcome.code, outcome.out) == (0, expected.generation + "\n")
    found = TURN_LINE.search(outcome.err)
    assert found is not None
    assert [int(count) for count in found.groups()] == [0, len(prompt), len(expected.token_ids)]
    assert re.search(r"^Compiling \d+ programs?, about \d+ s$", outcome.err, re.MULTILINE)  # no bar tells it here


def test_quiet_leaves_the_answer_alone(chat: Run) -> None:
    outcome = chat("the cat", "--max_gen_len", "3", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out


def test_a_model_without_a_chat_template_is_named(chat: Run, directory: Path, tmp_path: Path) -> None:
    """Once; not where the checkpoint has a template, nor where the user has chosen the format."""
    warning = "has no chat template, so dialogs are written in the format that its tokenizer fits, llama3"
    flags = ("--max_gen_len", "2")
    assert chat("the cat", *flags).err.count(warning) == 1
    assert warning not in chat("the cat", *flags, "--chat_format", "llama3").err
    shutil.copytree(directory, tmp_path / "own")
    (tmp_path / "own/chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert warning not in chat("the cat", *flags, "--ckpt_dir", str(tmp_path / "own")).err


@pytest.mark.parametrize(
    ("stdin", "flags", "words"),
    [
        ("", (), ["stdin", "got nothing", "at a terminal"]),
        ("  \n", (), ["stdin", "got nothing"]),
        ("hi", ("--chat_format", "lama3"), ["'lama3'", "llama2, llama3, template"]),
        ("hi", ("--chat_format", "template"), ["no chat template"]),
        ("hi", ("--on_overflow", "keep"), ["--on_overflow", "'keep'", "refuse"]),
        ("hi", ("--temperature", "-1"), ["temperature"]),
        ("hi", ("--top_p", "2"), ["top_p"]),
        ("hi", ("--max_gen_len", "0"), ["max_gen_len"]),
        ("hi", ("--dtype", "int3"), ["dtype", "'int3'"]),
        ("hi", ("--sytem_prompt", "x"), ["--sytem_prompt", "did you mean --system_prompt?"]),
    ],
)
def test_what_cannot_work_is_refused_before_loading(
    chat: Run, stdin: str, flags: tuple[str, ...], words: list[str]
) -> None:
    refused_at_once(chat(stdin, *flags), *words)


def test_a_directory_that_is_not_there_is_named(chat: Run, tmp_path: Path) -> None:
    refused(chat("hi", "--ckpt_dir", str(tmp_path / "none")), str(tmp_path / "none"))


def test_a_question_that_does_not_fit_is_refused(chat: Run) -> None:
    outcome = chat("dog " * 400)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "the message alone does not fit" in outcome.message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "top_p 0.31, from the checkpoint's generation_config.json"),
        (("--top_p", "0.5"), "top_p 0.5, as asked; the checkpoint's"),
    ],
)
def test_the_log_says_whose_sampling_defaults_won(
    chat: Run, directory: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    """generation_config.json is a default, a flag overrides it, and either way the user reads it."""
    shutil.copytree(directory, tmp_path / "own")
    (tmp_path / "own/generation_config.json").write_text('{"top_p": 0.31, "eos_token_id": [769]}')
    outcome = chat("the cat", "--max_gen_len", "2", "--ckpt_dir", str(tmp_path / "own"), *flags)
    assert said in outcome.err
