"""The settings files of a checkpoint: params.json (Meta's and our own format) and config.json (Hugging Face's).

No tensors here: a model's shape is known without torch.

Of config.json, the architectures in FAMILIES are supported, as transformers computes them. Settings that would change
the computation in an unsupported way are refused by name; settings that change nothing (dropout, caches, token ids) are
ignored.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

from llama.config import LARGEST_SIZE, ModelArgs, RopeKind, RopeScaling, check_number
from llama.errors import CheckpointError, ConfigError
from llama.quantization import KEYS, SUFFIXES, Quantization, packed_group, packed_layer, read_quantization
from llama.regular_files import check_regular, hint, mistaken, read_bytes, reason_of
from llama.sharding import HEAD, SHAPES, has_scale
from llama.storage import WeightFormat, formats_of

PARAMS, CONFIG = "params.json", "config.json"
QUANTIZE_CONFIG = "quantize_config.json"  # where older versions of AutoGPTQ keep the quantization_config


class Family(NamedTuple):
    """In what an architecture of transformers differs from LLaMA, and transformers' defaults for settings it lacks.

    Attributes:
        qkv_bias, qk_norm: see ModelArgs.
        head_dim: the head's size if config.json says none; None: ``hidden_size / num_attention_heads``.
        slides: whether ``sliding_window`` is for ``all`` layers, for ``some`` (``use_sliding_window`` and
            ``max_window_layers``), or for ``none``.
        window: the sliding window if config.json has no such key.
        is_fused: query, key and value are one weight, and so are the two inputs of the feed-forward layer.
        allowed: settings that are refused elsewhere.
        original_context: ``original_max_position_embeddings`` if config.json has no such key, where it goes before that
            of the rotary scaling.
        rope_kinds: other names of rotary scalings.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    slides: Literal["none", "all", "some"] = "none"
    window: int | None = None
    is_fused: bool = False
    allowed: tuple[str, ...] = ()
    original_context: int | None = None
    rope_kinds: Mapping[str, str] = MappingProxyType({})


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(slides="all", window=4096),
    "Qwen2ForCausalLM": Family(qkv_bias=True, slides="some", window=4096),
    "Qwen3ForCausalLM": Family(qk_norm=True, head_dim=128, slides="some", window=4096),
    "Phi3ForCausalLM": Family(
        slides="all",
        is_fused=True,
        allowed=("partial_rotary_factor", "original_max_position_embeddings", "auto_map"),
        original_context=4096,
        rope_kinds=MappingProxyType({"su": "longrope", "yarn": "longrope"}),
    ),
}
ARCHITECTURES = tuple(FAMILIES)
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
    *("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"),
    *("use_sliding_window", "max_window_layers"),
    *KEYS,
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
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "use_qk_norm": (False,),
}
# Other keys that transformers and other exporters write; they are not taken for misspelt settings
HARMLESS = {
    *(
        "model_type",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "torch_dtype",
        "dtype",
    ),
    "is_decoder",
}
DEFAULT_WINDOW_LAYERS = 28  # transformers' default of max_window_layers
FULL, SLIDING = "full_attention", "sliding_attention"
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
    "yarn": {"factor": "factor", "original_max_position_embeddings": "original_max_seq_len"},
    "dynamic": {"factor": "factor"},
    "longrope": {"short_factor": "short_factor", "original_max_position_embeddings": "original_max_seq_len"},
}
ROPE_OPTIONS = {  # of each kind, settings that may be missing
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "dynamic": {"original_max_position_embeddings"},  # which transformers does not read
    "longrope": {"long_factor", "factor", "attention_factor"},  # long_factor is for texts that are refused
}
DEFAULT_THETA = 10000.0  # transformers' default
LIKENESS = 0.8  # of an unknown key to one that is read: then it is a misspelling, or a flipped bit


