"""GGUF files: weights of every type, settings, tokenizers, templates and commands; damaged and foreign files.

The oracles are the library gguf, transformers, which reads GGUF files, too, and llama.cpp where llama-cpp-python is
installed.
"""

from __future__ import annotations

import io
import math
import shutil
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_files as files
import numpy as np
import pytest
import tokenizer_files
import torch
from checkpoint_files import assert_equal, logits_of, random_weights, write_meta
from commands import Run
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings, strategies as st

from llama import ModelArgs
from llama.chat import choose_format, find_template
from llama.checkpoint import checked, open_checkpoint, with_scales
from llama.checkpoint.gguf_file import BLOCKS, IN_ONE_GO, to_gguf, to_meta
from llama.checkpoint.quantize import dequantize
from llama.checkpoint.reshard import convert
from llama.config import RopeScaling
from llama.errors import CheckpointError, TokenizerError, UserError
from llama.gguf_header import _read_header, read_header
from llama.gguf_settings import factors, read_gguf
from llama.tokenizer import Part, find_tokenizer, load_tokenizer
from llama.tokenizer.gguf_kind import PATTERNS

SMALL = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=32)
IDS = [1, *range(5, 45)]
WIDE = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
KINDS = [*WIDE, *(Kind[name] for name in BLOCKS)]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


def write_small(path: Path, tokenizer_path: Path, kind: Kind = Kind.F32, **more: Any) -> Path:
    """A model of SMALL's shape with the fixture's tokenizer and a chat template."""
    entries = {**files.sentencepiece_entries(tokenizer_path), "tokenizer.chat_template": TEMPLATE}
    return files.write(path, SMALL, random_weights(SMALL), kind, **{"tokenizer": entries, **more})


@pytest.fixture
def small(tmp_path: Path, tokenizer_path: Path) -> Path:
    return write_small(tmp_path / "model.gguf", tokenizer_path)


# Weights


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_of_every_type(kind: Kind, tmp_path: Path, tokenizer_path: Path) -> None:
    """Each weight is what the library makes of its bytes; wide ones keep their type, bit by bit."""
    weights = random_weights(files.ARGS)
    path = files.write(tmp_path / "model.gguf", files.ARGS, weights, kind)
    source = open_checkpoint(path)
    assert source.args == replace(
        files.ARGS, ffn_hidden_dim=files.ARGS.hidden_dim, norm_eps=float(np.float32(files.ARGS.norm_eps))
    )
    found = {
        name: tensor if scale is None else dequantize(tensor, scale)
        for name, tensor, scale in with_scales(checked(source))
    }
    assert found.keys() == weights.keys()
    for number, (name, weight) in enumerate(weights.items()):
        own = kind if weight.dim() == 2 else Kind.F32
        data = files.stored(weight, own, number)
        assert found[name].dtype == WIDE.get(own, torch.float32)
        assert torch.equal(found[name].float(), torch.from_numpy(gguf.dequantize(data, own))), name
        assert own not in (Kind.Q8_0, Kind.Q5_1) or torch.allclose(found[name], weight, atol=0.02)


@pytest.mark.slow
def test_logits_are_those_of_transformers(tmp_path: Path, tokenizer_path: Path) -> None:
    """Its own reader restores Hugging Face's order of wq and wk, so another order here would show."""
    from transformers import LlamaForCausalLM

    args = replace(files.ARGS, n_layers=1)
    path = files.write(
        tmp_path / "model.gguf", args, random_weights(args), Kind.Q8_0, files.sentencepiece_entries(tokenizer_path)
    )
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected = theirs(ids).logits
    assert torch.allclose(logits_of(open_checkpoint(path), ids), expected, atol=1e-4)


