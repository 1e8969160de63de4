"""The command `llama-xla batch`: a file of requests, by one process or several, resumed where it ended."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.cli.loading import config_of, loaded, readable_tokenizer, takes_loading
from llama.cli.output import counted, interruptible, json_line, leave_compiling_to_bars, log_to_stderr, write
from llama.cli.sampling import checked, takes_controls
from llama.config import DEMO_DIR, EngineConfig
from llama.errors import FlagError, GrammarCutError, InterruptedRunError, PromptError
from llama.ranks import Ranks, current_ranks

if TYPE_CHECKING:
    from llama.batch import InputLines, Line, Merged, Parts, RunSettings
    from llama.batch.stream import Answer
    from llama.generation import LLaMA

log = logging.getLogger("llama")
progress_log = logging.getLogger("llama.batch")

STDOUT = "-"
SECONDS_BETWEEN_LINES = 10
MOST_HELD = 1024  # lines that may end before an earlier one does, where results are printed in order


@takes_loading(max_batch_size=(8, "Slots: prompts that run together."))
@takes_controls(without=("seed", "prompt_logprobs", "hidden_states", "logits", "cache_salt"))
def batch(
    *,
    loading: dict[str, Any],
    sampling: dict[str, Any],
    input: str | None = None,
    output: str = STDOUT,
    seed: int = 0,
    chat_format: str | None = None,
    restart: bool = False,
    merge: bool = False,
    strict_grammar: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Answer every line of a file, and go on where an earlier run ended.

    llama-xla batch --input docs/examples/batch.jsonl --output results.jsonl

    A line is {"prompt": "..."}, {"prompt_ids": [...]} or {"messages": [...]}, perhaps with a custom_id and any of the
    controls below, or a request in OpenAI's batch format. Of several processes (RANK and WORLD_SIZE, or what SLURM,
    Kubernetes and TPU hosts set) each answers its share, and the last one merges.

    Batch:
        input: A file of JSON lines.
        output: The results, in the order of the input; - is stdout. Until all lines have ended, the results so far are
            in a directory of this name with .parts behind it, and the same command goes on from there.
        restart: Forget what an earlier run has done, and overwrite the output.
        merge: Only merge parts that were put in one directory, from processes without a common file system.
        chat_format: llama2, llama3 or template (the checkpoint's own). Default: the checkpoint's template, else the
            format of its tokenizer.

    Controls of lines that do not give them:

    {sampling}

    Seed:
        seed: Lines that have no seed draw theirs from this number and their place in the input.

    {loading}

    Output:
        strict_grammar: If texts ended before their grammar was satisfied and no line is an error, end with exit code 4.
            They are written all the same, and the log counts their lines in any case.
        quiet: Log nothing to stderr.
        verbose: Log every chunk, the memory plan, and every program that is compiled.
    """
    log_to_stderr(quiet, verbose)
    if merge:
        _merge_only(input, output, restart, strict_grammar)
        return
    if input is None:
        raise FlagError("--input is needed; llama-xla batch --help lists the flags")
    if not 0 <= seed < 2**63:
        raise FlagError(f"--seed: got {seed}, expected 0 to 2**63 - 1")
    ranks = current_ranks()
    if output == STDOUT and not ranks.is_alone:
        raise FlagError(
            f"--output {STDOUT}: got it with {ranks.world_size} processes, expected a file, beside which each of them "
            "keeps its results"
        )
    if output == STDOUT and restart:
        raise FlagError("--restart: got it without --output, expected a file whose parts are to be forgotten")
    given, config = checked(sampling), config_of(loading)
    from llama.batch import InputLines

    with InputLines(Path(input)) as lines:
        if output != STDOUT and Path(output).exists() and Path(output).samefile(input):
            raise FlagError(f"--output {output}: it is the input; expected another file")
        job = _Job(loading, config, given, seed, chat_format, quiet, verbose, strict_grammar)
        if output == STDOUT:
            _print_all(job, lines)
        else:
            _write_all(job, lines, Path(output), ranks, restart)


