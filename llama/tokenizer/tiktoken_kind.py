"""Llama 3's tokenizer file: lines of ``base64 rank``, read with tiktoken.

The file holds the ranks alone. The pattern that cuts texts into words and the 256 control tokens after the ranks belong
to the format; both are as Meta's llama-models publishes them. Llama 3.0 calls some of the control tokens reserved that
3.1 gave a name to.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

from llama.errors import TokenizerError
from llama.tokenizer.base import PlainTextTokenizer, library_errors

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
N_SPECIAL = 256
BOS, EOS, EOM, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
NAMED = (
    BOS,
    EOS,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    EOM,
    EOT,
    "<|python_tag|>",
    "<|image|>",
)
SPECIAL = (*NAMED, *(f"<|reserved_special_token_{i + 2}|>" for i in range(N_SPECIAL - len(NAMED))))

# tiktoken fails on texts and runs much longer than these. Meta's tokenizer cuts at the same places, which gives the
# same ids.
LONGEST_TEXT = 400_000
LONGEST_RUN = 25_000
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})\s*")
_RUN = re.compile(r"\s+|\S+")


class TiktokenTokenizer(PlainTextTokenizer):
    """A ranks file; see Tokenizer. The control tokens follow the file's own ranks."""

    kind = "tiktoken"

    def __init__(self, model_path: str | Path) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise TokenizerError(f"{model_path} needs the library tiktoken: pip install tiktoken") from error
        ranks = read_ranks(Path(model_path))
        self._first_special = len(ranks)
        self.n_words = len(ranks) + N_SPECIAL
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.bos_id, self.eos_id = self.special_ids[BOS], self.special_ids[EOS]
        self.stop_ids = tuple(self.special_ids[name] for name in (EOS, EOM, EOT))
        self._path = Path(model_path)
        with library_errors(f"{model_path} is not a ranks file that the library tiktoken reads"):
            self._encoding = tiktoken.Encoding(
                "llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
            )

    def _encode_text(self, text: str) -> list[int]:
        with library_errors(f"{self._path} cannot encode a text, so it is damaged"):
            return [i for piece in _digestible(text) for i in self._encoding.encode_ordinary(piece)]

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if token_id >= self._first_special else self._encoding.decode_single_token_bytes(token_id)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read and check a ranks file; return ranks by token bytes.

    Every rank from 0 and every token occurs once, and all single bytes are among the tokens.

    Raises:
        TokenizerError: the file is not that, or larger than Llama 3's (another model's, with another pattern).
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(match.group(1), validate=True) if match else b""
        except ValueError:
            token = b""
        if match is None or not token or token in ranks:
            raise TokenizerError(
                f"{path}, line {number}: got {line[:60]!r}, expected 'base64 rank' with a token "
                "that was not there before"
            )
        ranks[token] = int(match.group(2))
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"{path}: its {len(ranks)} ranks are not 0 to {len(ranks) - 1}, each once: lines are missing or doubled"
        )
    absent = [b for b in range(256) if bytes([b]) not in ranks]
    if absent:
        raise TokenizerError(
            f"{path}: {len(absent)} of the 256 single bytes are missing, the first is {absent[0]}: it is cut short"
        )
    if len(ranks) > LLAMA3_RANKS:
        raise TokenizerError(
            f"{path}: got {len(ranks)} ranks, expected at most Llama 3's {LLAMA3_RANKS}: it is another model's"
        )
    return ranks


def _digestible(text: str) -> Iterator[str]:
    """Yield the text in pieces that tiktoken can encode.

    A piece has at most ``LONGEST_TEXT`` characters, and at most ``LONGEST_RUN`` in a row with or without white space.
    """
    for start in range(0, len(text), LONGEST_TEXT):
        block = text[start : start + LONGEST_TEXT]
        runs = _RUN.finditer(block) if len(block) > LONGEST_RUN else ()
        cuts = [cut for run in runs for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)]
        for begin, end in zip([0, *cuts], [*cuts, len(block)], strict=True):
            yield block[begin:end]
