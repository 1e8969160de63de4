"""The command `llama-xla chat`: a conversation at the terminal, or one question from a pipe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llama.cli.flags import one_of
from llama.cli.output import interruptible, log_to_stderr, write
from llama.config import DTYPES, EngineConfig
from llama.errors import InterruptedRunError, UserError

if TYPE_CHECKING:
    from llama.conversation import Conversation, Overflow
    from llama.generation import LLaMA

log = logging.getLogger("llama")

HELP = """/system TEXT   set the system prompt (none takes it away)     /undo        take back the last turn
/reset         forget all turns                               /save FILE   write the dialog as JSON
/help          this                                           /exit        end (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""


def chat(
    *,
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    chat_format: str | None = None,
    system_prompt: str | None = None,
    on_overflow: str = "refuse",
    max_gen_len: int = 512,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    max_seq_len: int = 2048,
    dtype: str = "auto",
    quiet: bool = False,
) -> None:
    """Talk with a chat model. A question in a pipe is answered once.

    llama-xla chat --ckpt_dir path/to/Llama-3.2-1B-Instruct
    echo "Why is the sky blue?" | llama-xla chat --ckpt_dir path/to/Llama-3.2-1B-Instruct --quiet

    Model:
        ckpt_dir: A chat model's directory, in any format that is read.
        tokenizer_path: Its tokenizer. Without it: the one beside the weights.
        chat_format: llama2, llama3 or template (the checkpoint's own). Without it: the checkpoint's own, or what its tokenizer says.
        dtype: How weights are stored: float32, bfloat16, or auto: float32 on a CPU device, else bfloat16.

    Dialog:
        system_prompt: What the model is told first.
        on_overflow: When the dialog no longer fits: refuse, or drop the oldest turns.
        max_seq_len: Positions of the cache: the whole dialog.

    Sampling:
        max_gen_len: Most tokens of an answer.
        temperature: 0 takes the likeliest token; higher is more random. Without it: the checkpoint's own wish, or 0.6.
        top_p: Sample from the likeliest tokens that together have this probability. Without it: the checkpoint's own wish, or 0.9.
        seed: Same seed, same answers. Without it: a new one for each answer.

    Output:
        quiet: No log on stderr.
    """
    log_to_stderr(quiet)
    config = EngineConfig(max_seq_len=max_seq_len, dtype=one_of("dtype", dtype, DTYPES))
    from llama.chat import choose_format
    from llama.conversation import OVERFLOWS, Conversation
    from llama.generation import LLaMA

    overflow = cast("Overflow", one_of("on_overflow", on_overflow, OVERFLOWS))
    llm = LLaMA.build(ckpt_dir, tokenizer_path, config=config, progress=not quiet and sys.stderr.isatty())
    params = llm.sampling(max_gen_len, temperature, top_p, seed, otherwise=(0.6, 0.9))
    chosen = choose_format(llm.tokenizer, llm.directory, chat_format)
    conversation = Conversation(llm, chosen, params, system_prompt=system_prompt, on_overflow=overflow)
    if sys.stdin.isatty():
        _talk(llm, conversation)
        return
    with interruptible(llm):
        _answer(conversation, sys.stdin.read().strip())
        if llm.engine.interrupted:
            raise InterruptedRunError("interrupted; the answer so far is printed")


def _talk(llm: LLaMA, conversation: Conversation) -> None:
    """Read lines until the user has had enough; nothing that he types ends the program but /exit and Ctrl-D."""
    write("/help lists the commands.\n")
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _command(line, conversation):
                    return
            elif line.strip():
                with interruptible(llm):
                    _answer(conversation, line)
        except UserError as error:
            print(f"llama-xla: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """What the user types, line by line; one that ends in a backslash goes on in the next."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history at the prompt, where the platform has it
    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input("  ")
            yield line
        except KeyboardInterrupt:
            write("\n")
        except EOFError:
            write("\n")
            return


def _answer(conversation: Conversation, text: str) -> None:
    for piece in conversation.say(text):
        write(piece)
    write("\n")


def _command(line: str, conversation: Conversation) -> bool:
    """Carry out a /command; False ends the conversation."""
    name, _, rest = line.partition(" ")
    commands: dict[str, Callable[[], object]] = {
        "/help": lambda: write(HELP + "\n"),
        "/reset": conversation.reset,
        "/undo": lambda: write("Taken back.\n" if conversation.undo() else "There is nothing to take back.\n"),
        "/system": lambda: conversation.set_system(rest.strip() or None),
        "/save": lambda: conversation.save(Path(rest.strip() or "conversation.json")),
    }
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name in commands:
        commands[name]()
    else:
        write(f"{name} is no command.\n{HELP}\n")
    return True
