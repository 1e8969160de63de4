"""The classic entry: pytorch-tpu/llama's flags and its lines in the log, text out. The same function is
`llama-xla generate`.

Without a prompt it continues the demo prompt, at a terminal, too.
"""

import logging
import os
import sys

from llama.cli import main

if __name__ == "__main__":
    if sys.stdin is not None and sys.stdin.isatty():
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # an empty stdin is no prompt
    logging.getLogger("llama.classic").setLevel(logging.DEBUG)
    main(["generate", *sys.argv[1:]])
