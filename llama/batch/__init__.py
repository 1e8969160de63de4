"""Offline batches: a file of requests becomes a file of results, by one process or several, and goes on where it ended.

    lines.py     the input: a line's place, its JSON, and duplicates
    fields.py    what a request says; prompts, messages and controls by their types
    requests.py  a line becomes a request, in the package's own form or in OpenAI's
    openai.py    OpenAI's batch format: bodies of requests and of responses
    stream.py    requests go through the engine as one stream that keeps the slots full
    records.py   the object that is written for a line
    settings.py  what results depend on: a run is not resumed with other settings
    parts.py     results on the disk: a part for each process, and the merge

A line that is wrong becomes an error object in its place. What is written depends on the input, the model and the
settings alone; not on how many processes there were, or how often they were ended.
"""

from __future__ import annotations

from llama.batch.lines import InputLines, Line
from llama.batch.parts import Merged, Parts, merge_parts
from llama.batch.settings import RunSettings

__all__ = [
    "InputLines",
    "Line",
    "Merged",
    "Parts",
    "RunSettings",
    "merge_parts",
]