def _merge_only(input: str | None, output: str, restart: bool, strict_grammar: bool) -> None:
    """Merge parts without a model."""
    from llama.batch import InputLines, merge_parts

    if output == STDOUT:
        raise FlagError("--merge needs --output: the file whose parts are merged")
    if not current_ranks().is_alone:
        raise FlagError("--merge: got it in one of several processes, expected one process")
    if restart:
        raise FlagError(
            "--merge with --restart: the one keeps the parts, the other forgets them; leave one of them out"
        )
    with nullcontext() if input is None else InputLines(Path(input)) as lines:
        found = merge_parts(Path(output), lines)
    log.info("Merged %s into %s", counted(found.lines, "line"), output)
    _refuse_failures(found, output, strict_grammar)


class _Job:
    """What the flags say about the model, and the model once it is needed.

    Args:
        given: the controls that flags give.
    """

    def __init__(
        self,
        loading: Mapping[str, Any],
        config: EngineConfig,
        given: dict[str, Any],
        seed: int,
        chat_format: str | None,
        quiet: bool,
        verbose: bool,
        strict_grammar: bool,
    ) -> None:
        self.quiet, self.strict_grammar = quiet, strict_grammar
        self._loading, self._config, self._given, self._verbose = loading, config, given, verbose
        self._seed, self._chat_format = seed, chat_format
        self._directory = Path(loading["ckpt_dir"] or DEMO_DIR)
        self._tokenizer = readable_tokenizer(loading["ckpt_dir"], loading["tokenizer_path"])
        if chat_format is not None and self._tokenizer is not None:
            from llama.chat import choose_format

            choose_format(self._tokenizer, self._directory, chat_format)

    def settings(self, lines: InputLines) -> RunSettings:
        """What results depend on."""
        from llama.batch import RunSettings
        from llama.batch.settings import model_digest

        return RunSettings(
            {
                "input": lines.sha256,
                "ckpt_dir": model_digest(self._directory, self._loading["tokenizer_path"]),
                "dtype": self._config.dtype,
                "cache_dtype": self._config.cache_dtype,
                "activations": self._config.activations,
                "prefill_products": self._config.prefill_products,
                **({"int4_group": self._config.int4_group} if self._config.dtype == "int4" else {}),
                "max_seq_len": self._config.max_seq_len,
                "batch_invariant": self._config.batch_invariant,
                "chat_format": self._chat_format,
                "seed": self._seed,
                **self._given,
            }
        )

    def load(self) -> LLaMA:
        """Load the model; from here on the log is that of the batch."""
        llm = loaded(self._loading, self._config, self._tokenizer, self.quiet)
        if llm.hosts > 1:
            raise FlagError(
                f"--tensor_parallel: got devices of {llm.hosts} hosts, which run one program together, but the lines "
                "are divided among the hosts; give each host its own devices, or run llama-xla generate"
            )
        self._defaults = llm.sampling(**self._given)
        leave_compiling_to_bars(progress_log, self._verbose)
        return llm

    def answers(
        self, llm: LLaMA, lines: Iterator[Line], most_ahead: int | None = None
    ) -> Generator[Answer, None, None]:
        """What becomes of lines, as they end."""
        from llama.batch.requests import Prepared
        from llama.batch.stream import Stream

        prepared = Prepared(llm.tokenizer, llm.directory, self._defaults, self._seed, self._chat_format)
        return Stream(llm, prepared, most_ahead).run(lines)


def _print_all(job: _Job, lines: InputLines) -> None:
    """Print results in the order of the input."""
    settings, created = job.settings(lines), int(time.time())
    printed, held = 0, dict[int, dict[str, Any]]()
    llm = job.load()
    with _Progress(len(lines), job.quiet) as progress, closing(llm), interruptible(llm):
        every = (lines.read(index) for index in range(len(lines)))
        try:
            with closing(job.answers(llm, every, MOST_HELD)) as answers:
                for answer in answers:
                    held[answer.line.index] = _record(answer, settings.digest, created)
                    progress.take(answer)
                    while printed in held:
                        write(json_line(held.pop(printed)))
                        printed += 1
        except InterruptedRunError:
            raise InterruptedRunError(f"interrupted; the results of the first {printed} lines are printed") from None
    _refuse_failures(progress.counts, "the output", job.strict_grammar)


