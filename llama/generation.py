"""Class LLaMA: text in, text out, over an Engine and a tokenizer.

Three layers: the engine yields news of each sequence, ``pieces`` yields text as it becomes certain and the result of
each sample at its end, and ``generate`` and ``stream`` are the two usual ways to consume that.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from llama import arguments, checkpoint
from llama.chat import Dialog, choose_format
from llama.config import (
    DEFAULT_DRAFT_LENS,
    DEMO_CONTEXT,
    DEMO_DIR,
    DraftConfig,
    EngineConfig,
    GenerationDefaults,
    ModelArgs,
)
from llama.engine.callers import Call, Callers
from llama.engine.drafting import Drafter, Drafting
from llama.engine.engine import Engine
from llama.engine.prefixes import run_order
from llama.engine.runner import XlaRunner
from llama.engine.scheduler import KEEP_PAYS
from llama.engine.sequence import DraftCounts, Sequence as Request
from llama.errors import ConfigError, InterruptedRunError, PromptError, RecompileError
from llama.grammar import Grammars
from llama.inputs import Prompt, encode_prompt, make_sequences, random_seed, scored_sequence
from llama.loading import load_model, matched, mesh_for
from llama.outputs import (
    ChatPrediction,
    CompletionPrediction,
    Generation,
    Piece,
    ProgramCount,
    Timing,
    TokenList,
    Totals,
    mean_logprob,
    result_of,
)
from llama.sampling_params import SamplingParams
from llama.scoring import Pair, RollingScore, Score, TooLong, encode_pair, fitted, rolling_windows, score_of
from llama.sharding import Mesh
from llama.startup import Startup
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from llama.xla import backend, mesh
from llama.xla.counters import counters, surprises

log = logging.getLogger("llama")
classic_log = logging.getLogger("llama.classic")  # the original's lines, see docs/cli.md

SYNTHETIC_TOKEN = 8
SCORED_AT_ONCE = 2048  # sequences that a call of the engine holds, so that memory does not grow with an evaluation


class LLaMA:
    """A model, its tokenizer and its engine. Make one with ``LLaMA.build``.

    Attributes:
        hosts: how many processes run the model together, each on the devices of its host. All of them make the same
            calls in the same order, from one thread; seeds that are not given are then 1, 2, 3 and so on.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        load_s: float = 0.0,
        defaults: GenerationDefaults | None = None,
        directory: Path = DEMO_DIR,
        startup: Startup | None = None,
        hosts: int = 1,
    ) -> None:
        self.hosts = hosts
        # what differs from host to host must not reach the device: they run one program together
        self._fresh_seed = random_seed if hosts == 1 else itertools.count(1).__next__
        self.defaults = defaults or GenerationDefaults()
        self.directory = directory
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = engine.config
        self.vocab_size = engine.runner.vocab_size
        self._callers = Callers(engine)
        self.load_s = load_s
        self.startup = startup or Startup()
        self._grammars = Grammars(tokenizer)

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = 1,
        *,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        random_weights: ModelArgs | None = None,
        seed: int = 1,
        allow_nan: bool = False,
        check_sums: bool = False,
        progress: bool = False,
        startup: Startup | None = None,
        drafting: DraftConfig | Drafter | None = None,
    ) -> LLaMA:
        """Load a checkpoint and its tokenizer onto the device.

        Args:
            ckpt_dir: directory in Meta's, Hugging Face's or our own format, or a GGUF file; None means the demo model
                that the package ships.
            tokenizer_path: a SentencePiece model, a tiktoken ranks file or a tokenizer.json; None means the one beside
                the checkpoint, or in its parent.
            tokenizer: instead of ``tokenizer_path``, where it has been loaded already.
            max_seq_len: positions of the cache; None means 2048, or 512 for the demo model.
            max_batch_size: rows of every program.
            config: every static shape, the two above included; they are read only without it.
            random_weights: this shape with seeded random weights instead of a checkpoint, for tests and timings.
            seed: of the random weights.
            allow_nan: go on where a weight holds NaN or infinity.
            check_sums: first read all files of the checkpoint and compare them with the sums beside them; without
                it, sizes and samples of the files are compared if a sizes.json gives them.
            progress: bars on stderr while loading and compiling.
            startup: the stopwatch of the process; None means a new one, which begins here.
            drafting: how tokens are drafted, or a drafter of your own, whose guesses are all checked by steps of
                ``config.draft_lens``; None means one token a step.

        Raises:
            CheckpointError, TokenizerError, ConfigError: see errors.py; nothing is loaded then.
        """
        arguments.optional("startup", startup, Startup)
        startup = startup or Startup()
        startup.enter("load")
        if random_weights is not None and ckpt_dir is not None:
            raise ConfigError(
                "random_weights and ckpt_dir: got both, expected one (random weights would replace the checkpoint's)"
            )
        ckpt_dir = None if ckpt_dir is None else arguments.path_of("ckpt_dir", ckpt_dir)
        tokenizer_path = None if tokenizer_path is None else arguments.path_of("tokenizer_path", tokenizer_path)
        arguments.optional("tokenizer", tokenizer, Tokenizer)
        arguments.optional("config", config, EngineConfig)
        arguments.optional("random_weights", random_weights, ModelArgs)
        arguments.optional("drafting", drafting, DraftConfig, Drafter)
        for name, value in (("allow_nan", allow_nan), ("check_sums", check_sums), ("progress", progress)):
            arguments.flag(name, value)
        seed = arguments.whole_number("seed", seed)
        is_demo = ckpt_dir is None and random_weights is None
        if config is None:
            default = DEMO_CONTEXT if is_demo else EngineConfig.max_seq_len
            config = EngineConfig(
                max_batch_size=arguments.whole_number("max_batch_size", max_batch_size),
                max_seq_len=default if max_seq_len is None else arguments.whole_number("max_seq_len", max_seq_len),
            )
        if isinstance(drafting, DraftConfig):
            config = drafting.settled(config)
        elif drafting is not None and not config.draft_lens:
            config = replace(config, draft_lens=DEFAULT_DRAFT_LENS)
        log.info("Loading %s", "the demo model" if is_demo else ckpt_dir or "random weights")
        directory = DEMO_DIR if ckpt_dir is None else ckpt_dir
        source = None if random_weights is not None else checkpoint.open_checkpoint(directory)
        if source is not None:
            checkpoint.check_files(directory, source.files, whole=check_sums)
        elif check_sums:
            raise ConfigError("check_sums: random weights come from no files; leave it out")
        tokenizer = tokenizer or load_tokenizer(tokenizer_path or find_tokenizer(directory))
        args = matched(random_weights, source, tokenizer, config)
        opened = None
        if isinstance(drafting, DraftConfig):
            from llama.drafting.opening import open_drafting  # nobody else pays for importing the drafters

            opened = open_drafting(drafting, args, tokenizer, config, is_demo)
        with startup.within("import"):
            backend.prepare()
        with startup.within("device"), backend.starting():
            config = mesh_for(config, args)
            device = backend.init(Mesh(config.data_parallel, config.tensor_parallel))
        model = load_model(source, args, config, device, seed=seed, allow_nan=allow_nan, progress=progress)
        runner = XlaRunner(model, config, device, progress)
        drafter = drafting if isinstance(drafting, Drafter) else None
        if opened is not None:
            drafter = opened.drafter(runner, allow_nan)
        backend.wait()
        startup.enter("load")  # goes on, until the first call compiles
        load_s = startup.seconds["load"]
        log.debug("Loaded in %.2f seconds", load_s)
        defaults = GenerationDefaults() if source is None else source.defaults
        engine = Engine(config, runner)
        hosts = 1 if mesh.current().is_single else mesh.host_count()
        if drafter is not None:
            # measured seconds differ from host to host, and every host must take the same steps
            adaptive = isinstance(drafting, DraftConfig) and drafting.is_adaptive and hosts == 1
            engine.drafting = Drafting.of(drafter, config, model.args.vocab_size, adaptive=adaptive)
        return cls(engine, tokenizer, load_s, defaults, directory, startup, hosts)

    def warm_up(self) -> float:
        """Compile every program that any prompt and parameter can need, and say how many seconds it took.

        Afterwards nothing compiles, whatever comes. Without it, each call compiles what it needs and lacks before its
        clock starts.

        Raises:
            InterruptedRunError: ``interrupt`` was called meanwhile.
        """
        began = time.perf_counter()
        with self._callers.exclusive() as engine, self.startup.within("compile"):
            engine.stop_compiling(False)
            try:
                engine.warm_up()
            except InterruptedRunError:
                self._callers.take_interrupt()
                raise
        return time.perf_counter() - began

    def sampling(self, otherwise: SamplingParams | None = None, **given: Any) -> SamplingParams:
        """Sampling parameters: the given ones, else those of the checkpoint's generation_config.json, else
        ``otherwise``.

        The log names each value that came from the checkpoint.

        Args:
            otherwise: None means SamplingParams().
            given: fields of SamplingParams; those of None count as not given.

        Raises:
            ConfigError: see SamplingParams.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        for name, default in asdict(self.defaults).items():
            if name == "stop_ids" or default is None:
                continue
            if name not in chosen:
                log.info("%s %g, from the checkpoint's generation_config.json", name, default)
                chosen[name] = default
            elif chosen[name] != default:
                log.info("%s %g, as asked; the checkpoint's generation_config.json has %g", name, chosen[name], default)
        if otherwise is None:
            return arguments.sampling(chosen)
        arguments.optional("otherwise", otherwise, SamplingParams)
        return arguments.sampling({f.name: getattr(otherwise, f.name) for f in fields(otherwise)} | chosen)

    def interrupt(self) -> None:
        """End the running call after its current step, or the next call where none runs; what was generated is kept.

        A call that compiles ends after the current program, with InterruptedRunError: nothing has been generated.
        Safe from a signal handler or another thread.
        """
        self._callers.interrupt()

    def take_interrupt(self) -> bool:
        """Whether ``interrupt`` was called and has ended nothing yet; the next call will not see it then."""
        return self._callers.take_interrupt()

    def stats(self) -> dict[str, float]:
        """Counters: requests running and waiting, shares of slots, cache and padding, tokens and drafts in all."""
        drafts = DraftCounts() if self.engine.drafting is None else self.engine.drafting.counts
        return {
            **self.engine.scheduler.stats(),
            "drafts": drafts.drafts,
            "draft_tokens": drafts.draft_tokens,
            "accepted_tokens": drafts.accepted_tokens,
            **{f"accepted_at_{place}": count for place, count in enumerate(drafts.accepted_per_position)},
        }

    def close(self) -> None:
        """Keep what a drafter has learnt, for instance in a file. The object works on."""
        if self.engine.drafting is not None:
            self.engine.drafting.drafter.close()

    def synthetic_prompt(self, length: int) -> list[int]:
        """BOS and ``length`` times one token, as pytorch-tpu/llama makes them for timings."""
        return [self.tokenizer.bos_id] + [SYNTHETIC_TOKEN] * length

    def prompt_text(self, prompt: Prompt) -> str:
        """A prompt as text, also where it is given as ids."""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        max_gen_len: int = 256,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int | None = None,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **controls: Any,
    ) -> list[Generation]:
        """Generate for every prompt, in batches of ``max_batch_size``.

        Args:
            prompts: one or several. A text is encoded after BOS, so that the empty one is BOS alone; ids are taken as
                they are.
            max_gen_len, temperature, top_p, seed, controls: see SamplingParams; the same for all prompts.
            params: instead of those, one for all prompts or one for each.

        Returns:
            One result per prompt and sample, in order.

        Raises:
            PromptError: a prompt that does not fit; nothing is generated then.
            ConfigError: a control out of its range, or two that contradict each other; likewise.
            RecompileError: under ``fail_on_recompile``, when something was left to compile after warm-up.
            InterruptedRunError: ``interrupt`` was called while programs were compiled.
        """
        texts = [prompts] if isinstance(prompts, str) else arguments.several("prompts", prompts)
        if params is None:
            named = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, "seed": seed}
            params = arguments.sampling({**named, **controls})
        elif controls:
            raise ConfigError(f"{next(iter(controls))}: got it beside params, expected one of them: params would win")
        return _results(self.pieces(texts, arguments.params_of(params, len(texts))))

    def stream(
        self,
        prompt: Prompt,
        max_gen_len: int = 256,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int | None = None,
        **controls: Any,
    ) -> Iterator[str]:
        """Yield the generation of one prompt in pieces; joined they are the text that ``generate`` returns for the
        same seed.

        Raises:
            ConfigError: more than one sample is requested; they would come interleaved. ``pieces`` keeps them apart.
        """
        named = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, "seed": seed}
        params = arguments.sampling({**named, **controls})
        if params.samples > 1:
            raise ConfigError(
                f"n: got {params.samples} samples to stream as one text, expected 1; "
                "generate returns several, pieces streams them"
            )
        for piece in self.pieces([prompt], [params]):
            if piece.text:
                yield piece.text

    def score(
        self,
        contexts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        too_long: TooLong = "refuse",
        prefix_cache: bool = True,
        cache_salt: str | None = None,
    ) -> list[Score | None]:
        """The log-probability of each continuation after its context.

        Contexts that begin alike are computed once. Only a continuation's positions go through the vocabulary head.

        Args:
            contexts: texts, which are encoded after BOS, so that the empty one is BOS alone; or ids, taken as they are.
            continuations: one for each context; texts, or ids where the context is ids. Spaces at a context's end count
                to the continuation, and both are encoded as one text.
            too_long: what becomes of a pair of more than ``longest_scored`` tokens: ``refuse`` it, ``truncate`` its
                context from the left, or ``skip`` it.
            prefix_cache, cache_salt: see SamplingParams.

        Returns:
            One result per pair, in order; None for one that was skipped.

        Raises:
            PromptError: a pair that does not fit or cannot be encoded; nothing is run then.
            ConfigError: an unknown ``too_long``.
            InterruptedRunError: ``interrupt`` was called.
        """
        contexts = arguments.several("contexts", contexts)
        found: list[Score | None] = [None] * len(contexts)
        wish: dict[str, Any] = {"too_long": too_long, "prefix_cache": prefix_cache, "cache_salt": cache_salt}
        for each in self.score_each(contexts, continuations, **wish):
            found[each.index] = each
        return found

    def score_each(
        self,
        contexts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        too_long: TooLong = "refuse",
        prefix_cache: bool = True,
        cache_salt: str | None = None,
    ) -> Iterator[Score]:
        """Like ``score``, each result when it is known; those that are skipped are left out."""
        arguments.flag("prefix_cache", prefix_cache)
        arguments.optional("cache_salt", cache_salt, str)
        contexts, continuations = (
            [
                arguments.prompt_of(name, index, value)
                for index, value in enumerate(arguments.several(f"{name}s", values))
            ]
            for name, values in (("context", contexts), ("continuation", continuations))
        )
        if len(contexts) != len(continuations):
            raise PromptError(
                f"got {len(contexts)} contexts and {len(continuations)} continuations, expected one for each"
            )
        pairs: list[Pair | None] = []
        for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            ids = encode_pair(self.tokenizer, index, context, continuation, self.vocab_size)
            pairs.append(fitted(index, *ids, self.longest_scored, too_long))
        _warn_too_long(pairs, len(pairs))
        kept = [(index, pair) for index, pair in enumerate(pairs) if pair is not None]
        yield from self._scores(kept, cache_salt, prefix_cache=prefix_cache)

    def rolling(self, texts: Sequence[Prompt]) -> list[RollingScore]:
        """The log-probability of each text, every token scored once, the first one after BOS.

        A text that is too long is cut into windows; see ``scoring.rolling_windows``.

        Args:
            texts: texts, or ids without BOS.

        Raises:
            PromptError: a text that is not valid Unicode, or an id outside the embedding.
        """
        owners: list[int] = []
        pairs: list[Pair] = []
        sizes: list[tuple[int, int]] = []  # of each text: tokens and windows
        for index, value in enumerate(arguments.several("texts", texts)):
            text = arguments.prompt_of("text", index, value)
            ids = encode_prompt(self.tokenizer, index, text, self.vocab_size) if text else ()
            ids = ids[1:] if isinstance(text, str) else ids
            windows = list(rolling_windows(ids, self.tokenizer.bos_id, self.longest_scored))
            pairs += windows
            owners += [index] * len(windows)
            sizes.append((len(ids), len(windows)))
        sums = [0.0] * len(sizes)
        for score in self._scores(list(enumerate(pairs)), None, prefix_cache=True):
            sums[owners[score.index]] += score.logprob
        return [RollingScore(index, sums[index], *size) for index, size in enumerate(sizes)]

    @property
    def longest_scored(self) -> int:
        """Tokens of a context and its continuation that can be scored: the last one need not be run."""
        return self.config.max_seq_len + 1

    def _scores(
        self, pairs: Sequence[tuple[int, Pair]], cache_salt: str | None, *, prefix_cache: bool
    ) -> Iterator[Score]:
        """Score pairs, each with the index that its result gets."""
        order: Sequence[int] = range(len(pairs))
        if prefix_cache:  # those that begin alike one after the other
            order = sorted(order, key=lambda place: (pairs[place][1].context, pairs[place][1].continuation))
        surprised, done = surprises(), 0
        for begin in range(0, len(order), SCORED_AT_ONCE):
            sequences = [
                scored_sequence(place, *pairs[place][1][:2], cache_salt, prefix_cache=prefix_cache)
                for place in order[begin : begin + SCORED_AT_ONCE]
            ]
            call = Call(sequences)
            for sequence, _, is_last in self._callers.run(call):
                if is_last and sequence.finish_reason == "interrupted":
                    raise InterruptedRunError(f"interrupted after {done} of {len(pairs)} continuations")
                if is_last:
                    done += 1
                    index, pair = pairs[sequence.index]
                    yield score_of(index, pair, sequence)
        self._refuse_surprises(surprised)

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Complete texts, with the signature and the results of Meta's ``Llama.text_completion``.

        Args:
            prompts: texts.
            temperature, top_p: see SamplingParams.
            max_gen_len: None means as many as the cache has room for.
            logprobs: also return the tokens and their log-probabilities.
            echo: repeat the prompt before its generation, also among the tokens; the first one's log-probability is 0,
                as in Meta's code.
        """
        arguments.flag("logprobs", logprobs)
        arguments.flag("echo", echo)
        prompts = arguments.texts_of("prompts", prompts)
        ids = [encode_prompt(self.tokenizer, i, prompt, self.vocab_size) for i, prompt in enumerate(prompts)]
        results = self._complete(ids, temperature, top_p, max_gen_len, logprobs, scored=logprobs and echo)
        return [
            {"generation": (prompt if echo else "") + result.generation, **self._token_list(result, prompt_ids[0])}
            for prompt, prompt_ids, result in zip(prompts, ids, results, strict=True)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answer dialogs, with the signature and the results of Meta's ``Llama.chat_completion``.

        Args:
            dialogs: each an optional system message, then user and assistant in turn, a user's message last.
            temperature, top_p, max_gen_len, logprobs: see ``text_completion``.

        Raises:
            ChatError: a dialog of another order, or a checkpoint that has no chat format.
        """
        arguments.flag("logprobs", logprobs)
        dialogs = arguments.dialogs_of(dialogs)
        chat_format = choose_format(self.tokenizer, self.directory)
        prompts = [tuple(chat_format.encode(dialog)) for dialog in dialogs]
        results = self._complete(prompts, temperature, top_p, max_gen_len, logprobs, stop_ids=chat_format.stop_ids)
        return [
            {
                "generation": {"role": "assistant", "content": result.generation.strip()},
                **self._token_list(result, prompt_ids[0]),
            }
            for prompt_ids, result in zip(prompts, results, strict=True)
        ]

    def _token_list(self, result: Generation, first_id: int) -> TokenList:
        """A result's tokens and their log-probabilities as Meta's predictions have them; nothing where they were not
        asked for.
        """
        if result.logprobs is None:
            return {}
        told = [*(result.prompt_logprobs or ()), *result.logprobs]
        first = self.tokenizer.token_bytes(first_id).decode(errors="replace")  # nothing predicts a prompt's first token
        return {
            "tokens": [first if each is None else each.token for each in told],
            "logprobs": [0.0 if each is None else each.logprob for each in told],
        }

    def _complete(
        self,
        prompts: Sequence[tuple[int, ...]],
        temperature: float,
        top_p: float,
        max_gen_len: int | None,
        logprobs: bool,
        *,
        scored: bool = False,
        stop_ids: Sequence[int] = (),
    ) -> list[Generation]:
        room = self.config.max_seq_len
        limits = [max(room - len(p), 1) if max_gen_len is None else max_gen_len for p in prompts]
        wanted = 0 if logprobs else None
        named = {"temperature": temperature, "top_p": top_p, "logprobs": wanted, "prompt_logprobs": scored}
        params = [arguments.sampling({"max_gen_len": limit, **named}) for limit in limits]
        return _results(self.pieces(prompts, params, stop_ids=stop_ids))

    def pieces(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[Piece]:
        """Run prompts and yield their text as it becomes certain, interleaved; see ``generate``.

        Of a prompt that returns the best of more samples, text comes when all of them have ended.

        Args:
            stop_ids: ids that end a row, besides the tokenizer's and the checkpoint's own.
        """
        prompts = [arguments.prompt_of("prompt", i, p) for i, p in enumerate(arguments.several("prompts", prompts))]
        params = arguments.params_of(params, len(prompts))
        own = arguments.sampling({"stop_token_ids": stop_ids}).stop_token_ids
        eos_ids = tuple(dict.fromkeys((*self.tokenizer.stop_ids, *self.defaults.stop_ids, *own)))
        vocab_size, room = self.vocab_size, self.config.max_seq_len
        grammars, fresh_seed = self._grammars, self._fresh_seed
        sequences = make_sequences(prompts, params, self.tokenizer, eos_ids, vocab_size, room, grammars, fresh_seed)
        if not sequences:
            return
        call, totals, ranking = Call(self._in_run_order(sequences)), Totals(), _Ranking()
        before = counters.compiled, counters.runs
        surprised, left = surprises(), len(sequences)
        self.startup.enter("compile")
        for sequence, text, is_last in self._callers.run(call):
            if sequence.first_token is not None:
                submitted = min(s.submitted or sequence.first_token for s in sequences)
                self.startup.first_token(submitted, sequence.first_token, counters.compiled)
            ranked = sequence.params.is_ranked
            if text and not ranked:
                yield Piece(sequence.index, sequence.sample, text, None)
            if is_last:
                left -= 1
                if not left:
                    self._end_call(sequences, totals, counters.runs - before[1], surprised)
                timing = Timing.of(sequence, self.load_s, call.compile_s)
                programs = ProgramCount(counters.compiled - before[0], sequence.runs)
                prompt = self.prompt_text(prompts[sequence.index])
                result = result_of(sequence, prompt, self.tokenizer, timing, programs, totals)
                if self.engine.drafting is not None:
                    result = replace(result, drafting=sequence.drafting)
                if ranked:
                    yield from ranking.take(sequence, result)
                else:
                    yield Piece(sequence.index, sequence.sample, "", result)

    def _in_run_order(self, sequences: list[Request]) -> list[Request]:
        """The sequences of a call in the order in which they are submitted: where more of them come than there are
        slots, those that begin alike one after the other.
        """
        if len(sequences) <= self.config.max_batch_size or not self.config.prefix_cache:
            return sequences
        return [sequences[i] for i in run_order([s.prompt_key for s in sequences], KEEP_PAYS)]

    def _end_call(self, sequences: Sequence[Request], totals: Totals, runs: int, surprised: int) -> None:
        """Add up a call that has ended, and check that XLA has compiled nothing unasked."""
        totals.add_up(sequences, runs)
        for line in totals.classic_lines():
            classic_log.debug("%s", line)
        self._refuse_surprises(surprised)

    def _refuse_surprises(self, surprised: int) -> None:
        """Under ``fail_on_recompile``, refuse that XLA has compiled anything since then unasked."""
        surplus = surprises() - surprised if self.config.fail_on_recompile else 0
        if surplus:
            config = self.config
            raise RecompileError(
                f"XLA compiled {surplus} computations while warmed-up requests ran, outside the engine's programs; its "
                f"shapes: batch {config.max_batch_size}, positions {config.max_seq_len}, "
                f"buckets {list(config.buckets)}, key buckets {list(config.key_buckets)}"
            )


class _Ranking:
    """Results of prompts of which the best of several samples are returned."""

    def __init__(self) -> None:
        self._found: dict[int, list[tuple[float, Generation]]] = {}  # by prompt

    def take(self, sequence: Request, result: Generation) -> Iterator[Piece]:
        """Keep a sample; yield the best ones when the prompt's last sample has come."""
        found = self._found.setdefault(sequence.index, [])
        found.append((mean_logprob(sequence), result))
        if len(found) == sequence.params.samples:
            # of equal ones the first sample: the order in which they ended depends on the others
            found.sort(key=lambda pair: (-pair[0], pair[1].sample))
            for place, (_, each) in enumerate(found[: sequence.params.n]):
                yield Piece(sequence.index, place, each.generation, None)
                yield Piece(sequence.index, place, "", replace(each, sample=place))


def _warn_too_long(pairs: Sequence[Pair | None], count: int) -> None:
    """Say how many of ``count`` pairs were cut or left out."""
    cut, skipped = sum(pair is not None and pair.truncated > 0 for pair in pairs), sum(pair is None for pair in pairs)
    if cut:
        log.warning("Cut %d of %d contexts from the left: they are too long", cut, count)
    if skipped:
        log.warning("Skipped %d of %d pairs: they are too long", skipped, count)


def _results(pieces: Iterable[Piece]) -> list[Generation]:
    """The results of a call's pieces, prompt by prompt and sample by sample."""
    return sorted((p.result for p in pieces if p.result is not None), key=lambda result: (result.index, result.sample))
