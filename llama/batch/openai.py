"""OpenAI's batch format: the bodies of its requests as ours, and our results as the bodies of its responses.

Read from OpenAI's reference of the Batch, Completions and Chat Completions endpoints. What a request leaves out takes
the command's defaults, not OpenAI's. Fields of SamplingParams that OpenAI's API does not have are taken, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

from llama.batch.fields import Request, controls_of, messages_of, prompts_of
from llama.batch.lines import shown
from llama.errors import ConfigError, PromptError
from llama.outputs import Generation, TokenLogprob, finite

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEYS = ("custom_id", "method", "url", "body")
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
ONLY = {"stream": False, "suffix": "", "tools": [], "parallel_tool_calls": True, "modalities": ["text"]}


def request_of_body(line: dict[str, Any]) -> Request:
    """What a line in OpenAI's form asks for.

    Raises:
        UserError: a key or a value that is not allowed.
    """
    unknown = [name for name in line if name not in KEYS]
    if unknown:
        raise PromptError(f"unknown key {unknown[0]!r:.60}, expected {', '.join(KEYS)}")
    if line.get("custom_id") is None:
        raise PromptError("custom_id: got none, expected a text by which the response is found")
    if line.get("method") != "POST":
        raise PromptError(f'method: got {shown(line.get("method"))}, expected "POST"')
    url, body = line.get("url"), line.get("body")
    if url not in (COMPLETIONS, CHAT):
        raise PromptError(f"url: got {shown(url)}, expected {COMPLETIONS} or {CHAT}")
    if not isinstance(body, dict):
        raise PromptError(f"body: got {shown(body)}, expected an object")
    given = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    for name, only in ONLY.items():
        if given.pop(name, only) != only:
            raise PromptError(f"{name}: got {shown(body[name])}, expected {shown(only)} or nothing")
    model = given.pop("model", "")
    if not isinstance(model, str):
        raise PromptError(f"model: got {shown(model)}, expected a text")
    return _completion(given, model) if url == COMPLETIONS else _chat(given, model)


def _completion(given: dict[str, Any], model: str) -> Request:
    if "prompt" not in given:
        raise PromptError("prompt: got none, expected a text or token ids")
    prompts = prompts_of(given.pop("prompt"))
    echo = given.pop("echo", False)
    if not isinstance(echo, bool):
        raise ConfigError(f"echo: got {shown(echo)}, expected true or false")
    controls = controls_of(given)
    if echo and "logprobs" in controls:
        controls["prompt_logprobs"] = True
    return Request(prompts, None, controls, COMPLETIONS, model, echo)


def _chat(given: dict[str, Any], model: str) -> Request:
    if "messages" not in given:
        raise PromptError("messages: got none, expected a list of messages")
    dialog = messages_of(given.pop("messages"))
    wanted, top = given.pop("logprobs", False), given.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise ConfigError(f"logprobs: got {shown(wanted)}, expected true or false; their number is top_logprobs")
    if top is not None and not wanted:
        raise ConfigError("top_logprobs: got it without logprobs, expected logprobs true beside it")
    if wanted:
        given["logprobs"] = 0 if top is None else top
    given |= _response_format(given.pop("response_format", {"type": "text"}))
    return Request((), dialog, controls_of(given), CHAT, model)


def _response_format(value: Any) -> dict[str, Any]:
    """The control that a response_format stands for."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    declared = value.get("json_schema") if kind == "json_schema" else None
    if isinstance(declared, dict) and isinstance(declared.get("schema"), dict):
        return {"json_schema": declared["schema"]}
    raise ConfigError(
        f"response_format: got {shown(value)}, expected the type text, json_object, or json_schema with a schema in it"
    )


# --- responses --------------------------------------------------------------------------------------------------------


def body_of(request: Request, results: Sequence[Generation], name: str, created: int) -> dict[str, Any]:
    """The body of a response.

    Args:
        results: prompt by prompt and sample by sample.
        name: a digest that ids are made from.
        created: seconds since 1970.
    """
    is_chat = request.url == CHAT
    choose = _chat_choice if is_chat else _completion_choice
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": [choose(place, result, request) for place, result in enumerate(results)],
        "usage": usage_of(results),
    }


def usage_of(results: Sequence[Generation]) -> dict[str, int]:
    """The tokens of a line: each prompt's once, and those of all samples."""
    prompts = sum(next(samples).prompt_tokens for _, samples in groupby(results, key=lambda result: result.index))
    generated = sum(len(result.token_ids) for result in results)
    return {"prompt_tokens": prompts, "completion_tokens": generated, "total_tokens": prompts + generated}


def _chat_choice(place: int, result: Generation, request: Request) -> dict[str, Any]:
    told = result.logprobs
    return {
        "index": place,
        "message": {"role": "assistant", "content": result.generation.strip(), "refusal": None},
        "logprobs": None if told is None else {"content": [each.as_json() for each in told], "refusal": None},
        "finish_reason": result.finish_reason,
    }


def _completion_choice(place: int, result: Generation, request: Request) -> dict[str, Any]:
    return {
        "index": place,
        "text": (result.prompt if request.echo else "") + result.generation,
        "logprobs": None if result.logprobs is None else _token_lists(result),
        "finish_reason": result.finish_reason,
    }


def _token_lists(result: Generation) -> dict[str, list[Any]]:
    """A completion's log-probabilities, as parallel lists; nothing predicts a prompt's first token."""
    tokens = [*(result.prompt_logprobs or ()), *(result.logprobs or ())]
    told: list[TokenLogprob] = [each for each in tokens if each is not None]
    return {
        "tokens": [each.token for each in told],
        "token_logprobs": [finite(each.logprob) for each in told],
        "top_logprobs": [{top.token: finite(top.logprob) for top in each.top} for each in told],
        "text_offset": list(accumulate((len(each.token) for each in told[:-1]), initial=0)) if told else [],
    }
