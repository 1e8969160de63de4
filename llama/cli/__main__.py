"""`python -m llama.cli` is `llama-xla`."""

from llama.cli import main

if __name__ == "__main__":
    main()