def logits_of_llama_cpp(path: Path, ids: list[int]) -> torch.Tensor:
    """Logits [T, vocab] with a cache of float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1, use_mmap=False
    )
    model.eval(ids)
    found = torch.tensor(model.scores[: len(ids)])
    model.close()
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_logits_are_those_of_llama_cpp(kind: Kind, tmp_path: Path, tokenizer_path: Path) -> None:
    """To 1e-4 in float32; llama.cpp rounds the activations of the other types, to 8 bits for those in blocks."""
    path = files.write(
        tmp_path / "model.gguf",
        files.ARGS,
        random_weights(files.ARGS),
        kind,
        files.sentencepiece_entries(tokenizer_path),
    )
    expected = logits_of_llama_cpp(path, IDS)
    ours = logits_of(open_checkpoint(path), torch.tensor([IDS]))[0]
    assert (ours - expected).abs().max() < (1e-4 if kind == Kind.F32 else 0.2 * expected.std())


def test_a_tied_head_and_a_head_of_its_own(tmp_path: Path) -> None:
    """Without output.weight the head is the embedding."""
    weights = random_weights(replace(SMALL, tie_word_embeddings=True))
    assert "output.weight" not in weights
    source = open_checkpoint(files.write(tmp_path / "tied.gguf", SMALL, weights))
    assert source.args.tie_word_embeddings
    assert_equal(source.tensors(), weights)


def test_a_head_size_of_its_own(tmp_path: Path) -> None:
    """As Mistral NeMo has it."""
    args = replace(SMALL, attn_head_dim=32)
    weights = random_weights(args)
    sizes = {"attention__key_length": 32, "attention__value_length": 32}
    source = open_checkpoint(files.write(tmp_path / "m.gguf", args, weights, **sizes))
    assert source.args.head_dim == 32
    assert_equal(source.tensors(), weights)


def test_weights_are_widened_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """Reading a weight takes the memory of its result and little else."""
    args = ModelArgs(dim=256, n_layers=1, n_heads=8, vocab_size=32768, multiple_of=256)
    weights = random_weights(args)
    path = files.write(tmp_path / "model.gguf", args, weights, Kind.Q5_1)
    source = open_checkpoint(path)
    source.read("layers.0.attention.wq.weight")
    tracemalloc.start()
    read = source.read("tok_embeddings.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < read.nbytes + 6 * 4 * IN_ONE_GO
    assert read.nbytes > 7 * 4 * IN_ONE_GO  # so a second copy would show


def test_wide_weights_are_views_of_the_mapped_file(small: Path) -> None:
    """Nothing is copied."""
    source = open_checkpoint(small)
    tracemalloc.start()
    kept = dict(source.tensors())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**16 < sum(tensor.nbytes for tensor in kept.values())


def test_names_both_ways() -> None:
    """The two tables are each other's inverse; a name of another form is in neither."""
    for name in random_weights(SMALL):
        assert to_meta(str(to_gguf(name))) == name
    for name in ("blk.01.attn_q.weight", "blk.0.attn_q.bias", "x.blk.0.attn_q.weight", "blk.{}.attn_q.weight", ""):
        assert to_meta(name) is None, name


# Settings


@pytest.mark.parametrize("scaling", [RopeScaling(factor=8.0), RopeScaling(factor=32.0)], ids=["8", "32"])
def test_rotary_factors_of_llama_3(scaling: RopeScaling, tmp_path: Path, tokenizer_path: Path) -> None:
    """Their table becomes the rule's parameters, and what is computed with them is what llama.cpp computes."""
    args = replace(files.ARGS, rope_theta=500000.0)
    table = factors(scaling, args)
    assert 1.0 in table
    assert any(1 < each < scaling.factor for each in table)
    path = files.write(
        tmp_path / "model.gguf",
        args,
        random_weights(args),
        tokenizer=files.sentencepiece_entries(tokenizer_path),
        factors=table,
    )
    source = open_checkpoint(path)
    assert source.args.rope_scaling == scaling
    expected = logits_of_llama_cpp(path, IDS)
    ids = torch.tensor([IDS])
    assert (logits_of(source, ids)[0] - expected).abs().max() < 1e-4
    source.args = args
    assert (logits_of(source, ids)[0] - expected).abs().max() > 1e-3  # the scaling shows


