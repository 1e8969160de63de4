"""`llama-xla chat` at a terminal: pasted blocks, commands, Ctrl-C and Ctrl-D at every place, and terminals that can do
little, or that go away.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import TINY, random_weights, write_meta
from commands import ROOT
from fakes import fake_llm
from tokenizer_files import byte_level, write_ranks

from llama import SamplingParams
from llama.chat import Llama2Format
from llama.cli.lines import Lines
from llama.cli.talk import COMMANDS, Talk
from llama.cli.terminal import as_shown, visible
from llama.conversation import Conversation
from llama.errors import OutputError

CHAT_ARGS = replace(TINY, vocab_size=768)
TURN_LINE = re.compile(r"\[(\d+) tokens kept, (\d+) new, (\d+) generated(, interrupted|, cut at the limit|)")
PROMPT = r"\x1b\[\?2004h[^>]*> ?"  # the editor asks for marked pastes, then shows its prompt
PLAIN_PROMPT = r"(?<![^\n])> "
ENDED_S = 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in Meta's format with a Llama 3 ranks file."""
    made = write_meta(tmp_path_factory.mktemp("chat") / "llama3", CHAT_ARGS, [random_weights(CHAT_ARGS)])
    write_ranks(byte_level(), made / "tokenizer.model")
    return made


class Terminal:
    """A chat at a pseudo-terminal, as a user has it.

    Args:
        arguments: of the command.
        term: the terminal's kind.
        streams: that are something else than the terminal.
        nohup: leave the process alone when the terminal goes away.
    """

    def __init__(
        self, arguments: list[str], term: str = "xterm", streams: dict[str, Any] | None = None, nohup: bool = False
    ) -> None:
        self._fd, child = pty.openpty()
        own_terminal = (
            "import fcntl, os, signal, sys, termios; "
            + ("signal.signal(signal.SIGHUP, signal.SIG_IGN); " if nohup else "")
            + "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
        )
        command = [sys.executable, "-c", own_terminal, sys.executable, "-m", "llama.cli", "chat", *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TERM": term},
            start_new_session=True,
            **{"stdin": child, "stdout": child, "stderr": child, **(streams or {})},
        )
        os.close(child)
        self.seen = ""
        self.is_open = True

    def type(self, text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        while data:
            data = data[os.write(self._fd, data[:512]) :]
            self._read(0)

    def paste(self, text: str) -> None:
        """Send text as a terminal does where the program has asked for marks; it sends a newline as Enter."""
        self.type("\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~")

    def wait_for(self, pattern: str, within_s: float = 60) -> re.Match[str]:
        """Read until a pattern appears behind what the last wait found; what comes after it is left for the next."""
        until = time.monotonic() + within_s
        while (found := re.search(pattern, self.seen, re.DOTALL)) is None:
            assert self._read(max(until - time.monotonic(), 0)), f"no {pattern!r} in {self.seen!r}"
        self.seen = self.seen[found.end() :]
        return found

    def _read(self, within_s: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], within_s)
        if ready:
            self.seen += os.read(self._fd, 4096).decode(errors="replace")
        return bool(ready)

    def ended(self) -> int:
        """The exit code; what the process still writes is read meanwhile."""
        until = time.monotonic() + ENDED_S
        while self.process.poll() is None and time.monotonic() < until:
            if self.is_open:
                try:
                    self._read(0.05)
                except OSError:  # the process was the last that had the terminal open
                    break
            else:
                time.sleep(0.05)
        return self.process.wait(timeout=ENDED_S)

    def hang_up(self) -> None:
        """Take the terminal away."""
        os.close(self._fd)
        self.is_open = False

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.is_open:
            self.hang_up()


@pytest.fixture
def opened(directory: Path) -> Iterator[Callable[..., Terminal]]:
    """``opened(term="dumb")``: a chat whose sampled answers are long."""
    made: list[Terminal] = []

    def make(**given: Any) -> Terminal:
        length = given.pop("length", "3500")
        flags = ["--max_seq_len", "4096", "--max_gen_len", length, "--min_tokens", length]
        flags += ["--temperature", "1", "--seed", "1"]
        made.append(Terminal(["--ckpt_dir", str(directory), *flags], **given))
        return made[-1]

    yield make
    for terminal in made:
        terminal.close()


