"""The caller's side of render.py: a process that renders templates, watched by a deadline and replaced when it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from llama.errors import ChatError

RENDERER = Path(__file__).with_name("render.py")


class Limits(NamedTuple):
    """Limits on rendering a template.

    Attributes:
        seconds: to render the dialogs of one request, the start of the process included.
        memory: bytes of address space, the interpreter's included.
        characters: of the rendered text.
        template: characters of the template itself.
    """

    seconds: float = 10.0
    memory: int = 256 << 20
    characters: int = 4 << 20
    template: int = 1 << 20


class Rendered(NamedTuple):
    """A rendered dialog, or None and what went wrong."""

    text: str | None
    problem: str


class Renderer:
    """A process that renders one template; it starts at the first request and serves until ``close``.

    Starting it takes about 70 ms, a request about one.

    Args:
        template: its text.
        variables: what it is rendered with, beside the dialog.
        source: its origin, for errors.
        limits: on each request.
    """

    def __init__(self, template: str, variables: dict[str, Any], source: str, limits: Limits) -> None:
        self._template, self._variables, self._source, self._limits = template, variables, source, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: weakref.finalize[Any, Any] | None = None
        self._lock = threading.Lock()

    def render(self, dialogs: Sequence[Sequence[Any]], **variables: Any) -> list[Rendered]:
        """The text of each dialog.

        Args:
            variables: more of them, of this request only.

        Raises:
            ChatError: the process could not be started, was stopped at the deadline, or ended by itself.
        """
        request = {
            "path": _library_path(),
            "seconds": self._limits.seconds,
            "memory": self._limits.memory,
            "characters": self._limits.characters,
            "template": self._template,
            "variables": {**self._variables, **variables},
            "dialogs": [[{"role": m["role"], "content": m["content"]} for m in dialog] for dialog in dialogs],
        }
        with self._lock:
            try:
                results = json.loads(self._answer(json.dumps(request).encode() + b"\n"))
            except BaseException:
                self.close()  # whatever it still writes belongs to no later request
                raise
        return [Rendered(result.get("text"), _visible(result.get("problem", ""))) for result in results]

    def close(self) -> None:
        """End the process; the next request starts another one."""
        if self._ending is not None:
            self._ending()
        self._process = self._ending = None

    def _answer(self, request: bytes) -> bytes:
        """The line that the process writes for a request."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        deadline = threading.Timer(self._limits.seconds, stop)
        deadline.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            deadline.cancel()
            deadline.join()
        if line.endswith(b"\n"):
            return line
        if late.is_set():
            raise ChatError(
                f"{self._source}: the chat template took more than {self._limits.seconds} seconds and was stopped"
            )
        assert process.stderr is not None
        last_words = _visible(process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2])
        raise ChatError(
            f"{self._source}: the process that renders chat templates ended with {process.wait()}: {last_words}"
        )

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(RENDERER)],
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env={key: os.environ[key] for key in ("LD_LIBRARY_PATH", "TZ") if key in os.environ},
                start_new_session=True,  # Ctrl-C is for the answer, not for this
            )
        except OSError as error:
            raise ChatError(
                f"{self._source}: the process that renders chat templates cannot be started: {error}"
            ) from error
        self._process, self._ending = process, weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(BrokenPipeError):  # of a request that it did not read
                stream.close()
    process.wait()


def _library_path() -> list[str]:
    """Return the directories in which jinja2 and its dependency are installed."""
    found = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ChatError(f"chat templates need the library {name}: pip install {name}")
        found.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(found))


def _visible(problem: Any) -> str:
    """A template's own message, cut short and without characters that would act on a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(problem)[:300])
