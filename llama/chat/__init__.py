"""Dialogs to prompts: the formats that chat models were trained on.

    formats.py   the type of a dialog; Llama 2's and Llama 3's formats, as Meta's code builds them
    template.py  a checkpoint's own chat template, with a user's control tokens kept as text
    render.py    the process that renders templates, within limits of time, memory and size
    renderer.py  its caller's side

Whatever the format, control tokens come from the format alone: ``<|eot_id|>`` typed into a message is
text to the model.
"""

from __future__ import annotations

from pathlib import Path

from llama.chat.formats import ChatFormat, Dialog, Llama2Format, Llama3Format, Message
from llama.chat.renderer import Limits
from llama.chat.template import TemplateFormat, find_template
from llama.errors import ChatError
from llama.tokenizer import Tokenizer, special_names

FORMATS = ("llama2", "llama3", "template")

__all__ = [
    "FORMATS",
    "ChatFormat",
    "Dialog",
    "Limits",
    "Llama2Format",
    "Llama3Format",
    "Message",
    "TemplateFormat",
    "choose_format",
    "find_template",
]


def choose_format(tokenizer: Tokenizer, directory: Path, name: str | None = None) -> ChatFormat:
    """The format of a checkpoint's dialogs.

    Args:
        tokenizer: the checkpoint's.
        directory: the checkpoint's, which may hold a template.
        name: ``llama2``, ``llama3`` or ``template``. Default: the checkpoint's own template if it has one, else the
            format that its tokenizer was made for.

    Raises:
        ChatError: an unknown name, a format that the tokenizer has no tokens for, or nothing to choose by.
    """
    choices = f"expected one of {', '.join(FORMATS)}"
    if name is not None and name not in FORMATS:
        raise ChatError(f"chat format: got {name!r}, {choices}")
    found = find_template(directory) if name in (None, "template") else None
    if found is not None:
        return TemplateFormat(tokenizer, found.text, special_names(directory), source=str(found.path))
    if name == "template":
        raise ChatError(
            f"{directory} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
        )
    if name == "llama3" or (name is None and Llama3Format.fits(tokenizer)):
        return Llama3Format(tokenizer)
    if name == "llama2" or Llama2Format.fits(tokenizer):
        return Llama2Format(tokenizer)
    raise ChatError(
        f"{directory} has no chat template, and its tokenizer is neither Llama 2's nor Llama 3's: "
        f"choose a format, {choices}"
    )
