"""Other programs that take a LLaMA: each module is an adapter, and needs the extra that its errors name.

lm_eval.py   lm-evaluation-harness
"""

from typing import Literal

TooLong = Literal["truncate", "refuse"]

MAX_GEN_TOKS = 256  # tokens of an answer where a task does not say: lm-eval's own number
TOO_LONG: tuple[TooLong, ...] = ("truncate", "refuse")  # lm-eval needs an answer to every request, so none is skipped
