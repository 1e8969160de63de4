"""Text to token ids and back, whole or as a stream, for every kind of LLaMA tokenizer.

    loading.py             find a tokenizer file, recognise its kind by content, load it
    base.py                the base class Tokenizer, and StreamDecoder
    sentencepiece_kind.py  LLaMA 1 and 2's SentencePiece models
    tiktoken_kind.py       Llama 3's ranks files
    tokenizers_kind.py     Hugging Face's tokenizer.json
    files.py               the JSON files beside a tokenizer

``load_tokenizer(path)`` returns the right kind. Decoding goes through bytes: each id stands for some bytes
(``token_bytes``), and text is their UTF-8 decoding. That makes a stream exact by construction: an incremental UTF-8
decoder yields the same text as decoding the whole, and a character whose bytes are spread over several tokens is held
back until its last byte is there.

Control tokens written out in a text (``</s>``) stay text unless ``allow_special`` asks for them.
"""

from llama.tokenizer.base import Part, StreamDecoder, Tokenizer, TokenizerKind
from llama.tokenizer.files import special_names
from llama.tokenizer.loading import find_tokenizer, load_tokenizer, mismatch

__all__ = [
    "Part",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerKind",
    "find_tokenizer",
    "load_tokenizer",
    "mismatch",
    "special_names",
]
