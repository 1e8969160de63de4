"""Several callers, one engine: whoever waits for news runs the next round, and the news of others waits for them.

No thread of its own: a call runs rounds only while somebody listens to it, in the thread that listens. Two threads that
generate, or one that generates while it holds an open stream, share the slots; each gets its own sequences' updates.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence as Sequences
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from llama.engine.engine import Engine
from llama.engine.sequence import Sequence, Update
from llama.errors import EngineError, InterruptedRunError


@dataclass(eq=False)
class Call:
    """One caller's sequences.

    Attributes:
        sequences: all of them.
        interrupted: end them after the current round.
        compile_s: seconds that compiling their programs took.
    """

    sequences: Sequences[Sequence]
    interrupted: bool = False
    compile_s: float = 0.0
    _cancelled: bool = False
    _news: deque[Update] = field(default_factory=deque)


class Callers:
    """Shares an engine between calls.

    Args:
        engine: nobody else steps it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._calls: dict[int, Call] = {}  # by sequence id
        self._open: list[Call] = []
        self._interrupted = False
        self._stepping = False
        self._changed = threading.Condition()
        self._pid = os.getpid()

    # --- interrupts: safe from a signal handler and from any thread ---------------------------------------------------

    def interrupt(self) -> None:
        """End the open calls after the current round, or the next call where none is open."""
        calls = list(self._open)
        for call in calls:
            call.interrupted = True
        self._interrupted |= not calls
        self.engine.stop_compiling()

    def take_interrupt(self) -> bool:
        """Whether an interrupt came that has ended nothing yet; it is forgotten then."""
        interrupted, self._interrupted = self._interrupted, False
        return interrupted

    # --- calls --------------------------------------------------------------------------------------------------------

    def check_process(self) -> None:
        """Refuse to work in a forked process.

        The device's threads are not copied by a fork, so a program that is started there never ends.

        Raises:
            EngineError: this is not the process in which the engine was made.
        """
        if os.getpid() != self._pid:
            raise EngineError(
                f"the model was loaded in process {self._pid} and cannot run in process {os.getpid()}, which was "
                "forked from it: a fork has none of the device's threads. Start processes with "
                'multiprocessing.get_context("spawn"), and call LLaMA.build in each'
            )

    @contextmanager
    def exclusive(self) -> Iterator[Engine]:
        """Within: the engine, while no round runs.

        Raises:
            EngineError: see ``check_process``.
        """
        self.check_process()
        took = False
        try:
            with self._changed:
                while self._stepping:
                    self._changed.wait()
                took = self._stepping = True
            yield self.engine
        finally:
            if took:
                with self._changed:
                    self._stepping = False
                    self._changed.notify_all()

    def run(self, call: Call) -> Iterator[Update]:
        """Run a call's sequences; yield what becomes known of them, in the order in which it does.

        Closing the iterator before its end cancels what is left.

        Raises:
            EngineError: see ``check_process``.
            LLaMAError: what ended one of the sequences; the others of the call are cancelled.
            InterruptedRunError: an interrupt came while the call's programs were compiled.
        """
        self.check_process()
        call.interrupted = self.take_interrupt()
        self._open.append(call)
        left = {s.id: s for s in call.sequences}
        try:
            if not call.interrupted:
                self._prepare(call)
            for sequence in call.sequences:
                self._calls[sequence.id] = call
                self.engine.submit(sequence)
            while left:
                update = self._next(call)
                sequence = update.sequence
                if update.is_last and sequence.error is not None:
                    raise sequence.error
                if update.is_last:
                    del left[sequence.id]
                yield update
        finally:
            self._open.remove(call)
            for sequence in call.sequences:
                self._calls.pop(sequence.id, None)
            for sequence in left.values():
                self.engine.cancel(sequence)
            if call.interrupted and all(s.finish_reason != "interrupted" for s in call.sequences):
                self._interrupted = True  # it came too late to end anything: it is the next call's

    def _prepare(self, call: Call) -> None:
        """Compile a call's programs."""
        with self.exclusive() as engine:
            engine.stop_compiling(call.interrupted)
            try:
                call.compile_s = engine.prepare(call.sequences)
            except InterruptedRunError:
                call.interrupted = False  # the error ends the call
                raise

    def _next(self, call: Call) -> Update:
        """The next update of a call; runs rounds, or waits while another caller runs one."""
        while True:
            self.check_process()  # a call that was begun before the fork
            if call.interrupted and not call._cancelled:
                call._cancelled = True
                for sequence in call.sequences:
                    self.engine.cancel(sequence)
            with self._changed:
                while not call._news and self._stepping:
                    self._changed.wait()
                if call._news:
                    return call._news.popleft()
            with self.exclusive() as engine, deferred_interrupts():
                if not call._news:
                    for update in engine.step():
                        owner = self._calls.get(update.sequence.id)
                        if owner is not None:
                            owner._news.append(update)


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Within: KeyboardInterrupt waits until the end, so that no round stops between a run and its bookkeeping."""
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    with suppress(ValueError):
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
