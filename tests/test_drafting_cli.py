"""Drafting from the command line and from Python: flags, results, refusals, files that stay."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence as Sequences
from pathlib import Path

import numpy as np
import pytest
from commands import Run
from conftest import LLMFactory

from llama import DraftConfig, Drafter, Drafts, LLaMA, SamplingParams
from llama.compiled.medusa import MedusaHeads
from llama.config import DEMO_DIR
from llama.drafting import fingerprint
from llama.drafting.datastore import build
from llama.engine.drafting import Drafting
from llama.engine.sequence import Sequence
from llama.errors import ConfigError
from llama.tokenizer import load_tokenizer

COPY = "Repeat: Tom found a golden bell by the river. Tom rang the bell.\nCopy:"
GENERATE = ("generate", "--prompt", COPY, "--temperature", "0", "--max_gen_len", "30")


# --- refused before anything is loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--drafter", "lookupp"], ["--drafter", "lookupp", "lookup", "suffix"]),
        (["--drafter", "lookup,lookup"], ["each once"]),
        (["--drafter", ""], ["--drafter"]),
        (["--draft_len", "3"], ["--draft_lens", "--drafter"]),
        (["--drafter", "lookup", "--draft_len", "32"], ["draft_lens", "32", "1 to 31"]),
        (["--drafter", "lookup", "--draft_len", "0"], ["draft_lens", "1 to 31"]),
        (["--drafter", "lookup", "--draft_len", "3,x"], ["--draft_lens", "whole numbers"]),
        (["--drafter", "lookup", "--max_seq_len", "8"], ["draft_lens", "7", "8 positions", "--max_seq_len"]),
        (["--drafter", "lookup", "--lookup_order", "last"], ["--lookup_order", "first, newest"]),
        (["--drafter", "model"], ["--draft_ckpt_dir"]),
        (["--drafter", "lookup", "--draft_ckpt_dir", "x"], ["--draft_ckpt_dir", "model"]),
        (["--drafter", "retrieval"], ["--datastore", "--word_bank"]),
        (["--drafter", "auto", "--datastore", "x"], ["--datastore", "retrieval"]),
        (["--drafter", "lookahead", "--lookahead", "5,1,5"], ["--lookahead", "three numbers"]),
        (["--drafter", "suffix", "--corpus_tokens", "-1"], ["--corpus_tokens", "0 or more"]),
        (["--drafter", "lookahead", "--lookahead", "5,4"], ["--lookahead", "three numbers"]),
    ],
)
def test_settings_that_make_no_sense(run: Run, flags: list[str], words: list[str]) -> None:
    outcome = run("generate", "--prompt", "x", *flags)
    assert outcome.code == 2
    assert outcome.out == ""
    assert all(word in outcome.err for word in words), outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_files_of_another_model(run: Run, tmp_path: Path, tiny_checkpoint: Path, tokenizer_path: Path) -> None:
    """A draft model with another vocabulary, heads of another width, a datastore of another tokenizer, a cut one."""
    import torch

    store, heads = tmp_path / "store", tmp_path / "heads"
    other = load_tokenizer(tokenizer_path)
    build([other.encode("the cat sang") for _ in range(9)], fingerprint(other), store)
    heads.mkdir()
    wide = MedusaHeads(2, 1, 64, 320)
    torch.save({name: torch.zeros(each.shape) for name, each in wide.state_dict().items()}, heads / "medusa_lm_head.pt")
    cases = [
        (["model", "--draft_ckpt_dir", str(tiny_checkpoint)], ["--draft_ckpt_dir", "id 2", "same tokenizer"]),
        (["medusa", "--medusa_dir", str(heads)], ["64", "192"]),
        (["retrieval", "--datastore", str(store)], ["tokenizer"]),
        (["retrieval", "--datastore", str(tmp_path / "none")], ["llama-xla datastore build"]),
        (["model", "--draft_ckpt_dir", str(tmp_path / "none")], ["no such directory"]),
    ]
    for flags, words in cases:
        outcome = run(*GENERATE, "--drafter", *flags)
        assert (outcome.code, outcome.out) == (2, "")
        assert all(word in outcome.err for word in words), outcome.err
        assert "Compiling" not in outcome.err
    mine = load_tokenizer(DEMO_DIR / "tokenizer.model")
    build([mine.encode("the cat sang") for _ in range(9)], fingerprint(mine), store)
    store.write_bytes(store.read_bytes()[:-3])
    outcome = run(*GENERATE, "--drafter", "retrieval", "--datastore", str(store))
    assert outcome.code == 2
    assert "bytes" in outcome.err


def test_the_first_differing_id_is_named(tmp_path: Path, tokenizer_path: Path) -> None:
    from llama.drafting.draft_model import check_same_vocabulary

    one, other = load_tokenizer(DEMO_DIR / "tokenizer.model"), load_tokenizer(tokenizer_path)
    check_same_vocabulary(one, load_tokenizer(DEMO_DIR / "tokenizer.model"))
    first = next(i for i in range(320) if one.token_bytes(i) != other.token_bytes(i))
    with pytest.raises(ConfigError, match=f"id {first} is "):
        check_same_vocabulary(one, other)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_run_prints(run: Run) -> None:
    """The same text as without a drafter, the four counters, OpenAI's two, and the last line of the log."""
    plain = json.loads(run(*GENERATE, "--json", "--quiet").out)
    outcome = run(*GENERATE, "--json", "--drafter", "lookup")
    found = json.loads(outcome.out)
    assert found["token_ids"] == plain["token_ids"]
    assert "drafting" not in plain
    counts, details = found["drafting"], found["usage"]["completion_tokens_details"]
    assert 0 < counts["accepted_tokens"] < counts["draft_tokens"]
    assert sum(counts["accepted_per_position"]) == counts["accepted_tokens"]
    assert details["accepted_prediction_tokens"] == counts["accepted_tokens"]
    assert details["rejected_prediction_tokens"] == counts["draft_tokens"] - counts["accepted_tokens"]
    assert found["programs"]["runs"] < plain["programs"]["runs"]
    told = f", {counts['accepted_tokens']} of {counts['draft_tokens']} drafted tokens accepted, in "
    assert told in outcome.err.splitlines()[-1]


