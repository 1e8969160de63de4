"""A row's text while it grows: decoding, stop strings, what is known of its tokens, and the result at its end.

Text is held back while it may be the beginning of a stop string. A stop string counts wherever it stands in the text,
however its characters are spread over tokens; of several, the one that is complete first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama.compiled import token_info as logprobs
from llama.engine.batch import Details, FinishReason, Progress
from llama.engine.request import Request
from llama.outputs import Generation, ProgramCount, Timing
from llama.tokenizer import StreamDecoder, Tokenizer


class StopStrings:
    """Watches a growing text for the first stop string.

    Args:
        stops: none of them empty.
        include: the stop string itself is let through.

    Attributes:
        found: the one that was found.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops, self._include = stops, include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take text in; return what is certain to stand before any stop string. Nothing more comes once one is
        found.
        """
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            end, start, self.found = min(places)
            self._held = ""
            return text[: end if self._include else start]
        keep = self._beginning_of_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _beginning_of_stop(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class RowText:
    """One row's text.

    Args:
        index: the prompt's place in its call.
        sample: which of the prompt's samples.
        prompt: its text.
        request: what the row runs.
        tokenizer: what ids mean.

    Attributes:
        finish_reason: why it ended; None while it goes on.
        token_ids: what was generated so far.
        prompt_details: what is known of the prompt's tokens from the second on, where it was asked for.
    """

    def __init__(self, index: int, sample: int, prompt: str, request: Request, tokenizer: Tokenizer) -> None:
        self.index, self.sample, self.prompt, self.request = index, sample, prompt, request
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, request.prompt_ids, at_start=request.constraint is None)
        self._stops = StopStrings(request.params.stop, request.params.include_stop)
        self._stop_reason: str | int | None = None
        self._parts: list[str] = []
        self._details: list[Details] = []
        self.prompt_details: Details | None = None

    def push(self, progress: Progress) -> str:
        """Take in what became known of the row; return the text that it made certain.

        A stop string ends the row here, behind the token that completed it; what else the progress holds is dropped.
        """
        taken, before = [], len(self.token_ids)
        chosen = list(progress.new_ids)
        if progress.stop_id is not None and self.request.params.include_stop:
            chosen.append(progress.stop_id)
        for token_id in chosen:
            self.token_ids.append(token_id)
            text = self._decoder.push([token_id])
            taken.append(text if len(self.token_ids) <= self.request.params.min_tokens else self._stops.push(text))
            if self._stops.found is not None:
                break
        if progress.finish_reason is not None:
            taken.append(self._stops.push(self._decoder.finish()) + self._stops.finish())
        if self._stops.found is not None:
            self.finish_reason, self._stop_reason = "stop", self._stops.found
        else:
            self.finish_reason, self._stop_reason = progress.finish_reason, progress.stop_id
        self._keep_details(progress, len(self.token_ids) - before)
        text = "".join(taken)
        self._parts.append(text)
        return text

    def _keep_details(self, progress: Progress, count: int) -> None:
        """Keep what is known of the first so many tokens, and of a stop token that is not among them."""
        if progress.details is not None:
            ended_by_token = progress.stop_id is not None and self._stops.found is None
            self._details.append(progress.details if ended_by_token else progress.details.first(count))
        if progress.prompt_details is not None:
            self.prompt_details = progress.prompt_details

    @property
    def mean_logprob(self) -> float:
        """Of the tokens that were chosen, the stop token included."""
        told = Details.joined(self._details).logprobs if self._details else None
        return -np.inf if told is None else float(told[:, 0].mean())

    def result(self, cached: int, timing: Timing, programs: ProgramCount) -> Generation:
        """What became of the row, once it has ended."""
        assert self.finish_reason is not None
        params = self.request.params
        assert params.seed is not None
        own = Details.joined(self._details).first(len(self.token_ids)) if self._details else None
        before = self.prompt_details
        return Generation(
            index=self.index,
            sample=self.sample,
            prompt=self.prompt,
            generation="".join(self._parts),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=cached,
            seed=params.seed,
            timing=timing,
            programs=programs,
            logprobs=None if params.logprobs is None else self._read(own, self.token_ids),
            prompt_logprobs=None
            if before is None or params.logprobs is None
            else [None, *self._read(before, self.request.prompt_ids[1:])],
            hidden_states=_joined("hidden", before, own) if params.hidden_states else None,
            logits=_joined("logits", before, own) if params.logits else None,
        )

    def _read(self, details: Details | None, token_ids: Sequence[int]) -> list[logprobs.TokenLogprob]:
        if details is None or details.logprobs is None:  # interrupted before the first token
            return []
        return logprobs.read(details.logprobs, token_ids, self.request.params.logprobs or 0, self._tokenizer)


def _joined(field: str, *parts: Details | None) -> np.ndarray | None:
    """One field of the prompt's and the generation's details, one after the other; None where there are none."""
    arrays = [array for part in parts if part is not None and (array := getattr(part, field)) is not None]
    return np.concatenate(arrays) if arrays else None
