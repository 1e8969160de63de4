"""Hugging Face's format: config.json with model.safetensors, in one file or several with an index.

Supported are LlamaForCausalLM, and MistralForCausalLM where it computes the same as LLaMA. Settings that would change
the computation in an unsupported way are refused by name; settings that change nothing (dropout, caches, token ids) are
ignored. Older checkpoints in pytorch_model.bin are read with a warning.

transformers rotates the two halves of a head's columns where Meta rotates neighbouring pairs, and stores the rows of wq
and wk in that order; ``read`` restores Meta's order.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import names
from llama.checkpoint.files import PickleFile, SafetensorsFile, TensorFile, read_json
from llama.checkpoint.source import Found, Settings, Source
from llama.config import LARGEST_SIZE, ModelArgs, RopeScaling
from llama.errors import CheckpointError, ConfigError

log = logging.getLogger("llama")

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
NEEDED = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
}
READ = {
    *NEEDED,
    *("architectures", "intermediate_size", "num_key_value_heads", "head_dim", "tie_word_embeddings", "sliding_window"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
}
# Settings that change the computation, and the values with which it is LLaMA's; None is always allowed
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "layer_types": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "no_rope_layers": ([],),
    "num_experts": (),
    "num_local_experts": (),
    "original_max_position_embeddings": (),  # transformers prefers it to the value inside rope_scaling
    "partial_rotary_factor": (1.0,),
    "qk_layernorm": (False,),
    "quantization": (),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "use_qk_norm": (False,),
}
# Other keys that transformers and other exporters write; they are not taken for misspelt settings
HARMLESS = {
    *(
        "model_type",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "torch_dtype",
        "dtype",
    ),
    *("use_sliding_window", "max_window_layers", "is_decoder"),
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ROPE_FIELDS: dict[str, dict[str, str]] = {  # of each kind, by transformers' names
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    },
}
DEFAULT_THETA = 10000.0  # transformers' default
LIKENESS = 0.8  # of an unknown key to one that is read: then it is a misspelling, or a flipped bit


class HFSource(Source):
    """A checkpoint in Hugging Face's format.

    Args:
        directory: with config.json and the weights.

    Raises:
        CheckpointError: a missing or damaged file, an index that contradicts the files, an unsupported setting, or see
            Source.
    """

    format = "huggingface"

    def __init__(self, directory: Path) -> None:
        settings = read_config(directory / "config.json")
        self._files = open_weights(directory)
        self._home: dict[str, TensorFile] = {}
        found = {}
        for file in self._files:
            for theirs, header in file.headers.items():
                if not names.DERIVED.fullmatch(theirs):
                    name = names.to_meta(theirs) or f"{theirs} (no weight of LLaMA's)"
                    self._home[name] = file
                    found[name] = Found(header.shape, header.dtype, file.path)
        super().__init__(directory, settings, found, tuple(file.path for file in self._files))

    def label(self, name: str) -> str:
        """A weight's name in Meta's and in this checkpoint's files."""
        theirs = names.to_hugging_face(name)
        return f"{name} ({theirs})" if theirs else name

    def _let_go(self, name: str) -> None:
        self._home[name].let_go()

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._home[name].read(names.to_hugging_face(name) or name).contiguous()
        if name.endswith((".wq.weight", ".wk.weight")):
            return to_pairs(tensor, self.args.head_dim)
        return tensor


def to_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of wq or wk [heads x head_dim, dim] from halves (transformers) to neighbouring pairs (Meta)."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])  # [heads, half, pair, dim]
    return halves.transpose(1, 2).reshape(weight.shape)


def open_weights(directory: Path) -> list[TensorFile]:
    """Open the files that hold the weights: safetensors, or else pytorch_model.bin.

    Either is one file, or several with an index.

    Raises:
        CheckpointError: there are none, or both a whole file and an index; see also open_indexed.
    """
    kinds: tuple[tuple[type[TensorFile], str], ...] = (
        (SafetensorsFile, "model.safetensors"),
        (PickleFile, "pytorch_model.bin"),
    )
    for kind, whole in kinds:
        path, index = directory / whole, directory / f"{whole}.index.json"
        if index.exists() and path.exists():
            raise CheckpointError(
                f"{directory} has both {whole} and {index.name}, expected one of them: which is meant is not clear"
            )
        if not index.exists() and not path.exists():
            continue
        if kind is PickleFile:
            log.warning(
                "%s: pytorch_model.bin is a pickle; load it from people you trust only, or convert it in a sandbox",
                directory,
            )
        return [kind(path)] if path.exists() else open_indexed(index, kind)
    raise CheckpointError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json nor pytorch_model.bin"
    )


