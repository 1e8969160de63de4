"""The command `llama-xla generate`: prompts from flags, a file or stdin; text or JSON lines out."""

from __future__ import annotations

import logging
import select
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.cli.drafting import drafting_of, takes_drafting
from llama.cli.flags import help_text
from llama.cli.loading import config_of, loaded, readable_tokenizer, takes_loading
from llama.cli.output import Printer, counted, interruptible, log_to_stderr
from llama.cli.sampling import checked, takes_controls
from llama.cli.streams import decoded, is_terminal, read_stdin
from llama.config import EngineConfig, ModelArgs
from llama.errors import FlagError, GrammarCutError, InterruptedRunError, PromptError
from llama.ranks import current_ranks
from llama.sampling_params import SamplingParams
from llama.startup import Startup, process_start

if TYPE_CHECKING:
    from llama.generation import LLaMA
    from llama.inputs import Prompt
    from llama.outputs import Generation

log = logging.getLogger("llama")

DEMO_PROMPT = "Once upon a time"
SYNTHETIC_PROMPT_LEN = 6
LARGEST_DEFAULT_BATCH = 32
MOST_SAMPLES = 65536  # of a prompt; each takes memory on the host while it waits
TRACED_TOKENS = 8
SILENCE_S = 2  # of stdin, until the log says what is waited for


