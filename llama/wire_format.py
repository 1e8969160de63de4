"""Protobuf's wire format: the few kinds of fields that messages are written of whose classes no library brings.

XLA reads its modules so (xla/modules.py), and sentencepiece its models (tokenizer/gguf_kind.py).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence


def varint(value: int) -> bytes:
    """A whole number in groups of seven bits, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    """A field that holds a whole number."""
    return varint(field << 3) + varint(value)


def float32(field: int, value: float) -> bytes:
    """A field that holds a float32."""
    return varint(field << 3 | 5) + struct.pack("<f", value)


def nested(field: int, content: bytes) -> bytes:
    """A field that holds a message, a string or bytes."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def packed(field: int, values: Sequence[int]) -> bytes:
    """A repeated field of whole numbers."""
    return nested(field, b"".join(map(varint, values)))
