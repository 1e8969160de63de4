"""Text generation with LLaMA-family models on PyTorch/XLA.

    from llama import LLaMA
    llm = LLaMA.build()                                   # the demo model; ckpt_dir="..." for yours
    print(llm.generate(["Once upon a time"])[0].generation)

Importing the package starts no device and does not even import torch: names are resolved when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llama.config import DraftConfig, EngineConfig, ModelArgs, RopeScaling
    from llama.engine.drafting import Drafter, Drafts
    from llama.errors import LLaMAError
    from llama.generation import LLaMA
    from llama.outputs import Generation, Piece
    from llama.sampling_params import SamplingParams
    from llama.scoring import RollingScore, Score
    from llama.tokenizer import Tokenizer, load_tokenizer

_HOME = {
    "DraftConfig": "llama.config",
    "Drafter": "llama.engine.drafting",
    "Drafts": "llama.engine.drafting",
    "EngineConfig": "llama.config",
    "ModelArgs": "llama.config",
    "RopeScaling": "llama.config",
    "SamplingParams": "llama.sampling_params",
    "RollingScore": "llama.scoring",
    "Score": "llama.scoring",
    "LLaMAError": "llama.errors",
    "Generation": "llama.outputs",
    "LLaMA": "llama.generation",
    "Piece": "llama.outputs",
    "Tokenizer": "llama.tokenizer",
    "load_tokenizer": "llama.tokenizer",
}

__all__ = [
    "DraftConfig",
    "Drafter",
    "Drafts",
    "EngineConfig",
    "Generation",
    "LLaMA",
    "LLaMAError",
    "ModelArgs",
    "Piece",
    "RollingScore",
    "RopeScaling",
    "SamplingParams",
    "Score",
    "Tokenizer",
    "__version__",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