@takes_loading(max_batch_size=(None, "Prompts that run together. Default: the number of prompts, at most 32."))
@takes_drafting
@takes_controls(without=("prompt_logprobs", "hidden_states", "logits", "cache_salt"))
def generate(
    *,
    loading: dict[str, Any],
    sampling: dict[str, Any],
    drafting: dict[str, Any],
    prompt: list[str] | None = None,
    prompts_file: str | None = None,
    prompt_len: int | None = None,
    strict_grammar: bool = False,
    hidden_states: str | None = None,
    logits: str | None = None,
    prefill_budget: int = EngineConfig.prefill_budget,
    schedule: str = EngineConfig.schedule,
    random_weights: bool = False,
    dim: int | None = None,
    n_layers: int | None = None,
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    vocab_size: int | None = None,
    repeat: int = 1,
    echo: bool = False,
    stream: bool = False,
    json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    timings: bool = False,
    profile: str | None = None,
    dump_hlo: str | None = None,
) -> None:
    """Continue prompts with the demo model, or with a checkpoint.

    llama-xla generate "Once upon a time" --stream
    llama-xla generate --ckpt_dir llama-2-7b --prompts_file prompts.txt --temperature 0 --json > out.jsonl

    Prompts:
        prompt: Text to continue; the name of the flag may be left out. Default: all of stdin, if it is no terminal;
            if nothing comes, the demo model continues "Once upon a time", and other models a synthetic prompt.
        prompts_file: A UTF-8 file with one prompt per line; blank lines are skipped, - is stdin.
        prompt_len: Run a synthetic prompt of this many tokens after BOS instead of a text, for timings.

    {model}

    {sampling}

    {drafting}

    {shapes}
        prefill_budget: Prompt tokens that may run before the running prompts get their next token.
        schedule: fcfs starts the prompts in their order; shortest starts short ones first.

    {devices}

    Random weights, for tests and timings:
        random_weights: Run random weights instead of a checkpoint; needs --dim, --n_layers and --n_heads.
        dim: Width of the random model.
        n_layers: Its layers.
        n_heads: Its query heads.
        n_kv_heads: Its key and value heads. Default: as many as query heads.
        vocab_size: Its vocabulary. Default: the tokenizer's.

    Output:
        echo: Print the prompt before its generation; with --logprobs, --hidden_states or --logits, include the
            prompt's tokens there.
        stream: Print text as it is generated.
        json: Print one JSON object per generation and line.
        strict_grammar: A generation that ends before its grammar is satisfied is an error with exit code 4; it is
            printed all the same.
        hidden_states: Write the last layer's hidden states to this directory, one .npy file per generation.
        logits: Write the raw logits to this directory, one .npy file per generation.
        quiet: Log nothing to stderr.
        verbose: Log the memory plan, too, every chunk, every compiled program, and the seconds of each phase.
        timings: Split the seconds from process start to first token into import, device, load, compile and prefill:
            a table in the log, or with --json the key startup.
        repeat: Timed passes over all prompts; several run every prompt from its start.
        profile: Write a trace of a few steps, run after the last pass, to this directory; TensorBoard and Perfetto
            open it.
        dump_hlo: Write the compiled programs to this directory, as XLA prints them, with a summary in summary.txt.
    """
    startup = Startup(process_start())
    log_to_stderr(quiet, verbose)
    if repeat < 1:
        raise FlagError(f"--repeat: got {repeat}, expected at least 1")
    has_details = sampling["logprobs"] is not None or hidden_states is not None or logits is not None
    if repeat > 1 or prompt_len is not None:
        sampling["prefix_cache"] = False  # or only the first pass would be one
    given = checked(
        sampling,
        hidden_states=hidden_states is not None,
        logits=logits is not None,
        prompt_logprobs=echo and has_details,
    )
    request = SamplingParams(**given)
    if request.samples > MOST_SAMPLES:
        which = "best_of" if request.is_ranked else "n"
        raise FlagError(
            f"--{which}: got {request.samples}, expected at most {MOST_SAMPLES}; run the command several times"
        )
    if stream and request.is_ranked:
        raise FlagError(
            f"--stream with --best_of {request.best_of}: the best are known only at the end; leave one of them out"
        )
    if strict_grammar and not request.is_constrained:
        raise FlagError("--strict_grammar: there is no grammar to satisfy; give --json_schema or --regex")
    drafted = drafting_of(drafting)
    shape = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "vocab_size": vocab_size}
    random_args = _random_shape(random_weights, loading["ckpt_dir"], shape)
    is_demo = loading["ckpt_dir"] is None and random_args is None
    texts = _texts(prompt, prompts_file, prompt_len)
    takes_stdin = not texts and prompt_len is None and random_args is None and current_ranks().is_alone
    if takes_stdin and is_terminal():
        print(_first_help(), file=sys.stderr)
        raise FlagError(
            "--prompt: got none, and stdin is a terminal, expected a text in quotes; llama-xla generate --help lists "
            "all flags"
        )
    config = config_of(
        loading,
        slots=min(max(len(texts), 1) * request.samples, LARGEST_DEFAULT_BATCH),
        has_random_weights=random_args is not None,
        prefill_budget=prefill_budget,
        schedule=schedule,
    )
    if drafted is not None:
        config = drafted.settled(config)  # refuses what the cache is too short for
    if takes_stdin:
        texts = _piped_prompt()
    if is_demo and not texts and prompt_len is None:
        texts = [DEMO_PROMPT]
    from llama.inputs import check_fit, encode_prompt

    with startup.within("load"):
        tokenizer = readable_tokenizer(loading["ckpt_dir"], loading["tokenizer_path"])
        if tokenizer is not None:
            for index, text in enumerate(texts):  # before the weights, whose loading can take minutes
                ids = encode_prompt(tokenizer, index, text, tokenizer.n_words)
                check_fit(index, len(ids), request.max_gen_len, config.max_seq_len)
    if dump_hlo is not None:
        from llama.xla import backend

        backend.dump_programs(_made_directory("dump_hlo", dump_hlo))
    for flag, name in (("profile", profile), ("hidden_states", hidden_states), ("logits", logits)):
        if name is not None:
            _made_directory(flag, name)
    llm = loaded(loading, config, tokenizer, quiet, random_weights=random_args, startup=startup, drafting=drafted)
    params = llm.sampling(**given)
    synthetic = llm.synthetic_prompt(prompt_len or SYNTHETIC_PROMPT_LEN)
    prompts: list[Prompt] = [*texts] or [synthetic] * config.max_batch_size
    printer = Printer(
        [llm.prompt_text(p) for p in prompts],
        params.n,
        as_json=json,
        stream=stream,
        echo=echo,
        startup=startup if timings else None,
    )
    cut = 0
    with closing(llm), interruptible(llm):
        for number in range(1, repeat + 1):
            results = printer.print_pieces(llm.pieces(prompts, [params] * len(prompts)))
            _save(results, hidden_states, logits)
            if params.is_constrained:
                cut += _warn_of_cuts(results, params)
            if timings and not json and number == 1:
                log.info("Process start to first token:\n%s", "\n".join(startup.table()))
            _log_phases(results[0], startup)
            _log_speeds(results[0], startup, len(prompts), number, repeat)
            if any(result.finish_reason == "interrupted" for result in results) or llm.take_interrupt():
                raise InterruptedRunError("interrupted; what had been generated is printed")
    if profile is not None:
        _trace(llm, prompts, params, Path(profile))
    if dump_hlo is not None:
        from llama.xla import reports as hlo

        (Path(dump_hlo) / "summary.txt").write_text("\n".join(hlo.report(Path(dump_hlo))) + "\n", encoding="utf-8")
        log.info("Wrote the programs to %s, with a summary in summary.txt", dump_hlo)
    if strict_grammar and cut:
        raise GrammarCutError(
            f"{cut} generation{'s' * (cut > 1)} ended before the {params.constraint_name} was satisfied; what had been "
            f"generated is printed; give --max_gen_len more than {params.max_gen_len}, or leave --stop out"
        )


