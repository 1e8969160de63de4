"""A checkpoint's own chat template: found, rendered in a separate process, and encoded.

A rendered template is one text, in which the template's ``<|eot_id|>`` and one that a user typed look the same. So a
dialog is rendered twice: as it is, and with a random mark inside every control token that a message holds. Split at the
marks, the second text has only the template's own control tokens whole; joined again, it must equal the first. Further
marks stand before and after each message's words, so that no control token can form across two messages; the white
space around the words stays outside, because most templates trim it.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from llama.chat.formats import ChatFormat, Dialog, Message, begun_answer, check_dialog
from llama.chat.renderer import Limits, Rendered, Renderer
from llama.errors import ChatError, TokenizerError, setting
from llama.gguf_header import gguf_in
from llama.regular_files import read_bytes
from llama.tokenizer import Part, Tokenizer
from llama.tokenizer.files import read_object
from llama.tokenizer.gguf_kind import chat_template_of

DEFAULT_LIMITS = Limits()


class Found(NamedTuple):
    """A template, and the file that holds it."""

    text: str
    path: Path


def find_template(directory: Path) -> Found | None:
    """Return a checkpoint's chat template, if it has one.

    It is in chat_template.jinja, or in tokenizer_config.json (of several, ``default``), or in a GGUF file's metadata.

    Raises:
        ChatError: a file that is not readable, or several templates without a default.
    """
    gguf = gguf_in(directory)
    if gguf is not None:
        return _in_metadata(gguf)
    path = directory / "chat_template.jinja"
    try:
        return Found(read_bytes(path).decode(), path)
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


def _in_metadata(path: Path) -> Found | None:
    """Return the template in a GGUF file's metadata, if it has one."""
    try:
        text = chat_template_of(path)
    except TokenizerError as error:
        raise ChatError(str(error)) from error
    return None if text is None else Found(text, path)


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

    @property
    def described(self) -> str:
        """The template."""
        return self._template

    def encode(self, dialog: Dialog, add_generation_prompt: bool = True) -> list[int]:
        """See ChatFormat."""
        check_dialog(dialog)
        mark = _mark()
        dialogs = [dialog, self._marked(dialog, mark)]
        with closing(self._renderer()) as renderer:
            plain, marked = renderer.render(dialogs, add_generation_prompt=add_generation_prompt)
        text = self._checked(plain)
        pieces = (marked.text or "").split(mark)
        if "".join(pieces) != text:
            self._refuse_control_tokens(dialog)
            pieces = [text]
        return self.tokenizer.encode_parts([Part(piece, True) for piece in pieces])

    def text(self, dialog: Dialog, add_generation_prompt: bool = True) -> str:
        """See ChatFormat. The process that renders is kept for the next dialog."""
        begun = begun_answer(dialog, add_generation_prompt)
        mark = f"{_mark()} "  # as in transformers: whether the space is left tells whether the template trims messages
        last: list[Message] = [] if begun is None else [{"role": "assistant", "content": begun + mark}]
        messages = [*(dialog if begun is None else dialog[:-1]), *last]
        (rendered,) = self._kept.render([messages], add_generation_prompt=add_generation_prompt)
        text = self._checked(rendered)
        if begun is None:
            return text
        written, found, rest = text.rpartition(mark.rstrip())
        if not found:
            raise ChatError(f"{self._source}: the chat template leaves out the last message, an answer that has begun")
        return written if rest.startswith(" ") else written.rstrip()

    def _checked(self, rendered: Rendered) -> str:
        """The text of a rendered dialog.

        Raises:
            ChatError: the template fails, or writes what cannot be a prompt.
        """
        if rendered.text is None:
            raise ChatError(f"{self._source}: {rendered.problem}")
        if not rendered.text.strip():
            written = "white space only" if rendered.text else "nothing"
            raise ChatError(
                f"{self._source}: the chat template writes {written} for this dialog, expected its messages: a name "
                "that it does not define is empty"
            )
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            raise ChatError(
                f"{self._source}: the chat template writes what is not valid Unicode: character {error.start}"
            ) from error
        return rendered.text

    @cached_property
    def _kept(self) -> Renderer:
        return self._renderer()

    def _renderer(self) -> Renderer:
        return Renderer(self._template, {**self._names, "tools": None, "documents": None}, self._source, self._limits)

    def _marked(self, dialog: Dialog, mark: str) -> list[Message]:
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


def _mark() -> str:
    """A text that no message contains: neither letters nor white space, so no filter changes it."""
    return f"\U000f0000{secrets.randbelow(10**20):020}\U000f0001"
