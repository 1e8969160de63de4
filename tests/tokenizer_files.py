"""Small tokenizer files of every kind, trained on the spot, and strings to try them on."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Llama 3's, as Meta's tokenizer.py has it
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
WORDS = [
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "the",
    "cat",
    "and",
    "dog",
    "ran",
    "home;",
    "user",
    "assistant",
    "system",
    "Hello,",
    "world!",
    "It's",
    "12345",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
]


def corpus() -> list[str]:
    """Made-up sentences, with Chinese, Arabic and emoji words in some."""
    chooser = random.Random(0)
    words = [*WORDS, "naïve", "日本語", "مرحبا", "😀😀", "def f(x):\n    return x\n\n", "  "]
    return [" ".join(chooser.choice(words) for _ in range(12)) for _ in range(400)]


def byte_level() -> Tokenizer:
    """A byte-level BPE in the manner of Llama 3's tokenizer.json: its pattern, its control tokens behind the
    vocabulary.
    """
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(LLAMA3_SPECIAL)
    bos = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[bos])
    return made


def sentencepiece_like(scheme: str = "legacy") -> Tokenizer:
    """A BPE with byte fallback in the manner of Llama 2's tokenizer.json.

    Args:
        scheme: ``legacy`` writes spaces by a normalizer, as Llama 2's; ``always``, ``first`` and ``never`` by
            Metaspace.
    """
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = [word for line in corpus() for word in line.replace(" ", " \n").split("\n")]  # no merges across words
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
    return Tokenizer.from_str(json.dumps(content))


def write_json(made: Tokenizer, directory: Path, **beside: Any) -> Path:
    """Save a tokenizer.json, and the JSON files beside it that the keywords name, for instance
    ``tokenizer_config={...}``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    for name, content in beside.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory / "tokenizer.json"


def write_ranks(made: Tokenizer, path: Path) -> Path:
    """Write a byte-level tokenizer's vocabulary as a ranks file; its control tokens, which stand behind it, are left
    out.
    """
    visible = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
    letters = {chr(b): b for b in visible}
    letters |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in visible)}
    pieces = sorted(made.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(letters[c] for c in piece)).decode()} {rank}" for piece, rank in pieces]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path


def strings(count: int, seed: int = 0) -> list[str]:
    """Texts that tokenizers get wrong: any Unicode, marks, emoji, both directions, white space, look-alikes, code,
    digits.
    """
    chooser = random.Random(seed)
    look_alikes = [
        *LLAMA3_SPECIAL,
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<|eot_id",
        "|>",
        "▁",
        "[INST]",
        "<|reserved_special_token_7|>",
    ]
    makers = [
        lambda: chr(
            chooser.choice([chooser.randrange(0x80), chooser.randrange(0xD800), chooser.randrange(0xE000, 0x110000)])
        ),
        lambda: chooser.choice(
            ["e\u0301", "\u0928\u093f", "\u0301", "\u200d", "\ufe0f", "\u200b", "\ufeff", "ﬁ", "İ", "ß"]
        ),
        lambda: chooser.choice(["😀", "👩‍👩‍👧‍👦", "🇨🇭", "👍🏽", "❤️"]),
        lambda: chooser.choice(["日本語", "漢字", "한국어", "مرحبا", "שלום", "\u202eabc\u202c"]),
        lambda: chooser.choice(" \t\n\r\v\f\u00a0\u2028\u3000\x1c\x85") * chooser.randrange(1, 9),
        lambda: chooser.choice(look_alikes),
        lambda: chooser.choice(["\\xff", "\\xc3\\x28", "\x00", "\x7f", "\x80", "ÿ"]),
        lambda: str(chooser.randrange(10 ** chooser.randrange(1, 12))),
        lambda: chooser.choice(["if (a[i] != '\\0') {", "\treturn x**2  # y\r\n", "it's we'LL", "a_b.c", "//!?"]),
        lambda: chooser.choice(WORDS) + " ",
    ]
    return [
        "",
        " ",
        "\n",
        *("".join(chooser.choice(makers)() for _ in range(chooser.randrange(1, 24))) for _ in range(count - 3)),
    ]