def _warn_of_cuts(results: Sequence[Generation], params: SamplingParams) -> int:
    """Log which generations ended before their grammar was satisfied; return how many."""
    from llama.grammar import is_cut

    cut = 0
    for result in results:
        if not is_cut(result.generation, result.finish_reason, result.stop_reason, params):
            continue
        cut += 1
        ended = "cut at --max_gen_len" if result.finish_reason == "length" else f"ended by {result.stop_reason!r}"
        log.warning("prompt %d: %s before the %s was satisfied", result.index, ended, params.constraint_name)
    return cut


def _save(results: Sequence[Generation], hidden_states: str | None, logits: str | None) -> None:
    """Write each generation's arrays to files."""
    import numpy as np

    for result in results:
        name = f"{result.index}-{result.sample}.npy"
        for directory, array in ((hidden_states, result.hidden_states), (logits, result.logits)):
            if directory is not None and array is not None:
                try:
                    np.save(Path(directory) / name, array)
                except OSError as error:
                    raise FlagError(f"cannot write {Path(directory) / name}: {error.strerror or error}") from error


def _made_directory(flag: str, name: str) -> Path:
    """Make a directory for a flag, and return its absolute path."""
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlagError(f"--{flag} {name}: {error.strerror or error}") from error
    return path.absolute()


