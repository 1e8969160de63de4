"""The tokenizer in a GGUF file's metadata, turned into the file that its own library reads.

``tokenizer.ggml.model`` names the kind: ``llama`` is a SentencePiece model (pieces with scores and types), ``gpt2`` a
byte-level BPE (tokens, merges, and the name of the pattern that cuts texts into words). The one becomes a SentencePiece
model, the other a tokenizer.json, both in memory; ``companions`` returns them for a checkpoint that is written from the
file.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from llama.errors import CheckpointError, TokenizerError, setting
from llama.gguf_header import read_header
from llama.tokenizer.base import Tokenizer
from llama.tokenizer.sentencepiece_kind import SentencePieceTokenizer
from llama.tokenizer.tiktoken_kind import PATTERN as LLAMA3
from llama.tokenizer.tokenizers_kind import (
    _WELL_KNOWN_STOPS,
    JSONTokenizer,
    _load,
    _PieceBytes,
    _RenamedTokenizer,
)
from llama.wire_format import float32, nested, number

log = logging.getLogger("llama")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, by SentencePiece's numbers
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: dict[str, tuple[str, ...]] = {  # by tokenizer.ggml.pre; each cuts what the one before has left
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), (LLAMA3,)),
    "gpt-2": (GPT2,),
    "qwen2": (QWEN2,),
    "smollm": (r"\p{N}", GPT2),
    "tekken": (TEKKEN,),
}
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token is taken without merging
ENDS = (
    *_WELL_KNOWN_STOPS,
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
)  # where control tokens have these names
_SPACE = "\u2581"


class Vocabulary(NamedTuple):
    """What the metadata say about the tokenizer, checked.

    Attributes:
        model: ``llama`` or ``gpt2``.
        types: of each token, see NORMAL and the others.
        scores: of each piece; empty for ``gpt2``.
        merges: of ``gpt2``.
        stop_ids: every id that ends a generation, EOS first.
        adds_bos: prompts begin with BOS.
        adds_space: a text begins with a space that is not in it.
    """

    path: Path
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    adds_bos: bool
    adds_space: bool

    def of_type(self, kind: int) -> dict[str, int]:
        """The tokens of one type, with their ids."""
        return {self.tokens[i]: i for i, each in enumerate(self.types) if each == kind}


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a GGUF file.

    Raises:
        TokenizerError: the file or its metadata are damaged, the tokenizer is of another kind, or has no BOS or EOS.
    """
    vocabulary = read_vocabulary(path)
    return GGUFSentencePiece(vocabulary) if vocabulary.model == "llama" else GGUFByteLevel(vocabulary)


def read_vocabulary(path: Path) -> Vocabulary:
    """Read and check the tokenizer's metadata.

    Raises:
        TokenizerError: see load_gguf_tokenizer.
    """
    metadata = _Metadata(path)
    model = metadata.take("model", str)
    if model not in ("llama", "gpt2"):
        raise TokenizerError(f"{path}: tokenizer.ggml.model is {model!r:.40}, expected 'llama' or 'gpt2'")
    pre = metadata.take("pre", str, "llama-bpe" if model == "llama" else None)
    if model == "gpt2" and pre not in PATTERNS:
        raise TokenizerError(
            f"{path}: tokenizer.ggml.pre is {pre!r:.40}, expected one of {', '.join(PATTERNS)}: how it cuts "
            f"texts into words is not known; give a tokenizer.json with {setting('tokenizer_path')}"
        )
    tokens = metadata.take_list("tokens", str)
    count = len(tokens)
    types = metadata.take_list("token_type", int, None if model == "llama" else [NORMAL] * count)
    scores = metadata.take_list("scores", float) if model == "llama" else []
    _check_tokens(path, tokens, types, scores)
    bos_id, eos_id = metadata.token_id("bos", count), metadata.token_id("eos", count)
    if bos_id is None or eos_id is None:
        raise TokenizerError(
            f"{path}: got BOS {bos_id} and EOS {eos_id}, expected tokenizer.ggml.bos_token_id and eos_token_id"
        )
    ends = [eos_id, metadata.token_id("eot", count), metadata.token_id("eom", count)]
    for special_id in (bos_id, *ends):
        if special_id is not None and types[special_id] == NORMAL:
            types = [*types[:special_id], CONTROL, *types[special_id + 1 :]]  # as llama.cpp takes it
    ends += [tokens.index(name) for name in ENDS if name in tokens and types[tokens.index(name)] == CONTROL]
    return Vocabulary(
        path,
        model,
        str(pre),
        tokens,
        types,
        scores,
        metadata.take_list("merges", str) if model == "gpt2" else [],
        bos_id,
        eos_id,
        tuple(dict.fromkeys(each for each in ends if each is not None)),
        metadata.take("add_bos_token", bool, model == "llama" or pre in WHOLE_WORDS),
        metadata.take("add_space_prefix", bool, True),
    )


