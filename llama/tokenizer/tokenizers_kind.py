"""Hugging Face's tokenizer.json, read with the library tokenizers.

The library encodes. Decoding goes through bytes as with the other kinds, so this module computes the bytes of each id,
for the two sorts of decoder that LLaMA-family models have: byte-level (Llama 3) and SentencePiece's (Llama 2, Mistral).
tokenizer.json does not name the tokens that begin and end a sequence: they are in the files beside it, or have
well-known names.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from llama.errors import PromptError, TokenizerError, setting
from llama.regular_files import read_bytes
from llama.tokenizer.base import REPLACEMENT, Part, Tokenizer, library_errors
from llama.tokenizer.files import generation_ids, read_object, special_names

if TYPE_CHECKING:
    import tokenizers

MOST_WORDS = 2**24  # far above any model's: tables of all ids are made
_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_SENTENCEPIECE_LIKE = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})
_WELL_KNOWN = {"bos": ("<s>", "<|begin_of_text|>"), "eos": ("</s>", "<|end_of_text|>")}
_WELL_KNOWN_STOPS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


class JSONTokenizer(Tokenizer):
    """A tokenizer.json and the files beside it; see Tokenizer."""

    kind = "tokenizers"

    def __init__(self, model_path: str | Path) -> None:
        self._path = Path(model_path)
        content = read_object(self._path)
        _check_model(content.get("model"), self._path)
        self._library = _load(read_bytes(self._path).decode("utf-8-sig"), self._path)
        self._lock = Lock()  # encode_special_tokens is a switch on the library's object, not an argument
        self._bytes = _PieceBytes(self._library, content.get("decoder"), self._path)
        self._added = self._library.get_added_tokens_decoder()
        self._vocabulary = self._library.get_vocab(with_added_tokens=True)
        if not self._library.get_vocab_size(with_added_tokens=False):
            raise TokenizerError(f"{self._path}: its model has no tokens, so that it encodes no text")
        self.n_words = max(self._vocabulary.values(), default=-1) + 1
        if self.n_words > MOST_WORDS:
            raise TokenizerError(
                f"{self._path}: got the token id {self.n_words - 1}, expected at most {MOST_WORDS - 1}"
            )
        self.special_ids = {token.content: i for i, token in self._added.items() if token.special}
        self.bos_id, self.eos_id = self._end_id("bos"), self._end_id("eos")
        self.stop_ids = self._stops()

    def _end_id(self, which: str) -> int:
        """Return the id of BOS or EOS.

        The files beside the tokenizer give its name or its id; otherwise a well-known name is used.
        """
        directory = self._path.parent
        name = special_names(directory).get(f"{which}_token")
        if name is not None and name not in self._vocabulary:
            raise TokenizerError(
                f"{directory}: its files name {name!r} as {which}_token, which is not in {self._path.name}"
            )
        if name is not None:
            return self._vocabulary[name]
        known = [self._vocabulary[n] for n in _WELL_KNOWN[which] if n in self._vocabulary]
        ids = [*generation_ids(directory, f"{which}_token_id"), *known]
        if not ids:
            raise TokenizerError(
                f"{self._path} has no {which.upper()} token: LLaMA needs one; expected {which}_token in "
                f"tokenizer_config.json beside it, or a token {' or '.join(_WELL_KNOWN[which])}"
            )
        return ids[0]

    def _stops(self) -> tuple[int, ...]:
        """Return EOS, the ids that generation_config.json adds, and the well-known ends of turns."""
        known = [self.special_ids[name] for name in _WELL_KNOWN_STOPS if name in self.special_ids]
        ids = tuple(dict.fromkeys([self.eos_id, *generation_ids(self._path.parent, "eos_token_id"), *known]))
        if max(self.bos_id, *ids) >= self.n_words:
            raise TokenizerError(
                f"{self._path.parent}: its files give token ids {self.bos_id} and {list(ids)}, of which "
                f"{self._path.name} has only those below {self.n_words}: they belong to different models"
            )
        return ids

    def _encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Encode the joined text in one call, with control tokens only where parts allow them.

        The library knows two ways only: every control token in a text, or none. If a text holds both sorts, a second
        tokenizer encodes it, in which the control tokens have names that nobody can guess.
        """
        text = "".join(part.text for part in parts)
        meant = sum(len(self.special_pattern.findall(part.text)) for part in parts if part.allow_special)
        ids = self._run(text, allow_special=meant > 0)
        controls = set(self.special_ids.values())
        if meant and sum(i in controls for i in ids) != meant:
            ids = self._renamed.encode(parts, self.special_pattern)
        if sum(i in controls - self._unknown for i in ids) > meant:
            written = ", ".join(sorted({found for part in parts for found in self.special_pattern.findall(part.text)}))
            raise PromptError(
                f"the text holds {written or 'a control token'}, which {self._path.name} cannot encode as plain text"
            )
        return ids

    def _run(self, text: str, allow_special: bool) -> list[int]:
        with self._lock:
            self._library.encode_special_tokens = not allow_special
            return _encode(self._library, text, self._path)

    @cached_property
    def _unknown(self) -> set[int]:
        """The id that some models use for unknown characters, if there is one."""
        name = getattr(self._library.model, "unk_token", None)
        return {self.special_ids[name]} if name in self.special_ids else set()

    @cached_property
    def _renamed(self) -> _RenamedTokenizer:
        return _RenamedTokenizer(read_object(self._path), self._added, self._path)

    def first_bytes(self, token_id: int) -> bytes:
        """As the file's decoder begins a text."""
        piece = self._library.id_to_token(token_id) if 0 <= token_id < self.n_words else None
        return self.token_bytes(token_id) if piece is None else self._bytes.first(piece)

    def _bytes_of(self, token_id: int) -> bytes:
        piece = self._library.id_to_token(token_id)
        if piece is None:
            return REPLACEMENT  # ids may have gaps
        return b"" if token_id in self._added and self._added[token_id].special else self._bytes.of(piece)