def _write_all(job: _Job, lines: InputLines, output: Path, ranks: Ranks, restart: bool) -> None:
    """Write the results of this process's lines into its part, and merge the parts if they are complete then."""
    from llama.batch import Parts

    settings = job.settings(lines)
    if ranks.rank >= len(lines):
        progress_log.info("Nothing to do for rank %d: there are %d lines", ranks.rank, len(lines))
        return
    with Parts(output, ranks, len(lines), settings, int(time.time()), restart=restart) as parts:
        is_done = parts.is_done
        own = [index for index in range(ranks.rank, len(lines), ranks.world_size) if not is_done[index]]
        if any(is_done):
            log.info("Going on with %s: %d of %d lines are done", parts.directory, sum(is_done), len(lines))
        if own:
            _run(job, lines, own, parts, settings.digest)
        merged = parts.merge()
    if merged is not None:
        progress_log.info("Wrote %s: %s", output, counted(merged.lines, "line"))
        _refuse_failures(merged, str(output), job.strict_grammar)


def _run(job: _Job, lines: InputLines, own: list[int], parts: Parts, run: str) -> None:
    """Answer lines, and keep each result as soon as it is there."""
    llm, goes_on = job.load(), f"which stay in {parts.directory}; the same command does the others"
    with _Progress(len(own), job.quiet) as progress, closing(llm), interruptible(llm):
        try:
            with closing(job.answers(llm, map(lines.read, own))) as answers:
                for answer in answers:
                    record = _record(answer, run, parts.header.created)
                    parts.add(answer.line.index, record, failed=answer.error is not None, cut=answer.is_cut)
                    progress.take(answer)
        except InterruptedRunError:
            raise InterruptedRunError(f"interrupted after {progress.lines} of {len(own)} lines, {goes_on}") from None
        except Exception:
            progress_log.info("Ended by an error after %d of %d lines, %s", progress.lines, len(own), goes_on)
            raise


def _record(answer: Answer, run: str, created: int) -> dict[str, Any]:
    """What is written for a line."""
    from llama.batch.records import error_record, record_of

    if answer.error is not None:
        return error_record(answer.line, answer.error, run)
    assert answer.request is not None
    return record_of(answer.line, answer.request, answer.results, run, created)


def _refuse_failures(counts: Merged, where: str, strict_grammar: bool) -> None:
    """Say how many lines are errors, if there are any, or cut.

    Raises:
        PromptError: with their number.
        GrammarCutError: under ``strict_grammar``, with theirs, where none is an error.
    """
    lines, failed, cut = counts
    told = f"{cut} of {lines} lines hold a text that ended before its grammar was satisfied" if cut else ""
    if failed:
        also = f"; {told}" if strict_grammar and cut else ""
        raise PromptError(f"{failed} of {lines} lines could not be answered; in their place {where} says why{also}")
    if strict_grammar and cut:
        raise GrammarCutError(f"{told}; give them a larger max_gen_len, or leave their stop out")


class _Progress:
    """A bar on a terminal, else a line from time to time; and a last line. A context.

    Args:
        total: lines that this process answers.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        self.lines, self._failed, self._cut, self._tokens, self._total = 0, 0, 0, 0, total
        self._began = self._told = time.perf_counter()
        self._is_bar = sys.stderr.isatty() and not quiet

    def __enter__(self) -> _Progress:
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, desc="Answering", unit=" lines", disable=not self._is_bar)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        progress_log.info("%s", self._described("Answered"))

    @property
    def counts(self) -> Merged:
        """What the lines so far became."""
        from llama.batch import Merged

        return Merged(self.lines, self._failed, self._cut)

    def take(self, answer: Answer) -> None:
        """Count what became of a line."""
        self.lines += 1
        self._failed += answer.error is not None
        self._cut += answer.is_cut
        if answer.is_cut:
            progress_log.debug("Index %d: a text ended before its grammar was satisfied", answer.line.index)
        self._tokens += sum(len(result.token_ids) for result in answer.results)
        self._bar.update()
        now = time.perf_counter()
        if not self._is_bar and now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            progress_log.info("%s", self._described("So far"))

    def _described(self, what: str) -> str:
        seconds = time.perf_counter() - self._began
        cut = f", {self._cut} cut within a grammar" if self._cut else ""
        return (
            f"{what} {self.lines} of {self._total} lines ({self._failed} errors{cut}), {self._tokens} tokens in "
            f"{seconds:.2f} s, {self._tokens / max(seconds, 1e-9):.1f} tok/s"
        )
