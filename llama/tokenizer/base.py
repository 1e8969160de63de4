"""The base class of every kind of tokenizer, and the decoder of streams."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

from llama.errors import LLaMAError, PromptError, TokenizerError

TokenizerKind = Literal["sentencepiece", "tiktoken", "tokenizers"]

REPLACEMENT = "\ufffd".encode()


LONGEST_REASON = 200  # characters of what a library says about a file


class Part(NamedTuple):
    """A stretch of a text, and whether control tokens written in it count as such or stay text."""

    text: str
    allow_special: bool = False


class Tokenizer(ABC):
    """A tokenizer file of any kind; ``load_tokenizer`` returns one.

    Attributes:
        kind: ``sentencepiece``, ``tiktoken`` or ``tokenizers``: the library that the file is for.
        n_words: number of ids: the largest one and one more.
        bos_id: beginning of sequence.
        eos_id: end of sequence.
        stop_ids: every id that ends a generation.
        special_ids: the control tokens by how they are written, for instance ``<s>``.
    """

    kind: ClassVar[TokenizerKind]
    n_words: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    special_ids: dict[str, int]

    def encode(self, text: str, bos: bool = True, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string of valid Unicode; the empty one gives BOS alone.
            bos: begin with BOS.
            eos: end with EOS.
            allow_special: read control tokens written in the text as those tokens. Off, they are encoded like any other
                text.

        Raises:
            PromptError: the text holds half of a surrogate pair, which is no character.
        """
        ids = self.encode_parts([Part(text, allow_special)])
        return [*([self.bos_id] if bos else []), *ids, *([self.eos_id] if eos else [])]

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues another, without the space that some kinds prepend.

        The text is encoded after a character that takes no part in its tokens: a line break, or another one if the line
        break does.
        """
        for before in ("\n", "a", "."):
            ids, written = self.encode(before + text, bos=False), b""
            for count, token_id in enumerate(ids, start=1):
                written += self.token_bytes(token_id) if written or count > 1 else self.first_bytes(token_id)
                if written == before.encode():
                    return ids[count:]
        return self.encode(text, bos=False)

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Token ids of the parts joined to one text.

        Words and merges run across the borders of parts, control tokens do not.

        Args:
            parts: in order. Where ``allow_special`` is off, nothing that is written becomes a control token, whatever
                its neighbours.

        Raises:
            PromptError: the text holds half of a surrogate pair, or a control token that this file cannot keep as text.
        """
        for part in parts:
            try:
                part.text.encode()
            except UnicodeEncodeError as error:
                raise PromptError(f"not valid Unicode: character {error.start} cannot be written as UTF-8") from error
        return self._encode_parts(parts)

    @abstractmethod
    def _encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """``encode_parts`` of valid Unicode."""

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """A pattern that finds control tokens in a text; of two that match, the longer one."""
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of an id: none for a control token, U+FFFD for an id beyond the vocabulary."""
        if not 0 <= token_id < self.n_words:
            return (
                REPLACEMENT  # embeddings are often padded past the tokenizer, and random weights choose from all of it
            )
        return self._bytes_of(token_id)

    def first_bytes(self, token_id: int) -> bytes:
        """The bytes of an id at the start of a text, where some kinds drop the space before a word."""
        return self.token_bytes(token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence, without a space that the tokenizer itself prepends."""
        decoder = StreamDecoder(self)
        return decoder.push(ids) + decoder.finish()

    @abstractmethod
    def _bytes_of(self, token_id: int) -> bytes:
        """``token_bytes`` of an id within the vocabulary."""


@contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Within: whatever a tokenizer's library raises becomes one error.

    The libraries raise plain Exceptions, and panics, which are not even that.

    Args:
        problem: begins the message, the library's reason follows.

    Raises:
        TokenizerError: in place of them.
    """
    try:
        yield
    except (LLaMAError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"{problem}: {' '.join(str(error).split())[:LONGEST_REASON]}") from error


class PlainTextTokenizer(Tokenizer):
    """A tokenizer whose library encodes only text without control tokens; this class handles the tokens."""

    def _encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Each stretch between two control tokens is encoded by itself, as the kinds' libraries do."""
        ids: list[int] = []
        stretch: list[str] = []
        for text, special_id in self._split(parts):
            stretch.append(text)
            if special_id is not None:
                ids += [*self._encode_text("".join(stretch)), special_id]
                stretch = []
        return ids + self._encode_text("".join(stretch))

    def _split(self, parts: Sequence[Part]) -> Iterator[tuple[str, int | None]]:
        """Split the parts after every allowed control token.

        Yields (the text before it, its id), and (the rest, None) for each part.
        """
        for part in parts:
            end = 0
            for match in self.special_pattern.finditer(part.text) if part.allow_special else ():
                yield part.text[end : match.start()], self.special_ids[match.group()]
                end = match.end()
            yield part.text[end:], None

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token."""


class StreamDecoder:
    """Decodes ids as they come; the pieces joined are exactly the text of the whole.

    Args:
        tokenizer: decodes the ids.
        context: ids that stand before the stream, whose text has been shown already. A continuation keeps the space
            before its first word; a text that begins the sequence does not.
        at_start: False keeps that space even if the context has no text.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int] = (), *, at_start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = at_start
        self.push(list(context))
        self._utf8.reset()  # half a character at the end of the context belongs to the context

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete; empty while a character is incomplete."""
        pieces = []
        for token_id in ids:
            data = self._tokenizer.token_bytes(token_id)
            if self._at_start and data:
                data, self._at_start = self._tokenizer.first_bytes(token_id), False
            pieces.append(self._utf8.decode(data))
        return "".join(pieces)

    def finish(self) -> str:
        """Return the rest when no more ids follow: U+FFFD for an incomplete character, or nothing."""
        return self._utf8.decode(b"", final=True)