def stopped(terminal: Terminal, prompt: str = PROMPT) -> re.Match[str]:
    """Let an answer begin, press Ctrl-C, and wait for the turn's line and the next prompt."""
    if prompt == PROMPT:
        terminal.wait_for(r"\x1b\[\?2004l")  # the editor has ended, so that Ctrl-C is a signal and no key
    terminal.wait_for("[^\x1b\r\n]{60}")
    terminal.type("\x03")
    return terminal.wait_for(TURN_LINE.pattern + ".*?" + prompt)


def saved(terminal: Terminal, path: Path) -> list[dict[str, str]]:
    """The dialog, as /save writes it to a file that is not there yet."""
    path.unlink(missing_ok=True)
    terminal.type(f"/save {path}\n")
    terminal.wait_for("Saved to .*?" + PROMPT)
    found: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_a_conversation_at_a_terminal(opened: Callable[..., Terminal], tmp_path: Path) -> None:
    """Ctrl-C stops the answer and not the program; the commands work; Ctrl-D ends with exit code 0."""
    terminal, path = opened(), tmp_path / "talk.json"
    terminal.wait_for("has no chat template.*llama3.*/help lists the commands.*?" + PROMPT)
    terminal.type("the cat\n")
    first = stopped(terminal)
    assert (first[1], first[4]) == ("0", ", interrupted")
    for press in ("\x03", "typed\x03"):
        terminal.type(press)
        terminal.wait_for(PROMPT)
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait_for(PROMPT)
    terminal.type("/frobnicate\n")
    terminal.wait_for("/frobnicate is no command; /help lists them.*?" + PROMPT)
    before = saved(terminal, path)
    assert [message["role"] for message in before] == ["user", "assistant"]
    assert before[0]["content"] == "the cat"
    for answer in ("\x03", "\x04", "\n", "n\n"):
        terminal.type(f"/save {path}\n")
        terminal.wait_for(r"Overwrite it\? \[y/N\]")
        terminal.type(answer)
        terminal.wait_for("Not saved.*?" + PROMPT)
    terminal.type("/regen\n")
    stopped(terminal)
    terminal.type(f"/save {path}\n")
    terminal.wait_for(r"Overwrite it\? \[y/N\]")
    terminal.type("y\n")
    terminal.wait_for("Saved to .*?" + PROMPT)
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again[:-1] == before[:-1]
    assert again[-1]["content"][:20] != before[-1]["content"][:20]  # another seed
    terminal.type("/edit\n")
    terminal.wait_for("edit> the cat")
    terminal.type("\x03")
    terminal.wait_for("Nothing is changed.*?" + PROMPT)
    terminal.type("/edit\n")
    terminal.wait_for("edit> the cat")
    terminal.type(" and the dog\n")
    assert int(stopped(terminal)[1]) > 0  # what stands before the changed message is still in the cache
    edited = saved(terminal, path)
    assert (len(edited), edited[0]["content"]) == (2, "the cat and the dog")
    terminal.type("/undo\n")
    terminal.wait_for("Taken back.*?" + PROMPT)
    terminal.type(f"/load {path}\n")
    terminal.wait_for("Loaded 1 turn from .*without a system prompt.*?" + PROMPT)
    assert saved(terminal, tmp_path / "other.json") == edited
    terminal.type("\x04")
    assert terminal.ended() == 0


@pytest.mark.slow
def test_a_pasted_block_is_one_message(opened: Callable[..., Terminal], tmp_path: Path) -> None:
    """With empty lines, slashes, wide characters, escapes, and beyond the 4,096 bytes of a terminal's own line; a
    backslash at the end of a typed line goes on in the next.
    """
    terminal = opened()
    terminal.wait_for(PROMPT)
    blocks = [
        "/usr/bin/cat: a path\n\n/exit\n日本語 \x1b[31m\x00 end\n",
        "one line of more bytes than a terminal keeps " + "x" * 600 + "y" * 4000,
        "\r\n".join(["a", "", "b"]),
    ]
    for block in blocks:
        terminal.paste(block.replace("\r\n", "\n"))
        terminal.type("\n")
        if "yyyy" in block:
            terminal.wait_for("the dialog does not fit.*?" + PROMPT)
        else:
            stopped(terminal)
    terminal.type("the cat \\\nran\\")
    terminal.type("\nhome\n")
    stopped(terminal)
    terminal.type(b"caf\xe9\xff\n")
    stopped(terminal)
    terminal.type("   \n")
    terminal.wait_for(PROMPT)
    said = [message["content"] for message in saved(terminal, tmp_path / "talk.json") if message["role"] == "user"]
    assert said == [blocks[0], "a\n\nb", "the cat \nran\nhome", "caf\ufffd\ufffd"]
    terminal.type("/exit\n")
    assert terminal.ended() == 0


