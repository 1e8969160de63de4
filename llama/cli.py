"""The commands: `llama-xla generate`, `llama-xla plan`, and what every command shares.

A command is a thin function whose signature declares its flags, once: name, type, default; its docstring is their help. fire
dispatches and prints the help. Before fire sees the arguments they are checked against the signature, because fire itself would
read ``--prompt "1, 2"`` as a tuple, keep the last of a repeated flag only, and answer a misspelt one with a trace.

stdout is the result, stderr is the log. Errors of errors.py are shown without a traceback and set the exit code; 130 is Ctrl-C.
"""

from __future__ import annotations

import codecs
import difflib
import inspect
import io
import json as json_lib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llama import __version__, buckets as bucket_plan
from llama.config import BUCKET_POLICIES, DEFAULT_BUCKETS, DEMO_CONTEXT, DTYPES, EngineConfig, ModelArgs, SamplingParams
from llama.errors import FlagError, InterruptedRunError, LLaMAError, PromptError

if TYPE_CHECKING:
    from llama.generation import Generation, LLaMA, Piece, Prompt

log = logging.getLogger("llama")

SEPARATOR = "\n==================================\n"
NEWLINE = b"\n"
DEMO_PROMPT = "Once upon a time"
SYNTHETIC_PROMPT_LEN = 6
LARGEST_DEFAULT_BATCH = 32
EXIT_CLOSED_PIPE = 141
NOT_YET = {"mp": "splitting a model over several devices is not supported yet; run without it, on one device"}


def generate(
    *,
    prompt: list[str] | None = None,
    prompts_file: str | None = None,
    prompt_len: int | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    dtype: str = "auto",
    max_gen_len: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int | None = None,
    buckets: list[int] | None = None,
    bucket_policy: str = "greedy",
    fail_on_recompile: bool = False,
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
) -> None:
    """Continue prompts with the demo model, or with a checkpoint.

    llama-xla generate --prompt "Once upon a time" --stream
    llama-xla generate --ckpt_dir llama-2-7b --prompts_file prompts.txt --temperature 0 --json > out.jsonl

    Prompts:
        prompt: Text to continue. May be repeated, or be a JSON list of strings.
        prompts_file: A UTF-8 file with one prompt a line, blank lines skipped. - is stdin.
        prompt_len: Instead of a text: a synthetic prompt of so many tokens behind BOS, for timings.

    Model:
        ckpt_dir: Directory with params.json and consolidated.00.pth. Without it: the demo model.
        tokenizer_path: SentencePiece model. Without it: the only *.model file in ckpt_dir or its parent.
        dtype: How weights are stored: float32, bfloat16, or auto: float32 on a CPU device, else bfloat16.

    Sampling:
        max_gen_len: Most tokens to generate for a prompt.
        temperature: 0 takes the likeliest token; higher is more random.
        top_p: Sample from the likeliest tokens that together have this probability, above 0, at most 1.
        seed: Same seed, same text. Without it: a new one for each prompt, shown by --json.

    Shapes, fixed when the programs are compiled:
        max_seq_len: Positions of the cache, prompt and generated tokens together. Without it: 2048, or 512 for the demo model.
        max_batch_size: Prompts that run together. Without it: as many as there are, at most 32.
        buckets: Chunk lengths that prompts are cut into. Without it: 512,64,8,1.
        bucket_policy: greedy covers a prompt exactly; pad may fill up its last chunk to run fewer programs.
        fail_on_recompile: A program compiled after warm-up is an error with exit code 3.

    Random weights, for tests and timings:
        random_weights: Random weights instead of a checkpoint; needs --dim, --n_layers and --n_heads.
        dim: Width of the random model.
        n_layers: Its layers.
        n_heads: Its query heads.
        n_kv_heads: Its key and value heads. Without it: as many as query heads.
        vocab_size: Its vocabulary. Without it: the tokenizer's.

    Output:
        echo: Print the prompt before its generation.
        stream: Print text as it is generated.
        json: Print one JSON object per prompt and line.
        quiet: No log on stderr.
        repeat: Timed passes over all prompts.
    """
    _log_to_stderr(quiet)
    if repeat < 1:
        raise FlagError(f"--repeat: got {repeat}, expected at least 1")
    params = SamplingParams(max_gen_len, temperature, top_p, seed)
    shape = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "vocab_size": vocab_size}
    random_args = _random_shape(random_weights, ckpt_dir, shape)
    is_demo = ckpt_dir is None and random_args is None
    texts = _texts(prompt, prompts_file, prompt_len, is_demo)
    config = EngineConfig(
        max_batch_size=max_batch_size if max_batch_size is not None else min(max(len(texts), 1), LARGEST_DEFAULT_BATCH),
        max_seq_len=max_seq_len if max_seq_len is not None else (DEMO_CONTEXT if is_demo else EngineConfig.max_seq_len),
        buckets=tuple(buckets or DEFAULT_BUCKETS),
        bucket_policy=_one_of("bucket_policy", bucket_policy, BUCKET_POLICIES),
        dtype=_one_of("dtype", dtype, DTYPES),
        fail_on_recompile=fail_on_recompile,
    )
    from llama.generation import LLaMA  # torch and torch_xla take seconds: flags are checked first

    llm = LLaMA.build(ckpt_dir, tokenizer_path, config=config, random_weights=random_args, progress=not quiet and sys.stderr.isatty())
    synthetic = llm.synthetic_prompt(prompt_len or SYNTHETIC_PROMPT_LEN)
    prompts: list[Prompt] = [*texts] or [synthetic] * config.max_batch_size
    printer = _Printer([llm.prompt_text(p) for p in prompts], as_json=json, stream=stream, echo=echo)
    with _interruptible(llm):
        for number in range(1, repeat + 1):
            if llm.engine.interrupted:  # Ctrl-C between two passes
                raise InterruptedRunError("interrupted; what had been generated is printed")
            if repeat > 1:
                log.info("Pass %d of %d", number, repeat)
            results = printer.print_pieces(llm.pieces(prompts, [params] * len(prompts)))
            _log_summary(results)
            if any(result.finish_reason == "interrupted" for result in results):
                raise InterruptedRunError("interrupted; what had been generated is printed")


