"""Fixtures for all tests, which run on the PJRT CPU device, offline, on models made here."""

from __future__ import annotations

import os

os.environ["PJRT_DEVICE"] = "CPU"
# Programs; each takes about 40 memory mappings on two cores, 110 on sixteen, of which Linux has 65,530 for a process.
os.environ["XLA_COMPILATION_CACHE_SIZE"] = "600"
# torch's threads, here and in all processes that tests start: they would wait for those of other workers, and the
# tensors are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import logging
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import Outcome, Run, exit_code

from llama import EngineConfig, LLaMA, ModelArgs

# A shell that runs the tests in the background has SIGINT ignored, which all processes would inherit: then Ctrl-C could
# not be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=32)

LLMFactory = Callable[..., LLaMA]

# A worker that began one of these files when the others have nothing left would be waited for.
LONGEST = ("test_mesh", "test_drafting_equality", "test_layers", "test_readme", "test_cache_dtype", "test_xla_dist")


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep the order of files, instead of sorting them by their number of tests."""
    config.option.loadscopereorder = False


def pytest_unconfigure() -> None:
    """Close what llama-cpp-python opens when it is imported, and leaves to be warned of at the process's end."""
    opened = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if opened is not None and hasattr(opened, name):
            getattr(opened, name).close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow whatever runs a compiled model, which takes seconds to compile; put the longest files first."""
    for item in items:
        if "make_llm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _restore_globals() -> Iterator[None]:
    """No test leaves a seed, a default dtype, an environment variable or a log level behind."""
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    state, log = torch.get_rng_state(), logging.getLogger("llama")
    level, propagates = log.level, log.propagate
    yield
    log.setLevel(level)
    log.propagate = propagates
    torch.set_rng_state(state)
    torch.set_default_dtype(dtype)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 320 ids with byte fallback, like LLaMA's, trained on made-up sentences."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("tokenizer")
    words = [
        "once",
        "upon",
        "a",
        "time",
        "there",
        "was",
        "the",
        "cat",
        "dog",
        "ran",
        "home",
        "green",
        "house",
        "and",
        "they",
        "sang",
    ]
    chooser = random.Random(0)
    lines = [" ".join(chooser.choice(words) for _ in range(12)).capitalize() + "." for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


@pytest.fixture(scope="module")
def make_llm(tokenizer_path: Path) -> LLMFactory:
    """``make_llm(args=TINY, seed=1, **engine)``: a LLaMA with random weights.

    The same arguments give the same, compiled, object within a module. It has no prefix cache unless that is asked for,
    because a test must not depend on the prompts of another one.
    """
    made: dict[tuple[ModelArgs, int, EngineConfig], LLaMA] = {}

    def make(args: ModelArgs = TINY, seed: int = 1, **engine: object) -> LLaMA:
        config = EngineConfig(**{"max_seq_len": 128, "buckets": (64, 8, 1), "prefix_cache": False, **engine})  # type: ignore[arg-type]
        key = (args, seed, config)
        if key not in made:
            made[key] = LLaMA.build(tokenizer_path=tokenizer_path, config=config, random_weights=args, seed=seed)
        return made[key]

    return make


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A checkpoint in Meta's format with TINY's shape and random weights; tests may damage it."""
    from llama import checkpoint

    params = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 320,
        "multiple_of": 32,
        "norm_eps": 1e-5,
    }
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(params))
    torch.save(dict(checkpoint.random_tensors(TINY, seed=3)), directory / "consolidated.00.pth")
    (directory / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return directory


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """``run("plan", "--prompt_len", "9")``: a command in this process; restores the log afterwards."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = exit_code(arguments)
        return Outcome(code, *capsys.readouterr())

    logger = logging.getLogger("llama")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    yield call
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