def test_rotary_settings(tmp_path: Path) -> None:
    """Linear scaling in both spellings; factors that are all 1 scale nothing; other tables are refused."""
    weights, count = random_weights(SMALL), iter(range(99))

    def read(**more: Any) -> RopeScaling | None:
        return read_gguf(files.write(tmp_path / f"{next(count)}.gguf", SMALL, weights, **more)).args.rope_scaling

    linear = RopeScaling(factor=4.0, kind="linear")
    assert read(rope__scaling__type="linear", rope__scaling__factor=4.0) == linear
    assert read(rope__scale_linear=4.0) == linear
    assert read(rope__scaling__type="none", rope__scaling__factor=4.0) is None
    assert read(factors=[1.0] * 8) is None
    for table in ([1.0] * 7, [2.0] * 8, [1.0] * 7 + [math.nan], [1.0] * 7 + [math.inf], [-1.0] * 8):
        with pytest.raises(CheckpointError, match=r"rope_freqs\.weight|rope_scaling"):
            read(factors=table)


def test_key_heads_of_each_layer(tmp_path: Path) -> None:
    """A list of equal numbers is one number."""
    weights = random_weights(SMALL)
    path = files.write(tmp_path / "list.gguf", SMALL, weights, attention__head_count_kv=[2, 2])
    assert open_checkpoint(path).args.n_kv_heads == 2
    path = files.write(tmp_path / "lists.gguf", SMALL, weights, attention__head_count_kv=[2, 4])
    with pytest.raises(CheckpointError, match="the same number in every layer"):
        open_checkpoint(path)


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"tokenizer": {"general.architecture": "qwen2"}}, "general.architecture is 'qwen2'"),
    "experts": ({"expert_count": 8}, "llama.expert_count is 8, which is not computed here"),
    "yarn": ({"rope__scaling__type": "yarn"}, "rope.scaling.type is 'yarn'"),
    "partial rotary": ({"rope__dimension_count": 8}, "rope.dimension_count is 8, expected the head's size, 16"),
    "two head sizes": ({"attention__key_length": 16, "attention__value_length": 8}, "value_length 8"),
    "logit scale": ({"logit_scale": 2.0}, "llama.logit_scale is 2.0"),
    "unknown setting": ({"attention__spice": 1}, "unknown setting llama.attention.spice"),
    "missing setting": ({"block_count": None}, "has no llama.block_count"),
    "text for a number": ({"block_count": "2"}, "n_layers: got '2'"),
    "zero": ({"embedding_length": 0}, "dim: got 0"),
    "odd heads": ({"attention__head_count": 3}, "3 heads"),
    "more layers": ({"block_count": 3}, "missing: layers.2.attention.wq.weight .blk.2.attn_q.weight."),
    "another width": ({"feed_forward_length": 96}, "instead of"),
    "one of several parts": ({"tokenizer": {"split.count": 3}}, "one of 3 parts .* llama-gguf-split --merge"),
    "alignment": ({"tokenizer": {"general.alignment": 48}}, "general.alignment is 48"),
    "unsupported type": ({"kind": Kind.TQ1_0}, "has the type TQ1_0, expected one of F32"),
    "negative window": ({"attention__sliding_window": "all"}, "sliding_window is all"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files(case: str, tmp_path: Path) -> None:
    """What would be computed in another way is refused by name."""
    changes, message = FOREIGN[case]
    args = replace(SMALL, dim=256, multiple_of=256) if "kind" in changes else SMALL
    path = tmp_path / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_architecture", lambda self: None)  # the case adds it
        entries = {"general.architecture": "llama", **changes.get("tokenizer", {})}
        files.write(path, args, random_weights(args), **{**changes, "tokenizer": entries})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_damaged_headers_by_hand(small: Path, tmp_path: Path) -> None:
    """Counts and lengths beyond the file end at once and say so."""
    content = small.read_bytes()

    def refusal(changed: bytes) -> str:
        path = tmp_path / "damaged.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(changed)
        _read_header.cache_clear()
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        return str(caught.value)

    huge = struct.pack("<Q", 2**63)
    assert "not a GGUF file" in refusal(b"GGML" + content[4:])
    assert "not a GGUF file" in refusal(b"")
    assert "version is 1" in refusal(content[:4] + struct.pack("<I", 1) + content[8:])
    assert "big-endian" in refusal(content[:4] + struct.pack(">I", 3) + content[8:])
    assert "entries" in refusal(content[:8] + huge + content[16:])
    assert "entries" in refusal(content[:16] + huge + content[24:])
    assert "bytes expected" in refusal(content[:24] + huge + content[32:])
    assert "fetch it again" in refusal(content[:-4000])
    assert "fetch it again" in refusal(content + bytes(32))
    assert "twice" in refusal(content.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    assert "attn_qx" in refusal(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_qxweight"))
    at = content.index(b"blk.1.attn_q.weight") + len(b"blk.1.attn_q.weight") + 4 + 16
    assert "unknown type 4" in refusal(content[:at] + struct.pack("<I", 4) + content[at + 4 :])
    assert "begins at" in refusal(content[: at + 4] + struct.pack("<Q", 64) + content[at + 12 :])


def test_infinite_scales_are_found(tmp_path: Path) -> None:
    """A damaged scale of a block makes its numbers infinite or NaN, which is refused with the file's name."""
    weights = random_weights(SMALL)
    path = files.write(tmp_path / "model.gguf", SMALL, weights, Kind.Q8_0)
    stored = read_header(path).tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[stored.start : stored.start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w3\.scale .* holds NaN or infinity"):
        dict(checked(open_checkpoint(path)))


# Where a file is found


def test_a_directory_with_one_file(small: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    """It stands for the file; with two it is refused; beside weights of another format the file is ignored."""
    (tmp_path / "notes.txt").write_text("x")
    assert_equal(open_checkpoint(tmp_path).tensors(), random_weights(SMALL))
    assert find_tokenizer(tmp_path) == find_tokenizer(small) == small
    assert find_template(tmp_path) == (TEMPLATE, small)
    shutil.copy(small, tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"several \.gguf files \(model\.gguf, other\.gguf\)"):
        open_checkpoint(tmp_path)
    meta = write_meta(tmp_path / "meta", SMALL, [random_weights(SMALL, seed=5)])
    shutil.copy(small, meta / "model.gguf")
    shutil.copy(tokenizer_path, meta / "tokenizer.model")
    assert open_checkpoint(meta).format == "meta"
    assert find_tokenizer(meta) == meta / "tokenizer.model"
    assert find_template(meta) is None


def test_a_file_of_another_name(small: Path, tmp_path: Path) -> None:
    """The content tells, as in a cache where files are called by their sums."""
    shutil.copy(small, tmp_path / "5f3a")
    assert open_checkpoint(tmp_path / "5f3a").format == "gguf"
    assert load_tokenizer(tmp_path / "5f3a").n_words == 320


# Tokenizers

TEXTS = tokenizer_files.strings(200)


def entries_of(name: str, tokenizer_path: Path) -> dict[str, Any]:
    """The metadata of a tokenizer; ``added`` has a control token and a user's one after the pieces."""
    if name in PATTERNS:
        return files.byte_level_entries(name)
    entries = files.sentencepiece_entries(tokenizer_path, **({"add_space_prefix": False} if name == "no space" else {}))
    if name == "added":
        for key, more in (("tokens", ["<|eot_id|>", "[INST]"]), ("scores", [0.0, 0.0]), ("token_type", [3, 4])):
            entries[f"tokenizer.ggml.{key}"] += more
    return entries


def write_tokenizer(path: Path, entries: dict[str, Any]) -> Path:
    count = len(entries["tokenizer.ggml.tokens"])
    args = replace(SMALL, n_layers=1, vocab_size=count)
    return files.write(path, args, random_weights(args), tokenizer=entries)


@pytest.mark.parametrize("name", ["plain", "no space", "added", *PATTERNS])
def test_tokens_are_those_of_llama_cpp(name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    """200 hard texts. Its expression for tekken takes marks for other characters than Mistral's own does."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = write_tokenizer(tmp_path / "model.gguf", entries_of(name, tokenizer_path))
    ours, theirs = load_tokenizer(path), llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    marks = ("\u0301", "\u093f", "\ufe0f") if name == "tekken" else ()
    for text in TEXTS:
        if not any(mark in text for mark in marks):
            assert ours.encode(text, bos=False) == theirs.tokenize(text.encode(), add_bos=False, special=False), text
            if text and "<unk>" not in text:
                found = ours.encode(text, allow_special=True)
                assert found == theirs.tokenize(text.encode(), add_bos=True, special=True), text
    theirs.close()


def test_sentencepiece_is_that_of_its_own_file(small: Path, tokenizer_path: Path) -> None:
    """The same ids, texts, control tokens and stops as the model that the metadata were made from."""
    ours, original = load_tokenizer(small), load_tokenizer(tokenizer_path)
    for text in TEXTS:
        ids = original.encode(text, eos=True, allow_special=True)
        assert ours.encode(text, eos=True, allow_special=True) == ids
        assert ours.decode(ids) == original.decode(ids)
    for name in ("kind", "n_words", "bos_id", "eos_id", "stop_ids", "special_ids"):
        assert getattr(ours, name) == getattr(original, name), name
    assert all(ours.token_bytes(i) == original.token_bytes(i) for i in range(-1, 322))


def test_byte_level_is_that_of_its_own_file(tmp_path: Path) -> None:
    """The same ids and texts as the tokenizer.json that the metadata were made from, written control tokens too."""
    ours = load_tokenizer(write_tokenizer(tmp_path / "model.gguf", files.byte_level_entries("llama-bpe")))
    original = load_tokenizer(tokenizer_files.write_json(tokenizer_files.byte_level(), tmp_path / "json"))
    for text in TEXTS:
        ids = original.encode(text, eos=True, allow_special=True)
        assert ours.encode(text, eos=True, allow_special=True) == ids
        assert ours.decode(ids) == original.decode(ids)
    parts = [Part("<|eot_id|>a", True), Part("<|eot_id|>")]
    assert ours.encode_parts(parts) == original.encode_parts(parts)
    assert ours.special_ids == original.special_ids
    assert ours.stop_ids == tuple(ours.special_ids[name] for name in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"))


def test_stops_are_those_of_llama_cpp(tmp_path: Path, tokenizer_path: Path) -> None:
    """Also without the id of an end of turn in the metadata: the names of control tokens tell."""
    llama_cpp = pytest.importorskip("llama_cpp")
    entries = files.byte_level_entries("llama-bpe", eot_token_id=None)
    path = write_tokenizer(tmp_path / "model.gguf", entries)
    ours, theirs = load_tokenizer(path), llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
    assert set(ours.stop_ids) == {i for i in range(ours.n_words) if llama_cpp.llama_vocab_is_eog(vocabulary, i)}
    theirs.close()


def test_bos_flag(tmp_path: Path, tokenizer_path: Path) -> None:
    """Where the file says that prompts have no BOS, texts begin without; an empty one is BOS, or it were none."""
    for number, (entries, adds) in enumerate(
        [
            (files.sentencepiece_entries(tokenizer_path), True),
            (files.sentencepiece_entries(tokenizer_path, add_bos_token=False), False),
            (files.byte_level_entries("smollm"), False),
            (files.byte_level_entries("smollm", add_bos_token=True), True),
            (files.byte_level_entries("llama-bpe"), True),
        ]
    ):
        ours = load_tokenizer(write_tokenizer(tmp_path / f"{number}.gguf", entries))
        assert (ours.encode("a")[0] == ours.bos_id) is adds
        assert ours.encode("") == [ours.bos_id]
        assert ours.encode("a", bos=False)[0] != ours.bos_id


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "no model": ({"model": None}, "tokenizer.ggml.model is None"),
    "no pattern": ({"model": "gpt2", "pre": None, "merges": ["a b"]}, "tokenizer.ggml.pre is None"),
    "another pattern": ({"model": "gpt2", "pre": "poro-chat"}, "tokenizer.ggml.pre is 'poro-chat', expected one of"),
    "merges of other tokens": ({"model": "gpt2", "pre": "gpt-2", "merges": ["qqqq zzzz"]}, "tokenizers reads"),
    "merges of three": ({"model": "gpt2", "pre": "gpt-2", "merges": ["a b c"]}, "not two tokens"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is absent"),
    "tokens of numbers": ({"tokens": [1, 2]}, "no list of str"),
    "few types": ({"token_type": [1, 2, 3]}, "320 tokens have 3 types"),
    "few scores": ({"scores": [1.0]}, "1 scores"),
    "odd type": ({"token_type": [9] * 320}, "types from 1 to 6"),
    "endless score": ({"scores": [math.inf] * 320}, "finite scores"),
    "one token twice": ({"tokens": ["a"] * 320}, "a token twice"),
    "BOS beyond": ({"bos_token_id": 320}, "bos_token_id is 320, expected one below 320"),
    "BOS of text": ({"bos_token_id": "1"}, "expected a value of type int"),
    "no EOS": ({"eos_token_id": None}, "EOS None"),
    "no unknown piece": ({"token_type": [3, 3, 3, *[6] * 256, *[1] * 61]}, "0 pieces are of type 2"),
    "bytes of no form": ({"token_type": [2, 3, 3, *[6] * 317]}, "not a SentencePiece model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizers(case: str, tmp_path: Path, tokenizer_path: Path) -> None:
    """Each is refused by name, and the weights still open."""
    changes, message = BROKEN[case]
    path = write_small(
        tmp_path / "model.gguf", tokenizer_path, tokenizer=files.sentencepiece_entries(tokenizer_path, **changes)
    )
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(path)
    assert open_checkpoint(path).format == "gguf"


def test_chat_template(small: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    """It is the checkpoint's own; without one the tokenizer decides."""
    chosen = choose_format(load_tokenizer(small), small)
    assert chosen.name == "template"
    assert chosen.text([{"role": "user", "content": "hi"}]) == "<s>[user] hi\n[assistant]"
    plain = write_small(tmp_path / "plain.gguf", tokenizer_path, tokenizer=files.sentencepiece_entries(tokenizer_path))
    assert choose_format(load_tokenizer(plain), plain).name == "llama2"


# Commands


def test_convert_warns_of_bos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The other formats' prompts always begin with BOS; those of the file do not."""
    path = write_tokenizer(tmp_path / "model.gguf", files.byte_level_entries("smollm"))
    convert(path, tmp_path / "new")
    assert any("begin without BOS" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["plain", "llama-bpe"])
def test_convert(name: str, tmp_path: Path, tokenizer_path: Path) -> None:
    """The new checkpoint has the same weights, tokenizer, stops and chat template."""
    entries = {**entries_of(name, tokenizer_path), "tokenizer.chat_template": TEMPLATE}
    path = write_tokenizer(tmp_path / "model.gguf", entries)
    convert(path, tmp_path / "new")
    new, old = open_checkpoint(tmp_path / "new"), open_checkpoint(path)
    assert new.args == old.args
    assert_equal(new.tensors(), dict(old.tensors()))
    ours, original = load_tokenizer(find_tokenizer(tmp_path / "new")), load_tokenizer(path)
    for text in TEXTS:
        assert ours.encode(text, allow_special=True) == original.encode(text, allow_special=True)
    assert set(ours.stop_ids) | set(new.defaults.stop_ids) >= set(original.stop_ids)
    template = find_template(tmp_path / "new")
    assert template is not None
    assert template.text == TEMPLATE


def test_commands_without_a_device(small: Path, tmp_path: Path, run: Run) -> None:
    """inspect, plan, convert to int8 and reshard take the path of a file."""
    found = run("inspect", str(small), "--check_tensors", "--json")
    assert found.code == 0, found.err
    facts = found.objects[0]
    assert (facts["format"], facts["files"], facts["tokenizer"]["ids"]) == ("gguf", ["model.gguf"], 320)
    assert facts["tensors_checked"] == 2 * 9 + 3
    assert "has no checksums.json" in run("inspect", str(small), "--check_sums", "--json").objects[0]["problems"][0]
    plan = run("plan", "--tensor_parallel", "2", "--ckpt_dir", str(small), "--json")
    assert plan.code == 0, plan.err
    assert run("convert", str(small), str(tmp_path / "int8"), "--dtype", "int8").code == 0
    assert open_checkpoint(tmp_path / "int8").is_quantised
    assert run("reshard", str(small), str(tmp_path / "two"), "--model_parallel", "2").code == 0
    assert_equal(open_checkpoint(tmp_path / "two").tensors(), random_weights(SMALL))
    assert load_tokenizer(find_tokenizer(tmp_path / "two")).n_words == 320


@pytest.mark.slow
def test_generate_and_chat(small: Path, tmp_path: Path, tokenizer_path: Path, run: Run) -> None:
    """The same text as from the weights in Meta's format, and an answer."""
    meta = write_meta(tmp_path / "meta", SMALL, [random_weights(SMALL)])
    shutil.copy(tokenizer_path, meta / "tokenizer.model")
    shape = ("--max_seq_len", "64", "--buckets", "8,1", "--temperature", "0", "--max_gen_len", "8")
    texts = []
    for place in (small, meta):
        found = run("generate", "--ckpt_dir", str(place), "--prompt", "once upon", *shape, "--json")
        assert found.code == 0, found.err
        texts.append(found.results[0]["generation"])
    assert texts[0] == texts[1]
    patch = pytest.MonkeyPatch()
    patch.setattr("sys.stdin", io.StringIO("once upon"))
    answer = run("chat", "--ckpt_dir", str(small), "--max_seq_len", "64", "--max_gen_len", "8", "--quiet")
    patch.undo()
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.strip()


def test_batches_tell_files_apart(small: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    """A batch that goes on notices another model behind the same path."""
    from llama.batch.settings import model_digest

    before = model_digest(small, None)
    assert model_digest(small, None) == before
    small.unlink()
    write_small(small, tokenizer_path, Kind.F16)
    assert model_digest(small, None) != before


# Damaged files


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    args = replace(SMALL, dim=32, n_heads=2, n_kv_heads=1)
    entries = {**files.sentencepiece_entries(tokenizer_path), "tokenizer.chat_template": TEMPLATE}
    files.write(path, args, random_weights(args), Kind.Q8_0, entries, factors=factors(RopeScaling(), args))
    return path, path.read_bytes()


def end_of_header(content: bytes) -> int:
    return content.index(b"rope_freqs.weight") + len("rope_freqs.weight") + 4 + 8 + 4 + 8


def damage(content: bytes, places: list[tuple[float, int]], action: str) -> bytes:
    """Change a header: flip bits, set bytes, cut it short, or copy a stretch over another one."""
    end = end_of_header(content)
    changed = bytearray(content)
    where = [int(share * (end - 1)) for share, _ in places]
    if action == "cut":
        return bytes(changed[: where[0]])
    for place, (_, value) in zip(where, places, strict=True):
        if action == "flip":
            changed[place] ^= 1 << value % 8
        elif action == "set":
            changed[place] = value
        else:
            changed[place : place + 8] = changed[where[0] : where[0] + 8]
    return bytes(changed)


def use(path: Path) -> None:
    """Everything that reads the file."""
    problems = 0
    for read in (
        lambda: dict(checked(open_checkpoint(path), allow_nan=True)),
        lambda: load_tokenizer(path).encode("once upon a time"),
        lambda: find_template(path),
    ):
        try:
            read()
        except UserError:
            problems += 1
    assert problems in range(4)


places = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=1000, deadline=10_000, derandomize=True, database=None)
@given(places=places, action=st.sampled_from(["flip", "flip", "set", "copy", "cut"]), late=st.booleans())
def test_damaged_files(original: tuple[Path, bytes], places: list[tuple[float, int]], action: str, late: bool) -> None:
    """Each ends in a UserError or in a load. Half of the changes are among the tensors' entries."""
    path, content = original
    entries = content.index(b"token_embd.weight") / end_of_header(content)
    moved = [(entries + share * (1 - entries) if late else share, value) for share, value in places]
    damaged = damage(content, moved, action)
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    _read_header.cache_clear()
    use(path)


@pytest.mark.slow
def test_damaged_tensor_entries_are_found(original: tuple[Path, bytes]) -> None:
    """Each single bit of the tensors' entries is either refused or leaves the weights as they were."""
    path, content = original
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    _read_header.cache_clear()
    expected = {name: tensor.clone() for name, tensor in open_checkpoint(path).tensors()}
    begin, end = content.index(b"token_embd.weight") - 8, end_of_header(content)
    refused = 0
    for bit in range(8 * begin, 8 * end, 5):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.unlink()
        path.write_bytes(changed)
        _read_header.cache_clear()
        try:
            found = dict(open_checkpoint(path).tensors())
        except CheckpointError:
            refused += 1
            continue
        assert_equal(found.items(), expected)
    assert refused > 500