def _check_tokens(path: Path, tokens: list[str], types: list[int], scores: list[float]) -> None:
    """Refuse lists that do not belong together, numbers out of their range, and tokens that occur twice.

    Only SentencePiece's pieces have scores, and one of them stands for what is unknown.
    """
    if len(types) != len(tokens) or len(scores) not in (0, len(tokens)):
        raise TokenizerError(
            f"{path}: {len(tokens)} tokens have {len(types)} types and {len(scores)} scores, expected equally many"
        )
    if any(not NORMAL <= kind <= BYTE for kind in types) or not all(map(math.isfinite, scores)):
        raise TokenizerError(
            f"{path}: got a type of a token or a score that is none, expected types from {NORMAL} to {BYTE} and finite "
            "scores"
        )
    if scores and types.count(UNKNOWN) != 1:
        raise TokenizerError(f"{path}: {types.count(UNKNOWN)} pieces are of type {UNKNOWN}, unknown, expected one")
    if len(set(tokens)) != len(tokens) or "" in tokens:
        raise TokenizerError(f"{path}: tokenizer.ggml.tokens holds a token twice, or an empty one")


def chat_template_of(path: Path) -> str | None:
    """Return the chat template in a GGUF file's metadata, if it has one.

    Raises:
        TokenizerError: the file is damaged, or the template is no text.
    """
    return _Metadata(path, "tokenizer.").take("chat_template", str, "") or None


class _Metadata:
    """The metadata about the tokenizer; values of another type are refused."""

    def __init__(self, path: Path, prefix: str = "tokenizer.ggml.") -> None:
        self._path, self._prefix = path, prefix
        try:
            self._values: Mapping[str, Any] = read_header(path).metadata
        except CheckpointError as error:
            raise TokenizerError(str(error)) from error

    def take(self, name: str, kind: type, otherwise: Any = None) -> Any:
        """Return a value; ``otherwise`` if it is absent."""
        value = self._values.get(self._prefix + name)
        if value is None:
            return otherwise
        if type(value) is not kind:
            raise TokenizerError(
                f"{self._path}: {self._prefix}{name} is {str(value)[:40]!r}, expected a value of type {kind.__name__}"
            )
        return value

    def take_list(self, name: str, kind: type, otherwise: list[Any] | None = None) -> list[Any]:
        """Return a list whose entries are of one type; ``otherwise``, if it is not None, if it is absent."""
        values = self.take(name, list, otherwise)
        if not values or not all(type(value) is kind for value in values):
            raise TokenizerError(f"{self._path}: {self._prefix}{name} is absent, empty, or no list of {kind.__name__}")
        return list(values)

    def token_id(self, name: str, count: int) -> int | None:
        """Return the id of a special token, or None."""
        value = self.take(f"{name}_token_id", int)
        if value is not None and not 0 <= value < count:
            raise TokenizerError(f"{self._path}: {self._prefix}{name}_token_id is {value}, expected one below {count}")
        return None if value is None else int(value)


class _Prefixed(Tokenizer):
    """Begins with BOS where the file says so. An empty text is BOS alone in any case, or it would be no prompt."""

    _adds_bos: bool

    def encode(self, text: str, bos: bool = True, eos: bool = False, allow_special: bool = False) -> list[int]:
        """See Tokenizer; ``bos`` has no effect where the model was trained without."""
        return super().encode(text, bos and (self._adds_bos or not text), eos, allow_special)


