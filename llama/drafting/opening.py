"""From settings to a drafter: everything that can be refused is refused before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from llama import checkpoint
from llama.checkpoint.medusa import MedusaFile, load_medusa, open_medusa
from llama.compiled.memory import dtypes_for
from llama.config import DEMO_HEADS, DraftConfig, EngineConfig, ModelArgs
from llama.drafting.chain import Chain
from llama.drafting.datastore import Datastore
from llama.drafting.draft_model import DraftModel, check_same_vocabulary
from llama.drafting.files import fingerprint
from llama.drafting.lookahead import Lookahead
from llama.drafting.lookup import Lookup
from llama.drafting.medusa import Medusa
from llama.drafting.retrieval import Retrieval
from llama.drafting.suffix import Suffix
from llama.drafting.word_bank import WordBank
from llama.engine.drafting import Drafter
from llama.engine.runner import XlaRunner
from llama.errors import ConfigError, setting
from llama.loading import load_model, matched
from llama.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from llama.xla import backend

TRUST = 2.0  # tokens that an adaptive drafter guesses for each token that matched: the length says how sure it is


@dataclass(frozen=True)
class OpenedDrafting:
    """Files that belong to the model, opened and checked; their weights have not been read.

    Attributes:
        settings: as they were given.
        retrieval: the drafter of that name, or None.
        heads: Medusa's file, or None.
        source, args: the draft model's checkpoint and shape, or None.
        loaded: drafters whose weights are on the device, by name. They learn nothing from one request for the next.
    """

    settings: DraftConfig
    retrieval: Retrieval | None
    heads: MedusaFile | None
    source: checkpoint.Source | None
    args: ModelArgs | None
    loaded: dict[str, Drafter] = field(default_factory=dict)

    def drafter(self, runner: XlaRunner, allow_nan: bool = False) -> Drafter:
        """Load what is to be loaded, beside the model that ``runner`` has."""
        drafters = list(self._drafters(runner, allow_nan))
        return drafters[0] if len(drafters) == 1 else Chain(drafters)

    def _drafters(self, runner: XlaRunner, allow_nan: bool) -> Iterator[Drafter]:
        settings = self.settings
        for name in settings.names:
            if name == "lookup":
                trust = TRUST if settings.is_adaptive else math.inf
                yield Lookup(order=settings.lookup_order, draft_per_match=trust)
            elif name == "suffix":
                # a match of one token is often a chance one: those behind it in the chain may know better
                shortest = 1 if name == settings.names[-1] else 2
                kept = settings.corpus_tokens
                adaptive = settings.is_adaptive
                yield Suffix(shortest, TRUST, kept) if adaptive else Suffix(shortest, corpus_tokens=kept)
            elif name == "retrieval":
                assert self.retrieval is not None
                yield self.retrieval
            elif name == "lookahead":
                yield Lookahead(runner, settings.lookahead[2])
            else:
                if name not in self.loaded:
                    load = self._medusa if name == "medusa" else self._draft_model
                    self.loaded[name] = load(runner, allow_nan)
                yield self.loaded[name]

    def _medusa(self, runner: XlaRunner, allow_nan: bool) -> Medusa:
        assert self.heads is not None
        storage, _ = dtypes_for(runner.config, on_cpu=backend.device_kind() == "CPU")
        dtype = getattr(torch, storage.dtype)
        return Medusa(load_medusa(self.heads, runner.model.args, dtype, runner.device, allow_nan), runner)

    def _draft_model(self, runner: XlaRunner, allow_nan: bool) -> DraftModel:
        assert self.source is not None
        assert self.args is not None
        config = _draft_engine(runner.config, self.source)
        model = load_model(self.source, self.args, config, runner.device, allow_nan=allow_nan, progress=runner.progress)
        return DraftModel(XlaRunner(model, config, runner.device, runner.progress))


def open_drafting(
    settings: DraftConfig, args: ModelArgs, tokenizer: Tokenizer, config: EngineConfig, is_demo: bool
) -> OpenedDrafting:
    """Open the files that the settings name.

    Args:
        args: the model's shape.
        tokenizer: the model's.
        config: the engine's.
        is_demo: the model is the demo model, which has heads of its own.

    Raises:
        CheckpointError, TokenizerError: a draft model or heads that cannot be read, or heads of another width.
        DatastoreError: a datastore or a word bank that is damaged, or of another tokenizer.
        ConfigError: a draft model with another vocabulary, or Medusa without heads.
    """
    heads = source = draft_args = None
    if "medusa" in settings.names:
        heads = open_medusa(_heads_directory(settings, is_demo))
        heads.check(args)
    if "model" in settings.names:
        assert settings.draft_ckpt_dir is not None
        directory = Path(settings.draft_ckpt_dir)
        source = checkpoint.open_checkpoint(directory)
        checkpoint.check_files(directory, source.files)
        draft_tokenizer = load_tokenizer(find_tokenizer(directory))
        check_same_vocabulary(tokenizer, draft_tokenizer)
        draft_args = matched(None, source, draft_tokenizer, _draft_engine(config, source))
    return OpenedDrafting(settings, _retrieval(settings, tokenizer), heads, source, draft_args)


def _draft_engine(config: EngineConfig, source: checkpoint.Source) -> EngineConfig:
    """The draft model's shapes: those of the model that it drafts for, without drafts. Quantised weights stay so. On a
    mesh every device computes all of it: it is small, and may have fewer heads than there are devices.
    """
    alone = replace(config, draft_lens=(), lookahead=(), tensor_parallel=1)
    if source.stored:
        alone = replace(alone, dtype="auto", int4_group=EngineConfig.int4_group)
    return replace(alone, batch_invariant=False, prefix_cache_bytes=0)


def _heads_directory(settings: DraftConfig, is_demo: bool) -> Path:
    if settings.medusa_dir is None and not is_demo:
        raise ConfigError(f"drafter: medusa needs {setting('medusa_dir')}, the directory of heads made for this model")
    return DEMO_HEADS if settings.medusa_dir is None else Path(settings.medusa_dir)


def _retrieval(settings: DraftConfig, tokenizer: Tokenizer) -> Retrieval | None:
    if "retrieval" not in settings.names:
        return None
    mark = fingerprint(tokenizer)
    bank = None if settings.word_bank is None else WordBank(Path(settings.word_bank), mark)
    return Retrieval(None if settings.datastore is None else Datastore(Path(settings.datastore), mark), bank)