@pytest.mark.slow
def test_a_terminal_that_cannot_move_its_cursor(opened: Callable[..., Terminal], tmp_path: Path) -> None:
    """Lines come from the terminal itself, without escape sequences; one that it has cut is refused."""
    terminal = opened(term="dumb")
    terminal.wait_for("lists the commands.*?" + PLAIN_PROMPT)
    terminal.type("\x03")
    terminal.wait_for(PLAIN_PROMPT)
    terminal.type("/z" + "z" * 4092 + "\n")
    terminal.wait_for("is no command.*?" + PLAIN_PROMPT)
    terminal.type("z" * 5000 + "\n")
    terminal.wait_for("a line of 4,095 bytes or more, which this terminal cuts.*?" + PLAIN_PROMPT)
    terminal.type("/edit\n")
    terminal.wait_for("there is no message to answer again.*?" + PLAIN_PROMPT)
    terminal.type(b"a\\\nb\x00\xff\n")
    stopped(terminal, PLAIN_PROMPT)
    terminal.type("/edit\n")
    terminal.wait_for("/edit TEXT sends another one instead.\r\na\r\nb\\\\x00\ufffd.*?" + PLAIN_PROMPT)
    terminal.type("/edit c\n")
    stopped(terminal, PLAIN_PROMPT)
    path = tmp_path / "talk.json"
    terminal.type(f"/save {path}\n")
    terminal.wait_for("Saved.*?" + PLAIN_PROMPT)
    assert json.loads(path.read_text(encoding="utf-8"))[0]["content"] == "c"
    for answer in ("\x03", "\x04", "\n"):
        terminal.type(f"/save {path}\n")
        terminal.wait_for(r"\[y/N\]")
        terminal.type(answer)
        terminal.wait_for("Not saved.*?" + PLAIN_PROMPT)
    assert "\x1b[" not in terminal.seen
    terminal.type("\x04")
    assert terminal.ended() == 0


@pytest.mark.slow
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_that_goes_away_ends_the_chat(opened: Callable[..., Terminal], term: str, tmp_path: Path) -> None:
    """Also where the hang-up signal is ignored, as by nohup: no traceback, and no process that waits forever."""
    with (tmp_path / "log").open("w") as log:
        terminal = opened(term=term, nohup=True, streams={"stderr": log})
        terminal.wait_for("lists the commands.*?> ?")
        terminal.hang_up()
        assert terminal.ended() in (0, 2)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_file_gets_the_exact_answers_only(opened: Callable[..., Terminal], tmp_path: Path) -> None:
    """Prompts and notes go to the terminal, by stderr; control characters of the model are as it wrote them."""
    with (tmp_path / "out").open("wb") as out:
        terminal = opened(length="300", streams={"stdout": out})
        terminal.wait_for("lists the commands.*> ")
        terminal.type("the cat\n")
        terminal.wait_for(TURN_LINE.pattern + ".*> ")
        terminal.type(f"/save {tmp_path / 'talk.json'}\n/exit\n")
        terminal.wait_for("Saved to ")
        assert terminal.ended() == 0
    answer = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))[1]["content"]
    written = (tmp_path / "out").read_bytes().decode()
    assert written.strip() == answer
    assert visible(answer) != answer


# ------------------------------------------------------------------------------------------------- without a terminal


def test_control_characters_are_written_out() -> None:
    r"""All of C0 and C1 but tab and newline, DEL, and what turns the direction of writing."""
    assert visible("\x1b[31mred\x07\r\n\tend\x7f\x9b\u202e\u2066") == (
        "\\x1b[31mred\\x07\\x0d\n\tend\\x7f\\x9b\\u202e\\u2066"
    )
    plain = "é 日本語 😀 \xa0 \u200d \u202f a\\x1b"
    assert visible(plain) == plain
    hidden = [chr(i) for i in range(0x3000) if visible(chr(i)) != chr(i)]
    expected = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert hidden == [chr(i) for i in expected]


def test_what_a_stream_gets() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert as_shown("a\x1b", Screen()) == "a\\x1b"
    assert as_shown("a\x1b", io.StringIO()) == "a\x1b"