class GGUFSentencePiece(_Prefixed, SentencePieceTokenizer):
    """A SentencePiece model from a GGUF file; see Tokenizer.

    Tokens that were added to the model (USER_DEFINED) are found in any text, and a stretch between two of them begins
    with a space like a text, as in llama.cpp.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._user_defined = vocabulary.of_type(USER_DEFINED)
        as_control = [CONTROL if kind == USER_DEFINED else kind for kind in vocabulary.types]
        super().__init__(vocabulary.path, sentencepiece_model(vocabulary._replace(types=as_control)))
        for token, token_id in self._user_defined.items():
            self._table[token_id] = token.replace(_SPACE, " ").encode()
        self.special_ids = vocabulary.of_type(CONTROL)
        self.stop_ids = vocabulary.stop_ids
        self._adds_bos = vocabulary.adds_bos
        longest_first = sorted(self._user_defined, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(self._pattern.split(text)):
            if place % 2:
                ids.append(self._user_defined[part])
            elif part:
                ids += super()._encode_text(part)
        return ids


class GGUFByteLevel(_Prefixed, JSONTokenizer):
    """A byte-level BPE from a GGUF file; see Tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._path = vocabulary.path
        self._content = tokenizer_json(vocabulary)
        self._library = _load(json.dumps(self._content), self._path)
        self._lock = Lock()
        self._bytes = _PieceBytes(self._library, self._content["decoder"], self._path)
        self._added = self._library.get_added_tokens_decoder()
        self._vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.n_words = len(vocabulary.tokens)
        self.special_ids = vocabulary.of_type(CONTROL)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self._adds_bos = vocabulary.adds_bos

    @cached_property
    def _renamed(self) -> _RenamedTokenizer:
        return _RenamedTokenizer(self._content, self._added, self._path)


def companions(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (file name, content) of the files that hold a GGUF file's tokenizer and chat template in other formats.

    The log warns where these cannot say that prompts begin without BOS.

    Raises:
        TokenizerError: see load_gguf_tokenizer.
    """
    found = read_vocabulary(path)
    if not found.adds_bos:
        log.warning("%s: its prompts begin without BOS, those of the new checkpoint begin with it", path)
    if found.model == "llama":
        yield "tokenizer.model", sentencepiece_model(found)
    else:
        yield "tokenizer.json", _json(tokenizer_json(found))
    config = {
        "bos_token": found.tokens[found.bos_id],
        "eos_token": found.tokens[found.eos_id],
        "add_bos_token": found.adds_bos,
    }
    template = chat_template_of(path)
    yield "tokenizer_config.json", _json(config if template is None else {**config, "chat_template": template})
    if len(found.stop_ids) > 1:
        yield "generation_config.json", _json({"eos_token_id": list(found.stop_ids)})


def _json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    words = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS[vocabulary.pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pairs = [merge.split(" ") for merge in vocabulary.merges]
    if any(len(pair) != 2 for pair in pairs):
        raise TokenizerError(f"{vocabulary.path}: tokenizer.ggml.merges holds an entry that is not two tokens")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": vocabulary.tokens[i], **flags, "special": kind == CONTROL}
            for i, kind in enumerate(vocabulary.types)
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.pre in WHOLE_WORDS,
            "vocab": {token: i for i, token in enumerate(vocabulary.tokens)},
            "merges": pairs,
        },
    }


def sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    """The SentencePiece model of pieces with scores: a message ModelProto, written field by field.

    The numbers of fields are those of sentencepiece_model.proto.
    """
    pieces = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    has_bytes = BYTE in vocabulary.types
    (unknown,) = vocabulary.of_type(UNKNOWN)
    trainer = b"".join(
        [
            number(3, 2),  # model_type BPE
            number(4, len(vocabulary.tokens)),  # vocab_size
            number(35, has_bytes),  # byte_fallback
            _text(45, unknown),  # unk_piece, then bos_piece and eos_piece
            _text(46, vocabulary.tokens[vocabulary.bos_id]),
            _text(47, vocabulary.tokens[vocabulary.eos_id]),
        ]
    )
    normalizer = b"".join(
        [
            _text(1, "identity"),
            number(3, vocabulary.adds_space),  # add_dummy_prefix
            number(4, False),  # remove_extra_whitespaces
            number(5, True),  # escape_whitespaces
        ]
    )
    written = [nested(1, _text(1, piece) + float32(2, score) + number(3, kind)) for piece, score, kind in pieces]
    return b"".join([*written, nested(2, trainer), nested(3, normalizer)])


def _text(field: int, text: str) -> bytes:
    return nested(field, text.encode())
