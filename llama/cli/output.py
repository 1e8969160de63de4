"""The output of commands: results on stdout, whole or as they grow, and the log on stderr.

Of several processes (ranks.py) the first one alone prints results: ``write`` is the one way to stdout.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from llama.cli.terminal import as_shown
from llama.errors import InterruptedRunError, OutputError
from llama.ranks import current_ranks

if TYPE_CHECKING:
    from llama.generation import LLaMA
    from llama.outputs import Generation, Piece
    from llama.startup import Startup

log = logging.getLogger("llama")

_OBEYED = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # C1 and DEL, line ends, directions; json escapes C0

SEPARATOR = "\n==================================\n"


class Printer:
    """Writes results to stdout in the order of the prompts, whole or as they grow.

    At a terminal, control characters of texts are written out.

    Args:
        prompts: the prompts' texts, for ``echo``.
        samples: results per prompt.
        startup: printed with each JSON result.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        samples: int,
        as_json: bool,
        stream: bool,
        echo: bool,
        startup: Startup | None = None,
    ) -> None:
        self._startup = startup
        self._prompts, self._as_json, self._stream, self._echo = prompts, as_json, stream, echo
        self._order = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
        self._begun: tuple[int, int] | None = None  # prompt and sample whose text has begun last
        self._separate = False

    def print_pieces(self, pieces: Iterable[Piece]) -> list[Generation]:
        """Print a call's pieces and return its results; text of later results waits for its turn."""
        held: dict[tuple[int, int], list[Piece]] = {turn: [] for turn in self._order}
        results: list[Generation] = []
        self._begun = None
        for piece in pieces:
            held[piece.index, piece.sample].append(piece)
            while len(results) < len(self._order):
                turn = self._order[len(results)]
                waiting, held[turn] = held[turn], []
                for ready in waiting:
                    self._print(ready)
                    if ready.result is not None:
                        results.append(ready.result)
                if not waiting or waiting[-1].result is None:
                    break
        return results

    def _print(self, piece: Piece) -> None:
        if self._as_json:
            if self._stream and piece.text:
                write(json_line({"index": piece.index, "sample": piece.sample, "piece": piece.text}))
            if piece.result is not None:
                startup = {} if self._startup is None else {"startup": self._startup.as_json()}
                write(json_line({**piece.result.as_json(), **startup}))
        elif self._stream or piece.result is not None:
            self._begin(piece)
            text = piece.text if self._stream or piece.result is None else piece.result.generation
            write(as_shown(text) + ("" if piece.result is None else "\n"))
            if piece.result is not None and piece.result.logprobs is not None:
                write("\n" + "".join(f"{line}\n" for line in _logprob_table(piece.result)))

    def _begin(self, piece: Piece) -> None:
        """Print the line between two results, and the echoed prompt, before a result's first text."""
        if (piece.index, piece.sample) == self._begun:
            return
        write((SEPARATOR if self._separate else "") + (as_shown(self._prompts[piece.index]) if self._echo else ""))
        self._begun, self._separate = (piece.index, piece.sample), True


def _logprob_table(result: Generation) -> Iterator[str]:
    """Yield a line for each token: its log-probability, its rank, and the likeliest tokens."""
    tokens = [*(result.prompt_logprobs or ()), *(result.logprobs or ())]
    width = max((len(repr(each.token)) for each in tokens if each is not None), default=0)
    yield f"{'logprob':>9} {'rank':>6}  {'token':{width}}  likeliest"
    for each in tokens:
        if each is not None:
            likeliest = "  ".join(f"{top.token!r} {top.logprob:.3f}" for top in each.top)
            yield f"{each.logprob:9.3f} {each.rank:6}  {each.token!r:{width}}  {likeliest}".rstrip()


def write(text: str) -> None:
    """Send text to stdout at once, so that a reader sees it as it grows and a closed pipe is noticed.

    Of several processes only rank 0 does.

    Raises:
        ConfigError: the environment gives no rank that makes sense.
        OutputError: stdout cannot be written, for instance because its disk is full.
        BrokenPipeError: nobody reads it any more.
    """
    if current_ranks().is_first:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(
                f"cannot write to stdout: {reason}; the result is incomplete, send it elsewhere"
            ) from error


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as ``1 file`` or ``2 files``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def json_line(value: dict[str, Any]) -> str:
    """Return an object as one line of JSON, with other characters than ASCII as they are if stdout's encoding has them.

    Escaped in any case is what a terminal would obey, and what readers of lines may take for the end of one.
    """
    text = json.dumps(value, ensure_ascii=not (sys.stdout.encoding or "utf-8").lower().startswith("utf"))
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def log_to_stderr(quiet: bool, verbose: bool = False) -> None:
    """Send the package's log to stderr as plain lines; ``quiet`` keeps only errors, ``verbose`` adds details."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    if quiet:
        handler.setLevel(logging.ERROR)  # also of a logger beneath with a level of its own, as in example_xla.py
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


def leave_compiling_to_bars(own: logging.Logger, verbose: bool) -> None:
    """Once a model is loaded: where bars tell what is compiled, at a terminal, keep lines about it out of the log.

    Args:
        own: logs the command's own lines, at the level that was asked for in any case.
    """
    own.setLevel(log.level)
    if sys.stderr.isatty() and not verbose:
        log.setLevel(max(log.level, logging.WARNING))


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within: Ctrl-C ends the process with one line and its exit code; there is nothing to keep yet.

    A KeyboardInterrupt would not always do that: modules that are being imported may print it as ignored and go on.
    """

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        print("llama-xla: interrupted", file=sys.stderr, flush=True)
        os._exit(InterruptedRunError.exit_code)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible(llm: LLaMA) -> Iterator[None]:
    """Let the first Ctrl-C end the generation after its current step or compile, and the second one the process.

    The second one ends it at once, by the signal, also within a compile: Python would run a handler only after it.
    """

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        llm.interrupt()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = signal.signal(signal.SIGINT, on_interrupt)
    _only_once(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _only_once(number: signal.Signals) -> None:
    """Have the system, not Python, reset a signal to its default action when it comes: SA_RESETHAND, by glibc's
    sysv_signal.
    """
    install = getattr(ctypes.CDLL(None), "sysv_signal", None)
    if install is not None:
        install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        install(number, install(number, None))  # None is SIG_DFL; the inner call returns Python's own handler
