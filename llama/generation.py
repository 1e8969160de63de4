"""Class LLaMA: text in, text out, over an Engine and a tokenizer.

Three concentric layers: the engine yields ids row by row, ``pieces`` turns them into text as it becomes certain and ends each
prompt with its typed result, and ``generate`` and ``stream`` are what most callers want of that.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from llama import checkpoint, runtime
from llama.chat import Dialog, choose_format
from llama.config import DEMO_CONTEXT, DEMO_DIR, EngineConfig, GenerationDefaults, ModelArgs, SamplingParams
from llama.engine import MAX_STOP_IDS, BatchClock, Engine, FinishReason, Request
from llama.errors import ConfigError, PromptError, TokenizerError
from llama.memory import check_fits, dtypes_for
from llama.model import Transformer
from llama.prompts import Prompt, check_fit, encode_prompt
from llama.results import ChatPrediction, CompletionPrediction, Generation, Piece, ProgramCount, Timing
from llama.tokenizer import StreamDecoder, Tokenizer, find_tokenizer

log = logging.getLogger("llama")

SYNTHETIC_TOKEN = 8


class LLaMA:
    """A model, its tokenizer and its engine. Make one with ``LLaMA.build``."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        load_s: float = 0.0,
        defaults: GenerationDefaults | None = None,
        directory: Path = DEMO_DIR,
    ) -> None:
        self.defaults = defaults or GenerationDefaults()
        self.directory = directory
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = engine.config
        self.load_s = load_s

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
        progress: bool = False,
    ) -> LLaMA:
        """Load a checkpoint and its tokenizer onto the device.

        Args:
            ckpt_dir: directory in Meta's, Hugging Face's or our own format; None means the demo model that the package ships.
            tokenizer_path: a SentencePiece model, a tiktoken ranks file or a tokenizer.json; None means the one beside the checkpoint,
                or in its parent.
            tokenizer: instead of ``tokenizer_path``, where it has been loaded already.
            max_seq_len: positions of the cache; None means 2048, or 512 for the demo model.
            max_batch_size: rows of every program.
            config: every static shape, the two above included; they are read only without it.
            random_weights: this shape with seeded random weights instead of a checkpoint, for tests and timings.
            seed: of the random weights.
            allow_nan: go on where a weight holds NaN or infinity.
            progress: bars on stderr while loading and compiling.

        Raises:
            CheckpointError, TokenizerError, ConfigError: see errors.py; nothing is loaded then.
        """
        began = time.perf_counter()
        log.info("Loading")
        if random_weights is not None and ckpt_dir is not None:
            raise ConfigError("random_weights and ckpt_dir: got both, expected one (random weights would replace the checkpoint's)")
        if config is None:
            default = DEMO_CONTEXT if ckpt_dir is None and random_weights is None else EngineConfig.max_seq_len
            config = EngineConfig(max_batch_size=max_batch_size, max_seq_len=max_seq_len or default)
        directory = DEMO_DIR if ckpt_dir is None else Path(ckpt_dir)
        source = None if random_weights is not None else checkpoint.open_checkpoint(directory)
        tokenizer = tokenizer or Tokenizer(tokenizer_path or find_tokenizer(directory))
        args = _matched(random_weights, source, tokenizer, config)
        device = runtime.init()
        dtype, activation_dtype = dtypes_for(
            config, on_cpu=runtime.device_kind() == "CPU", int8_stored=source is not None and source.is_int8
        )
        memory = check_fits(args, config, dtype, activation_dtype, runtime.free_memory(device))
        log.debug("Memory: %s", memory)
        with torch.device("meta"):
            model = Transformer(args, config.max_seq_len, activation_dtype)
        named = checkpoint.random_tensors(model, seed) if source is None else checkpoint.checked(source, allow_nan)
        with tqdm(total=memory.weights, desc="Loading", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
            for loaded in checkpoint.place(model, named, dtype, device):
                bar.update(loaded)
        runtime.wait()
        load_s = time.perf_counter() - began
        log.info("Loaded in %.2f seconds", load_s)
        defaults = GenerationDefaults() if source is None else source.defaults
        return cls(Engine(model, config, device, progress=progress), tokenizer, load_s, defaults, directory)

    def warm_up(self) -> float:
        """Compile every program that any prompt and parameter can need, and say how many seconds it took.

        Afterwards nothing compiles, whatever comes. Without it, each call compiles what it needs and lacks before its clock starts.
        """
        return self.engine.warm_up()

    def sampling(
        self,
        max_gen_len: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        otherwise: tuple[float, float] = (SamplingParams.temperature, SamplingParams.top_p),
    ) -> SamplingParams:
        """Sampling parameters: what is given, else what the checkpoint's generation_config.json wishes, else ``otherwise``.

        The log says where the checkpoint's wish won.
        """
        chosen = []
        given = (("temperature", temperature, self.defaults.temperature), ("top_p", top_p, self.defaults.top_p))
        for (name, value, wish), fallback in zip(given, otherwise, strict=True):
            if value is None and wish is not None:
                log.info("%s %g, from the checkpoint's generation_config.json", name, wish)
            elif value is not None and wish is not None and value != wish:
                log.info("%s %g, as asked; the checkpoint's generation_config.json has %g", name, value, wish)
            chosen.append(value if value is not None else wish if wish is not None else fallback)
        return SamplingParams(max_gen_len, chosen[0], chosen[1], seed)

    def interrupt(self) -> None:
        """End the running call after its current step, or the next call where none runs; what was generated is kept.

        Safe from a signal handler or another thread.
        """
        self.engine.interrupted = True

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
        params: Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Generate for every prompt, in batches of ``max_batch_size``.

        Args:
            prompts: one or several. A text is encoded behind BOS, so that the empty one is BOS alone; ids are taken as they are.
            max_gen_len, temperature, top_p, seed: see SamplingParams; the same for all prompts.
            params: one per prompt, instead of those.

        Returns:
            One result per prompt, in order.

        Raises:
            PromptError: a prompt that does not fit; nothing is generated then.
            RecompileError: under ``fail_on_recompile``, when something was left to compile after warm-up.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        common = SamplingParams(max_gen_len, temperature, top_p, seed)
        pieces = self.pieces(texts, [common] * len(texts) if params is None else params)
        return sorted((p.result for p in pieces if p.result is not None), key=lambda result: result.index)

    def stream(
        self, prompt: Prompt, max_gen_len: int = 256, temperature: float = 0.8, top_p: float = 0.95, seed: int | None = None
    ) -> Iterator[str]:
        """Yield the generation of one prompt in pieces; joined they are the text that ``generate`` returns for the same seed."""
        for piece in self.pieces([prompt], [SamplingParams(max_gen_len, temperature, top_p, seed)]):
            if piece.text:
                yield piece.text

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
            logprobs: not computed yet.
            echo: repeat the prompt before its generation.

        Raises:
            ConfigError: ``logprobs``.
        """
        results = self._complete([tuple(self.tokenizer.encode(p)) for p in prompts], temperature, top_p, max_gen_len, logprobs)
        return [{"generation": (prompt if echo else "") + r.generation} for prompt, r in zip(prompts, results, strict=True)]

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
            ConfigError: ``logprobs``.
        """
        chat_format = choose_format(self.tokenizer, self.directory)
        prompts = [tuple(chat_format.encode(dialog)) for dialog in dialogs]
        results = self._complete(prompts, temperature, top_p, max_gen_len, logprobs, chat_format.stop_ids)
        return [{"generation": {"role": "assistant", "content": r.generation.strip()}} for r in results]

    def _complete(
        self,
        prompts: Sequence[tuple[int, ...]],
        temperature: float,
        top_p: float,
        max_gen_len: int | None,
        logprobs: bool,
        stop_ids: Sequence[int] = (),
    ) -> list[Generation]:
        if logprobs:
            raise ConfigError("logprobs: not computed yet; leave it out")
        room = self.config.max_seq_len
        limits = [max(room - len(p), 1) if max_gen_len is None else max_gen_len for p in prompts]
        params = [SamplingParams(limit, temperature, top_p) for limit in limits]
        pieces = self.pieces(prompts, params, stop_ids=stop_ids)
        return sorted((p.result for p in pieces if p.result is not None), key=lambda result: result.index)

    def pieces(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], *, stop_ids: Sequence[int] = (), reuse: bool = False
    ) -> Iterator[Piece]:
        """Run prompts in batches and yield their text as it becomes certain, rows interleaved; see ``generate``.

        Args:
            stop_ids: ids that end a row, besides the tokenizer's and the checkpoint's own.
            reuse: do not run again what the cache still holds of the last call's prompts and generations; one batch only.
        """
        requests = self._requests(prompts, params, stop_ids)
        size = self.config.max_batch_size
        batches = [range(i, min(i + size, len(requests))) for i in range(0, len(requests), size)]
        compiled_before = runtime.counters.compiled
        cached = self.engine.reusable(requests) if reuse and len(batches) == 1 else 0
        keys = [key for batch in batches for key in self.engine.keys_for(requests[batch.start : batch.stop], cached)]
        compile_s = self.engine.warm_up(list(dict.fromkeys(keys)))
        was_interrupted = False
        try:
            for batch in batches:  # an interrupt during one batch ends those behind it before their first chunk
                rows = [_Text(i, self.prompt_text(prompts[i]), requests[i], self.tokenizer) for i in batch]
                for piece in self._run_batch(rows, compile_s, compiled_before, cached):
                    was_interrupted |= piece.result is not None and piece.result.finish_reason == "interrupted"
                    yield piece
        finally:
            if was_interrupted:  # one that comes after the last step is the next call's
                self.engine.interrupted = False

    def _run_batch(self, rows: list[_Text], compile_s: float, compiled_before: int, cached: int) -> Iterator[Piece]:
        """One batch through the engine; results come at the batch's end, when its times are known."""
        clock = BatchClock()
        for progress in self.engine.run([row.request for row in rows], clock, cached):
            row = rows[progress.row]
            text = row.push(progress.new_ids, progress.finish_reason)
            if text:
                yield Piece(row.index, text, None)
        lengths = [len(row.request.prompt_ids) for row in rows]
        timing = _timing(clock, sum(lengths) - cached * len(rows), self.load_s, compile_s)
        programs = ProgramCount(runtime.counters.compiled - compiled_before, clock.runs)
        for row in rows:
            yield Piece(row.index, "", row.result(cached, timing, programs))
        steps = max(len(row.ids) for row in rows)
        log.info("Processed prompts with %d to %d tokens, and generated %d tokens", min(lengths), max(lengths), steps)
        log.info("Totally decoded %d tokens in %.5f seconds", max(lengths) + steps - 1, clock.prefill_s + clock.decode_s)

    def _requests(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], more_stop_ids: Sequence[int]) -> list[Request]:
        """Encode and check all prompts before any of them runs."""
        if len(prompts) != len(params):
            raise PromptError(f"got {len(prompts)} prompts and {len(params)} sampling parameters, expected one per prompt")
        stop_ids = tuple(dict.fromkeys((*self.tokenizer.stop_ids, *self.defaults.stop_ids, *more_stop_ids)))
        if len(stop_ids) > MAX_STOP_IDS:
            raise ConfigError(f"stop ids: got {len(stop_ids)} ({', '.join(map(str, stop_ids))}), expected at most {MAX_STOP_IDS}")
        requests = []
        for index, (prompt, wish) in enumerate(zip(prompts, params, strict=True)):
            ids = encode_prompt(self.tokenizer, index, prompt, self.engine.model.args.vocab_size)
            check_fit(index, len(ids), wish.max_gen_len, self.config.max_seq_len)
            seed = secrets.randbits(63) if wish.seed is None else wish.seed
            requests.append(Request(ids, replace(wish, seed=seed), stop_ids))
        return requests