def plan(
    *,
    prompt_len: int,
    max_seq_len: int = 2048,
    buckets: list[int] | None = None,
    bucket_policy: str = "greedy",
    json: bool = False,
) -> None:
    """Show how a prompt is cut into chunks. No device is touched.

    llama-xla plan --prompt_len 1501 --max_seq_len 2048

    Flags:
        prompt_len: Tokens of the prompt, BOS included.
        max_seq_len: Positions of the cache.
        buckets: Chunk lengths. Without it: 512,64,8,1.
        bucket_policy: greedy covers the prompt exactly; pad may fill up its last chunk.
        json: Print one JSON object per chunk and line.
    """
    policy = _one_of("bucket_policy", bucket_policy, BUCKET_POLICIES)
    config = EngineConfig(max_seq_len=max_seq_len, buckets=tuple(buckets or DEFAULT_BUCKETS), bucket_policy=policy)
    chunks = bucket_plan.plan(prompt_len, config)
    for chunk in chunks:
        if json:
            print(json_lib.dumps(chunk._asdict()))
        else:
            padding = f", {chunk.length - chunk.valid} of it padding" if chunk.valid < chunk.length else ""
            print(f"prompt pos [{chunk.start}, {chunk.end}), section length {chunk.length}{padding}, reads keys [0, {chunk.key_len})")
    if not json:
        shapes = {(c.length, c.key_len, c is chunks[-1]) for c in chunks}
        print(f"{len(chunks)} sections, {len(shapes)} programs, {prompt_len} of {max_seq_len} positions")


COMMANDS: dict[str, Callable[..., None]] = {"generate": generate, "plan": plan}


# ---------------------------------------------------------------------------------------------------------------- what to run


