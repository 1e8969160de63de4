"""What tests/test_mesh.py runs in a process of its own for each mesh: everything that LLaMA does, as one JSON object.

python tests/mesh_child.py TENSOR DATA CASE...
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(int(sys.argv[1]) * int(sys.argv[2]))}

import numpy as np

from llama import DraftConfig, EngineConfig, LLaMA, ModelArgs, SamplingParams
from llama.compiled.state import CACHE
from llama.engine.runner import XlaRunner

TENSOR, DATA = int(sys.argv[1]), int(sys.argv[2])
SLOTS = 4
ARGS = ModelArgs(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=1030, multiple_of=32
)  # its vocabulary is no multiple of 4
TIED = ModelArgs(dim=96, n_layers=2, n_heads=8, n_kv_heads=8, vocab_size=1024, multiple_of=32, tie_word_embeddings=True)
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"temperature": 0.0, "logit_bias": {40: 3.0}, "bad_words": ((50, 51), (60,))},
    {"temperature": 1.0, "typical_p": 0.6, "min_tokens": 4},
    {"temperature": 0.9, "stop": ("e",), "include_stop": True},
    {"temperature": 1.0, "regex": "[a-z ]{3,20}"},
    {"temperature": 0.8, "n": 2},
    {"temperature": 0.8, "n": 1, "best_of": 3},
]


def shapes(**more: Any) -> EngineConfig:
    """The engine of every case, on this process's mesh."""
    given = {"max_batch_size": SLOTS, "max_seq_len": 192, "buckets": (64, 8, 1), **more}
    return EngineConfig(**given, tensor_parallel=TENSOR, data_parallel=DATA)


def prompt(length: int, seed: int) -> list[int]:
    """Made-up ids, BOS first."""
    return [1, *np.random.default_rng(seed).integers(3, 1000, length - 1).tolist()]


def told(results: list[Any]) -> list[Any]:
    """What became of each prompt: its ids, and the log-probability of each."""
    return [[r.token_ids, [each.logprob for each in r.logprobs]] for r in results]


def controls() -> Any:
    """Every control, in one call that has more requests than slots."""
    llm = LLaMA.build(random_weights=ARGS, config=shapes(), seed=5)
    params = [SamplingParams(12, seed=7 + i, logprobs=1, **wish) for i, wish in enumerate(WISHES)]
    prompts = [prompt((5, 20, 70, 9)[i % 4], i) for i in range(len(WISHES))]
    return told(llm.generate(prompts, params=params))


def details() -> Any:
    """Hidden states, logits and the prompt's own log-probabilities."""
    llm = LLaMA.build(random_weights=ARGS, config=shapes(prefix_cache=False), seed=5)
    wish = SamplingParams(3, 0.0, logprobs=2, prompt_logprobs=2, hidden_states=True, logits=True)
    (result,) = llm.generate([prompt(75, 1)], params=[wish])
    return {
        "hidden_states": result.hidden_states.tolist(),
        "logits": result.logits[-2:].tolist(),
        "prompt": [each.logprob for each in result.prompt_logprobs[1:]],
    }


def scores() -> Any:
    """Answers to two questions, and texts longer than the cache."""
    llm = LLaMA.build(random_weights=TIED, config=shapes(), seed=6)
    questions = [prompt(60, 1), prompt(40, 2)]
    pairs = [(question, prompt(1 + n, 10 + n)[1:]) for question in questions for n in (1, 3, 9, 20)]
    found = [score.logprob for score in llm.score(*zip(*pairs, strict=True))]
    return [found, [rolling.logprob for rolling in llm.rolling([prompt(300, 3), prompt(20, 4)])]]


def prefixes() -> Any:
    """One system prompt for all, again and again; with rows that keep what slots cannot."""
    llm = LLaMA.build(random_weights=ARGS, config=shapes(prefix_cache_bytes=8 << 20), seed=5)
    system, found, cached = prompt(90, 1), [], []
    for turn in range(3):
        prompts = [system + prompt(6 + n, 100 * turn + n)[1:] for n in range(6)]
        results = llm.generate(prompts, params=[SamplingParams(5, 0.0, logprobs=1)] * len(prompts))
        found += told(results)
        cached += [result.cached_tokens for result in results]
    return {"texts": found, "cached": cached}


def widths() -> Any:
    """Requests of different lengths, so that steps become narrower and rows move."""
    llm = LLaMA.build(random_weights=TIED, config=shapes(fail_on_recompile=True), seed=6)
    llm.warm_up()
    params = [SamplingParams(limit, 0.0, logprobs=1, ignore_eos=True) for limit in (4, 60, 5, 3, 6, 50, 4)]
    return told(llm.generate([prompt(4 + n, n) for n in range(len(params))], params=params))


