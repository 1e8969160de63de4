"""llama.cpp in the bench: the same work as ours, whatever the number of rows, and files in the kinds that are named.
Speeds are not tested.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import finished

from llama.bench.child import Child
from llama.bench.llama_cpp_batch import BATCH, LlamaCppBatch
from llama.bench.ours import OursRunner
from llama.bench.peers import HuggingFaceRunner, LlamaCppRunner, weights_of, write_gguf
from llama.bench.workload import Workload
from llama.errors import ConfigError

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

ROWS = 3
POSITIONS = 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The tiny model in float32, for llama.cpp."""
    write_gguf(Workload("tiny"), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


@pytest.fixture
def batch(path: Path) -> Iterator[LlamaCppBatch]:
    """Rows of it."""
    made = LlamaCppBatch(path, ROWS, POSITIONS)
    yield made
    made.close()


def prompts_of(*lengths: int) -> list[list[int]]:
    """A prompt for each row, all different."""
    return [Workload("tiny", prompt_len=length).prompt(row, 1024) for row, length in enumerate(lengths)]


@pytest.mark.parametrize(("rows", "prompt_len"), [(1, 300), (3, 300), (2, BATCH + 1), (5, 120)])
def test_both_programs_choose_the_same_tokens(rows: int, prompt_len: int) -> None:
    """In float32, greedily, the first ones of every row: llama.cpp's cache is float16, which may tip a later choice.

    Prompts end within a batch of llama.cpp's, and begin in one and end in the next.
    """
    work = Workload("tiny", prompt_len=prompt_len, gen_len=8, batch=rows)
    ours, peer = OursRunner(work), LlamaCppRunner(work)
    ours.run()
    times = peer.run()
    assert [len(row) for row in ours.chosen] == [len(row) for row in peer.chosen] == [8] * rows
    assert [row[:4] for row in peer.chosen] == [row[:4] for row in ours.chosen]
    assert len({tuple(row) for row in peer.chosen}) == rows
    assert times.prefill_s > 0
    assert times.decode_s > 0
    peer.close()
    peer.close()


def test_rows_do_not_depend_on_their_neighbours(path: Path, batch: LlamaCppBatch) -> None:
    """Prompts of different lengths, together and each alone; and again after the cache is emptied."""
    prompts = prompts_of(5, 17, 9)
    alone = []
    for prompt in prompts:
        one = LlamaCppBatch(path, 1, POSITIONS)
        first = one.evaluate([prompt])
        alone.append([*first, *one.steps(first, 6)[:, 0].tolist()])
        one.close()
    for _ in range(2):
        firsts = batch.evaluate(prompts)
        later = batch.steps(firsts, 6)
        assert later.shape == (6, ROWS)
        assert [[first, *column] for first, column in zip(firsts, later.T.tolist(), strict=True)] == alone
        assert batch.lengths == [11, 23, 15]
        batch.clear()


def test_a_step_is_an_evaluation_of_one_token(batch: LlamaCppBatch) -> None:
    """And a row that was cut goes on as if nothing had followed."""
    prompts = prompts_of(5, 17, 9)
    firsts = batch.evaluate(prompts)
    later = batch.steps(firsts, 2)
    batch.cut(17)
    assert batch.lengths == [7, 17, 11]
    batch.clear()
    batch.evaluate(prompts)
    assert batch.evaluate([[first] for first in firsts]) == later[0].tolist()
    batch.cut(4)
    assert batch.lengths == [4, 4, 4]
    assert batch.evaluate([prompt[4:] for prompt in prompts]) == firsts


def test_decoding_at_a_position_is_decoding_after_a_prompt_of_that_length() -> None:
    """In any order, whatever the cache held before."""
    work = Workload("tiny", prompt_len=40, gen_len=5, depths=(1, 12, 40), batch=2)
    peer = LlamaCppRunner(work)
    expected = {}
    for position in work.depths:
        short = LlamaCppRunner(Workload("tiny", prompt_len=position, gen_len=5, batch=2))
        expected[position] = short.chosen
        short.close()
    for position in (12, 40, 1, 1, 40, 12):
        peer.decode_at(position)
        assert peer.chosen == expected[position], position
    peer.close()


def test_what_llama_cpp_cannot_do_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than it serves, a file that is none, and its absence; each with the cure."""
    with pytest.raises(ConfigError, match="batch: got 1000, expected at most 256"):
        LlamaCppBatch(path, 1000, 8)
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"cannot load none\.gguf"):
        LlamaCppBatch(tmp_path / "none.gguf", 1, 8)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ConfigError, match=r"llama\.cpp needs llama-cpp-python and gguf: pip install"):
        LlamaCppRunner(Workload("tiny"))


def test_a_failure_of_a_step_is_an_error(batch: LlamaCppBatch) -> None:
    """A cache that is full, instead of tokens that mean nothing."""
    firsts = batch.evaluate(prompts_of(5, 17, 9))
    with pytest.raises(ConfigError, match=r"llama_decode returned -?\d+, expected 0"):
        batch.steps(firsts, 300)  # 256 positions are the least that llama.cpp takes


@pytest.mark.parametrize(
    ("dtype", "layers", "tables", "tolerance"),
    [
        ("float32", "F32", "F32", 0.0),
        ("bfloat16", "BF16", "BF16", 2**-8),
        ("int8", "Q8_0", "Q8_0", 2**-7),
        ("int4", "Q4_0", "Q8_0", 2**-3),
    ],
)
def test_the_file_holds_the_kind_that_is_named(
    dtype: str, layers: str, tables: str, tolerance: float, tmp_path: Path
) -> None:
    """Embedding and head stay in 8 bits where the layers have 4; values are ours, rounded."""
    work = Workload("tiny", dtype=dtype)
    write_gguf(work, tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    found = {name: tensor.tensor_type.name for name, tensor in stored.items()}
    assert {found["token_embd.weight"], found["output.weight"]} == {tables}
    assert {kind for name, kind in found.items() if name.startswith("blk.") and "norm" not in name} == {layers}
    assert {kind for name, kind in found.items() if "norm" in name} == {"F32"}
    _, tensors = weights_of(work)
    expected = dict(tensors)["layers.1.feed_forward.w2.weight"].float().numpy()
    down = stored["blk.1.ffn_down.weight"]
    error = np.abs(gguf.dequantize(down.data, down.tensor_type).reshape(expected.shape) - expected).max()
    assert error <= tolerance * np.abs(expected).max()
    peer = LlamaCppRunner(work)  # and llama.cpp loads it
    assert len(peer.chosen[0]) == work.gen_len
    peer.close()


def test_narrow_weights_have_no_counterpart_in_transformers() -> None:
    with pytest.raises(ConfigError, match="no weight-only int4"):
        HuggingFaceRunner(Workload("tiny", dtype="int4"))


def test_bench_runs_batches_beside_llama_cpp() -> None:
    """The whole command in processes of its own, for one row and for several."""
    flags = ["--shape", "tiny", "-p", "12", "-n", "5", "-r", "1", "--batch", "1,3", "--compare", "llama.cpp"]
    outcome = finished(["-m", "llama.cli", "bench", *flags])
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    rows: list[dict[str, Any]] = found["rows"]
    assert [(row["runner"], row["batch"], row["cache_dtype"]) for row in rows] == [
        ("ours", 1, "float32"),
        ("llama.cpp", 1, "float16"),
        ("ours", 3, "float32"),
        ("llama.cpp", 3, "float16"),
    ]
    assert [(each["against"], each["batch"]) for each in found["ratios"]] == [("llama.cpp", 1), ("llama.cpp", 3)]
    assert "| llama.cpp | tiny | float32 | float16 | 3 |" in outcome.out


def test_the_process_of_llama_cpp_says_what_is_wrong() -> None:
    """An error of its own, in one line, instead of a traceback."""
    with pytest.raises(ConfigError, match=r"^batch: got 257, expected at most 256, which llama\.cpp decodes at once$"):
        Child("llama.cpp", Workload("tiny", prompt_len=4, gen_len=2, batch=257))


def test_a_process_that_was_killed_is_an_error() -> None:
    """Such as for want of memory, between two runs: no broken pipe, and it can still be closed."""
    child = Child("llama.cpp", Workload("tiny", prompt_len=4, gen_len=2))
    child._process.kill()
    child._process.wait()
    with pytest.raises(ConfigError, match=r"the benchmark of llama\.cpp ended with code -9"):
        child.run()
    child.close()


def test_an_interrupt_while_a_process_warms_up_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed until it was warm."""
    started: list[Child] = []

    def interrupt(self: Child) -> dict[str, Any]:
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "_answer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Child("llama.cpp", Workload("tiny", prompt_len=4, gen_len=2))
    assert started[0]._process.returncode is not None
