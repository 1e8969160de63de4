"""LLaMA's relatives by the one model file: each computes what transformers' own class computes with the same weights.

Every kind is saved by transformers' ``save_pretrained``, random weights large enough for each part to show in the
logits. Controls switch each difference off and expect other logits, so that the equalities do test it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import assert_equal, edit_json, logits_of, random_weights, write_meta
from commands import ROOT

from llama import DraftConfig, EngineConfig, LLaMA, ModelArgs, RopeScaling, SamplingParams
from llama.checkpoint import names, open_checkpoint
from llama.checkpoint.quantize import quantize
from llama.checkpoint.reshard import convert, reshard
from llama.compiled.cache import LookaheadView, SlidingWindow
from llama.compiled.model import Transformer, rotary_frequencies
from llama.config import BUCKET_POLICIES
from llama.errors import CheckpointError, ConfigError
from llama.inspection import weight_facts
from llama.planning import parameter_count, weight_bytes
from llama.settings import read_config
from llama.sharding import span, whole_shape

TOLERANCE = 1e-4  # absolute, between logits that spread over several units
DECISIVE = 1e-3  # a greedy choice by less than this could fall either way and would prove nothing
SEQUENCE = 100
GENERATED = 6
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LONGROPE = rope(
    "longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.4, 2.0, 3.0, 4.5], long_factor=[9.0] * 6
)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-nemo": ("Mistral", {"head_dim": 24, "sliding_window": None}),
    "mistral-window": ("Mistral", {"head_dim": 24, "sliding_window": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-yarn": (
        "Qwen3",
        {"head_dim": 32, "tie_word_embeddings": True, **rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    ),
    "yarn-borders": (
        "Llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0, truncate=False),
    ),
    "yarn-mscale": (
        "Llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.3),
    ),
    "yarn-attention": (
        "Llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=64, attention_factor=0.8),
    ),
    "dynamic": ("Llama", {"max_position_embeddings": SEQUENCE, **rope("dynamic", factor=4.0)}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 128, "sliding_window": 20, **LONGROPE}),
    "phi3-partial": ("Phi3", rope("default", partial_rotary_factor=0.5)),
}
DEVICE = ("mistral-window", "qwen2-window", "qwen3-yarn", "phi3-longrope", "dynamic")
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def hf_model(kind: str) -> Any:
    """A random model of transformers' with wide weights; norms and biases are random, too."""
    import transformers

    name, more = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **more})
    with torch.random.fork_rng():
        torch.manual_seed(13)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
        for parameter_name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn_like(parameter)
            parameter.copy_(1 + noise if "norm" in parameter_name else noise)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(kind)``: its directory in Hugging Face's format; not to be changed."""

    @cache
    def save(kind: str) -> Path:
        directory = tmp_path_factory.mktemp("relatives") / kind
        hf_model(kind).save_pretrained(directory)
        return directory

    return save


Saved = Callable[[str], Path]