def _random_shape(random_weights: bool, ckpt_dir: str | None, shape: dict[str, int | None]) -> ModelArgs | None:
    """The random model that the flags describe, or None; half a description is refused, never guessed."""
    given = {name: value for name, value in shape.items() if value is not None}
    flags = ", ".join(f"--{name}" for name in given)
    if not random_weights:
        if given and ckpt_dir is not None:
            raise FlagError(f"{flags}: the shape of a checkpoint is what its params.json says; leave them out")
        if given:
            raise FlagError(f"{flags}: there is no checkpoint of this shape; give --ckpt_dir, or --random_weights to run random ones")
        return None
    if ckpt_dir is not None:
        raise FlagError("--random_weights with --ckpt_dir: got both, expected one of them")
    missing = [f"--{name}" for name in ("dim", "n_layers", "n_heads") if name not in given]
    if missing:
        raise FlagError(f"--random_weights needs {', '.join(missing)} too, for instance --dim 768 --n_layers 12 --n_heads 12")
    return ModelArgs(**given)  # type: ignore[arg-type]  # the five are whole numbers


def _texts(prompt: list[str] | None, prompts_file: str | None, prompt_len: int | None, is_demo: bool) -> list[str]:
    """All prompts that the flags give as text, in order; none where a synthetic one is wanted."""
    texts = [*(prompt or []), *(_read_prompts(prompts_file) if prompts_file is not None else [])]
    if texts and prompt_len is not None:
        raise FlagError("--prompt_len makes a synthetic prompt: got it beside --prompt or --prompts_file, expected one of them")
    if prompt_len is not None and prompt_len < 1:
        raise FlagError(f"--prompt_len: got {prompt_len}, expected at least 1")
    return [DEMO_PROMPT] if not texts and prompt_len is None and is_demo else texts


def _read_prompts(name: str) -> list[str]:
    """The lines of a prompts file, or of stdin."""
    where = "stdin" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise PromptError(f"--prompts_file {name}: {error.strerror or error}") from error
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode()
    except UnicodeDecodeError as error:
        place = mark + error.start
        line = data[:place].count(b"\n") + 1
        raise PromptError(
            f"--prompts_file {where} is not UTF-8: byte {place} in line {line}; convert it, for instance with iconv"
        ) from error
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise PromptError(f"--prompts_file {where}: got no prompts, expected one a line")
    return prompts


