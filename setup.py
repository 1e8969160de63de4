"""Packaging. torch and torch_xla are pinned to the pair that works together; why each library is here:
docs/decisions.md.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "llama" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

setup(
    name="llama-xla",
    version=VERSION.group(1),
    description=(
        "Text generation with LLaMA-family models on PyTorch/XLA: "
        "fixed-length prompt chunks, a preallocated cache, no recompiles"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed", "demo/*", "demo/medusa/*", "bench/draft_prompts.jsonl"]},
    install_requires=[
        "torch==2.9.0",
        "torch_xla==2.9.0",
        "numpy>=1.26,<3",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2.0,<0.3",
        "tiktoken>=0.9,<1",
        "tokenizers>=0.21,<1",
        "jinja2>=3.1.6,<4",
        "llguidance>=1.7,<2",
        "gguf>=0.17,<1",
        "fire>=0.7,<0.8",
        "fairscale>=0.4.13,<0.5",
        "tqdm>=4.66,<5",
        "prompt_toolkit>=3.0.48,<4",
        "psutil>=5.9,<8",
    ],
    extras_require={
        "tpu": ["torch_xla[tpu]==2.9.0"],
        "bench": ["transformers>=4.56,<6", "llama-cpp-python>=0.3.16,<0.4", "matplotlib>=3.9,<4"],
        "eval": ["lm-eval>=0.4.13,<0.6"],
        "dev": [
            "transformers>=4.56,<6",
            "lm-eval>=0.4.13,<0.6",
            "accelerate>=1.1,<2",
            "matplotlib>=3.9,<4",
            "coverage[toml]>=7.10,<8",
            "pre-commit>=4,<5",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.14,<0.18",
            "mypy>=1.18,<3",
            "types-psutil>=5.9,<8",
        ],
    },
    entry_points={"console_scripts": ["llama-xla = llama.cli:main"]},
)
