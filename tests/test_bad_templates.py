"""Chat templates that are damaged, odd or hostile: one message each, and never for long."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llama.chat import Dialog, Limits, TemplateFormat
from llama.config import DEMO_DIR
from llama.errors import ChatError
from llama.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow  # each starts a process

USER: Dialog = [{"role": "user", "content": "hi"}]
SECONDS = 1.0
BAD: list[tuple[str, str]] = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1.0 seconds"),
    ("{{ lipsum(100000)|length }}", "more than 1.0 seconds"),
    ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    ("{{ 'a' * 10**8 }}", "takes too much memory"),
    ("{{ 'a' * 10**12 }}", "takes too much memory"),
    ("{{ '%9999999999d'|format(1) }}", "takes too much memory"),
    ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "writes more than 4194304 characters"),
    ("{% import 'os' as os %}", "reads another template, os, for which there is no loader"),
    ("{% include '/etc/passwd' %}", "reads another template, /etc/passwd, for"),
    ("{% extends 'x' %}", "reads another template, x, for"),
    ("{{ ''.__class__.__mro__ }}", "what its sandbox forbids"),
    ("{{ messages.append(1) }}", "what its sandbox forbids"),
    ("{{ absent.name }}", "UndefinedError: 'absent' is undefined"),
    ("{{ absent() }}", "UndefinedError: 'absent' is undefined"),
    ("{{ absent }}", "writes nothing for this dialog, .* a name that it does not define is empty"),
    ("", "writes nothing for this dialog"),
    (" \n\t", "writes white space only for this dialog"),
    ("{% if false %}a{% endif %}", "writes nothing"),
    ("{{ raise_exception('not this one') }}", "refuses this dialog: not this one$"),
    ("{{ raise_exception() }}", "refuses this dialog: no reason given$"),
    ("{{ raise_exception('x\n\x1b[31m' * 1000) }}", r"refuses this dialog: x  \[31mx"),
    ("{{ messages|map('upper') }}", "it writes a generator, expected a text"),
    ("{{ cycler }}", "it writes a type"),
    ("{{ range }}", "it writes a function"),
    ("{{ range|tojson }}", "not JSON serializable"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ 1|absent }}", "line 1: No filter named 'absent'"),
    ("{% for %}", "is not valid, line 1"),
    ("a\n{{", "is not valid, line 2"),
    ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "calls itself, too deeply"),
    ("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", "too deeply"),
    ("{% if true %}" * 500 + "{% endif %}" * 500, "too deeply"),
    ("{% for a in [1] %}" * 30 + "x" + "{% endfor %}" * 30, "too many statically nested blocks"),
    ("{{ '\\ud800' }}", "not valid Unicode: character 0"),
    ("a\ud800", "not valid Unicode: character 1"),
    ("x" * (2 << 20), "has 2097152 characters, expected at most 1048576"),
]
ODD: list[tuple[str, str]] = [
    ("{{ 3 }}", "3"),
    ("{{ none }}{{ true }}", "NoneTrue"),
    ("{{ 1.5 }}{{ [1] }}{{ {'a': 1} }}{{ (1, 2) }}", "1.5[1]{'a': 1}(1, 2)"),
    ("a{{ absent }}b", "ab"),
    ("{% generation %}a{% endgeneration %}", "a"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{{ messages|map(attribute='content')|join }}", "hi"),
    ("{{ messages[0]|tojson }}", '{"role": "user", "content": "hi"}'),
]


def made(template: str, seconds: float = SECONDS) -> TemplateFormat:
    return TemplateFormat(
        load_tokenizer(DEMO_DIR / "tokenizer.model"), template, {}, "checkpoint", Limits(seconds=seconds)
    )


@pytest.mark.parametrize(("template", "says"), BAD, ids=[f"{template[:30]!r}" for template, _ in BAD])
def test_a_template_is_refused(template: str, says: str) -> None:
    """Also where only its text is asked for, as lm-evaluation-harness does."""
    for ask in (TemplateFormat.encode, TemplateFormat.text):
        began = time.perf_counter()
        # on a busy machine another limit could come second after that of time
        seconds = SECONDS if "seconds" in says else SECONDS + 2
        with pytest.raises(ChatError, match=f"^checkpoint: .*{says}") as raised:
            ask(made(template, seconds), USER)
        assert time.perf_counter() - began < SECONDS + 3
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 500


@pytest.mark.parametrize(("template", "text"), ODD, ids=[template[:30] for template, _ in ODD])
def test_an_odd_template_works(template: str, text: str) -> None:
    assert made(template).text(USER) == text


def test_a_template_that_is_refused_leaves_the_next_dialog_alone(tmp_path: Path) -> None:
    """The same process renders what follows."""
    template = made("{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}ok")
    with pytest.raises(ChatError, match="refuses this dialog: no"):
        template.text([{"role": "user", "content": "no"}])
    assert template.text(USER) == "ok"
