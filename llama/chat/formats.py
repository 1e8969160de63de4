"""The dialog, and the formats of Llama 2 and Llama 3, token by token as in Meta's code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, TypedDict

from llama.errors import ChatError
from llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]


class ChatFormat(ABC):
    """Turns a dialog into the prompt for its next answer.

    Args:
        tokenizer: the model's.

    Attributes:
        name: that users choose it by.
    """

    name: ClassVar[str]

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.tokenizer.stop_ids

    @abstractmethod
    def encode(self, dialog: Dialog, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a dialog.

        Args:
            dialog: an optional system message, then user and assistant in turn, a user's message last.
            add_generation_prompt: end with the beginning of an answer, in formats that have one.

        Raises:
            ChatError: roles in another order, contents that are not text, or messages that the format cannot express.
        """

    @abstractmethod
    def text(self, dialog: Dialog, add_generation_prompt: bool = True) -> str:
        """A dialog as text, with the control tokens written out; what users have written of them counts, too.

        Args:
            dialog: as for ``encode``. Without ``add_generation_prompt`` its last message may be the assistant's: the
                beginning of an answer, with which the text ends.

        Raises:
            ChatError: see ``encode``.
        """

    @property
    def described(self) -> str:
        """What reports say about the format."""
        return self.name

    def _written(self, token_id: int) -> str:
        """How a control token is written; empty if it has no name."""
        return next((name for name, known in self.tokenizer.special_ids.items() if known == token_id), "")


def begun_answer(dialog: Dialog, add_generation_prompt: bool) -> str | None:
    """The beginning of an answer with which a dialog ends, or None if it ends with the user's message.

    Raises:
        ChatError: see ``check_dialog``.
    """
    has_begun = not add_generation_prompt and bool(dialog) and dialog[-1]["role"] == "assistant"
    check_dialog(dialog[:-1] if has_begun else dialog)
    return dialog[-1]["content"] if has_begun else None


def check_dialog(dialog: Dialog) -> None:
    """Check that roles alternate, a user's message is last, and contents are valid text.

    Raises:
        ChatError: the first message that is wrong, and how.
    """
    for index, message in enumerate(dialog):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ChatError(
                f"message {index}: got {message!r:.200}, expected a dict with a role and a content, both text"
            )
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ChatError(
                f"message {index} is not valid Unicode: character {error.start} cannot be written as UTF-8"
            ) from error
    turns = list(dialog)[1:] if dialog and dialog[0]["role"] == "system" else list(dialog)
    offset = len(dialog) - len(turns)
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise ChatError(
                f"message {index + offset}: its role is {message['role']!r:.50}, expected {expected!r}: "
                "after an optional system message, user and assistant take turns"
            )
    if len(turns) % 2 == 0:
        got = f"the last of {len(dialog)} messages is the {dialog[-1]['role']}'s" if dialog else "got no messages"
        raise ChatError(f"{got}, expected a user's message last, which is to be answered")


class Llama2Format(ChatFormat):
    """``[INST] ... [/INST] answer``, each pair between BOS and EOS.

    The system message is part of the first user message.
    """

    name = "llama2"
    _TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer looks like Llama 2's."""
        return tokenizer.kind == "sentencepiece" or tokenizer.special_ids.get("<s>") == tokenizer.bos_id

    def encode(self, dialog: Dialog, add_generation_prompt: bool = True) -> list[int]:
        """See ChatFormat. Messages that hold a tag are refused, as in Meta's code: tags are ordinary text."""
        check_dialog(dialog)
        pairs, last = self._turns(dialog)
        ids: list[int] = []
        for user, assistant in pairs:
            ids += self.tokenizer.encode(f"[INST] {user} [/INST] {assistant} ", bos=True, eos=True)
        return ids + self.tokenizer.encode(f"[INST] {last} [/INST]", bos=True)

    def text(self, dialog: Dialog, add_generation_prompt: bool = True) -> str:
        """See ChatFormat."""
        begun = begun_answer(dialog, add_generation_prompt)
        pairs, last = self._turns(dialog if begun is None else dialog[:-1])
        bos, eos = self._written(self.tokenizer.bos_id), self._written(self.tokenizer.eos_id)
        turns = [f"{bos}[INST] {user} [/INST] {assistant} {eos}" for user, assistant in pairs]
        return "".join([*turns, f"{bos}[INST] {last} [/INST]", "" if begun is None else f" {begun.lstrip()}"])

    def _turns(self, dialog: Dialog) -> tuple[list[tuple[str, str]], str]:
        """The pairs of a user's message and its answer, and the user's last message."""
        for index, message in enumerate(dialog):
            written = [tag for tag in self._TAGS if tag in message["content"]]
            if written:
                raise ChatError(
                    f"message {index} holds {', '.join(written)}: Llama 2's format cannot tell these tags from its own"
                )
        contents = [message["content"] for message in dialog]
        if dialog[0]["role"] == "system":
            system, first, *others = contents
            contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}", *others]
        *pairs, last = (text.strip() for text in contents)
        return list(zip(pairs[::2], pairs[1::2], strict=True)), last


class Llama3Format(ChatFormat):
    """A header with the role before each message, and ``<|eot_id|>`` after it.

    Raises:
        ChatError: the tokenizer lacks one of the control tokens.
    """

    name = "llama3"
    _HEADER, _END_HEADER, _EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        absent = [name for name in (self._HEADER, self._END_HEADER, self._EOT) if name not in tokenizer.special_ids]
        if absent:
            raise ChatError(
                f"the tokenizer has no {', '.join(absent)}, which Llama 3's format is made of; "
                "choose another chat format"
            )

    @classmethod
    def fits(cls, tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer has Llama 3's control tokens."""
        return tokenizer.special_ids.keys() >= {cls._HEADER, cls._END_HEADER, cls._EOT}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokenizer's, and the end of a turn."""
        return tuple(dict.fromkeys([*self.tokenizer.stop_ids, self.tokenizer.special_ids[self._EOT]]))

    def encode(self, dialog: Dialog, add_generation_prompt: bool = True) -> list[int]:
        """See ChatFormat. Control tokens are put in as ids; contents are encoded as ordinary text."""
        check_dialog(dialog)
        ids = [self.tokenizer.bos_id]
        for message in dialog:
            ids += self._header(message["role"])
            ids += self.tokenizer.encode(message["content"].strip(), bos=False)
            ids.append(self.tokenizer.special_ids[self._EOT])
        return ids + self._header("assistant") if add_generation_prompt else ids

    def text(self, dialog: Dialog, add_generation_prompt: bool = True) -> str:
        """See ChatFormat."""
        begun = begun_answer(dialog, add_generation_prompt)
        messages = [(m["role"], m["content"].strip() + self._EOT) for m in (dialog if begun is None else dialog[:-1])]
        if add_generation_prompt or begun is not None:
            messages.append(("assistant", (begun or "").strip()))
        turns = [f"{self._HEADER}{role}{self._END_HEADER}\n\n{content}" for role, content in messages]
        return self._written(self.tokenizer.bos_id) + "".join(turns)

    def _header(self, role: Role) -> list[int]:
        name, newlines = (self.tokenizer.encode(text, bos=False) for text in (role, "\n\n"))
        return [
            self.tokenizer.special_ids[self._HEADER],
            *name,
            self.tokenizer.special_ids[self._END_HEADER],
            *newlines,
        ]
