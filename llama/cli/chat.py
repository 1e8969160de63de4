"""The command `llama-xla chat`: a conversation at the terminal, or one question from a pipe."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama.cli.devices import devices_of, takes_devices
from llama.cli.drafting import drafting_of, takes_drafting
from llama.cli.flags import one_of, shown
from llama.cli.loading import announce_imports, readable_tokenizer
from llama.cli.output import ending_at_once, interruptible, log_to_stderr, write
from llama.cli.sampling import checked, takes_controls
from llama.cli.streams import decoded, is_terminal, read_stdin
from llama.config import DTYPES, OVERFLOWS, EngineConfig, Overflow
from llama.errors import FlagError, InterruptedRunError, PromptError, UserError
from llama.ranks import current_ranks
from llama.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llama.conversation import Conversation
    from llama.generation import LLaMA

log = logging.getLogger("llama")
turns = logging.getLogger("llama.turns")

DEFAULTS = SamplingParams(max_gen_len=512, temperature=0.6, top_p=0.9)  # Meta's, for chat
HELP = """/system TEXT   set the system prompt (none takes it away)     /undo        take back the last turn
/reset         forget all turns                               /save FILE   write the dialog as JSON
/help          this                                           /exit        end (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""


@takes_devices
@takes_drafting
@takes_controls(
    without=(
        *("n", "best_of", "logprobs", "prompt_logprobs", "hidden_states", "logits"),
        *("prefix_cache", "cache_salt"),
    ),
    max_gen_len=DEFAULTS.max_gen_len,
    temperature=DEFAULTS.temperature,
    top_p=DEFAULTS.top_p,
)
def chat(
    *,
    sampling: dict[str, Any],
    drafting: dict[str, Any],
    devices: dict[str, Any],
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    chat_format: str | None = None,
    system_prompt: str | None = None,
    on_overflow: str = "refuse",
    max_seq_len: int = 2048,
    dtype: str = "auto",
    check_sums: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Talk with a chat model, or answer one question from a pipe.

    llama-xla chat --ckpt_dir path/to/Llama-3.2-1B-Instruct
    echo "Why is the sky blue?" | llama-xla chat --ckpt_dir path/to/Llama-3.2-1B-Instruct --quiet

    Model:
        ckpt_dir: A chat model's directory, in Meta's, Hugging Face's or llama-xla's own format, or its GGUF file.
        tokenizer_path: Its tokenizer. Default: the one beside the weights.
        chat_format: llama2, llama3 or template (the checkpoint's own). Default: the checkpoint's template, else the
            format of its tokenizer.
        dtype: Weights: float32, bfloat16, int8; auto: float32 on a CPU, else bfloat16.
        check_sums: Read all files of the checkpoint first and compare them with the sums beside them; see inspect.

    Dialog:
        system_prompt: Instructions that open the dialog.
        on_overflow: When the dialog no longer fits: refuse it, or drop the oldest turns.
        max_seq_len: Positions of the cache, for the whole dialog.

    {sampling}

    {drafting}

    {devices}

    Output:
        quiet: Log nothing to stderr.
        verbose: Log the memory plan, too, and every program that is compiled.
    """
    log_to_stderr(quiet, verbose)
    found = devices_of(devices)
    config = EngineConfig(
        max_batch_size=max(found.data_parallel, 1),
        max_seq_len=max_seq_len,
        dtype=one_of("dtype", dtype, DTYPES),
        **found._asdict(),
    )
    overflow = cast("Overflow", one_of("on_overflow", on_overflow, OVERFLOWS))
    given, drafted = checked(sampling), drafting_of(drafting)
    if drafted is not None:
        config = drafted.settled(config)
    ranks = current_ranks()
    if is_terminal() and not ranks.is_alone:
        raise FlagError(
            f"stdin: got a terminal in one of {ranks.world_size} processes, expected a question from a pipe or a file; "
            "for a conversation run llama-xla chat in one process"
        )
    question = None if is_terminal() else decoded(read_stdin(), "stdin").replace("\r\n", "\n").strip()
    if question == "":
        raise PromptError(
            "stdin: got nothing, expected a question; for a conversation run llama-xla chat at a terminal"
        )
    from llama.chat import choose_format

    tokenizer = readable_tokenizer(ckpt_dir, tokenizer_path)
    chosen = (
        choose_format(tokenizer, Path(ckpt_dir), chat_format)
        if tokenizer is not None and Path(ckpt_dir).exists()
        else None
    )
    announce_imports()
    with ending_at_once():
        from llama.conversation import Conversation
        from llama.generation import LLaMA

        llm = LLaMA.build(
            ckpt_dir,
            tokenizer_path,
            tokenizer=tokenizer,
            config=config,
            check_sums=check_sums,
            progress=not quiet and sys.stderr.isatty(),
            drafting=drafted,
        )
    params = llm.sampling(DEFAULTS, **given)
    assert chosen is not None  # a model without a tokenizer has been refused by now
    conversation = Conversation(llm, chosen, params, system_prompt=system_prompt, on_overflow=overflow)
    turns.setLevel(log.level)
    if not verbose:  # from here on one line per turn: other lines would interrupt the answers
        log.setLevel(max(log.level, logging.WARNING))
    with closing(llm):
        if question is None:
            _talk(llm, conversation)
        else:
            _answer_once(llm, conversation, question)


def _answer_once(llm: LLaMA, conversation: Conversation, question: str) -> None:
    """Answer the one question of a pipe."""
    with interruptible(llm):
        _answer(conversation, question)
        if conversation.result is not None and conversation.result.finish_reason == "interrupted":
            raise InterruptedRunError("interrupted; the answer so far is printed")


def _talk(llm: LLaMA, conversation: Conversation) -> None:
    """Answer line after line until /exit or Ctrl-D; an error or an interrupt is shown and the conversation goes on."""
    write("/help lists the commands.\n")
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _command(line, conversation):
                    return
            elif line.strip():
                with interruptible(llm):
                    _answer(conversation, line)
        except (UserError, InterruptedRunError) as error:
            print(f"llama-xla: {shown(error, chat)}", file=sys.stderr)
        except KeyboardInterrupt:  # it came when the answer had just ended
            write("\n")


def _lines() -> Iterator[str]:
    """Yield the lines that the user types until the end of stdin; one that ends in a backslash goes on in the next."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 must not end the conversation
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
        except (EOFError, OSError):  # Ctrl-D, or a terminal that is gone
            with suppress(KeyboardInterrupt):  # a Ctrl-C before it that readline had not noticed
                write("\n")
            return


def _answer(conversation: Conversation, text: str) -> None:
    """Stream one answer, and log its tokens and times."""
    for piece in conversation.say(text):
        write(piece)
    write("\n")
    result = conversation.result
    if result is not None:
        turns.info(
            "[%d tokens kept, %d new, %d generated%s; first token after %.2f s, then %.1f tok/s]",
            result.cached_tokens,
            result.prompt_tokens - result.cached_tokens,
            len(result.token_ids),
            {"stop": "", "length": ", cut at the limit", "interrupted": ", interrupted"}[result.finish_reason],
            result.timing.ttft_s,
            result.timing.decode_tok_s,
        )


def _command(line: str, conversation: Conversation) -> bool:
    """Carry out a /command; return False to end the conversation."""
    name, _, rest = line.strip().partition(" ")
    path = Path(rest.strip() or "conversation.json")

    def told(action: Callable[[], object], what: str) -> Callable[[], None]:
        def act() -> None:
            action()
            write(what + "\n")

        return act

    commands: dict[str, Callable[[], object]] = {
        "/help": lambda: write(HELP + "\n"),
        "/reset": told(conversation.reset, "All turns are forgotten."),
        "/undo": lambda: write("Taken back.\n" if conversation.undo() else "There is nothing to take back.\n"),
        "/system": told(
            lambda: conversation.set_system(rest.strip() or None), "Set." if rest.strip() else "Taken away."
        ),
        "/save": told(lambda: conversation.save(path), f"Saved to {path}."),
    }
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name in commands:
        commands[name]()
    else:
        write(f"{name} is no command; /help lists them. A message may begin with a space before its slash.\n")
    return True
