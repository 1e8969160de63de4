"""SentencePiece models, as LLaMA 1 and 2 ship them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama.errors import TokenizerError
from llama.tokenizer.base import PlainTextTokenizer, library_errors

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class SentencePieceTokenizer(PlainTextTokenizer):
    """A SentencePiece model; see Tokenizer.

    Args:
        model_path: its file, or the file that ``content`` was made from.
        content: the model itself; None means what the file holds.
    """

    kind = "sentencepiece"

    def __init__(self, model_path: str | Path, content: bytes | None = None) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise TokenizerError(f"{model_path} needs the library sentencepiece: pip install sentencepiece") from error
        self._path = Path(model_path)
        self._sp: SentencePieceProcessor
        with library_errors(
            f"{model_path} is not a SentencePiece model (nor a tiktoken ranks file or a tokenizer.json)"
        ):
            source = {"model_file": str(model_path)} if content is None else {"model_proto": content}
            self._sp = SentencePieceProcessor(**source)
            self.n_words: int = self._sp.vocab_size()
            self._pieces: list[str] = [self._sp.id_to_piece(i) for i in range(self.n_words)]
            self._table = [self._read_bytes(i, piece) for i, piece in enumerate(self._pieces)]
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise TokenizerError(
                f"{model_path} has no BOS or no EOS token (ids {self.bos_id}, {self.eos_id}): LLaMA needs both"
            )
        self.stop_ids = (self.eos_id,)
        self.special_ids = {piece: i for i, piece in enumerate(self._pieces) if self._sp.is_control(i)}

    def _encode_text(self, text: str) -> list[int]:
        with library_errors(f"{self._path} cannot encode a text, so it is damaged"):
            ids: list[int] = self._sp.encode(text)
        return ids

    def first_bytes(self, token_id: int) -> bytes:
        """As SentencePiece decodes: one space of a piece that is written with it, none of a byte token."""
        data = self.token_bytes(token_id)
        is_word = 0 <= token_id < self.n_words and self._pieces[token_id].startswith(_SPACE)
        return data.removeprefix(b" ") if is_word else data

    def _bytes_of(self, token_id: int) -> bytes:
        return self._table[token_id]

    def _read_bytes(self, token_id: int, piece: str) -> bytes:
        if self._sp.is_control(token_id):
            return b""
        if self._sp.is_byte(token_id):  # written <0x0A>
            return bytes([int(piece[3:5], 16)])
        if self._sp.is_unknown(token_id):
            return " \u2047 ".encode()
        return piece.replace(_SPACE, " ").encode()
