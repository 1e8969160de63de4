"""What the CPU device rounds before it multiplies (``activations``, ``prefill_products``) hardly moves a text's
likelihood and logits, against the same weights without rounding.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from llama import EngineConfig, LLaMA, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

pytestmark = pytest.mark.slow

EXACT = {"activations": "float32", "prefill_products": "float32"}
TEXTS = 10


def measured(texts: list[str], **settings: str) -> tuple[float, np.ndarray]:
    """Perplexity of texts, and the logits of the first one's positions: [T, V]."""
    config = EngineConfig(max_seq_len=384, buckets=(256, 64, 8, 1), prefix_cache=False, **settings)  # type: ignore[arg-type]
    llm = LLaMA.build(config=config)
    scores = llm.rolling(texts)
    params = SamplingParams(1, 0.0, logits=True, prompt_logprobs=True, logprobs=0)
    (result,) = llm.generate(texts[:1], params=[params])
    assert result.logits is not None
    return math.exp(-sum(s.logprob for s in scores) / sum(s.tokens for s in scores)), result.logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_defaults_stay_near_what_is_not_rounded(dtype: str) -> None:
    """Perplexity within 0.1 %, logits within 1 %, of prompts that go in chunks of 256, 64, 8 and 1; float32 is
    exact.
    """
    from demo_text import TextMaker

    maker = TextMaker(5)
    texts = [maker.story().text for _ in range(TEXTS)]
    (exact, logits), (rounded, near) = measured(texts, dtype=dtype, **EXACT), measured(texts, dtype=dtype)
    error = float(np.linalg.norm(near - logits) / np.linalg.norm(logits))
    print(f"{dtype}: perplexity {exact:.5f}, {100 * (rounded / exact - 1):+.3f} %; logits off by {100 * error:.3f} %")
    assert abs(rounded / exact - 1) < 0.001
    assert error < 0.01
    assert (error == 0) == (dtype == "float32")
