"""lm-evaluation-harness: a LLaMA as the language model that its tasks ask.

    from lm_eval import simple_evaluate
    from llama.integrations.lm_eval import LlamaXLA

    simple_evaluate(model=LlamaXLA.build("path/to/checkpoint", max_batch_size=8), tasks=["arc_easy"])

The answers are those of lm-eval's own ``hf`` model on the same checkpoint, item by item: encoding, BOS, truncation and
stop strings follow it (lm_eval/models/huggingface.py). All requests of a kind go to the engine in one call, which
shares the beginnings that they have in common and returns them as they end.

lm-eval 0.4.13 and 0.5.0.dev1 differ here in one thing: a request of ``loglikelihood_rolling`` holds a text, and is
answered by a number, or an empty context and the text, and is answered as ``loglikelihood`` is.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama.chat import ChatFormat, choose_format
from llama.errors import ChatError, ConfigError, InterruptedRunError, LibraryError, PromptError, setting
from llama.integrations import MAX_GEN_TOKS, TOO_LONG, TooLong
from llama.sampling_params import SamplingParams
from llama.scoring import rolling_windows

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise LibraryError(f"evaluation needs lm-eval: pip install -e .[eval] ({error})") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from llama.chat import Dialog
    from llama.generation import LLaMA
    from llama.scoring import Score
    from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
PASSED_ON = ("top_p", "top_k", "min_p", "typical_p", *PENALTIES, "min_tokens", "seed")
RENAMED = {"min_new_tokens": "min_tokens"}
WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}  # with these values
ALLOWED = ("until", "max_gen_toks", "do_sample", "temperature", *PASSED_ON, *RENAMED, *WITHOUT_EFFECT)

LogLikelihood = tuple[float, bool]


class Wish(NamedTuple):
    """What a request of ``generate_until`` asks for.

    Attributes:
        params: stop strings among them, where the engine can look for them.
        until: all stop strings, which lm-eval's own function cuts the text at.
    """

    params: SamplingParams
    until: list[str]


class ControlTokens(NamedTuple):
    """What lm-eval writes into its results about a tokenizer."""

    bos_token: str
    bos_token_id: int
    eos_token: str
    eos_token_id: int
    pad_token: str | None = None
    pad_token_id: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ControlTokens:
        """Read them from one of our tokenizers; a token without a name is empty."""
        names = {token_id: name for name, token_id in tokenizer.special_ids.items()}
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
        return cls(names.get(bos_id, ""), bos_id, names.get(eos_id, ""), eos_id)


class LlamaXLA(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A LLaMA for lm-eval's ``simple_evaluate`` and ``evaluate``.

    Args:
        llm: the model; as many requests run together as it has slots.
        add_bos_token: texts are encoded after BOS, unless they begin with it, as a chat template writes it. A text of
            ``loglikelihood_rolling`` is then scored with BOS as its first token, after BOS, as ``hf`` does it; without,
            its first own token is scored after BOS.
        too_long: what becomes of a context that does not fit: ``truncate`` it from the left, or ``refuse`` it. A
            continuation that does not fit by itself is always refused.
        max_gen_toks: most tokens of an answer where the task does not say.
        chat_format: see ``choose_format``; read only where lm-eval applies a chat template.
        progress: bars on stderr while requests are answered.

    Raises:
        ConfigError: an unknown ``too_long``, or a limit below 1.
    """

    def __init__(
        self,
        llm: LLaMA,
        *,
        add_bos_token: bool = True,
        too_long: TooLong = "truncate",
        max_gen_toks: int = MAX_GEN_TOKS,
        chat_format: str | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if too_long not in TOO_LONG:
            raise ConfigError(f"too_long: got {too_long!r}, expected one of {', '.join(TOO_LONG)}")
        if max_gen_toks < 1:
            raise ConfigError(f"max_gen_toks: got {max_gen_toks}, expected at least 1")
        self.llm = llm
        self.add_bos_token = add_bos_token
        self.too_long = too_long
        self.max_gen_toks = max_gen_toks
        self.progress = progress
        self.tokenizer = ControlTokens.of(llm.tokenizer)
        self._format_name = chat_format
        self._is_chat = self._told = False

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path | None = None,
        *,
        add_bos_token: bool = True,
        too_long: TooLong = "truncate",
        max_gen_toks: int = MAX_GEN_TOKS,
        chat_format: str | None = None,
        progress: bool = True,
        **build: Any,
    ) -> LlamaXLA:
        """Load a checkpoint as ``LLaMA.build`` does, which takes the keywords that are not the class's own."""
        from llama.generation import LLaMA

        return cls(
            LLaMA.build(ckpt_dir, progress=progress and sys.stderr.isatty(), **build),
            add_bos_token=add_bos_token,
            too_long=too_long,
            max_gen_toks=max_gen_toks,
            chat_format=chat_format,
            progress=progress,
        )

    # --- what lm-eval asks about the model ----------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens that one run takes; the last token of what is scored is not run."""
        return self.llm.longest_scored - 1

    @property
    def batch_size(self) -> int:
        """Requests that run together."""
        return self.llm.config.max_batch_size

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, which stands before a continuation without a context."""
        return self.tokenizer.bos_token_id

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model, by the names that it has for ``hf``."""
        found: dict[str, Any] = {"model_revision": "", "model_sha": ""}
        model = getattr(self.llm.engine.runner, "model", None)
        if model is not None:
            from llama.checkpoint.names import expected_weights, shape_of

            dtype = self.llm.config.dtype
            found["model_num_parameters"] = sum(
                math.prod(shape_of(w, model.args)) for _, w in expected_weights(model.args)
            )
            found["model_dtype"] = str(model.tok_embeddings.weight.dtype) if dtype == "auto" else dtype
        return {**found, "max_length": self.max_length, "add_bos_token": self.add_bos_token}

    # --- tokens -------------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, in which written control tokens are control tokens.

        Args:
            string: the text.
            add_special_tokens: begin with BOS. Default: ``add_bos_token``, unless the text begins with it already.
        """
        bos = add_special_tokens
        if bos is None:
            name = self.tokenizer.bos_token
            bos = self.add_bos_token and not (name and string.startswith(name))
        return self.llm.tokenizer.encode(string, bos=bos, allow_special=True)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; control tokens have none."""
        return self.llm.tokenizer.decode(tokens)

    # --- chat ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _format(self) -> ChatFormat:
        return choose_format(self.llm.tokenizer, self.llm.directory, self._format_name)

    def apply_chat_template(self, chat_history: Dialog, add_generation_prompt: bool = True) -> str:
        """A dialog as the text of its prompt.

        Args:
            chat_history: as lm-eval makes it: perhaps a system message, user and assistant in turn.
            add_generation_prompt: without, the last message is the beginning of an answer, with which the text ends.

        Raises:
            ChatError: the checkpoint has no chat format, or it refuses the dialog also without its system message.
        """
        self._is_chat = True
        without_system = [message for message in chat_history if message["role"] != "system"]
        try:
            return self._format.text(chat_history, add_generation_prompt)
        except ChatError as error:
            if len(without_system) == len(chat_history):
                raise
            if not self._told:
                log.warning("Left out system messages, which the chat format refuses: %s", error)
            self._told = True
            return self._format.text(without_system, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the results say about the chat format: the checkpoint's own template, or the format's name.

        Args:
            chat_template: a format's name, True, or False for none.
        """
        if isinstance(chat_template, str) and chat_template != "default":
            self._format_name = chat_template
            self.__dict__.pop("_format", None)
        return self._format.described if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """A name for the tokenizer and the chat format, by which lm-eval keeps requests that it has built."""
        facts = [*self.tokenizer, self._format.described]
        digest = hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()
        return f"{self.llm.directory.resolve().name}-{self._format.name}-{digest[:12]}"

    # --- log-likelihoods ----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[LogLikelihood]:
        """The log-probability of each continuation after its context, and whether greedy decoding would give it.

        Raises:
            PromptError: an empty continuation, or one that does not fit; nothing is run then.
        """
        for index, request in enumerate(requests):
            if not request.args[1]:
                raise PromptError(f"{_named(request, index)}: got an empty continuation, expected a text")
        answers: list[LogLikelihood] = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.progress)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[LogLikelihood]:
        contexts = [context or [self.prefix_token_id] for _, context, _ in requests]
        continuations = [continuation for *_, continuation in requests]
        for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            self._check_length(index, len(context), len(continuation))
        found: dict[int, LogLikelihood] = {}
        for score in self._scored(contexts, continuations, "Running loglikelihood requests", disable_tqdm):
            found[score.index] = answer = score.logprob, score.is_greedy
            asked = requests[score.index][0]
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return [found[index] for index in range(len(requests))]

    def _check_length(self, index: int, context: int, continuation: int) -> None:
        """Refuse a pair of so many tokens that cannot be scored, before any is."""
        most = self.max_length
        if not 0 < continuation <= most:
            raise PromptError(
                f"request {index}: its continuation has {continuation} tokens, expected 1 to {most}"
                + (f"; {setting('max_seq_len')} {self._needed(continuation)} at least" if continuation else "")
            )
        if self.too_long == "refuse" and context + continuation > most + 1:
            raise PromptError(
                f"request {index} does not fit: {context} tokens of context + {continuation} of continuation, expected "
                f"at most {most + 1} together, or {setting('too_long')} truncate"
            )

    def _needed(self, length: int) -> int:
        """The smallest ``max_seq_len`` with which ``max_length`` is ``length``."""
        return length + self.llm.config.max_seq_len - self.max_length

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float] | list[LogLikelihood]:
        """The log-probability of each whole text; see ``rolling_windows`` for one that is too long for a run."""
        windows = [
            list(rolling_windows(self.tok_encode(request.args[-1]), self.prefix_token_id, self.llm.longest_scored))
            for request in requests
        ]
        pairs = [(index, pair) for index, own in enumerate(windows) for pair in own]
        left = [len(own) for own in windows]
        sums = [0.0] * len(requests)
        contexts, continuations = [pair.context for _, pair in pairs], [pair.continuation for _, pair in pairs]
        for score in self._scored(contexts, continuations, "Running loglikelihood_rolling requests", disable_tqdm):
            index = pairs[score.index][0]
            sums[index] += score.logprob
            left[index] -= 1
            if not left[index]:
                asked = requests[index].args
                self.cache_hook.add_partial("loglikelihood_rolling", asked, _rolled(asked, sums[index]))
        return [_rolled(request.args, total) for request, total in zip(requests, sums, strict=True)]

    def _scored(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], title: str, quiet: bool
    ) -> Iterator[Score]:
        """Score pairs of ids, each as it becomes known.

        Raises:
            InterruptedRunError: ``llm.interrupt`` was called meanwhile.
        """
        done = 0
        with self._bar(len(contexts), title, quiet) as bar:
            for score in self.llm.score_each(contexts, continuations, too_long="truncate"):
                if len(score.token_logprobs) < len(score.token_ids):
                    break  # the engine ended it before its last token
                yield score
                done += 1
                bar.update()
        if done < len(contexts):
            raise InterruptedRunError(f"interrupted after {done} of {len(contexts)} requests")

    def _bar(self, total: int, title: str, quiet: bool) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, desc=title, disable=quiet or not self.progress)

    # --- texts --------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to where it is to stop.

        Raises:
            ConfigError: a setting of a request that we do not know, or that is out of its range; nothing is run then.
            PromptError: a context that does not fit and is refused.
        """
        wishes = [self.wish(request.args[1], _named(request, index)) for index, request in enumerate(requests)]
        params = [wish.params for wish in wishes]
        prompts = self._fitted([request.args[0] for request in requests], params)
        stop_ids = self._format.stop_ids if self._is_chat else ()
        found: dict[int, str] = {}
        with self._bar(len(requests), "Running generate_until requests", disable_tqdm) as bar:
            for piece in self.llm.pieces(prompts, params, stop_ids=stop_ids):
                if piece.result is None:
                    continue
                index = piece.result.index
                if piece.result.finish_reason == "interrupted":
                    raise InterruptedRunError(f"interrupted after {len(found)} of {len(requests)} requests")
                text = self.tok_decode(piece.result.token_ids)  # as ``hf``: of Llama 2's without the first word's space
                found[index] = postprocess_generated_text(text, wishes[index].until, None)
                self.cache_hook.add_partial("generate_until", requests[index].args, found[index])
                bar.update()
        return [found[index] for index in range(len(requests))]

    def wish(self, given: Mapping[str, Any], name: str) -> Wish:
        """A task's ``generation_kwargs`` as our settings. What lm-eval leaves open filters nothing.

        A sampled request draws its seed from torch, whose own seed ``simple_evaluate`` sets.

        Args:
            given: as lm-eval has them.
            name: of the request or the task, for messages.

        Raises:
            ConfigError: a setting that we do not know, or that is out of its range.
        """
        wanted = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        unknown = [key for key in wanted if key not in ALLOWED]
        unknown += [f"{key}={given[key]!r}" for key, only in WITHOUT_EFFECT.items() if given.get(key, only) != only]
        if unknown:
            raise ConfigError(
                f"generation_kwargs of {name}: got {', '.join(unknown)}, which llama-xla does not know; "
                f"expected some of {', '.join(ALLOWED)}"
            )
        most = self.max_length - 1
        if not 1 <= wanted["max_gen_toks"] <= most:
            raise ConfigError(
                f"generation_kwargs of {name}: got max_gen_toks {wanted['max_gen_toks']}, expected 1 to {most}; beside "
                f"a context it takes {setting('max_seq_len')} {self._needed(wanted['max_gen_toks'] + 1)} at least"
            )
        until = [text for text in wanted["until"] if text not in (None, "")]
        if not all(isinstance(text, str) for text in until):
            raise ConfigError(f"until of {name}: got {until!r:.60}, expected texts")
        until = handle_stop_sequences(until, self.tokenizer.eos_token or None)
        temperature = float(wanted.get("temperature") or 0.0) if wanted["do_sample"] else 0.0
        chosen = {RENAMED.get(name, name): wanted[name] for name in (*PASSED_ON, *RENAMED) if name in wanted}
        if temperature and chosen.get("seed") is None:
            chosen["seed"] = _drawn_seed()
        params = SamplingParams(
            max_gen_len=wanted["max_gen_toks"],
            temperature=temperature,
            **{"top_p": 1.0, **chosen},
            # the space before an answer's first word is no part of it for lm-eval, so it must not end the answer
            stop=tuple(text for text in until if not text.startswith(" ")),
            include_stop=True,
        )
        return Wish(params, until)

    def _fitted(self, contexts: Sequence[str], params: Sequence[SamplingParams]) -> list[list[int]]:
        """The ids of contexts, cut from the left so that an answer has room after them."""
        prompts, cut = [], 0
        for index, (context, wish) in enumerate(zip(contexts, params, strict=True)):
            room = self.max_length - wish.max_gen_len
            ids = self.tok_encode(context) or [self.prefix_token_id]
            if len(ids) > room and self.too_long == "refuse":
                raise PromptError(
                    f"request {index} does not fit: {len(ids)} tokens of context + max_gen_toks {wish.max_gen_len}, "
                    f"expected at most {self.max_length} together, or {setting('too_long')} truncate"
                )
            cut += len(ids) > room
            prompts.append(ids[-room:])
        if cut:
            log.warning("Cut %d of %d contexts from the left: they are too long", cut, len(contexts))
        return prompts


def _rolled(asked: Sequence[str], total: float) -> Any:
    """The answer to a request of ``loglikelihood_rolling``, in the form of the lm-eval that asked."""
    return total if len(asked) == 1 else (total, False)


def _named(request: Instance, index: int) -> str:
    """A request's task and place, for messages."""
    task = getattr(request, "task_name", None)
    return f"request {index}" + (f" of {task}" if task else "")


def _drawn_seed() -> int:
    import torch

    return int(torch.randint(2**63 - 1, ()).item())
