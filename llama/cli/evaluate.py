"""The command `llama-xla eval`: lm-evaluation-harness's tasks, asked of a checkpoint."""

from __future__ import annotations

import difflib
import fnmatch
import json as json_lib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.cli.flags import one_of
from llama.cli.loading import config_of, loaded as loaded_model, readable_tokenizer, takes_loading
from llama.cli.output import ending_at_once, json_line, log_to_stderr, write
from llama.config import DEMO_DIR
from llama.errors import FlagError, LLaMAError, TaskError, setting
from llama.integrations import MAX_GEN_TOKS, TOO_LONG

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

log = logging.getLogger("llama")

INDEX_TAKES_S = 10  # the 14,683 names that lm-eval 0.4.13 brings
LONGEST_MESSAGE = 400
SECONDS_BETWEEN_LINES = 10
YAML = (".yaml", ".yml")
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@takes_loading(max_batch_size=(8, "Requests that run together."))
def evaluate(
    *,
    loading: dict[str, Any],
    tasks: list[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    seed: int | None = None,
    gen_kwargs: str | None = None,
    max_gen_toks: int = MAX_GEN_TOKS,
    bootstrap_iters: int = 100000,
    confirm_run_unsafe_code: bool = False,
    apply_chat_template: bool = False,
    chat_format: str | None = None,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = True,
    add_bos_token: bool = True,
    too_long: str = "truncate",
    json: bool = False,
    output_path: str | None = None,
    log_samples: bool = False,
    use_cache: str | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Run lm-evaluation-harness's tasks on the demo model, or on a checkpoint.

    llama-xla eval --ckpt_dir llama-2-7b --tasks arc_easy,hellaswag --num_fewshot 5
    llama-xla eval --ckpt_dir llama-2-7b --tasks my_task --include_path my_tasks --limit 20 --json

    Needs lm-eval: pip install -e .[eval]. The flags that lm_eval run has, too, mean the same.

    Tasks:
        tasks: Names of tasks, groups or tags, separated by commas; * stands for any characters. Or a task's YAML file.
        include_path: A directory with more tasks. If all names are those of its tasks, lm-eval's own are not read.
        num_fewshot: Examples before each question. Default: the task's.
        limit: Ask the first so many questions of each task only, or below 1 this share of them.
        seed: Seed of the choice of examples and of sampled answers. Default: lm-eval's, 1234.
        gen_kwargs: How answers are generated, such as do_sample=true,temperature=0.8, or a JSON object; comes before
            what the tasks say.
        max_gen_toks: Most tokens of an answer where the task does not say.
        bootstrap_iters: Samples from which standard errors without a formula are computed; 0 computes none.
        confirm_run_unsafe_code: Run tasks that execute what the model writes.

    Prompts:
        apply_chat_template: Ask in the checkpoint's chat format.
        chat_format: llama2, llama3 or template (the checkpoint's own). Default: the checkpoint's template, else the
            format of its tokenizer.
        system_instruction: Instructions before each question.
        fewshot_as_multiturn: With --apply_chat_template: examples are earlier turns. Default: true.
        add_bos_token: Texts begin with BOS; false leaves it out. Default: true.
        too_long: truncate cuts a context that does not fit from the left; refuse ends the evaluation.

    {loading}

    Output:
        json: Print lm-eval's results as one JSON object instead of its table.
        output_path: Write the results to this directory, in the files that lm-eval writes: results_DATE.json and more.
        log_samples: Write each question with its answer there, too.
        use_cache: Keep answers in a file, this name with _rank0.db behind it, and take from it those that it holds; a
            file for each model.
        quiet: Log nothing to stderr.
        verbose: Log what lm-eval does, and where one of its errors comes from.
    """
    log_to_stderr(quiet, verbose)
    _check(limit, num_fewshot=num_fewshot, seed=seed, bootstrap_iters=bootstrap_iters, max_gen_toks=max_gen_toks)
    if chat_format is not None and not apply_chat_template:
        raise FlagError(f"--chat_format {chat_format}: it is read with --apply_chat_template only")
    if log_samples and output_path is None:
        raise FlagError("--log_samples needs --output_path: where to write them")
    cut = one_of("too_long", too_long, TOO_LONG)
    given = None if gen_kwargs is None else _settings(gen_kwargs)
    config, ckpt_dir = config_of(loading), loading["ckpt_dir"]
    _check_places(include_path, output_path)
    tokenizer = readable_tokenizer(ckpt_dir, loading["tokenizer_path"])
    if apply_chat_template and tokenizer is not None:
        from llama.chat import choose_format

        choose_format(tokenizer, DEMO_DIR if ckpt_dir is None else Path(ckpt_dir), chat_format)
    _send_log_of_lm_eval(quiet, verbose)
    with ending_at_once():
        from llama.integrations.lm_eval import LlamaXLA  # first: it may be missing

    manager, loaded = _loaded(tasks, include_path, {} if ckpt_dir is None else {"pretrained": ckpt_dir})
    model = LlamaXLA(
        loaded_model(loading, config, tokenizer, quiet),
        add_bos_token=add_bos_token,
        too_long=cut,
        max_gen_toks=max_gen_toks,
        chat_format=chat_format,
        progress=not quiet,
    )
    for name, task in loaded["tasks"].items():  # here, and not when their turn comes
        if getattr(task.config, "output_type", None) == "generate_until":
            model.wish({**(task.config.generation_kwargs or {}), **(given or {})}, name)
    if not verbose:  # a line about compiling would land within lm-eval's bars, which go to a file, too
        log.setLevel(max(log.level, logging.WARNING))
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tracker = None if output_path is None else EvaluationTracker(output_path=output_path)
    with closing(model.llm), _errors_of_lm_eval("the evaluation ended"), redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=model,
            model_args={"pretrained": ckpt_dir or "llama-xla-demo", **asdict(config)},
            tasks=list(loaded["tasks"]),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=config.max_batch_size,
            use_cache=use_cache,
            bootstrap_iters=bootstrap_iters,
            log_samples=log_samples,
            evaluation_tracker=tracker,
            system_instruction=system_instruction,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            gen_kwargs=given,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            **({} if seed is None else dict.fromkeys(SEEDS, seed)),
        )
    samples = results.pop("samples", None)
    write(_as_json(results) if json else _tables(results))
    if tracker is not None:
        with redirect_stdout(sys.stderr):
            _save(tracker, results, samples)


def _check(limit: float | None, **numbers: int | None) -> None:
    """Refuse numbers out of their range."""
    if limit is not None and not limit > 0:
        raise FlagError(f"--limit: got {limit:g}, expected a number above 0")
    for flag, value in numbers.items():
        least = 1 if flag == "max_gen_toks" else 0
        if value is not None and value < least:
            raise FlagError(f"--{flag}: got {value}, expected {least} or more")


def _settings(text: str) -> dict[str, Any]:
    """The value of --gen_kwargs."""
    if text.lstrip().startswith("{"):
        try:
            value: dict[str, Any] = json_lib.loads(text)
        except ValueError as error:
            raise FlagError(f"--gen_kwargs: got {text!r:.60}, which is not JSON: {error}") from error
        return value
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and sign for name, sign, _ in pairs):
        raise FlagError(f"--gen_kwargs: got {text!r:.60}, expected name=value,name=value, or a JSON object")
    return {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> Any:
    """A setting's value: a number, true, false or none where it is one, else the text."""
    try:
        return json_lib.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
    except ValueError:
        return text


def _check_places(include_path: str | None, output_path: str | None) -> None:
    """Refuse a directory that is not there, and one where results cannot be written."""
    if include_path is not None and not Path(include_path).is_dir():
        raise FlagError(f"--include_path {include_path}: no such directory")
    if output_path is None:
        return
    path = Path(output_path)
    directory = path.parent if path.suffix == ".json" else path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(None, "not writable")
    except OSError as error:
        raise FlagError(f"--output_path {path}: {error.strerror or error}") from error


def _send_log_of_lm_eval(quiet: bool, verbose: bool) -> None:
    """Send lm-eval's log to where ours goes, and its bars to a terminal; a file gets a line from time to time."""
    theirs = logging.getLogger("lm_eval")
    theirs.handlers, theirs.propagate = list(log.handlers), False
    theirs.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    if quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS_BETWEEN_LINES))
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def _errors_of_lm_eval(what: str) -> Iterator[None]:
    """Turn the errors of lm-eval, of its tasks and of the libraries that load them into one of ours.

    Raises:
        TaskError: there was one; its message says what it was.
    """
    try:
        yield
    except LLaMAError:
        raise
    except Exception as error:
        log.debug("lm-eval's error:", exc_info=True)
        chain = [error] if error.__cause__ is None else [error, error.__cause__]
        told = " ".join("; ".join(f"{type(each).__name__}: {each}".rstrip(": ") for each in chain).split())
        told += " (as if there were no documents)" if isinstance(error, StopIteration) else ""
        raise TaskError(f"{what}: {told[:LONGEST_MESSAGE]}; {setting('verbose')} shows where") from error


class _Skipped(logging.Handler):
    """Collects which YAML files lm-eval leaves out of its index, and why."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a message about a file that is left out."""
        if str(record.msg).startswith("Skip"):
            self.found.append(" ".join(record.getMessage().removeprefix("Skip").split()))


def _loaded(texts: Sequence[str], include_path: str | None, metadata: Mapping[str, Any]) -> tuple[TaskManager, Any]:
    """lm-eval's index of tasks, and those that are meant, loaded: a dict with ``tasks`` and ``groups`` by name.

    Args:
        texts: names, separated by commas.
        metadata: what tasks may want to know about the model.

    Raises:
        TaskError: a name is unknown, or a task cannot be loaded.
    """
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not names:
        raise FlagError("--tasks: got no name, expected at least one")
    with _errors_of_lm_eval("cannot load the tasks"), redirect_stdout(sys.stderr):
        from lm_eval.tasks import TaskManager

        with _skipped() as skipped:
            manager = TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)
        if not all(_is_file(name) or name in manager.all_subtasks for name in names):
            log.info("Reading the index of lm-eval's tasks, about %d s", INDEX_TAKES_S)
            manager = TaskManager(include_path=include_path, metadata=metadata)
        found = [each for name in names for each in _meant(name, manager.all_tasks, skipped)]
        try:
            loaded = manager.load(list(dict.fromkeys(found)))
        except Exception:
            for name in found:
                with _errors_of_lm_eval(f"cannot load {name}"):
                    manager.load([name])
            raise
        manager.load = lambda *_: loaded  # lm-eval would load them once more, after the weights
    for name, task in loaded["tasks"].items():
        with _errors_of_lm_eval(f"cannot load {name}"):
            if not len(task.eval_docs):  # lm-eval 0.5 reads them now
                raise TaskError(f"{setting('tasks')} {name}: it has no documents to ask about")
    return manager, loaded


