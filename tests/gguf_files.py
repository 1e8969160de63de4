"""GGUF files for tests, written by the library gguf: random tiny models in any type, with either kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import tokenizer_files
import torch
from gguf import GGMLQuantizationType as Kind

from llama import ModelArgs
from llama.checkpoint.gguf_file import to_gguf

ARGS = ModelArgs(
    dim=256, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=320, multiple_of=256, norm_eps=2e-5, rope_theta=20000.0
)
BY_HAND = {  # fields of a K-quant's block, which the library reads but does not write: 16-bit floats first or last
    Kind.Q4_K: (2, 140, 0),
    Kind.Q5_K: (2, 172, 0),
    Kind.Q6_K: (0, 208, 1),
}


def stored(weight: torch.Tensor, kind: Kind, seed: int = 0) -> np.ndarray:
    """The bytes of a weight [rows, columns]; those of K-quants are random blocks of about its size."""
    if kind not in BY_HAND:
        return gguf.quantize(weight.float().numpy(), kind)
    before, numbers, after = BY_HAND[kind]
    rows, blocks = weight.shape[0], weight.shape[1] // 256
    chooser = np.random.default_rng(seed)
    size = (rows, blocks)
    scales = [
        chooser.uniform(1e-5, 5e-5, (*size, count)).astype(np.float16).view(np.uint8) for count in (before, after)
    ]
    return np.concatenate(
        [scales[0], chooser.integers(0, 256, (*size, numbers), np.uint8), scales[1]], axis=-1
    ).reshape(rows, -1)


def write(
    path: Path,
    args: ModelArgs,
    weights: dict[str, torch.Tensor],
    kind: Kind = Kind.F32,
    tokenizer: dict[str, Any] | None = None,
    factors: list[float] | None = None,
    **metadata: Any,
) -> Path:
    """Write a model.

    Args:
        weights: by Meta's names, in Meta's layout.
        kind: of the matrices; vectors are F32.
        tokenizer: entries ``tokenizer.*``.
        factors: of the rotary frequencies.
        metadata: more entries ``llama.*`` (``__`` for a dot), or other values for them; None leaves one out.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    entries: dict[str, Any] = {
        "llama.context_length": 512,
        "llama.embedding_length": args.dim,
        "llama.block_count": args.n_layers,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.rope.dimension_count": args.head_dim,
        "llama.rope.freq_base": args.rope_theta,
        "llama.vocab_size": args.vocab_size,
        **(tokenizer or {}),
        **{f"llama.{key.replace('__', '.')}": value for key, value in metadata.items()},
    }
    for key, value in entries.items():
        add(writer, key, value)
    for number, (name, weight) in enumerate(weights.items()):
        own = kind if weight.dim() == 2 else Kind.F32
        writer.add_tensor(str(to_gguf(name)), stored(weight, own, number), raw_dtype=own)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add an entry in the type that its Python value has here: whole numbers are unsigned."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        adders[type(value)](key, value)


def sentencepiece_entries(path: Path, **more: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece model; ``more`` are entries ``tokenizer.ggml.*``."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(library.vocab_size())

    def kind(i: int) -> int:
        is_kind = (library.is_unknown, library.is_control, lambda _: False, library.is_unused, library.is_byte)
        return next((number for number, check in enumerate(is_kind, start=2) if check(i)), 1)

    entries = {
        "model": "llama",
        "pre": "default",
        "tokens": [library.id_to_piece(i) for i in ids],
        "scores": [float(library.get_score(i)) for i in ids],
        "token_type": [kind(i) for i in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


def byte_level_entries(pre: str, **more: Any) -> dict[str, Any]:
    """The metadata of Llama 3's kind of tokenizer, trained on the spot."""
    made = json.loads(tokenizer_files.byte_level().to_str())
    vocabulary = {**made["model"]["vocab"], **{token["content"]: token["id"] for token in made["added_tokens"]}}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert sorted(vocabulary.values()) == list(range(len(tokens)))
    control = {token["content"] for token in made["added_tokens"]}
    merges = [each if isinstance(each, str) else " ".join(each) for each in made["model"]["merges"]]
    entries = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in control else 1 for token in tokens],
        "merges": merges,
        "bos_token_id": vocabulary["<|begin_of_text|>"],
        "eos_token_id": vocabulary["<|end_of_text|>"],
        "eot_token_id": vocabulary["<|eot_id|>"],
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