@pytest.mark.slow
def test_a_stream_is_the_same_text(run: Run) -> None:
    whole = run(*GENERATE, "--quiet")
    streamed = run(*GENERATE, "--quiet", "--stream", "--drafter", "auto,lookahead", "--draft_len", "5")
    assert streamed.out == whole.out


@pytest.mark.slow
def test_a_word_bank_grows_from_run_to_run(run: Run, tmp_path: Path) -> None:
    """The second run of a prompt is drafted from the first one's answer."""
    bank = tmp_path / "bank"
    flags = [*GENERATE, "--json", "--quiet", "--drafter", "retrieval", "--word_bank", str(bank)]
    first = json.loads(run(*flags).out)
    size = bank.stat().st_size
    second = json.loads(run(*flags).out)
    assert second["token_ids"] == first["token_ids"]
    assert first["drafting"]["accepted_tokens"] < second["drafting"]["accepted_tokens"]
    assert bank.stat().st_size >= size


@pytest.mark.slow
def test_a_word_bank_that_cannot_be_written_is_said(run: Run, tmp_path: Path) -> None:
    """The text has been printed by then."""
    outcome = run(*GENERATE, "--quiet", "--drafter", "retrieval", "--word_bank", str(tmp_path / "no" / "bank"))
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert str(tmp_path / "no") in outcome.err


@pytest.mark.slow
def test_statistics_and_two_drafters_at_once() -> None:
    llm = LLaMA.build(max_batch_size=2, max_seq_len=256, drafting=DraftConfig(("suffix", "medusa")))
    results = llm.generate([COPY, "Once upon a time"], max_gen_len=40, temperature=0)
    stats = llm.stats()
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert stats[name] == sum(getattr(r.drafting, name) for r in results)
    assert results[0].totals.drafting.draft_tokens == stats["draft_tokens"]
    llm.close()
    llm.close()


# --- attacks ----------------------------------------------------------------------------------------------------------


class Eager(Drafter):
    """Repeats the last token for ever."""

    def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
        return Drafts.of([[s.ids[-1]] * draft_len for s in sequences], draft_len)


@pytest.mark.slow
def test_a_consumer_that_stops_listening(make_llm: LLMFactory) -> None:
    """A stream that is dropped between two pieces frees its slot; the next call gets its own text."""
    plain = make_llm().generate(["the cat"], max_gen_len=40, temperature=0)
    llm = make_llm(draft_lens=(3,))
    llm.engine.drafting = Drafting.of(Eager(), llm.config, llm.vocab_size)
    for taken in range(4):
        pieces = llm.stream("once upon a time", max_gen_len=60, temperature=0)
        for _ in range(taken):
            next(pieces)
        pieces.close()
    assert llm.generate(["the cat"], max_gen_len=40, temperature=0)[0].token_ids == plain[0].token_ids


@pytest.mark.slow
def test_an_interrupt_keeps_the_text(make_llm: LLMFactory) -> None:
    whole = make_llm().generate(["the cat"], max_gen_len=100, temperature=0, ignore_eos=True)[0].token_ids
    llm = make_llm(draft_lens=(3,))
    llm.engine.drafting = Drafting.of(Eager(), llm.config, llm.vocab_size)
    pieces = llm.pieces(["the cat"], [SamplingParams(100, 0.0, ignore_eos=True)])
    result = None
    for number, piece in enumerate(pieces):
        if number == 3:
            llm.interrupt()
        result = piece.result or result
    assert result is not None
    assert result.finish_reason == "interrupted"
    assert 0 < len(result.token_ids) < 100
    assert result.token_ids == whole[: len(result.token_ids)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["propose", "accepted", "finished"])
def test_a_drafter_that_fails(make_llm: LLMFactory, moment: str, caplog: pytest.LogCaptureFixture) -> None:
    """While it is asked: the request ends with its error. When it is told of an end: the log has it, the text stays.
    The next call works.
    """
    plain = make_llm().generate(["the cat"], max_gen_len=20, temperature=0)[0].token_ids

    class Fails(Eager):
        broken = True

        def propose(self, sequences: Sequences[Sequence], draft_len: int) -> Drafts:
            self._fail("propose")
            return super().propose(sequences, draft_len)

        def accepted(self, counts: np.ndarray) -> None:
            self._fail("accepted")

        def finished(self, sequence: Sequence) -> None:
            self._fail("finished")

        def _fail(self, now: str) -> None:
            if self.broken and now == moment:
                raise ValueError("broken drafter")

    llm, drafter = make_llm(draft_lens=(3,)), Fails()
    llm.engine.drafting = Drafting.of(drafter, llm.config, llm.vocab_size)

    def call() -> list[int]:
        return llm.generate(["the cat"], max_gen_len=20, temperature=0)[0].token_ids

    if moment == "finished":
        with caplog.at_level(logging.ERROR, "llama"):
            assert call() == plain
        assert "broken drafter" in caplog.text
    else:
        with pytest.raises(ValueError, match="broken drafter"):
            call()
    drafter.broken = False
    assert call() == plain