@contextmanager
def _skipped() -> Iterator[list[str]]:
    """Within: the list receives the YAML files that lm-eval leaves out of its index, each with the reason."""
    index = logging.getLogger("lm_eval.tasks._index")
    handler, level = _Skipped(), index.level
    index.addHandler(handler)
    index.setLevel(logging.DEBUG)  # lm-eval says it on this level only
    index.propagate = False
    try:
        yield handler.found
    finally:
        index.removeHandler(handler)
        index.setLevel(level)
        index.propagate = True


def _meant(name: str, known: Sequence[str], skipped: Sequence[str]) -> list[str]:
    """The names that a name stands for: itself, or those that its pattern matches.

    Raises:
        TaskError: there are none; the message has names that are near.
    """
    if _is_file(name) or _base(name) in known:
        return [name]
    matches = fnmatch.filter(known, name)
    if matches:
        return matches
    if name.endswith(YAML):
        raise TaskError(f"{setting('tasks')} {name}: no such file")
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists those that it brings"
    files = f"; left out of {setting('include_path')}: {'; '.join(skipped)}"[:LONGEST_MESSAGE] if skipped else ""
    raise TaskError(f"{setting('tasks')}: got {name!r}, which is no task, group or tag; {hint}{files}")


def _is_file(name: str) -> bool:
    return name.endswith(YAML) and Path(name).is_file()