def _trace(llm: LLaMA, prompts: Sequence[Prompt], params: SamplingParams, directory: Path) -> None:
    """Run the first batch again for a few tokens, with everything compiled, under the profiler."""
    from llama.xla import backend

    count = min(params.max_gen_len, TRACED_TOKENS)
    few = replace(params, max_gen_len=count, min_tokens=min(params.min_tokens, count))
    batch = prompts[: max(llm.config.max_batch_size // params.samples, 1)]
    with backend.profiled(directory):
        llm.generate(batch, params=[few] * len(batch))
    log.info(
        "Wrote a trace to %s: tensorboard --logdir %s, or its *.trace.json.gz in ui.perfetto.dev", directory, directory
    )


def _random_shape(random_weights: bool, ckpt_dir: str | None, shape: dict[str, int | None]) -> ModelArgs | None:
    """Return the random model's shape, or None without one; an incomplete shape is refused."""
    given = {name: value for name, value in shape.items() if value is not None}
    flags = ", ".join(f"--{name}" for name in given)
    if not random_weights:
        if given and ckpt_dir is not None:
            raise FlagError(f"{flags}: a checkpoint's shape is in its params.json; leave them out")
        if given:
            raise FlagError(
                f"{flags}: there is no checkpoint of this shape; "
                "give --ckpt_dir, or --random_weights to run random ones"
            )
        return None
    if ckpt_dir is not None:
        raise FlagError("--random_weights with --ckpt_dir: got both, expected one of them")
    missing = [f"--{name}" for name in ("dim", "n_layers", "n_heads") if name not in given]
    if missing:
        raise FlagError(
            f"--random_weights needs {', '.join(missing)} too, for instance --dim 768 --n_layers 12 --n_heads 12"
        )
    return ModelArgs(**given)  # type: ignore[arg-type]  # the five are whole numbers


generate.nameless = "prompt"  # type: ignore[attr-defined]  # see flags.normalise


def _first_help() -> str:
    """The help's first lines: what the command does, and how prompts are given."""
    return help_text("generate", generate).partition("\n\nModel:")[0] + "\n"


def _texts(prompt: list[str] | None, prompts_file: str | None, prompt_len: int | None) -> list[str]:
    """Return all prompts that the flags give as text, in order; none for a synthetic prompt."""
    texts = [*(prompt or []), *(_read_prompts(prompts_file) if prompts_file is not None else [])]
    if texts and prompt_len is not None:
        raise FlagError(
            "--prompt_len makes a synthetic prompt: got it beside --prompt or --prompts_file, expected one of them"
        )
    if prompt_len is not None and prompt_len < 1:
        raise FlagError(f"--prompt_len: got {prompt_len}, expected at least 1")
    return texts


def _piped_prompt() -> list[str]:
    """Return the text of stdin without its last line break, or nothing where nothing comes or can be read."""
    with suppress(OSError, ValueError):  # not a stream of the system: a test's, for instance
        if not select.select([sys.stdin], [], [], SILENCE_S)[0]:
            log.info("Reading the prompt from stdin; a prompt in quotes after the command would not wait for it")
    try:
        data = read_stdin()
    except PromptError:
        return []  # nobody has given one: a service's stdin, for instance
    text = decoded(data, "stdin")
    return [text.removesuffix("\n").removesuffix("\r")] if text.strip() else []


def _read_prompts(name: str) -> list[str]:
    """Return the prompts in a file or in stdin, one per line."""
    where = "--prompts_file " + ("stdin" if name == "-" else name)
    try:
        data = read_stdin() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise PromptError(f"--prompts_file {name}: {error.strerror or error}") from error
    text = decoded(data, where)
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise PromptError(f"{where}: got no prompts, expected one a line")
    return prompts


def _log_speeds(first: Generation, startup: Startup, prompts: int, number: int, repeat: int) -> None:
    """Log what a pass over all prompts did, in one line: tokens, speeds, and the time to the first token.

    Args:
        first: any result of the pass.
        prompts: how many were given.
        number, repeat: which pass of how many.
    """
    totals = first.totals
    heading = f"Pass {number} of {repeat}: " if repeat > 1 else ""
    if totals.requests > 1:
        samples = f" and {totals.requests} samples" if totals.requests > prompts else ""
        heading += f"{counted(prompts, 'prompt')}{samples} in all: "
    cached = f" ({totals.cached_tokens} cached)" if totals.cached_tokens else ""
    told = [
        counted(sum(totals.prompt_lengths), "prompt token") + cached + _rate(totals.prompt_tokens, totals.prefill_s),
        f"{totals.generated_tokens} generated" + _rate(totals.decoded_tokens, totals.decode_s),
    ]
    if first.drafting is not None:
        drafted = counted(totals.drafting.draft_tokens, "drafted token")
        told.append(f"{totals.drafting.accepted_tokens} of {drafted} accepted")
    ttft = ""
    if totals.prompt_lengths and number == 1:
        ttft = f"; first token {startup.total_s:.2f} s after the command began"
    elif totals.prompt_lengths:
        ttft = f"; first token {totals.ttft_s:.2f} s after the pass began"
    log.info("%s%s, in %.2f s%s", heading, ", ".join(told), totals.total_s, ttft)


def _rate(tokens: int, seconds: float) -> str:
    """How fast tokens were run or chosen; nothing where none were."""
    if not tokens or not seconds:
        return ""
    rate = tokens / seconds
    return f" at {rate:.0f} tok/s" if rate >= 10 else f" at {rate:.1f} tok/s"


def _log_phases(first: Generation, startup: Startup) -> None:
    """Log the seconds of every phase until the end of a pass; ``first`` is any of its results."""
    totals = first.totals
    log.debug(
        "import %.2f s, device %.2f s, load %.2f s, compile %.2f s (%d programs), first token %.3f s, prefill %.3f s, "
        "decode %.3f s, %d program runs",
        startup.seconds["import"],
        startup.seconds["device"],
        startup.seconds["load"],
        first.timing.compile_s,
        first.programs.compiled,
        totals.ttft_s,
        totals.prefill_s,
        totals.decode_s,
        totals.runs,
    )
