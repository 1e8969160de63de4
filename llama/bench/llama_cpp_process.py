"""llama.cpp from import to first token; its text runs as ``python -c TEXT GGUF PROMPT_TOKENS POSITIONS`` (startup.py).

Prints one JSON line with the seconds of its phases. Weights are mapped and all cores are used.
"""

from __future__ import annotations

import json
import os
import sys
import time

TOKEN = 8  # of the synthetic prompt, as LLaMA.synthetic_prompt has it


def main(path: str, prompt_len: int, positions: int) -> None:
    """Load the weights, evaluate the prompt, sample one token."""
    times = [time.perf_counter()]
    import llama_cpp

    times.append(time.perf_counter())
    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        path, n_ctx=positions, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    times.append(time.perf_counter())
    model.eval([1] + [TOKEN] * (prompt_len - 1))
    model.sample(temp=0.0, top_k=1, repeat_penalty=1.0)
    times.append(time.perf_counter())
    phases = ("import_s", "load_s", "prefill_s")
    spent = {name: end - begin for name, begin, end in zip(phases, times, times[1:], strict=False)}
    print(json.dumps({"startup": spent}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
