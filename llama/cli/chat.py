"""The command `llama-xla chat`: a conversation at the terminal, or one question from a pipe."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama.cli.drafting import drafting_of, takes_drafting
from llama.cli.flags import REQUIRED, one_of, shown
from llama.cli.loading import config_of, loaded, readable_tokenizer, takes_loading
from llama.cli.output import interruptible, leave_compiling_to_bars, log_to_stderr
from llama.cli.sampling import checked, takes_controls
from llama.cli.streams import decoded, is_terminal, read_stdin
from llama.cli.talk import Talk, open_lines, stream_answer, turns
from llama.config import OVERFLOWS, EngineConfig, Overflow
from llama.errors import FlagError, InterruptedRunError, PromptError
from llama.ranks import current_ranks
from llama.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llama.conversation import Conversation
    from llama.generation import LLaMA

log = logging.getLogger("llama")

DEFAULTS = SamplingParams(max_gen_len=512, temperature=0.6, top_p=0.9)  # Meta's, for chat


@takes_loading(
    without=("max_batch_size", "fail_on_recompile"),  # one request at a time; a longer dialog has programs of its own
    ckpt_dir=(
        REQUIRED,
        "A chat model's directory, in Meta's, Hugging Face's or llama-xla's own format, or its GGUF file.",
    ),
    max_seq_len=(EngineConfig.max_seq_len, "Positions of the cache, for the whole dialog."),
)
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
    loading: dict[str, Any],
    sampling: dict[str, Any],
    drafting: dict[str, Any],
    chat_format: str | None = None,
    system_prompt: str | None = None,
    on_overflow: str = "refuse",
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Talk with a chat model, or answer one question from a pipe.

    llama-xla chat --ckpt_dir path/to/Llama-3.2-1B-Instruct
    echo "Why is the sky blue?" | llama-xla chat --ckpt_dir path/to/Llama-3.2-1B-Instruct --quiet

    {model}
        chat_format: llama2, llama3 or template (the checkpoint's own). Default: the checkpoint's template, else the
            format of its tokenizer.

    Dialog:
        system_prompt: Instructions that open the dialog.
        on_overflow: When the dialog no longer fits: refuse it, or drop the oldest turns.

    {sampling}

    {drafting}

    {shapes}

    {devices}

    Output:
        quiet: Log nothing to stderr.
        verbose: Log the memory plan, too, and every program that is compiled.
    """
    log_to_stderr(quiet, verbose)
    config, ckpt_dir = config_of(loading), loading["ckpt_dir"]
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

    tokenizer = readable_tokenizer(ckpt_dir, loading["tokenizer_path"])
    chosen = (
        choose_format(tokenizer, Path(ckpt_dir), chat_format)
        if tokenizer is not None and Path(ckpt_dir).exists()
        else None
    )
    llm = loaded(loading, config, tokenizer, quiet, drafting=drafted)
    from llama.conversation import Conversation

    params = llm.sampling(DEFAULTS, **given)
    assert chosen is not None  # a model without a tokenizer has been refused by now
    if chat_format is None and chosen.name != "template":
        log.warning(
            "%s has no chat template, so dialogs are written in the format that its tokenizer fits, %s. If the model "
            "has not learnt it, or is no chat model, the answers make no sense; --chat_format %s says that it has",
            ckpt_dir,
            *(chosen.name, chosen.name),
        )
    conversation = Conversation(llm, chosen, params, system_prompt=system_prompt, on_overflow=overflow)
    leave_compiling_to_bars(turns, verbose)
    with closing(llm):
        if question is None:
            Talk(llm, conversation, open_lines(), partial(shown, command=chat)).run()
        else:
            _answer_once(llm, conversation, question)


def _answer_once(llm: LLaMA, conversation: Conversation, question: str) -> None:
    """Answer the one question of a pipe."""
    with interruptible(llm):
        stream_answer(lambda: conversation.say(question), conversation)
        if conversation.result is not None and conversation.result.finish_reason == "interrupted":
            raise InterruptedRunError("interrupted; the answer so far is printed")
