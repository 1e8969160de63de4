"""The object that is written for a line: its results, or the error in their place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from llama.batch.fields import Request
from llama.batch.lines import Line
from llama.batch.openai import body_of, usage_of
from llama.errors import ChatError, ConfigError, UserError
from llama.outputs import Generation

OF_THE_RUN = ("index", "usage", "timing", "programs", "drafting")  # keys that say how, or how fast, a result came
BAD_REQUEST = 400


def record_of(line: Line, request: Request, results: Sequence[Generation], run: str, created: int) -> dict[str, Any]:
    """What is written for a line that was answered.

    Args:
        results: prompt by prompt and sample by sample.
        run: a digest of the input and the settings.
        created: when the run began, in seconds since 1970.
    """
    if line.is_openai:
        body = body_of(request, results, _name(run, line.index), created)
        return _response(line, run, 200, body, None)
    found = [{name: value for name, value in each.as_json().items() if name not in OF_THE_RUN} for each in results]
    return {
        "index": line.index,
        "custom_id": line.custom_id,
        "results": found,
        "usage": usage_of(results),
        "error": None,
    }


def error_record(line: Line, error: UserError, run: str) -> dict[str, Any]:
    """What is written for a line that cannot be run."""
    told = {"code": _code(error), "message": str(error)}
    if line.is_openai:
        body = {"error": {"message": str(error), "type": "invalid_request_error", "param": None, "code": told["code"]}}
        return _response(line, run, BAD_REQUEST, body, told)
    return {"index": line.index, "custom_id": line.custom_id, "results": [], "usage": usage_of([]), "error": told}


def _response(line: Line, run: str, status: int, body: dict[str, Any], error: dict[str, str] | None) -> dict[str, Any]:
    name = _name(run, line.index)
    return {
        "id": f"batch_req_{name}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
        "error": error,
    }


def _name(run: str, index: int) -> str:
    """A name that no other line of any run has, and that a line keeps when it is run again."""
    return hashlib.blake2b(f"{run}:{index}".encode(), digest_size=12).hexdigest()


def _code(error: UserError) -> str:
    kinds = ((ConfigError, "invalid_setting"), (ChatError, "invalid_dialog"))
    return next((code for kind, code in kinds if isinstance(error, kind)), "invalid_prompt")


def as_bytes(value: dict[str, Any]) -> bytes:
    """An object as one line of a file."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