def _base(name: str) -> str:
    """A task's name without what lm-eval 0.5 lets follow it: ``@format`` or ``::subtask``."""
    return name.split("@")[0].split("::")[0]


def _save(tracker: EvaluationTracker, results: dict[str, Any], samples: dict[str, Any] | None) -> None:
    """Write lm-eval's files.

    Raises:
        FlagError: it could not; lm-eval only logs that.
    """
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in samples or ():
        tracker.save_results_samples(task_name=name, samples=samples[name])  # type: ignore[index]
    path = Path(tracker.output_path)
    where = path.parent if path.suffix == ".json" else path
    written = list(where.rglob(f"*{getattr(tracker, 'date_id', None)}*"))
    if len(written) < 1 + len(samples or ()):
        raise FlagError(f"--output_path {path}: not all results could be written there; the log says why")


def _tables(results: Mapping[str, Any]) -> str:
    from lm_eval.utils import make_table

    tables = [make_table(results), *([make_table(results, "groups")] if "groups" in results else [])]
    return "\n".join(table.rstrip("\n") + "\n" for table in tables)


def _as_json(results: dict[str, Any]) -> str:
    from lm_eval.utils import handle_non_serializable

    return json_line(json_lib.loads(json_lib.dumps(results, default=handle_non_serializable)))