def ids(rows: int = 2, length: int = SEQUENCE, seed: int = 5) -> torch.Tensor:
    """Token ids [rows, length], no control token among them."""
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def hf_logits(kind: str, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = hf_model(kind)(tokens).logits
    return found


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@every_kind
def test_logits_are_those_of_transformers_in_every_format(kind: str, saved: Saved, tmp_path: Path) -> None:
    """Hugging Face's files, our own format, and Meta's layout in two shards: the same tensors, the same logits."""
    expected = hf_logits(kind, ids())
    assert expected.std() > 0.5
    source = open_checkpoint(saved(kind))
    assert deviation(logits_of(source, ids()), expected) < TOLERANCE
    weights = dict(source.tensors())
    convert(saved(kind), tmp_path / "native", max_shard_size="50KB")
    reshard(saved(kind), tmp_path / "two", 2)
    reshard(tmp_path / "two", tmp_path / "one", 1)
    convert(tmp_path / "one", tmp_path / "back")
    for name in ("native", "two", "one", "back"):
        opened = open_checkpoint(tmp_path / name)
        assert opened.args == source.args, name
        assert_equal(opened.tensors(), weights)
    assert deviation(logits_of(open_checkpoint(tmp_path / "native"), ids()), expected) < TOLERANCE


# What each kind's equality is about: without it the logits must differ
SWITCHED_OFF: dict[str, dict[str, Any]] = {
    "mistral-window": {"sliding_window": None},
    "qwen2-window": {"first_sliding_layer": 0},
    "qwen3-yarn": {"rope_scaling": None},
    "yarn-borders": {"rope_scaling": RopeScaling(8.0, original_max_seq_len=64, kind="yarn", attention_factor=1.2079)},
    "yarn-mscale": {"rope_scaling": RopeScaling(8.0, original_max_seq_len=64, kind="yarn")},
    "phi3-longrope": {"sliding_window": None},
    "phi3-partial": {"rotary_dim": None},
}


@pytest.mark.parametrize(("kind", "changes"), SWITCHED_OFF.items(), ids=list(SWITCHED_OFF))
def test_oracle_sees_each_difference(kind: str, changes: dict[str, Any], saved: Saved) -> None:
    """A control: the same weights without what the kind is about miss the tolerance by far."""
    source = open_checkpoint(saved(kind))
    source.args = replace(source.args, **changes)
    assert deviation(logits_of(source, ids()), hf_logits(kind, ids())) > 10 * TOLERANCE


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3-partial"])
def test_int8_keeps_biases_and_norms(kind: str, saved: Saved, tmp_path: Path) -> None:
    """Linear layers become int8 with their scales, cut ones, too; the logits are those of the rounded weights."""
    convert(saved(kind), tmp_path / "int8", dtype="int8")
    opened, source = open_checkpoint(tmp_path / "int8"), open_checkpoint(saved(kind))
    for name, info in opened.infos().items():
        assert (info.dtype == torch.int8) == names.is_quantised(name), name
    rounded = {}
    for name, tensor in source.tensors():
        numbers, scales = quantize(tensor) if names.is_quantised(name) else (tensor, torch.ones(1))
        rounded[name] = numbers * (scales.unsqueeze(1) if names.is_quantised(name) else scales)
    model = Transformer(source.args, SEQUENCE)
    model.load_state_dict(rounded)
    with torch.no_grad():
        expected = model.head(model(ids(), torch.arange(SEQUENCE).expand(2, -1)))
    assert deviation(logits_of(opened, ids()), expected) < TOLERANCE
    assert deviation(expected, hf_logits(kind, ids())) > TOLERANCE  # a control: rounding is seen


# --- on the device ----------------------------------------------------------------------------------------------------

LENGTHS = (3, 21, 40, 57)
CONFIG = EngineConfig(
    max_batch_size=2, max_seq_len=80, buckets=(16, 4, 1), key_buckets=(32,), dtype="float32", prefix_cache=False
)


def prompts_of(kind: str) -> list[list[int]]:
    """A prompt of each length whose greedy choices are all decisive."""
    found = []
    for length in LENGTHS:
        rows = ids(6, length, seed=length)
        grown, lead = greedy(kind, rows)
        best = int(lead.argmax())
        assert lead[best] > DECISIVE, f"no prompt of {length} tokens has such a text: take other weights"
        found.append(grown[best, :length].tolist())
    return found


def greedy(kind: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own greedy continuation of rows [B, T], and the smallest lead of each row's choices."""
    with torch.no_grad():
        out = hf_model(kind).generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            max_new_tokens=GENERATED,
            eos_token_id=SHAPE["vocab_size"],  # none: a text goes on after EOS
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(out.logits, dim=1).topk(2).values
    return out.sequences, (best[..., 0] - best[..., 1]).amin(dim=1)


def assert_same(kind: str, prompts: Sequence[list[int]], results: Sequence[tuple[list[int], np.ndarray]]) -> None:
    """The same greedy texts, and the logits from which each token was chosen."""
    for prompt, (token_ids, logits) in zip(prompts, results, strict=True):
        assert token_ids == greedy(kind, torch.tensor([prompt]))[0][0, len(prompt) :].tolist(), len(prompt)
        expected = hf_logits(kind, torch.tensor([prompt + token_ids]))[0, len(prompt) - 1 : -1]
        assert deviation(torch.from_numpy(logits), expected) < TOLERANCE, len(prompt)


def generated(llm: LLaMA, prompts: Sequence[list[int]]) -> list[tuple[list[int], np.ndarray]]:
    wish = SamplingParams(GENERATED, 0.0, ignore_eos=True, logits=True)
    results = llm.generate(list(prompts), params=[wish] * len(prompts))
    return [(result.token_ids, result.logits) for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEVICE)
def test_text_and_logits_of_every_plan(
    kind: str, saved: Saved, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled chunks, the cache, the loop over layers: prompts of several plans that share two slots, so that rows are
    out of step and a row stands behind the keys that a step reads.
    """
    llm = LLaMA.build(saved(kind), tokenizer_path=tokenizer_path, config=CONFIG)
    prompts = prompts_of(kind)
    for policy in BUCKET_POLICIES:
        config = replace(CONFIG, bucket_policy=policy)
        monkeypatch.setattr(llm, "config", config)
        monkeypatch.setattr(llm.engine, "config", config)
        assert_same(kind, prompts, generated(llm, prompts))


@pytest.mark.slow
def test_a_window_in_lookahead(saved: Saved, tokenizer_path: Path) -> None:
    """The Jacobi window's own mask and the sliding window together: drafts, and the text of transformers."""
    kind = "mistral-window"
    config = replace(CONFIG, max_batch_size=1, buckets=(16, 1))
    drafting = DraftConfig(("lookahead",), draft_lens=(3,), lookahead=(3, 3, 4))
    llm = LLaMA.build(saved(kind), tokenizer_path=tokenizer_path, config=config, drafting=drafting)
    prompt = prompts_of(kind)[2]
    result = llm.generate([prompt], params=[SamplingParams(GENERATED, 0.0, ignore_eos=True)])[0]
    assert result.token_ids == greedy(kind, torch.tensor([prompt]))[0][0, len(prompt) :].tolist()


CHILD = """
import json, sys
from llama import EngineConfig, LLaMA, SamplingParams
tokenizer, prompts, *directories = json.loads(sys.argv[1])
config = EngineConfig(max_seq_len=80, buckets=(16, 1), key_buckets=(80,), dtype="float32", tensor_parallel=2)
wish = SamplingParams(6, 0.0, ignore_eos=True, logits=True)
found = []
for directory, prompt in zip(directories, prompts, strict=True):
    (result,) = LLaMA.build(directory, tokenizer_path=tokenizer, config=config).generate([prompt], params=[wish])
    found.append([result.token_ids, result.logits.tolist()])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_biases_norms_and_windows_on_two_devices(saved: Saved, tokenizer_path: Path) -> None:
    """Biases are split with their layers' output features, norms of heads are whole: what transformers computes."""
    kinds = ("qwen2-window", "qwen3-yarn")
    prompts = [prompts_of(kind)[1] for kind in kinds]
    given = json.dumps([str(tokenizer_path), prompts, *(str(saved(kind)) for kind in kinds)])
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, given], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, prompt, (token_ids, logits) in zip(kinds, prompts, json.loads(done.stdout), strict=True):
        assert_same(kind, [prompt], [(token_ids, np.array(logits, np.float32))])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_more_shards_than_key_heads(saved: Saved, tmp_path: Path) -> None:
    """Neighbouring shards hold the same key head, and its part of the bias."""
    for kind in ("qwen2", "qwen3", "mistral-nemo"):
        reshard(saved(kind), tmp_path / kind, 4)
        assert_equal(open_checkpoint(tmp_path / kind).tensors(), dict(open_checkpoint(saved(kind)).tensors()))


def test_what_is_told_of_a_model(saved: Saved) -> None:
    """Numbers and bytes on paper are those of the files, and inspect tells in what a model differs from LLaMA."""
    for kind in KINDS:
        source = open_checkpoint(saved(kind))
        count = sum(tensor.numel() for _, tensor in source.tensors())
        assert parameter_count(source.args) == weight_facts(source)["parameters"] == count
        assert weight_bytes(source.args, "float32") == 4 * count
    facts = weight_facts(open_checkpoint(saved("qwen2-window")))
    assert (facts["sliding_window"], facts["shape"]["qkv_bias"], facts["shape"]["first_sliding_layer"]) == (20, True, 1)
    facts = weight_facts(open_checkpoint(saved("phi3-longrope")))
    assert facts["shape"]["rotary_dim"] == 12
    assert facts["rope"] == {"theta": 10000.0, "scaling": "longrope", "factor": 4.0}


def test_positions_that_cannot_be_equal_are_refused(saved: Saved, tokenizer_path: Path) -> None:
    """transformers changes the frequencies of a whole text when it outgrows the original context."""
    for kind, most in (("dynamic", SEQUENCE), ("phi3-longrope", 128)):
        args = open_checkpoint(saved(kind)).args
        assert args.most_positions == most
        args.check_positions(most, "here")
        config = EngineConfig(max_seq_len=most + 1)
        with pytest.raises(ConfigError, match=rf"max_seq_len: got {most + 1}, but .* {most} at most"):
            LLaMA.build(saved(kind), tokenizer_path=tokenizer_path, config=config)
    longer = torch.cat((ids(1), ids(1)), dim=1)  # a control: beyond the limit transformers computes something else
    ours = logits_of(open_checkpoint(saved("dynamic")), longer)
    assert deviation(ours, hf_logits("dynamic", longer)) > 10 * TOLERANCE


def test_scalings_are_read_as_older_versions_wrote_them(saved: Saved, tmp_path: Path) -> None:
    """``su`` was longrope's first name, ``type`` the first key, and Phi-3 came with code of its own."""
    config = json.loads((saved("phi3-longrope") / "config.json").read_text())
    expected = read_config(saved("phi3-longrope") / "config.json")
    given = config.pop("rope_parameters")
    path = tmp_path / "config.json"
    old = {name: given[name] for name in ("short_factor", "long_factor")}
    for kind in ("su", "yarn", "longrope"):
        config |= {
            "rope_theta": given["rope_theta"],
            "rope_scaling": {"type": kind, "rope_type": "longrope", **old},
            "partial_rotary_factor": 0.75,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "m.Phi3ForCausalLM"},
        }
        path.write_text(json.dumps(config))
        assert read_config(path).args == expected.args


def test_settings_left_out_are_those_of_transformers(saved: Saved, tmp_path: Path) -> None:
    """Mistral's window, Qwen3's head size, and the context that yarn stretches."""
    path = tmp_path / "config.json"

    def without(kind: str, *keys: str, **changes: Any) -> ModelArgs:
        path.write_text((saved(kind) / "config.json").read_text())
        edit_json(path, **dict.fromkeys(keys), **changes)
        return read_config(path).args

    assert without("mistral-window", "sliding_window").sliding_window == 4096
    assert without("qwen3", "head_dim").head_dim == 128
    scaling = without("qwen2", rope_parameters={"rope_type": "yarn", "factor": 4.0}).rope_scaling
    assert scaling is not None
    assert scaling.original_max_seq_len == SHAPE["max_position_embeddings"]
    by_number = without("qwen2-window", "layer_types")
    assert by_number == read_config(saved("qwen2-window") / "config.json").args
    assert (by_number.sliding_window, by_number.first_sliding_layer) == (20, 1)
    assert without("qwen2-window", "layer_types", use_sliding_window=False).sliding_window is None
    assert without("qwen2-window", "layer_types", max_window_layers=3).sliding_window is None


def test_a_fused_weight_of_another_size_is_refused(saved: Saved, tmp_path: Path) -> None:
    """It cannot be cut into query, key and value."""
    directory = tmp_path / "phi3"
    hf_model("phi3").save_pretrained(directory)
    edit_json(directory / "config.json", num_key_value_heads=4)
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight is \[128, 64\], expected 192 rows"):
        open_checkpoint(directory)
    plain = {"architectures": ["MistralForCausalLM"], "original_max_position_embeddings": None}
    edit_json(directory / "config.json", num_key_value_heads=2, **plain)
    with pytest.raises(CheckpointError, match=r"not known to this model: model\.layers\.0\.mlp\.gate_up_proj"):
        open_checkpoint(directory)


def test_params_json_holds_every_difference() -> None:
    """And is what it was for a model without them, because files of our format repeat it."""
    plain = ModelArgs(dim=64, n_heads=4, n_layers=3, vocab_size=9)
    assert plain.to_params().keys() == {
        *("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta")
    }
    linear = replace(plain, rope_scaling=RopeScaling(4.0, kind="linear"))
    assert linear.to_params()["rope_scaling"].keys() == {
        *("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len", "kind")
    }
    longrope = RopeScaling(4.0, kind="longrope", attention_factor=1.5, short_factor=(1.0, 2.0))
    different = {"attn_head_dim": 8, "rotary_dim": 4, "sliding_window": 5, "first_sliding_layer": 2}
    args = replace(plain, **different, qkv_bias=True, qk_norm=True, rope_scaling=longrope)
    assert ModelArgs.from_params(json.loads(json.dumps(args.to_params()))) == args


def test_a_window_beside_params_json_is_computed(tmp_path: Path) -> None:
    """As checkpoints hold it that were written when a window limited the positions."""
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=32)
    plain = write_meta(tmp_path / "plain", args, [random_weights(args)])
    noted = write_meta(tmp_path / "noted", args, [random_weights(args)])
    (noted / "llama-xla.json").write_text('{"sliding_window": 20}')
    stated = write_meta(tmp_path / "stated", args, [random_weights(args)], sliding_window=20)
    logits = [logits_of(open_checkpoint(each), ids()) for each in (plain, noted, stated)]
    assert torch.equal(logits[1], logits[2])
    assert torch.equal(logits[0][:, :20], logits[1][:, :20])
    assert not torch.allclose(logits[0][:, 20:], logits[1][:, 20:])


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3-yarn", "yarn-borders", "yarn-mscale", "phi3-longrope"])
def test_frequencies_are_those_of_transformers(kind: str, saved: Saved) -> None:
    """The values themselves, beside the logits, and the factor of queries and keys."""
    args, rotary = open_checkpoint(saved(kind)).args, hf_model(kind).model.rotary_emb
    ours = rotary_frequencies(args.turned, args.rope_theta, args.rope_scaling)
    torch.testing.assert_close(ours, rotary.original_inv_freq, rtol=2e-6, atol=0)
    assert args.rope_scaling is not None
    assert args.rope_scaling.attention_factor == pytest.approx(rotary.attention_scaling)


