"""A process that renders chat templates: ``python -I -S render.py``, requests on stdin.

A template is untrusted code. jinja2's sandbox keeps it from Python's objects, but not from looping forever or from
``"a" * 10**12``, and a single such operation cannot be interrupted within its process. So templates run here: the
system limits this process's memory and CPU time, and the caller stops it at a deadline.

Each line of standard input is a request, a JSON object: ``template``, ``variables``, ``dialogs``, the limits
``seconds``, ``memory`` and ``characters``, and ``path``, where jinja2 is installed. Standard output gets a line for it:
a JSON list with ``{"text": ...}`` or ``{"problem": ...}`` for each dialog. The process ends with its input. Nothing
else of the package is imported.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template


class TooLongError(Exception):
    """The text has more characters than the limit, which is the argument."""


@lru_cache(maxsize=1)
def compile_template(text: str) -> Template:
    """Compile a template with the names and filters that transformers gives to chat templates.

    Raises:
        jinja2.TemplateSyntaxError: it is not valid.
    """
    from jinja2 import FunctionLoader, TemplateError, TemplateRuntimeError, Undefined, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``, which marks answers for training, and changes nothing here."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str = "no reason given") -> None:
        raise TemplateError(message)

    def only_values(value: Any) -> Any:
        """Refuse to write a generator or a function: the text would hold where in memory it is."""
        if value is None or isinstance(value, str | int | float | list | tuple | dict | Undefined):
            return value
        raise TemplateRuntimeError(f"it writes a {type(value).__name__}, expected a text")

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
        finalize=only_values,
        loader=FunctionLoader(lambda name: None),
    )
    environment.filters["tojson"] = to_json  # jinja2's own writes < and > as escapes, for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)


def describe(error: BaseException) -> str:
    """Describe an error for the user."""
    from jinja2 import TemplateError, TemplateNotFound, TemplateRuntimeError, TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    if isinstance(error, TemplateSyntaxError):
        return f"the chat template is not valid, line {error.lineno}: {error.message}"
    if isinstance(error, SecurityError):
        return f"the chat template tries what its sandbox forbids: {error}"
    if isinstance(error, TemplateNotFound):
        return f"the chat template reads another template, {error}, for which there is no loader"
    if isinstance(error, RecursionError):
        return "the chat template fails: RecursionError: it is nested, or calls itself, too deeply"
    if isinstance(error, TemplateError) and not isinstance(error, TemplateRuntimeError):
        return f"the chat template refuses this dialog: {error}"
    if isinstance(error, MemoryError):
        return "the chat template takes too much memory"
    if isinstance(error, TooLongError):
        return f"the chat template writes more than {error} characters"
    return f"the chat template fails: {type(error).__name__}: {error}"


def limited(chunks: Iterator[str], characters: int) -> str:
    """Join the chunks.

    Raises:
        TooLongError: there are more characters than that.
    """
    kept: list[str] = []
    length = 0
    for chunk in chunks:
        kept.append(chunk)
        length += len(chunk)
        if length > characters:
            raise TooLongError(characters)
    return "".join(kept)


def answer(request: dict[str, Any]) -> list[dict[str, str]]:
    """The result for each dialog of a request."""
    try:
        template = compile_template(request["template"])
    except Exception as error:
        return [{"problem": describe(error)}] * len(request["dialogs"])
    return [
        render(template, {**request["variables"], "messages": dialog}, request["characters"])
        for dialog in request["dialogs"]
    ]


def render(template: Template, variables: dict[str, Any], characters: int) -> dict[str, str]:
    """The result for one dialog."""
    try:
        return {"text": limited(template.generate(variables), characters)}
    except Exception as error:
        return {"problem": describe(error)}


def limit(request: dict[str, Any]) -> None:
    """Have the system hold this process to a request's limits."""
    spent = sum(os.times()[:2])
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = math.ceil(spent + request["seconds"]) + 1  # ends this process if the caller is gone
    resource.setrlimit(resource.RLIMIT_CPU, (seconds if most < 0 else min(seconds, most), most))
    for kind, value in (
        (resource.RLIMIT_AS, request["memory"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def main() -> None:
    """Serve requests until there are no more."""
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "jinja2" not in sys.modules:
            sys.path += request["path"]
            import jinja2.debug  # imported when a template fails, which may be when no memory is left
            import jinja2.sandbox  # noqa: F401
        limit(request)
        sys.stdout.buffer.write(json.dumps(answer(request)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