def _one_of(flag: str, value: str, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise FlagError(f"--{flag}: got {value!r}, expected one of {', '.join(allowed)}")
    return value


# ------------------------------------------------------------------------------------------------------------ what is printed


class _Printer:
    """Writes results to stdout in the order of the prompts, whole or as they grow.

    Args:
        prompts: the prompts' texts, for ``echo``.
    """

    def __init__(self, prompts: Sequence[str], as_json: bool, stream: bool, echo: bool) -> None:
        self._prompts, self._as_json, self._stream, self._echo = prompts, as_json, stream, echo
        self._begun = -1  # index of the last prompt whose text has begun
        self._separate = False

    def print_pieces(self, pieces: Iterable[Piece]) -> list[Generation]:
        """Consume a call's pieces; text of a prompt whose turn has not come is held back until it has."""
        held: dict[int, list[Piece]] = {i: [] for i in range(len(self._prompts))}
        results: list[Generation] = []
        self._begun = -1
        for piece in pieces:
            held[piece.index].append(piece)
            while len(results) in held:
                turn = len(results)
                for ready in held[turn]:
                    self._print(ready)
                    if ready.result is not None:
                        results.append(ready.result)
                held[turn] = []
                if len(results) == turn:
                    break
        return results

    def _print(self, piece: Piece) -> None:
        if self._as_json:
            if self._stream and piece.text:
                _write(_json_line({"index": piece.index, "piece": piece.text}))
            if piece.result is not None:
                _write(_json_line(piece.result.as_json()))
        elif self._stream or piece.result is not None:
            self._begin(piece.index)
            text = piece.text if self._stream or piece.result is None else piece.result.generation
            _write(text + ("" if piece.result is None else "\n"))

    def _begin(self, index: int) -> None:
        """Before a prompt's first text: a line between two results, and the prompt where it is to be echoed."""
        if index == self._begun:
            return
        _write((SEPARATOR if self._separate else "") + (self._prompts[index] if self._echo else ""))
        self._begun, self._separate = index, True


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _json_line(value: dict[str, Any]) -> str:
    """An object on one line; characters stay readable where stdout can carry all of them."""
    return json_lib.dumps(value, ensure_ascii=not (sys.stdout.encoding or "utf-8").lower().startswith("utf")) + "\n"


def _log_summary(results: Sequence[Generation]) -> None:
    """What the pass took: the times of each batch added up, once a batch (its rows share them)."""
    batches = list({id(r.timing): r for r in results}.values())
    prefill_s, decode_s = sum(r.timing.prefill_s for r in batches), sum(r.timing.decode_s for r in batches)
    prompt_tokens, generated = sum(r.prompt_tokens for r in results), sum(len(r.token_ids) for r in results)
    decoded = sum(r.timing.decode_tok_s * r.timing.decode_s for r in batches)
    first = batches[0]
    log.info(
        "load %.2f s, compile %.2f s (%d programs), first token %.3f s, prefill %.3f s (%d tokens, %.1f tok/s), "
        "decode %.3f s (%d tokens, %.1f tok/s), %d program runs",
        first.timing.load_s,
        first.timing.compile_s,
        first.programs.compiled,
        first.timing.ttft_s,
        prefill_s,
        prompt_tokens,
        prompt_tokens / prefill_s if prefill_s else 0.0,
        decode_s,
        generated,
        decoded / decode_s if decode_s else 0.0,
        sum(r.programs.runs for r in batches),
    )


def _log_to_stderr(quiet: bool) -> None:
    """Send the package's log to stderr as plain lines, above any progress bar."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.ERROR if quiet else logging.INFO)


@contextmanager
def _interruptible(llm: LLaMA) -> Iterator[None]:
    """Within: the first Ctrl-C ends the generation after its current step, the second one ends the process."""

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        llm.interrupt()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# -------------------------------------------------------------------------------------------------------------- reading flags


def normalise(command: Callable[..., None], arguments: Sequence[str]) -> list[str]:
    """Check raw arguments against a command's signature and write each as ``--name=value``, as fire takes it without guessing.

    Args:
        arguments: what follows the command's name. A flag is ``--name value``, ``--name=value``, or ``--name`` for a boolean;
            dashes and underscores within a name are the same.

    Returns:
        One string a flag; a repeatable flag's values are joined into one JSON list.

    Raises:
        FlagError: an unknown flag (the nearest right one is named), a missing or repeated value, or an argument that is no flag.
    """
    kinds = {name: str(p.annotation) for name, p in inspect.signature(command).parameters.items()}
    values: dict[str, list[str]] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise FlagError(f"unexpected argument {argument!r}: every value belongs to a flag, for instance --prompt {argument!r}")
        written, has_value, value = argument[2:].partition("=")
        name = written.replace("-", "_")
        if name not in kinds:
            raise FlagError(_unknown(written, name, kinds))
        if kinds[name] == "bool":
            is_separate = not has_value and bool(queue) and queue[0].lower() in ("true", "false")
            value = value if has_value else (queue.pop(0) if is_separate else "true")
        elif not has_value:
            if not queue or _is_flag(queue[0], kinds):
                hint = f"; if {queue[0]!r} is meant as its value, write --{name}={queue[0]}" if queue else ""
                raise FlagError(f"--{name}: got no value, expected one behind it{hint}")
            value = queue.pop(0)
        values.setdefault(name, []).append(value)
    return [f"--{name}={_joined(name, kinds[name], found)}" for name, found in values.items()]


def _is_flag(argument: str, known: Mapping[str, str]) -> bool:
    return argument.startswith("--") and argument[2:].partition("=")[0].replace("-", "_") in known


def _unknown(written: str, name: str, known: dict[str, str]) -> str:
    if name in NOT_YET:
        return f"--{written}: {NOT_YET[name]}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
    return f"unknown flag --{written}; {hint}"


def _joined(name: str, kind: str, values: list[str]) -> str:
    """The one value of a flag, or the JSON list of a repeatable one's."""
    if not kind.startswith("list[str]"):
        if len(values) > 1:
            raise FlagError(f"--{name}: got it {len(values)} times, expected once")
        return values[0]
    texts: list[str] = []
    for value in values:
        try:
            parsed = json_lib.loads(value) if value.startswith("[") else None
        except ValueError:
            parsed = None  # a text that begins with a bracket
        texts += parsed if isinstance(parsed, list) and all(isinstance(t, str) for t in parsed) else [value]
    if not texts:
        raise FlagError(f"--{name}: got an empty list, expected at least one text (an empty one is --{name} '')")
    return json_lib.dumps(texts)


def _parser(name: str, kind: str) -> Callable[[str], Any]:
    """How the text behind a flag becomes its value."""

    def parse(text: str) -> Any:
        try:
            return PARSERS[kind.removesuffix(" | None")](text)
        except (ValueError, KeyError):
            raise FlagError(f"--{name}: got {text!r}, expected {EXPECTED[kind.removesuffix(' | None')]}") from None

    return parse


PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "list[str]": json_lib.loads,
    "list[int]": lambda text: [int(part) for part in text.strip("[]() ").split(",")],
}
EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "list[int]": "whole numbers such as 512,64,8,1"}


