"""A checkpoint as Hugging Face's own classes read it: its weights, and its SentencePiece model as a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from llama.checkpoint import open_checkpoint
from llama.checkpoint.names import to_hugging_face


def write_hugging_face(source: Path, directory: Path, positions: int, **tokenizer_config: str) -> Path:
    """Write a checkpoint with a SentencePiece model in Hugging Face's format.

    Args:
        source: a checkpoint in Meta's format.
        directory: is made.
        positions: what config.json says of the longest text.
        tokenizer_config: more entries of tokenizer_config.json.
    """
    directory.mkdir()
    opened = open_checkpoint(source)
    args = opened.args
    heads = {"wq": args.n_heads, "wk": args.kv_heads}
    weights = {}
    for name, weight in opened.tensors():
        turned = next((count for part, count in heads.items() if f".{part}." in name), None)
        own = weight if turned is None else halves_apart(weight, turned)
        weights[str(to_hugging_face(name))] = own.float().clone()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": positions,
        "tie_word_embeddings": args.tie_word_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(source / "tokenizer.model", directory, **tokenizer_config)
    return directory


def halves_apart(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of a query or key projection from Meta's order in each head (the two of a pair are neighbours) to Hugging
    Face's (all first halves, then all second ones).
    """
    out_features, in_features = weight.shape
    pairs = weight.view(n_heads, out_features // n_heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)


def write_tokenizer(path: Path, directory: Path, **config: str) -> None:
    """Write a SentencePiece BPE model as tokenizer.json and tokenizer_config.json, as transformers converts Llama 2's.

    Args:
        config: more entries of tokenizer_config.json.
    """
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [library.id_to_piece(i) for i in range(library.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece in pieces:
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        own = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        found += sorted(own, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    merges = sorted(found, key=lambda cut: -library.get_score(ids["".join(cut)]))
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")])
    made.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