class _RenamedTokenizer:
    """The same tokenizer with random names for its control tokens, which no text can contain.

    Args:
        content: the tokenizer.json.
        added: the tokens that were added to its model, by id.
        path: its file, for errors.
    """

    def __init__(self, content: dict[str, Any], added: dict[int, tokenizers.AddedToken], path: Path) -> None:
        from tokenizers import AddedToken

        self._path = path
        nonce = secrets.token_hex(16)
        self._library = _load(json.dumps({**content, "added_tokens": [], "post_processor": None}), path)
        self._names = {token.content: f"\U000f0000{nonce}.{i}\U000f0001" for i, token in added.items() if token.special}
        self._ids: dict[int, int] = {}  # by the id that the token got here
        for i, token in added.items():
            name = self._names.get(token.content, token.content)
            flags = {k: getattr(token, k) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            self._library.add_tokens([AddedToken(name, **flags)])
            own_id = self._library.token_to_id(name)
            assert own_id is not None
            self._ids[own_id] = i

    def encode(self, parts: Sequence[Part], pattern: re.Pattern[str]) -> list[int]:
        """Encode the joined text; ``pattern`` finds control tokens in the parts that allow them."""
        texts = [pattern.sub(lambda m: self._names[m.group()], p.text) if p.allow_special else p.text for p in parts]
        return [self._ids.get(i, i) for i in _encode(self._library, "".join(texts), self._path)]


class _PieceBytes:
    """How a file's decoder turns pieces into bytes.

    Args:
        library: its decoder is tried on a few pieces, because the same parts decode differently in another order.
        decoder: the file's section of that name.
        path: the file, for errors.

    Raises:
        TokenizerError: a decoder that is neither byte-level nor in SentencePiece's manner.
    """

    def __init__(self, library: tokenizers.Tokenizer, decoder: Any, path: Path) -> None:
        names = _decoder_names(decoder)
        self._byte_level = names == ["ByteLevel"]
        if self._byte_level:
            return
        # how many of three leading spaces are kept: Strip removes one, Metaspace all of the first piece, others none
        pieces = [f"{_SPACE * 3}a", f"{_SPACE}b{_SPACE}", f"{_SPACE}b{_SPACE}"]
        with library_errors(f"{path}: its decoder fails"):
            first = library.decoder.decode(pieces) if names else ""
        self._first_spaces = len(first) - len(first.lstrip(" "))
        self._byte_fallback = "ByteFallback" in names
        if (
            not set(names) <= _SENTENCEPIECE_LIKE
            or first.lstrip(" ") != "a b  b "
            or self._first_spaces not in (0, 2, 3)
        ):
            raise TokenizerError(
                f"{path}: its decoder is {' + '.join(names) or 'absent'}, expected ByteLevel or SentencePiece's manner "
                "(Replace or Metaspace, ByteFallback, Fuse, Strip); where a SentencePiece *.model lies beside it, "
                f"give that with {setting('tokenizer_path')}"
            )

    def of(self, piece: str) -> bytes:
        """The bytes of a piece within a text."""
        if self._byte_level:
            known = all(c in _BYTE_LEVEL for c in piece)
            return bytes(_BYTE_LEVEL[c] for c in piece) if known else piece.encode()
        if self._byte_fallback and _BYTE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def first(self, piece: str) -> bytes:
        """The bytes of a text's first piece."""
        if self._byte_level or self._first_spaces == 3:
            return self.of(piece)
        return self.of(piece.replace(_SPACE, "")) if self._first_spaces == 0 else self.of(piece).removeprefix(b" ")


def _check_model(model: Any, path: Path) -> None:
    """Refuse vocabularies that mark a piece's position in a word: their bytes are not the piece's."""
    marks = (
        [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
        if isinstance(model, dict)
        else []
    )
    if any(marks):
        raise TokenizerError(
            f"{path}: its model marks pieces within words (by {marks}), expected a model of the LLaMA family, without"
        )


def _decoder_names(decoder: Any) -> list[str]:
    """The types of a decoder section, sequences taken apart."""
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") != "Sequence":
        return [str(decoder.get("type"))]
    return [name for part in decoder.get("decoders", ()) for name in _decoder_names(part)]


def _load(content: str, path: Path) -> tokenizers.Tokenizer:
    """The library's object of a tokenizer.json, which neither truncates nor pads."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise TokenizerError(f"{path} needs the library tokenizers: pip install tokenizers") from error
    with library_errors(f"{path} is not a tokenizer.json that the library tokenizers reads"):
        library = Library.from_str(content)
        library.no_truncation()
        library.no_padding()
    return library


def _encode(library: tokenizers.Tokenizer, text: str, path: Path) -> list[int]:
    """Ids of a text, without the tokens that the file's post-processor would add."""
    with library_errors(f"{path} cannot encode a text, so it is damaged"):
        return library.encode(text, add_special_tokens=False).ids


def _byte_level_table() -> dict[str, int]:
    """Return GPT-2's table of visible characters for bytes.

    Visible bytes stand for themselves, the others are written from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_BYTE_LEVEL = _byte_level_table()