def test_absurd_borders_of_yarn_are_computed() -> None:
    """A damaged file ends in numbers, not in an overflow."""
    scaling = RopeScaling(4.0, original_max_seq_len=2**31 - 1, kind="yarn", beta_fast=1e308, beta_slow=1e-300)
    for theta in (1.0000000000000002, 1e300):
        assert rotary_frequencies(8, theta, scaling).shape == (4,)


def test_biases_are_cut_like_the_rows_of_their_weights() -> None:
    """Also with more devices than key heads, and with a head size of its own."""
    args = ModelArgs(dim=48, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=37, attn_head_dim=10, qkv_bias=True)
    for tensor in (1, 2, 4, 8):
        for rank in range(tensor):
            for part in ("wq", "wk", "wv"):
                weight, bias = (f"layers.0.attention.{part}.{leaf}" for leaf in ("weight", "bias"))
                assert span(bias, args, tensor, rank) == span(weight, args, tensor, rank)
                assert whole_shape(bias, args) == whole_shape(weight, args)[:1]


def test_what_a_window_leaves() -> None:
    """Against a count by hand; a row behind all keys keeps some, because a softmax over none is NaN."""
    window = SlidingWindow(3, 1)
    positions, keys = torch.tensor([[0, 2, 5], [7, 8, 40]]), torch.arange(8).view(1, 1, -1)
    seen = keys <= positions.unsqueeze(-1)
    expected = [[[0], [0, 1, 2], [3, 4, 5]], [[5, 6, 7], [5, 6, 7], [5, 6, 7]]]
    for layer in (1, torch.tensor(1), torch.tensor(2, dtype=torch.int32)):
        left = window.limit(seen, positions, keys, layer)
        assert [[row.nonzero().flatten().tolist() for row in rows] for rows in left] == expected
    assert torch.equal(window.limit(seen, positions, keys, torch.tensor(0)), seen)
    assert window.limit(seen, positions, keys, 0) is seen
    assert SlidingWindow(8, 0).limit(seen, positions, keys, 3) is seen  # no operation where it limits nothing
    plain = ModelArgs(dim=64, n_heads=4, n_layers=3)
    assert SlidingWindow.of(plain) is None
    assert SlidingWindow.of(replace(plain, sliding_window=5, first_sliding_layer=3)) is None
    assert SlidingWindow.of(replace(plain, sliding_window=5, first_sliding_layer=2)) == (5, 2)


def test_positions_of_a_jacobi_window() -> None:
    """Token j of level l stands 1 + l + j positions behind the last known one, at ``starts``."""
    starts = torch.tensor([2, 5], dtype=torch.int32)
    view = LookaheadView(3, torch.empty(0), torch.empty(0), torch.zeros(1), starts, torch.zeros(1), (16,))
    found = view.key_positions(starts, 7, 12)[:, 0].tolist()
    behind = [0] + [1 + level + column for level in range(2) for column in range(3)]
    for start, row in zip((2, 5), found, strict=True):
        assert row[: start + 7] == [*range(start), *(start + each for each in behind)][: len(row)]
