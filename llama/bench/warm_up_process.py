"""A full warm-up, timed; its text runs as ``python -c TEXT JSON`` (startup.py).

``llama`` may be an older version of this package, so only what all versions have is used: ``LLaMA.build`` and
``warm_up``. Prints one JSON line: wall and CPU seconds of the warm-up, layers, and programs, which are None if this
version's counter is not found.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

COUNTERS = ("llama.xla.counters", "llama.runtime")  # where versions count the programs that they have compiled


def compiled() -> int | None:
    """Programs compiled so far.

    Only imported modules are asked: an editable install would find a module that this version lacks in another one.
    """
    for name in COUNTERS:
        if hasattr(sys.modules.get(name), "counters"):
            return int(sys.modules[name].counters.compiled)
    return None


def main(given: dict[str, Any]) -> None:
    """Build the model, warm it up."""
    from llama.config import EngineConfig, ModelArgs
    from llama.generation import LLaMA

    settings = given["config"]
    settings["buckets"] = tuple(settings.get("buckets", EngineConfig.buckets))
    llm = LLaMA.build(
        given["ckpt_dir"],
        config=EngineConfig(**settings),
        random_weights=None if given["args"] is None else ModelArgs(**given["args"]),
        seed=given["seed"],
    )
    before, began, cpu = compiled(), time.perf_counter(), os.times()
    llm.warm_up()
    wall_s, after = time.perf_counter() - began, compiled()
    cpu_s = sum(os.times()[:4]) - sum(cpu[:4])  # user and system, of this process and of children that have ended
    programs = None if before is None or after is None else after - before
    print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "programs": programs}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