def open_indexed(index: Path, kind: type[TensorFile]) -> list[TensorFile]:
    """Open all files that an index names, and compare the index with their headers.

    Raises:
        CheckpointError: a missing file, or a tensor that is in no file, in two, or in another one than the index says.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{index}: got no usable weight_map, expected an object from tensors' names to files' names"
        )
    there = {path.name for path in index.parent.iterdir()}
    for name, file in weight_map.items():
        if file not in there:
            raise CheckpointError(
                f"{index.parent / Path(file).name} is missing: {index.name} says that it holds {name}"
            )
    files = [kind(index.parent / file) for file in sorted(set(weight_map.values()))]
    _check_index(index, weight_map, files)
    return files


def _check_index(index: Path, weight_map: Mapping[str, str], files: Sequence[TensorFile]) -> None:
    held: dict[str, str] = {}
    for file in files:
        for name in file.headers:
            if name in held:
                raise CheckpointError(f"{file.path}: tensor {name} is in {held[name]}, too, expected every tensor once")
            held[name] = file.path.name
    for name in sorted(held.keys() | weight_map.keys()):
        if held.get(name) != weight_map.get(name):
            said, is_in = weight_map.get(name, "no file"), held.get(name, "no file")
            raise CheckpointError(f"{index}: says that tensor {name} is in {said}, but it is in {is_in}")


def read_config(path: Path) -> Settings:
    """Read the shape that a config.json declares.

    Raises:
        CheckpointError: damaged, of another architecture, without a required setting, or with an unsupported one.
    """
    config = read_json(path)
    _check_settings(path, config)
    missing = [key for key in (*NEEDED, "intermediate_size") if config.get(key) is None]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}")
    try:
        args = ModelArgs(
            **{ours: config[theirs] for theirs, ours in NEEDED.items()},
            n_kv_heads=config.get("num_key_value_heads"),
            tie_word_embeddings=config.get("tie_word_embeddings") or False,
            **_feed_forward(config["hidden_size"], config["intermediate_size"]),
            **_rope(path, config),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error} (in Meta's names)") from error
    if config.get("head_dim") not in (None, args.head_dim):
        raise CheckpointError(
            f"{path}: head_dim is {config['head_dim']}, expected hidden_size / num_attention_heads = {args.head_dim}"
        )
    window = config.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise CheckpointError(f"{path}: sliding_window is {str(window)[:40]}, expected a positive whole number or null")
    return Settings(args, path, sliding_window=window)


def _check_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings that would compute something else, and keys that look misspelt."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architectures is {str(architectures)[:100]}, expected one of {', '.join(ARCHITECTURES)}"
        )
    mathematical = sorted(READ | NEUTRAL.keys())
    for key, value in config.items():
        if key in NEUTRAL and value is not None and not _is_neutral(key, value):
            raise CheckpointError(f"{path}: {key} is {str(value)[:100]}, which is not computed here; {_allowed(key)}")
        if key == "auto_map" and value:
            raise CheckpointError(
                f"{path}: auto_map names code of the checkpoint's own, which is never run; its mathematics is unknown"
            )
        known = key in mathematical or key in HARMLESS
        if not known and (near := difflib.get_close_matches(key, mathematical, n=1, cutoff=LIKENESS)):
            raise CheckpointError(f"{path}: unknown key {key!r}; if {near[0]} is meant, mend it, else remove the key")


def _is_neutral(key: str, value: object) -> bool:
    if key == "layer_types":  # one entry a layer; a sliding window is compared with max_seq_len for all of them
        return isinstance(value, list) and all(each in ("full_attention", "sliding_attention") for each in value)
    return any(type(value) in (type(allowed), int) and value == allowed for allowed in NEUTRAL[key])


def _allowed(key: str) -> str:
    values = NEUTRAL[key]
    return f"expected {' or '.join(repr(value) for value in values)}, or none" if values else "expected none"


def _feed_forward(dim: object, width: object) -> dict[str, Any]:
    """Return Meta's settings for a feed-forward width.

    params.json has no key for the width: Meta's rule rounds two thirds of 4 dim up to a multiple.
    """
    if not isinstance(dim, int) or not isinstance(width, int) or not 0 < dim <= LARGEST_SIZE:
        return {"multiple_of": width}
    by_rule = int(2 * (4 * dim) / 3)
    return (
        {"multiple_of": width}
        if by_rule <= width
        else {"multiple_of": width, "ffn_dim_multiplier": (width + 0.25) / by_rule}
    )


def _rope(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling from either spelling.

    The spellings are rope_theta with rope_scaling, and transformers 5's rope_parameters.
    """
    spelled = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    if not all(isinstance(each, dict) for each in spelled) or any(each != spelled[0] for each in spelled[1:]):
        raise CheckpointError(
            f"{path}: rope_scaling and rope_parameters, got {str(spelled)[:200]}, "
            "expected one object, or two equal ones"
        )
    rope = spelled[0] if spelled else {}
    thetas = [theta for theta in (rope.get("rope_theta"), config.get("rope_theta")) if theta is not None]
    kinds = {str(rope[key]) for key in ("rope_type", "type") if rope.get(key) is not None} or {"default"}
    kind = kinds.pop()
    if kinds or any(theta != thetas[0] for theta in thetas):
        raise CheckpointError(f"{path}: two different values of rope_theta or of the rope type, expected one")
    if kind not in ROPE_FIELDS:
        raise CheckpointError(
            f"{path}: rope type {kind[:40]!r} is not computed here, expected one of {', '.join(ROPE_FIELDS)}"
        )
    fields = ROPE_FIELDS[kind]
    wrong = sorted((rope.keys() - ROPE_KEYS) ^ fields.keys())
    if wrong or rope.get("partial_rotary_factor") not in (None, 1.0):
        named = ", ".join(wrong) or "partial_rotary_factor"
        raise CheckpointError(
            f"{path}: rope type {kind} expects exactly {', '.join(fields) or 'no settings'}; "
            f"too many or missing: {named}"
        )
    values = {ours: rope[theirs] for theirs, ours in fields.items()}
    scaling = None if kind == "default" else RopeScaling(**values, kind="linear" if kind == "linear" else "llama3")
    return {"rope_theta": thetas[0] if thetas else DEFAULT_THETA, "rope_scaling": scaling}
