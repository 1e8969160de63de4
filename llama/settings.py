"""The settings files of a checkpoint: params.json (Meta's and our own format) and config.json (Hugging Face's).

No tensors here: a model's shape is known without torch.

Of config.json, LlamaForCausalLM is supported, and MistralForCausalLM where it computes the same as LLaMA. Settings that
would change the computation in an unsupported way are refused by name; settings that change nothing (dropout, caches,
token ids) are ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from llama.config import LARGEST_SIZE, ModelArgs, RopeScaling
from llama.errors import CheckpointError, ConfigError

PARAMS, CONFIG = "params.json", "config.json"
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


class Settings(NamedTuple):
    """The settings of a checkpoint, apart from its weights.

    Attributes:
        args: the shape; a vocabulary size of -1 is settled by the embedding.
        file: the file that holds the settings, for errors.
        sliding_window: how many positions back attention was trained to see, or None.
        embedding_axis: the axis that the embedding is, or was, split along; None if unknown.
    """

    args: ModelArgs
    file: Path
    sliding_window: int | None = None
    embedding_axis: int | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, is no object, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError(f"a key twice in the object that begins with {pairs[0][0]!r}")
        return made

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def read_params(ckpt_dir: Path) -> ModelArgs:
    """Read the shape that a checkpoint's params.json declares.

    Raises:
        CheckpointError: no such directory or file, not JSON, an unknown key, or a value out of its range.
    """
    path = ckpt_dir / PARAMS
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in ckpt_dir.iterdir())[:10]) if ckpt_dir.is_dir() else "no such directory"
        raise CheckpointError(
            f"{ckpt_dir} has no params.json (found: {found or 'nothing'}), which Meta's format "
            "and that of llama-xla convert need"
        )
    try:
        return ModelArgs.from_params(read_json(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


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


class Planned(NamedTuple):
    """What is known of a checkpoint without its weights, which need not be there.

    Attributes:
        settings: the shape; its vocabulary size is -1 where neither the settings nor a safetensors header say it.
        is_int8: some weights are stored as int8.
    """

    settings: Settings
    is_int8: bool


def read_planned(directory: Path) -> Planned:
    """Read params.json or config.json, and the headers of the safetensors files beside it, if there are any.

    Raises:
        CheckpointError: no such directory, no settings in it, settings of two formats, or a damaged file.
    """
    found = [name for name in (PARAMS, CONFIG) if (directory / name).is_file()]
    if not found:
        there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else ["no such directory"]
        raise CheckpointError(
            f"{directory} has neither {PARAMS} nor {CONFIG} (found: {', '.join(there[:10]) or 'nothing'}), "
            "expected one of them"
        )
    headers, has_pickles = read_headers(directory), any(directory.glob("*.pth"))
    embeddings = {PARAMS: "tok_embeddings.weight", CONFIG: "model.embed_tokens.weight"}
    if len(found) > 1:
        found = [name for name in found if embeddings[name] in headers or (name == PARAMS and has_pickles)]
    if len(found) != 1:
        raise CheckpointError(f"{directory} has both {PARAMS} and {CONFIG}, expected one: move the other out of it")
    (name,) = found
    settings = Settings(read_params(directory), directory / PARAMS) if name == PARAMS else read_config(directory / name)
    shape = headers[embeddings[name]].shape if embeddings[name] in headers else ()
    if settings.args.vocab_size == -1 and len(shape) == 2 and 0 < shape[0] <= LARGEST_SIZE:
        settings = settings._replace(args=settings.args.with_vocab_size(shape[0]))
    return Planned(settings, any(header.dtype == "I8" for header in headers.values()))


class StoredTensor(NamedTuple):
    """A tensor as a safetensors header describes it; the dtype by safetensors' name, such as ``BF16``."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of all files ``model*.safetensors``, by name; empty where there are none.

    Raises:
        CheckpointError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    headers: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        try:
            with cast(Any, safe_open(path, framework="np")) as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    part = file.get_slice(name)
                    headers[name] = StoredTensor(tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a safetensors file, or a damaged one: {first_line(error)}") from error
    return headers