def threads() -> Any:
    """Two callers at once, one of which stops listening."""
    llm = LLaMA.build(random_weights=ARGS, config=shapes(), seed=5)
    wish = SamplingParams(30, 0.0, logprobs=1, ignore_eos=True)
    found: dict[int, Any] = {}

    def call(number: int) -> None:
        found[number] = told(llm.generate([prompt(20 + n, n) for n in range(number, number + 3)], params=[wish] * 3))

    callers = [threading.Thread(target=call, args=(number,)) for number in (0, 10)]
    dropped = llm.pieces([prompt(9, 50)], [wish])
    next(dropped)
    for caller in callers:
        caller.start()
    next(dropped)
    dropped.close()
    for caller in callers:
        caller.join()
    return [found[0], found[10]]


def narrow() -> Any:
    """Weights in bfloat16 and int8."""
    found = []
    for dtype in ("bfloat16", "int8"):
        llm = LLaMA.build(random_weights=TIED if dtype == "int8" else ARGS, config=shapes(dtype=dtype), seed=5)
        params = [SamplingParams(8, 0.0, logprobs=1)] * 3
        found += told(llm.generate([prompt(20, 1), prompt(70, 2), prompt(3, 3)], params=params))
    return found


def halved() -> Any:
    """A cache of bfloat16, with shared beginnings and rows that move, and its bytes on a device beside float32's."""
    from llama.xla import mesh

    held = {}
    for dtype in ("float32", "bfloat16"):
        llm = LLaMA.build(random_weights=ARGS, config=shapes(cache_dtype=dtype), seed=5)
        held[dtype] = mesh.part_bytes([llm.engine.runner.tensor(name) for name in CACHE])
    prompts = [prompt(70, 1) + prompt(4 + n, n)[1:] for n in range(7)]
    params = [SamplingParams(limit, 0.0, logprobs=1, ignore_eos=True) for limit in (4, 60, 5, 3, 6, 50, 4)]
    results = llm.generate(prompts, params=params)
    return {"texts": told(results), "cached": [result.cached_tokens for result in results], "bytes": held}


def drafts() -> Any:
    """Every drafter, on the demo model."""
    found = {}
    text = "Once upon a time there was a dog. The dog was big. Once upon a time there was a dog. The dog was big. Once"
    names = ("lookup", "suffix", "lookahead", "medusa", "model")
    for name in names:
        from llama.config import DEMO_DIR

        own = {"draft_ckpt_dir": DEMO_DIR} if name == "model" else {}
        config = shapes(buckets=(8, 1), max_batch_size=2 * DATA)
        llm = LLaMA.build(config=config, drafting=DraftConfig(drafter=(name,), draft_lens=(3,), **own))
        params = [SamplingParams(16, 0.0, logprobs=1), SamplingParams(16, 0.9, seed=3, logprobs=1)]
        results = llm.generate([text, text], params=params)
        found[name] = {"texts": told(results), "accepted": sum(r.drafting.accepted_tokens for r in results)}
    return found


def memory() -> Any:
    """Bytes of weights and cache on each device, as they are."""
    from llama.xla import mesh

    llm = LLaMA.build(random_weights=ARGS, config=shapes(), seed=5)
    runner = llm.engine.runner
    assert isinstance(runner, XlaRunner)
    weights = [p for p in runner.model.parameters() if p.device.type == "xla"]
    if TENSOR * DATA > 1:  # else the stacks are made of the layers' own
        weights += [stack._whole for stack in runner.model.stacks.values()]
    return [mesh.part_bytes(weights), mesh.part_bytes([runner.tensor(name) for name in CACHE])]


def files() -> Any:
    """Checkpoints of one shape in several files, in the directories that MESH_FILES names."""
    found = {}
    for directory in os.environ["MESH_FILES"].split(":"):
        for dtype in ("auto", "int8"):
            llm = LLaMA.build(directory, config=shapes(max_batch_size=DATA, dtype=dtype))
            (result,) = llm.generate([prompt(12, 1)], params=[SamplingParams(8, 0.0, logprobs=1)])
            found[dtype] = [*found.get(dtype, []), *told([result])]
    return found


def loading() -> Any:
    """Anonymous memory that loading the checkpoint in MESH_FILES takes at most, and the bytes of its weights."""
    from llama.sharding import Mesh
    from llama.xla import backend

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))

    backend.init(Mesh(DATA, TENSOR))
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    llm = LLaMA.build(os.environ["MESH_FILES"], config=shapes(max_batch_size=DATA, max_seq_len=16, buckets=(1,)))
    done.set()
    watching.join()
    assert isinstance(llm.engine.runner, XlaRunner)
    return [most - before, sum(p.nbytes for p in llm.engine.runner.model.parameters())]


CASES: dict[str, Callable[[], Any]] = {
    case.__name__: case
    for case in (controls, details, scores, prefixes, widths, threads, narrow, halved, drafts, memory, files, loading)
}
if __name__ == "__main__":
    print(json.dumps({name: CASES[name]() for name in sys.argv[3:] or CASES}))
