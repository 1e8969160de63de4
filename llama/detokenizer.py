"""A growing text: ids become characters as they come, and a stop string is found wherever it stands.

Text is held back while it may be the beginning of a stop string. A stop string counts however its characters are spread
over tokens; of several, the one that is complete first.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama.sampling_params import SamplingParams
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


class Detokenizer:
    """The text of one generation; see ``engine.sequence.Text``.

    Args:
        tokenizer: what the ids mean.
        prompt_ids: what stands before the generation.
        params: stop strings, and what becomes of them. Under a grammar the first token counts with its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._decoder = StreamDecoder(tokenizer, prompt_ids, at_start=not params.is_constrained)
        self._stops = StopStrings(params.stop, params.include_stop)
        self._parts: list[str] = []

    @property
    def stop(self) -> str | None:
        """The stop string that was found."""
        return self._stops.found

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._parts)

    def push(self, token_id: int, *, search: bool) -> str:
        """Take a token; return the text that is certain now.

        Args:
            search: look for stop strings, also those that begin in text that is held back.
        """
        decoded = self._decoder.push([token_id])
        return self._keep(self._stops.push(decoded) if search else decoded)

    def finish(self) -> str:
        """Return the rest of the text; no more tokens come.

        An incomplete character becomes U+FFFD, which is no stop string: nothing generated it.
        """
        return self._keep(self._stops.finish() + self._decoder.finish())

    def _keep(self, text: str) -> str:
        self._parts.append(text)
        return text