class Script(Lines):
    """Lines that a test has written; an exception is raised."""

    def __init__(self, *lines: str | type[BaseException], edits: bool = True) -> None:
        self._lines, self.edits = iter(lines), edits  # type: ignore[misc]
        self.asked: list[tuple[str, str]] = []

    def read(self, prompt: str, text: str = "") -> str:
        self.asked.append((prompt, text))
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    def answer(self, question: str) -> str:
        return self.read(question)


@pytest.fixture
def talk(tokenizer_path: Path) -> Callable[..., tuple[Script, Conversation]]:
    """``talk("hi", "/undo")``: a conversation over a fake device to the end of these lines."""

    def run(*lines: str | type[BaseException], edits: bool = True) -> tuple[Script, Conversation]:
        llm = fake_llm(tokenizer_path, max_seq_len=256)
        conversation = Conversation(llm, Llama2Format(llm.tokenizer), SamplingParams(8, 1.0, 1.0, seed=1))
        script = Script(*lines, edits=edits)
        Talk(llm, conversation, script, str).run()
        return script, conversation

    return run


def test_commands_say_what_they_do(
    talk: Callable[..., tuple[Script, Conversation]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Near misses get a hint, words where none belong are refused, and a block that begins with a path is a message."""
    _, conversation = talk(
        *("hi", "/regn", "/undo 2", "/exit\nnow", "/regen", "/Users/me\nis a path", "/help", "/bye", "never read")
    )
    said = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert said == ["hi", "/Users/me\nis a path"]
    err = capsys.readouterr().err  # stdout is no terminal here
    assert "/regn is no command; did you mean /regen? /help lists them" in err
    assert "llama-xla: /undo: got '2' after it, expected nothing" in err
    assert "llama-xla: /exit: got 'now' after it, expected nothing" in err
    assert all(f"\n{name}" in err for name in COMMANDS)


def test_nothing_to_answer_again(
    talk: Callable[..., tuple[Script, Conversation]], capsys: pytest.CaptureFixture[str]
) -> None:
    script, conversation = talk("/regen", "/edit", "/edit x", "/undo")
    assert conversation.messages == []
    assert len(script.asked) == 5  # /edit asked for no text
    err = capsys.readouterr().err
    assert err.count("there is no message to answer again; write one first") == 3
    assert "There is nothing to take back" in err


@pytest.mark.parametrize("given", [KeyboardInterrupt, EOFError, "", "  \n "])
def test_an_edit_that_is_cancelled_changes_nothing(
    talk: Callable[..., tuple[Script, Conversation]], given: str | type[BaseException]
) -> None:
    script, conversation = talk("hi\nyou", "/edit", given, "/system be brief")
    assert script.asked[2] == ("edit> ", "hi\nyou")
    assert [message["content"] for message in conversation.messages][:2] == ["be brief", "hi\nyou"]


def test_an_edited_message_is_no_command(talk: Callable[..., tuple[Script, Conversation]]) -> None:
    _, conversation = talk("hi", "/edit", "/exit", "more")
    said = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert said == ["/exit", "more"]


def test_a_message_that_does_not_fit_can_be_edited(
    talk: Callable[..., tuple[Script, Conversation]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The refused message is the one that /edit offers; the turn before it stays."""
    script, conversation = talk("hi", "dog " * 300, "/edit", "dog")
    assert script.asked[3] == ("edit> ", "dog " * 300)
    said = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert said == ["hi", "dog"]
    assert "the dialog does not fit" in capsys.readouterr().err


def test_ctrl_c_between_two_messages_ends_nothing(
    talk: Callable[..., tuple[Script, Conversation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that comes while the dialog is saved, as at any moment that waits for nothing, is without effect; the
    handler of before comes back.
    """
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Conversation, "undo", lambda self: signal.raise_signal(signal.SIGINT) or True)
    script, _ = talk("hi", "/undo", KeyboardInterrupt, "/help")
    assert len(script.asked) == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stdout_that_is_full_ends_the_talk(
    talk: Callable[..., tuple[Script, Conversation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="No space left"):
            talk("hi", "never read")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what it still holds can go


def test_the_editor_is_loaded_at_a_terminal_only() -> None:
    """A pipe does not pay for importing prompt_toolkit."""
    code = "import llama.cli, sys; from llama.cli.talk import open_lines; open_lines(); print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    assert "prompt_toolkit" not in ran.stdout.split()
    assert "llama.cli.talk" in ran.stdout.split()
