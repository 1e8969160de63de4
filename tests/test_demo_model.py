"""The shipped demo model: small enough, whole, sensible; and the script that trains it runs from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama import LLaMA
from llama.config import DEMO_CONTEXT, DEMO_DIR

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def demo() -> LLaMA:
    """The demo model, two rows."""
    return LLaMA.build(max_batch_size=2)


def test_it_is_small_and_in_metas_format() -> None:
    """At most 8 MB together: the three files of a LLaMA checkpoint, its Medusa heads, and a README of each."""
    files = {str(p.relative_to(DEMO_DIR)): p.stat().st_size for p in DEMO_DIR.rglob("*") if p.is_file()}
    heads = {f"medusa/{name}" for name in ("medusa_lm_head.safetensors", "config.json", "README.md")}
    assert set(files) == {"params.json", "consolidated.00.pth", "tokenizer.model", "README.md", *heads}
    assert sum(files.values()) <= 8_000_000
    assert files["medusa/medusa_lm_head.safetensors"] < 3_000_000
    params = json.loads((DEMO_DIR / "params.json").read_text())
    assert params["n_kv_heads"] < params["n_heads"]


def test_its_tokenizer_is_made_like_llamas(demo: LLaMA) -> None:
    """Byte fallback, digits one by one, BOS 1 and EOS 2, and any text back unchanged."""
    assert (demo.tokenizer.bos_id, demo.tokenizer.eos_id) == (1, 2)
    text = "Mia had 12 kites.\n\u00dcber \u6f22 \U0001f600  two spaces"
    assert demo.tokenizer.decode(demo.tokenizer.encode(text)) == text
    assert len(demo.tokenizer.encode("1234", bos=False)) >= 4


def test_it_tells_a_story_and_ends_it(demo: LLaMA) -> None:
    """Greedy: sentences of words that end by EOS; the hero who is named first is named again."""
    (result,) = demo.generate(["Once upon a time, there was a little girl named Lily"], max_gen_len=300, temperature=0)
    assert result.finish_reason == "stop"
    assert result.generation.strip().endswith((".", '"', "!"))
    assert result.generation.count("Lily") >= 2
    assert result.generation.isascii()


REPEATED = [
    "Mia and her brother carried the red lamp to the barn.",
    "seven apples, a blue kite and the old wooden box",
    "Tom found a golden bell by the river.",
    "the green drum, the white shell and two tiny stones",
    "On Monday Lily baked bread in the kitchen.",
    "a big yellow boat and a small black hat",
]


def test_it_copies_from_its_prompt(demo: LLaMA) -> None:
    """Most words behind ``Copy:`` are the passage's own; few of them stand in another passage, which the test could
    confuse it with.
    """
    results = demo.generate([f"Repeat: {passage}\nCopy:" for passage in REPEATED], max_gen_len=40, temperature=0)
    copies = [r.generation.split("\n")[0].split() for r in results]

    def shared(shift: int) -> float:
        passages = [set(REPEATED[(i + shift) % len(REPEATED)].split()) for i in range(len(REPEATED))]
        return sum(word in words for copy, words in zip(copies, passages, strict=True) for word in copy) / sum(
            map(len, copies)
        )

    assert shared(0) >= 0.6, copies
    assert shared(1) < 0.4


def test_its_context_is_used_to_the_end(demo: LLaMA) -> None:
    """A prompt of all but one position still runs."""
    (result,) = demo.generate([[1] + [20] * (DEMO_CONTEXT - 2)], max_gen_len=1, temperature=0)
    assert result.prompt_tokens == DEMO_CONTEXT - 1


def test_the_training_script_runs(tmp_path: Path) -> None:
    """A few steps into an empty directory make a checkpoint that loads and generates, and the README that goes with
    it.
    """
    command = [sys.executable, str(SCRIPTS / "train_demo_model.py"), "--quick", "--out", str(tmp_path / "quick")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    llm = LLaMA.build(tmp_path / "quick", max_seq_len=64)
    assert len(llm.generate(["Once"], max_gen_len=4, temperature=0)[0].token_ids) <= 4
    assert "perplexity" in (tmp_path / "quick" / "README.md").read_text()
