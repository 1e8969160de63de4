"""`python -m llama.cli` is `llama-xla`."""

from llama.cli import main

main()