class Settings(NamedTuple):
    """The settings of a checkpoint, apart from its weights.

    Attributes:
        args: the shape; a vocabulary size of -1 is settled by the embedding.
        file: the file that holds the settings, for errors.
        sliding_window: ``args.sliding_window`` as a file beside params.json has it, which is how checkpoints were
            written that a version without windows made; or None.
        embedding_axis: the axis that the embedding is, or was, split along; None if unknown.
        is_fused: see Family.
        quantization: how linear layers are quantised, or None.
    """

    args: ModelArgs
    file: Path
    sliding_window: int | None = None
    embedding_axis: int | None = None
    is_fused: bool = False
    quantization: Quantization | None = None


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
        content = json.loads(read_bytes(path).decode("utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise CheckpointError(f"{path} is not readable: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        found = mistaken(path)
        raise CheckpointError(
            f"{path} is not readable as JSON: {found or f'{first_line(error)}; mend it, or download it again'}"
        ) from error
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
    if not os.path.lexists(path):
        there = sorted(path.name for path in ckpt_dir.iterdir()) if os.path.isdir(ckpt_dir) else ["no such directory"]
        found = ", ".join(there[:10])
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
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{path.parent} has no {CONFIG}, which Hugging Face's format needs: download it from the same repository"
        )
    config = read_json(path)
    beside = path.parent / QUANTIZE_CONFIG
    if not any(config.get(key) for key in KEYS) and os.path.lexists(beside):
        config |= {KEYS[0]: {"quant_method": "gptq", **read_json(beside)}}
    family = _check_settings(path, config)
    missing = [key for key in (*NEEDED, "intermediate_size") if config.get(key) is None]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}")
    try:
        args = ModelArgs(
            **{ours: config[theirs] for theirs, ours in NEEDED.items()},
            n_kv_heads=config.get("num_key_value_heads"),
            tie_word_embeddings=config.get("tie_word_embeddings") or False,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            **_head_dim(config, family),
            **_feed_forward(config["hidden_size"], config["intermediate_size"]),
        )
        args = replace(args, **_windows(path, config, family), **_rope(path, config, family, args.head_dim))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error} (in Meta's names)") from error
    quantization = read_quantization(path, config)
    return Settings(args, path, is_fused=family.is_fused, quantization=quantization)


def _check_settings(path: Path, config: Mapping[str, Any]) -> Family:
    """Return the architecture; refuse settings that would compute something else, and keys that look misspelt."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architectures is {str(architectures)[:100]}, expected one of {', '.join(ARCHITECTURES)}"
        )
    (architecture,) = architectures
    family = FAMILIES[architecture]
    mathematical = sorted(READ | NEUTRAL.keys())
    for key, value in config.items():
        refused = key in NEUTRAL and key not in family.allowed
        if refused and value is not None and not _is_neutral(key, value):
            raise CheckpointError(f"{path}: {key} is {str(value)[:100]}, which is not computed here; {_allowed(key)}")
        if key == "auto_map" and value and not (key in family.allowed and _is_of_library(value, architecture)):
            raise CheckpointError(
                f"{path}: auto_map names code of the checkpoint's own, which is never run; its mathematics is unknown"
            )
        known = key in mathematical or key in HARMLESS
        if not known and (near := difflib.get_close_matches(key, mathematical, n=1, cutoff=LIKENESS)):
            raise CheckpointError(f"{path}: unknown key {key!r}; if {near[0]} is meant, mend it, else remove the key")
    return family


def _is_of_library(auto_map: object, architecture: str) -> bool:
    """Whether auto_map names a class that transformers has; checkpoints older than that class brought its code."""
    named = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return isinstance(named, str) and named.rpartition(".")[2] == architecture


def _head_dim(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the head's size, if it is not ``hidden_size / num_attention_heads``."""
    given = config.get("head_dim")
    size = family.head_dim if given is None else given
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    is_usual = type(size) is int and isinstance(heads, int) and size * heads == dim
    return {} if is_usual else {"attn_head_dim": size}


def _windows(path: Path, config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the sliding window and the first layer that has it.

    Raises:
        CheckpointError: a wrong value, a window that the architecture has not, or layers that differ in another way
            than full attention first, then sliding windows.
    """
    window = config.get("sliding_window", family.window)
    if window is not None and (type(window) is not int or window < 1):
        raise CheckpointError(f"{path}: sliding_window is {str(window)[:40]}, expected a positive whole number or null")
    if window is not None and family.slides == "none":
        raise CheckpointError(
            f"{path}: sliding_window is {window}, which {config['architectures'][0]} does not have; remove the key if "
            "the model was trained without it"
        )
    types, layers, first = config.get("layer_types"), config["num_hidden_layers"], 0
    if family.slides == "some":
        if config.get("use_sliding_window") not in (None, True, False):
            raise CheckpointError(
                f"{path}: use_sliding_window is {str(config['use_sliding_window'])[:40]}, expected true or false"
            )
        window = window if config.get("use_sliding_window") else None
        first = config.get("max_window_layers", DEFAULT_WINDOW_LAYERS)
        if window is not None and types is not None:  # which transformers prefers
            first = types.index(SLIDING) if SLIDING in types else layers
        if type(first) is not int or first < 0:
            raise CheckpointError(f"{path}: max_window_layers is {str(first)[:40]}, expected a whole number")
    full = layers if window is None else first
    if types is not None and (len(types) != layers or types != [FULL] * full + [SLIDING] * (layers - full)):
        raise CheckpointError(
            f"{path}: layer_types is {str(types)[:100]}, which is not computed here; expected none, or {FULL} for the "
            f"first layers and {SLIDING} for the others, where the architecture has a sliding window"
        )
    return {} if window is None or full >= layers else {"sliding_window": window, "first_sliding_layer": full}


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


def _rope(path: Path, config: Mapping[str, Any], family: Family, head_dim: int) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and rotary_dim from either spelling.

    The spellings are rope_theta with rope_scaling, and transformers 5's rope_parameters.
    """
    spelled = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    if not all(isinstance(each, dict) for each in spelled) or any(each != spelled[0] for each in spelled[1:]):
        raise CheckpointError(
            f"{path}: rope_scaling and rope_parameters, got {str(spelled)[:200]}, "
            "expected one object, or two equal ones"
        )
    rope = {key: value for key, value in (spelled[0] if spelled else {}).items() if value is not None}
    thetas = [theta for theta in (rope.get("rope_theta"), config.get("rope_theta")) if theta is not None]
    named = [str(rope[key]) for key in ("rope_type", "type") if key in rope] or ["default"]
    kinds = {family.rope_kinds.get(kind, kind) for kind in named}
    kind = kinds.pop()
    for theta in thetas:
        check_number("rope_theta", theta)
    if kinds or any(theta != thetas[0] for theta in thetas):
        raise CheckpointError(f"{path}: two different values of rope_theta or of the rope type, expected one")
    if kind not in ROPE_FIELDS:
        raise CheckpointError(
            f"{path}: rope type {kind[:40]!r} is not computed here, expected one of {', '.join(ROPE_FIELDS)}"
        )
    factors = [f for f in (rope.get("partial_rotary_factor"), config.get("partial_rotary_factor")) if f is not None]
    if any(factor != factors[0] for factor in factors) or (
        "partial_rotary_factor" not in family.allowed and factors and factors[0] != 1.0
    ):
        raise CheckpointError(f"{path}: partial_rotary_factor is {str(factors)[:100]}, expected 1.0, or none")
    is_scaled = kind != "default" or rope.keys() - ROPE_KEYS
    scaling = _scaling(path, config, family, rope, kind) if is_scaled else None
    turned = {} if not factors else _rotary_dim(path, factors[0], head_dim)
    return {"rope_theta": thetas[0] if thetas else DEFAULT_THETA, "rope_scaling": scaling, **turned}


def _rotary_dim(path: Path, factor: object, head_dim: int) -> dict[str, Any]:
    """Return how many of a head's columns are turned, if not all are."""
    turned = int(head_dim * factor) if isinstance(factor, (int, float)) and 0 < factor <= 1 else 0
    if turned < 2 or turned % 2:
        raise CheckpointError(
            f"{path}: partial_rotary_factor is {str(factor)[:40]}, expected a number up to 1 that makes an even number "
            f"of columns of a head's {head_dim}"
        )
    return {} if turned == head_dim else {"rotary_dim": turned}


def _scaling(path: Path, config: Mapping[str, Any], family: Family, rope: Mapping[str, Any], kind: str) -> RopeScaling:
    """Return a rotary scaling, with transformers' defaults for what is left out.

    Raises:
        CheckpointError: a setting is missing, or is none of the scaling's.
        ConfigError: a value is out of its range.
    """
    given, fields = dict(rope), ROPE_FIELDS[kind]
    longest, original = config.get("max_position_embeddings"), "original_max_position_embeddings"
    if original in fields and kind != "llama3":
        ordered = (config.get(original), family.original_context, rope.get(original), longest)
        known = [each for each in ordered if each is not None]
        given |= {original: known[0]} if known else {}
    wrong = sorted((given.keys() - ROPE_KEYS - ROPE_OPTIONS.get(kind, set())) ^ fields.keys())
    if wrong:
        raise CheckpointError(
            f"{path}: rope type {kind} expects exactly {', '.join(fields) or 'no settings'}; "
            f"too many or missing: {', '.join(wrong)}"
        )
    values = {ours: given[theirs] for theirs, ours in fields.items()}
    if kind == "dynamic":
        values["original_max_seq_len"] = longest
    elif kind == "yarn":
        optional = ("beta_fast", "beta_slow", "truncate")
        values |= {name: given[name] for name in optional if name in given}
        values["attention_factor"] = _yarn_attention(given)
    elif kind == "longrope":
        values["factor"] = _longrope_factor(given, longest)
        values["attention_factor"] = _longrope_attention(given, values["factor"])
    return RopeScaling(**values, kind=cast(RopeKind, kind))


def _yarn_attention(rope: Mapping[str, Any]) -> object:
    """The factor of queries and keys under yarn: given, or by the scaling's logarithm."""
    if "attention_factor" in rope:
        return rope["attention_factor"]
    for name in ("factor", "mscale", "mscale_all_dim"):
        check_number(f"rope_scaling {name}", rope.get(name, 1.0))

    def by(weight: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * weight * math.log(rope["factor"]) + 1.0

    if "mscale" in rope and "mscale_all_dim" in rope:
        return by(rope["mscale"]) / by(rope["mscale_all_dim"])
    return by(1.0)


def _longrope_factor(rope: Mapping[str, Any], longest: object) -> float:
    """How much longer than at first a text may become under longrope."""
    original, factor = rope["original_max_position_embeddings"], rope.get("factor")
    check_number("rope_scaling original_max_position_embeddings", original)
    if factor is None:
        check_number("max_position_embeddings", longest)
        factor = cast(float, longest) / original
    check_number("rope_scaling factor", factor)
    return cast(float, factor)


def _longrope_attention(rope: Mapping[str, Any], factor: float) -> object:
    """The factor of queries and keys under longrope: given, or by ``factor``."""
    if "attention_factor" in rope:
        return rope["attention_factor"]
    original = rope["original_max_position_embeddings"]
    return 1.0 if factor <= 1.0 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


class Planned(NamedTuple):
    """What is known of a checkpoint without its weights, which need not be there.

    Attributes:
        settings: the shape; its vocabulary size is -1 where neither the settings nor a safetensors header say it.
        stored: the quantised weights by numberless names (storage.py).
    """

    settings: Settings
    stored: Mapping[str, WeightFormat]


def read_planned(directory: Path) -> Planned:
    """Read params.json or config.json, and the headers of the safetensors files beside it, if there are any.

    Raises:
        CheckpointError: no such directory, no settings in it, settings of two formats, or a damaged file.
    """
    found = [name for name in (PARAMS, CONFIG) if os.path.isfile(directory / name)]
    if not found:
        there = sorted(path.name for path in directory.iterdir()) if os.path.isdir(directory) else ["no such directory"]
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
    return Planned(settings, _stored(settings, headers))


def _stored(settings: Settings, headers: Mapping[str, StoredTensor]) -> dict[str, WeightFormat]:
    """The quantised weights that headers show: our own format's, or those of layers that others have packed."""
    if settings.quantization is None:
        return formats_of(headers)
    method, numbers = settings.quantization.method, SUFFIXES[settings.quantization.method][0]
    layers = [place[0] for name in headers if (place := packed_layer(name, method)) and place[1] == numbers]
    found = {group for layer in layers if (group := packed_group(layer, method, headers))}
    if not found or not settings.quantization.is_symmetric:
        return {}
    own = WeightFormat("int4", min(found))  # of every layer's, as all quantisers do by default
    packed = [name for name in SHAPES if "{}" in name and has_scale(name)]
    return dict.fromkeys([*packed, *([HEAD] if "lm_head" in layers else [])], own)


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
            check_regular(path)
            with cast(Any, safe_open(path, framework="np")) as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    part = file.get_slice(name)
                    headers[name] = StoredTensor(tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file, or a damaged one: {first_line(error)}{hint(path)}"
            ) from error
    return headers
