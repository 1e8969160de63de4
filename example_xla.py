"""The classic entry: pytorch-tpu/llama's flags, text out. The same function is `llama-xla generate`."""

import sys

from llama.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
