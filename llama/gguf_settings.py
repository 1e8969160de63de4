"""The settings in a GGUF file's metadata: the model's shape, without torch.

Only general.architecture ``llama`` is supported. As with config.json, settings that would change the computation in an
unsupported way are refused by name, and so are unknown ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama.config import ModelArgs, RopeScaling
from llama.errors import CheckpointError, ConfigError
from llama.gguf_header import GGUFHeader, StoredTensor, read_floats, read_header
from llama.settings import DEFAULT_THETA, Planned, Settings
from llama.sharding import LAYER, numberless
from llama.storage import WeightFormat, formats_of, scale_of

TO_GGUF = {
    "tok_embeddings.weight": "token_embd.weight",
    "layers.{}.attention.wq.weight": "blk.{}.attn_q.weight",
    "layers.{}.attention.wk.weight": "blk.{}.attn_k.weight",
    "layers.{}.attention.wv.weight": "blk.{}.attn_v.weight",
    "layers.{}.attention.wo.weight": "blk.{}.attn_output.weight",
    "layers.{}.feed_forward.w1.weight": "blk.{}.ffn_gate.weight",
    "layers.{}.feed_forward.w2.weight": "blk.{}.ffn_down.weight",
    "layers.{}.feed_forward.w3.weight": "blk.{}.ffn_up.weight",
    "layers.{}.attention_norm.weight": "blk.{}.attn_norm.weight",
    "layers.{}.ffn_norm.weight": "blk.{}.ffn_norm.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
FROM_GGUF = {theirs: ours for ours, theirs in TO_GGUF.items()}
_BLOCK = re.compile(r"^blk\.(0|[1-9][0-9]*)\.")
KEPT = {"Q4_0": WeightFormat("int4", 32), "Q8_0": WeightFormat("int8", 32)}  # types of matrices that stay as they are
ARCHITECTURE = "llama"
EMBEDDING, HEAD, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
NEEDED = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "feed_forward_length": "ffn_hidden_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
READ = {
    *NEEDED,
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("vocab_size", "rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
}
# Settings that change the computation, and the value with which it is LLaMA's
NEUTRAL: dict[str, object] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}
HARMLESS = {"context_length", "tensor_data_layout", "rope.scaling.finetuned"}
RULES = ((1.0, 4.0, 8192),)  # low and high frequency factor, original positions: of all that Llama 3.1 and later ship
CLOSE = 1e-4  # rotary factors are stored as float32


def read_gguf(path: Path) -> Settings:
    """Read the shape that a GGUF file declares; a vocabulary size of -1 is settled by the embedding.

    Raises:
        CheckpointError: damaged, of another architecture, without a required setting, or with an unsupported one.
    """
    header = read_header(path)
    found = header.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise CheckpointError(
            f"{path}: general.architecture is {str(found)[:40]!r}, expected {ARCHITECTURE!r}; other models are not "
            "computed here"
        )
    values = {k.removeprefix("llama."): v for k, v in header.metadata.items() if k.startswith("llama.")}
    _check_settings(path, values)
    try:
        args = ModelArgs(
            **{ours: values[theirs] for theirs, ours in NEEDED.items()},
            n_kv_heads=_kv_heads(path, values),
            vocab_size=_vocab_size(header, values),
            rope_theta=values.get("rope.freq_base", DEFAULT_THETA),
            tie_word_embeddings=HEAD not in header.tensors,
            **_head_dim(path, values),
        )
        _check_rotary(path, values, args)
        args = replace(args, rope_scaling=_scaling(header, values, args))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error} (in Meta's names)") from error
    window = values.get("attention.sliding_window")
    if window is not None and (type(window) is not int or window < 0):
        raise CheckpointError(f"{path}: llama.attention.sliding_window is {window}, expected a number of positions")
    return Settings(args, path, sliding_window=window or None)


def read_planned_gguf(path: Path) -> Planned:
    """``read_gguf``, with the quantised weights that stay so.

    Raises:
        CheckpointError: see there.
    """
    settings, tensors = read_gguf(path), read_header(path).tensors
    kept: dict[str, tuple[tuple[int, ...], str]] = {}
    for theirs, stored in tensors.items():
        if (name := to_meta(theirs)) is not None:
            kept |= kept_tensors(name, stored)
    return Planned(settings, formats_of(kept))


def kept_tensors(name: str, stored: StoredTensor) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tensors that a stored one is read as, by Meta's names: a matrix of Q4_0 or Q8_0 and its
    scales, or a single one.

    Args:
        name: Meta's, of the stored one.
    """
    is_matrix = len(stored.shape) == 2 and name.endswith(".weight")
    kind = KEPT.get(stored.kind) if is_matrix else None
    if kind is None:
        return {name: (stored.shape, "other")}
    rows, width = stored.shape
    scales = {scale_of(name): ((rows, width // kind.group), "float16")}
    return {name: ((rows, width // 2), "uint8") if kind.dtype == "int4" else (stored.shape, "int8"), **scales}


def _check_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse settings that are missing, unknown, or that would compute something else."""
    missing = [f"llama.{key}" for key in NEEDED if key not in values]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}")
    for key, value in values.items():
        if key in NEUTRAL and value != NEUTRAL[key]:
            raise CheckpointError(
                f"{path}: llama.{key} is {str(value)[:40]}, which is not computed here; expected {NEUTRAL[key]}"
            )
        if key not in READ and key not in NEUTRAL and key not in HARMLESS:
            raise CheckpointError(
                f"{path}: unknown setting llama.{key[:80]}: it may change what the model computes, so it is not ignored"
            )


def _kv_heads(path: Path, values: Mapping[str, Any]) -> Any:
    """Return the key and value heads, which some files give for each layer."""
    heads = values.get("attention.head_count_kv")
    if not isinstance(heads, list):
        return heads
    if not heads or len(set(heads)) != 1:
        raise CheckpointError(
            f"{path}: llama.attention.head_count_kv is {str(heads)[:80]}, expected the same number in every layer"
        )
    return heads[0]


def _vocab_size(header: GGUFHeader, values: Mapping[str, Any]) -> Any:
    """Return the embedding's number of rows, or what the settings say where there is no embedding."""
    shape = header.tensors[EMBEDDING].shape if EMBEDDING in header.tensors else ()
    return shape[0] if len(shape) == 2 else values.get("vocab_size", -1)


def _head_dim(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the head's size where it is not the width divided by the number of heads (Mistral NeMo)."""
    dim, heads, size = (values.get(key) for key in ("embedding_length", "attention.head_count", "attention.key_length"))
    if values.get("attention.value_length", size) != size and "attention.key_length" in values:
        raise CheckpointError(
            f"{path}: llama.attention.key_length is {str(size)[:40]} and value_length "
            f"{str(values['attention.value_length'])[:40]}, expected the same"
        )
    is_usual = type(size) is type(dim) is type(heads) is int and dim == heads * size
    return {} if size is None or is_usual else {"attn_head_dim": size}


def _check_rotary(path: Path, values: Mapping[str, Any], args: ModelArgs) -> None:
    """Refuse rotary embedding of a part of each head."""
    turned = values.get("rope.dimension_count", args.head_dim)
    if turned != args.head_dim:
        raise CheckpointError(
            f"{path}: llama.rope.dimension_count is {str(turned)[:40]}, expected the head's size, {args.head_dim}"
        )


def _scaling(header: GGUFHeader, values: Mapping[str, Any], args: ModelArgs) -> RopeScaling | None:
    """Return the scaling of rotary frequencies: by one factor, or by Llama 3.1's table of factors."""
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{header.path}: llama.rope.scaling.type is {str(kind)[:40]!r}, which is not computed here; "
            "expected 'none' or 'linear'"
        )
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0)) if kind == "linear" else 1.0
    linear = None if factor == 1.0 else RopeScaling(factor=factor, kind="linear")
    if FREQUENCIES not in header.tensors:
        return linear
    by_table = _llama3(header, values, args)
    if linear is not None and by_table is not None:
        raise CheckpointError(f"{header.path}: got both linear rotary scaling and {FREQUENCIES}, expected one of them")
    return linear if by_table is None else by_table


def _llama3(header: GGUFHeader, values: Mapping[str, Any], args: ModelArgs) -> RopeScaling | None:
    """Return the scaling that a file's table of rotary factors was computed from; None where all of them are 1.

    Raises:
        CheckpointError: a table of another rule.
    """
    found = read_floats(header, FREQUENCIES)
    if found == [1.0] * (args.head_dim // 2):
        return None
    original = values.get("rope.scaling.original_context_length")
    rules = [*RULES, *((low, high, original) for low, high, _ in RULES if type(original) is int)]
    for low, high, positions in rules if len(found) == args.head_dim // 2 and math.isfinite(max(found)) else ():
        scaling = RopeScaling(_rounded(max(found)), low, high, positions)
        if all(math.isclose(a, b, rel_tol=CLOSE) for a, b in zip(found, factors(scaling, args), strict=True)):
            return scaling
    raise CheckpointError(
        f"{header.path}: {FREQUENCIES} holds {len(found)} factors that are not those of Llama 3.1's rule "
        f"(low_freq_factor 1, high_freq_factor 4, 8192 positions) for heads of {args.head_dim}"
    )


def _rounded(factor: float) -> float:
    """Return the whole number that a float32 factor is close to, or else the factor."""
    return float(round(factor)) if math.isclose(factor, round(factor), rel_tol=CLOSE) else factor


def factors(scaling: RopeScaling, args: ModelArgs) -> list[float]:
    """Return what Llama 3.1's rule divides each rotary frequency by, from the highest one on."""
    found = []
    for index in range(args.head_dim // 2):
        wavelength = 2 * math.pi * args.rope_theta ** (2 * index / args.head_dim)
        turns = scaling.original_max_seq_len / wavelength
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # of the frequency that stays
        found.append(1 / ((1 - share) / scaling.factor + share))
    return found


def to_gguf(name: str) -> str | None:
    """GGUF's name for one of Meta's, or None for a name that is not in the table."""
    theirs, layer = TO_GGUF.get(numberless(name)), LAYER.search(name)
    return theirs and theirs.format(layer and layer[1])


def to_meta(name: str) -> str | None:
    """Meta's name for one of GGUF's, or None for a name that is not in the table."""
    layer = _BLOCK.match(name)
    if layer is None:
        return None if "{" in name else FROM_GGUF.get(name)
    ours = FROM_GGUF.get(_BLOCK.sub("blk.{}.", name))
    return ours and ours.format(layer[1])