def help_text(name: str) -> str:
    """A command's docstring with its flags as they are typed: the one source of ``--help``, and of the README's table."""
    parameters = inspect.signature(COMMANDS[name]).parameters
    lines = [f"llama-xla {name}: {inspect.getdoc(COMMANDS[name])}"]
    return "\n".join(_help_line(line, parameters) for line in "\n".join(lines).split("\n"))


def _help_line(line: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    flag, colon, text = line.strip().partition(": ")
    if not colon or flag not in parameters:
        return line
    kind, default = str(parameters[flag].annotation).removesuffix(" | None"), parameters[flag].default
    required = " Required." if default is inspect.Parameter.empty else ""
    shown = f" [{default}]" if isinstance(default, (int, float, str)) and not isinstance(default, bool) else ""
    return f"  --{flag}{PLACEHOLDERS[kind]}".ljust(27) + f"{text}{required}{shown}"


PLACEHOLDERS = {"str": " TEXT", "int": " N", "float": " X", "bool": "", "list[str]": " TEXT", "list[int]": " N,N,..."}


def run(arguments: Sequence[str]) -> None:
    """Run one command from raw arguments, the command's name first.

    Raises:
        LLaMAError: whatever the user has to mend; ``main`` shows it.
    """
    import fire
    from fire.decorators import SetParseFns

    name, *flags = arguments
    command = COMMANDS[name]
    parameters = inspect.signature(command).parameters
    flags = normalise(command, flags)
    missing = [k for k, p in parameters.items() if p.default is p.empty and not any(f.startswith(f"--{k}=") for f in flags)]
    if missing:
        raise FlagError(f"--{missing[0]} is needed; llama-xla {name} --help lists the flags")
    parsers = {key: _parser(key, str(p.annotation)) for key, p in parameters.items()}
    fire.Fire(SetParseFns(**parsers)(command), command=flags, name=f"llama-xla {name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script ``llama-xla``: run a command, show errors without a traceback, exit with their code."""
    sys.exit(_exit_code(list(sys.argv[1:] if arguments is None else arguments)))


def _exit_code(arguments: Sequence[str]) -> int:
    """Run the command line and say how it ended."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark, and the run goes on
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # here, where a closed pipe is expected
        return code
    except LLaMAError as error:
        print(f"llama-xla: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llama-xla: interrupted", file=sys.stderr)
        return InterruptedRunError.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout once more at exit
        return EXIT_CLOSED_PIPE


def _dispatch(arguments: Sequence[str]) -> int:
    if arguments in (["--version"], ["version"]):
        print(f"llama-xla {__version__}")
    elif not arguments:
        print(USAGE, file=sys.stderr)
        return FlagError.exit_code
    elif arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
    elif arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise FlagError(f"unknown command {arguments[0]!r}; {hint}")
    elif {"-h", "--help"} & set(arguments):
        print(help_text(arguments[0]))
    else:
        run(arguments)
    return 0


USAGE = f"""llama-xla {__version__}: text generation with LLaMA models on PyTorch/XLA

  llama-xla generate   continue prompts                    (llama-xla generate --help)
  llama-xla plan       show how a prompt is cut in chunks  (llama-xla plan --help)
  llama-xla --version
"""


if __name__ == "__main__":
    main()