class _Text:
    """A row's text while it grows."""

    def __init__(self, index: int, prompt: str, request: Request, tokenizer: Tokenizer) -> None:
        self.index, self.prompt, self.request = index, prompt, request
        self.ids: list[int] = []
        self._decoder = StreamDecoder(tokenizer, request.prompt_ids)
        self._parts: list[str] = []
        self._finish_reason: FinishReason | None = None

    def push(self, new_ids: list[int], finish_reason: FinishReason | None) -> str:
        """Take new ids in; return the text that they made certain."""
        self.ids += new_ids
        self._finish_reason = finish_reason
        text = self._decoder.push(new_ids)
        if finish_reason is not None:
            text += self._decoder.finish()
        self._parts.append(text)
        return text

    def result(self, cached: int, timing: Timing, programs: ProgramCount) -> Generation:
        assert self._finish_reason is not None
        assert self.request.params.seed is not None
        return Generation(
            index=self.index,
            prompt=self.prompt,
            generation="".join(self._parts),
            token_ids=self.ids,
            finish_reason=self._finish_reason,
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=cached,
            seed=self.request.params.seed,
            timing=timing,
            programs=programs,
        )


def _matched(args: ModelArgs | None, source: checkpoint.Source | None, tokenizer: Tokenizer, config: EngineConfig) -> ModelArgs:
    """The model's shape, after weights, tokenizer and configuration have been found to go together."""
    if source is not None:
        args = source.args
        if source.sliding_window is not None and source.sliding_window < config.max_seq_len:
            raise ConfigError(
                f"max_seq_len: got {config.max_seq_len}, but {source.directory} limits attention to {source.sliding_window} positions, "
                f"which is not computed; --max_seq_len {source.sliding_window} at most"
            )
    assert args is not None
    if args.vocab_size == -1:
        args = args.with_vocab_size(tokenizer.n_words)
    if tokenizer.n_words > args.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.n_words} ids but the model's embedding only {args.vocab_size} rows: it belongs to another "
            "model; give the right one with --tokenizer_path"
        )
    return args


def _timing(clock: BatchClock, prompt_tokens: int, load_s: float, compile_s: float) -> Timing:
    return Timing(
        load_s=load_s,
        compile_s=compile_s,
        ttft_s=clock.ttft_s,
        prefill_s=clock.prefill_s,
        decode_s=clock.decode_s,
        prefill_tok_s=prompt_tokens / clock.prefill_s if clock.prefill_s else 0.0,
        decode_tok_s=clock.decoded / clock.decode_s if clock.decode_s else 0.0,
    )
