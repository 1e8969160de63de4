"""Text to token ids and back, whole or as a stream.

A tokenizer is anything with the members of the ``Tokenizer`` protocol's shape; ``Tokenizer`` here reads LLaMA 1 and 2's
SentencePiece models. Decoding goes through bytes: each id stands for some bytes (``token_bytes``), and text is their UTF-8
decoding. That makes a stream exact by construction: an incremental UTF-8 decoder yields the same text as decoding the whole, and a
character whose bytes are spread over several tokens is held back until its last byte is there.

Control tokens written out in a text (``</s>``) stay text unless ``allow_special`` asks for them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llama.errors import TokenizerError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_REPLACEMENT = "\ufffd".encode()


class Tokenizer:
    """A SentencePiece model, as LLaMA 1 and 2 ship it.

    Args:
        model_path: the tokenizer.model file.

    Attributes:
        n_words: number of ids.
        bos_id: beginning of sequence.
        eos_id: end of sequence.
        stop_ids: every id that ends a generation.

    Raises:
        TokenizerError: the file is absent, is no SentencePiece model, or has no BOS or EOS.
    """

    def __init__(self, model_path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        path = Path(model_path)
        if not path.is_file():
            raise TokenizerError(f"no tokenizer at {path}: expected a SentencePiece model file; give its path with --tokenizer_path")
        try:
            self._sp: SentencePieceProcessor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path} is not a SentencePiece model: {error}") from error
        self.n_words: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError(f"{path} has no BOS or no EOS token (ids {self.bos_id}, {self.eos_id}): LLaMA needs both")
        self.stop_ids: tuple[int, ...] = (self.eos_id,)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The control tokens by how they are written, for instance ``<s>``."""
        return {self._sp.id_to_piece(i): i for i in range(self.n_words) if self._sp.is_control(i)}

    def encode(self, text: str, bos: bool = True, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string; the empty one gives BOS alone.
            bos: begin with BOS.
            eos: end with EOS.
            allow_special: read control tokens written in the text as those tokens. Off, they are encoded like any other text.
        """
        ids: list[int] = [self.bos_id] if bos else []
        if allow_special and self.special_ids:
            pattern = "(" + "|".join(re.escape(piece) for piece in self.special_ids) + ")"
            for part in re.split(pattern, text):
                ids += [self.special_ids[part]] if part in self.special_ids else self._sp.encode(part)
        else:
            ids += self._sp.encode(text)
        return [*ids, self.eos_id] if eos else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for; none for a control token, U+FFFD for an id beyond the vocabulary."""
        if not 0 <= token_id < self.n_words:
            return _REPLACEMENT  # embeddings are often padded past the tokenizer, and random weights choose from all of it
        return self._table[token_id]

    def begins_with_mark(self, token_id: int) -> bool:
        """Whether the id's piece begins with SentencePiece's word mark: the space that encoding puts before a text's first word."""
        return 0 <= token_id < self.n_words and str(self._sp.id_to_piece(token_id)).startswith(_SPACE)

    @cached_property
    def _table(self) -> list[bytes]:
        return [self._bytes_of(i) for i in range(self.n_words)]

    def _bytes_of(self, token_id: int) -> bytes:
        if self._sp.is_control(token_id):
            return b""
        piece: str = self._sp.id_to_piece(token_id)
        if self._sp.is_byte(token_id):  # written <0x0A>
            return bytes([int(piece[3:5], 16)])
        if self._sp.is_unknown(token_id):
            return " \u2047 ".encode()
        return piece.replace(_SPACE, " ").encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence. The space that SentencePiece puts before the first word is taken off again."""
        decoder = StreamDecoder(self)
        return decoder.push(ids) + decoder.finish()


class StreamDecoder:
    """Decodes ids as they come; the pieces joined are exactly the text of the whole.

    Args:
        tokenizer: what the ids mean.
        context: ids that stand before the stream, whose text has been shown already. A continuation keeps the space before its
            first word; a text that begins the sequence does not.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True
        self.push(list(context))
        self._utf8.reset()  # half a character at the end of the context belongs to the context

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids; empty while a character is incomplete."""
        pieces = []
        for token_id in ids:
            data = self._tokenizer.token_bytes(token_id)
            if self._at_start and data:
                data = data[1:] if self._tokenizer.begins_with_mark(token_id) else data
                self._at_start = False
            pieces.append(self._utf8.decode(data))
        return "".join(pieces)

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD for an incomplete character, or nothing."""
        return self._utf8.decode(b"", final=True)
