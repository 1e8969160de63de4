"""A checkpoint's own chat template: found, rendered in a separate process, and encoded.

A rendered template is one text, in which the template's ``<|eot_id|>`` and one that a user typed look the same. So a
dialog is rendered twice: as it is, and with a random mark inside every control token that a message holds. Split at the
marks, the second text has only the template's own control tokens whole; joined again, it must equal the first. Further
marks stand before and after each message's words, so that no control token can form across two messages; the white
space around the words stays outside, because most templates trim it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama.chat.formats import ChatFormat, Dialog, Message, check_dialog
from llama.errors import ChatError, TokenizerError, setting
from llama.tokenizer import Part, Tokenizer
from llama.tokenizer.files import read_object

RENDERER = Path(__file__).with_name("render.py")


class Limits(NamedTuple):
    """Limits on rendering a template.

    Attributes:
        seconds: to render one dialog, the start of the process included.
        memory: bytes of address space, the interpreter's included.
        characters: of the rendered text.
        template: characters of the template itself.
    """

    seconds: float = 10.0
    memory: int = 256 << 20
    characters: int = 4 << 20
    template: int = 1 << 20


DEFAULT_LIMITS = Limits()


class Found(NamedTuple):
    """A template, and the file that holds it."""

    text: str
    path: Path


def find_template(directory: Path) -> Found | None:
    """Return a checkpoint's chat template, if it has one.

    It is in chat_template.jinja, or in tokenizer_config.json (of several, ``default``).

    Raises:
        ChatError: a file that is not readable, or several templates without a default.
    """
    path = directory / "chat_template.jinja"
    try:
        return Found(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ChatError(f"{path} is not readable: {error}") from error
    path = directory / "tokenizer_config.json"
    try:
        value = read_object(path).get("chat_template")
    except TokenizerError as error:
        raise ChatError(str(error)) from error
    if isinstance(value, list):
        named = {str(t.get("name")): t.get("template") for t in value if isinstance(t, dict)}
        if "default" not in named:
            raise ChatError(
                f"{path} has the chat templates {', '.join(named) or 'none'}, expected one with the name default"
            )
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise ChatError(
            f"{path}: chat_template: got a JSON {type(value).__name__}, expected a text, or a list of named ones"
        )
    return None if value is None else Found(value, path)


class TemplateFormat(ChatFormat):
    """A Jinja chat template, as Hugging Face checkpoints carry it.

    Args:
        tokenizer: the checkpoint's.
        template: its text.
        names: control tokens by the variables that templates use: ``bos_token``, ``eos_token`` and others.
        source: its origin, for errors.
        limits: on rendering.

    Raises:
        ChatError: a template that is too long, or control tokens that the tokenizer does not have.
    """

    name = "template"

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        names: Mapping[str, str],
        source: str = "chat template",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(tokenizer)
        self._template, self._source, self._limits = template, source, limits
        if len(template) > limits.template:
            raise ChatError(
                f"{source}: the chat template has {len(template)} characters, expected at most {limits.template}"
            )
        written = {i: name for name, i in tokenizer.special_ids.items()}
        own = {"bos_token": written.get(tokenizer.bos_id, ""), "eos_token": written.get(tokenizer.eos_id, "")}
        self._names = {**own, **names}
        for key in own.keys() & names.keys():
            if len(tokenizer.encode_parts([Part(names[key], True)])) != 1:
                raise ChatError(
                    f"{source}: the template's {key} {names[key]!r} is no token of the {tokenizer.kind} tokenizer: "
                    f"they belong to different models, or a tokenizer.json is needed; give it with "
                    f"{setting('tokenizer_path')}"
                )

    def encode(self, dialog: Dialog, add_generation_prompt: bool = True) -> list[int]:
        """See ChatFormat."""
        check_dialog(dialog)
        # neither letters nor white space, so no filter changes the mark
        mark = f"\U000f0000{secrets.randbelow(10**20):020}\U000f0001"
        plain, marked = self._render([dialog, self._mark(dialog, mark)], add_generation_prompt)
        if plain.text is None:
            raise ChatError(f"{self._source}: {plain.problem}")
        pieces = (marked.text or "").split(mark)
        if "".join(pieces) != plain.text:
            self._refuse_control_tokens(dialog)
            pieces = [plain.text]
        return self.tokenizer.encode_parts([Part(piece, True) for piece in pieces])

    def _mark(self, dialog: Dialog, mark: str) -> list[Message]:
        """Return the dialog with marks around each message's words and inside its control tokens."""
        token = re.compile(f"(?={self.tokenizer.special_pattern.pattern})")
        marked: list[Message] = []
        for message in dialog:
            content = message["content"]
            words = content.strip()
            cuts = [0, *(match.start() + 1 for match in token.finditer(words)), len(words)]
            pieces = [words[begin:end] for begin, end in itertools.pairwise(cuts)]
            text = content.replace(words, mark.join(["", *pieces, ""]), 1) if words else content
            marked.append({"role": message["role"], "content": text})
        return marked

    def _refuse_control_tokens(self, dialog: Dialog) -> None:
        """Refuse messages with control tokens, for templates that disturb the marks."""
        for index, message in enumerate(dialog):
            match = self.tokenizer.special_pattern.search(message["content"])
            if match:
                raise ChatError(
                    f"message {index} holds {match.group()}, and {self._source} changes messages in a way that "
                    "does not let it be told from the template's own control tokens; write it differently"
                )

    def _render(self, dialogs: Sequence[Dialog], add_generation_prompt: bool) -> list[_Rendered]:
        """The text of each dialog, from a process that can be stopped."""
        request = {
            "path": _library_path(),
            "seconds": self._limits.seconds,
            "memory": self._limits.memory,
            "characters": self._limits.characters,
            "template": self._template,
            "variables": {
                **self._names,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            },
            "dialogs": [[{"role": m["role"], "content": m["content"]} for m in dialog] for dialog in dialogs],
        }
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", str(RENDERER)],
                input=json.dumps(request).encode(),
                capture_output=True,
                timeout=self._limits.seconds,
                env={key: os.environ[key] for key in ("LD_LIBRARY_PATH", "TZ") if key in os.environ},
                start_new_session=True,  # Ctrl-C is for the answer, not for this
            )
        except subprocess.TimeoutExpired as error:
            raise ChatError(
                f"{self._source}: the chat template took more than {self._limits.seconds} seconds and was stopped"
            ) from error
        except OSError as error:
            raise ChatError(
                f"{self._source}: the process that renders chat templates cannot be started: {error}"
            ) from error
        try:
            return [
                _Rendered(result.get("text"), _visible(result.get("problem", ""))) for result in json.loads(done.stdout)
            ]
        except ValueError as error:
            last_words = _visible(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
            raise ChatError(
                f"{self._source}: the process that renders chat templates ended with {done.returncode}: {last_words}"
            ) from error


class _Rendered(NamedTuple):
    """A rendered dialog, or None and what went wrong."""

    text: str | None
    problem: str


def _library_path() -> list[str]:
    """Return the directories in which jinja2 and its dependency are installed."""
    found = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ChatError(f"chat templates need the library {name}: pip install {name}")
        found.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(found))


def _visible(problem: Any) -> str:
    """A template's own message, cut short and without characters that would act on a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(problem)[:300])
