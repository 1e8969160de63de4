"""What is compiled, when, and into what: the zero-recompile contract and the optimised program of the decode step."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
import torch
from commands import dumped_programs
from conftest import LLMFactory

from llama import SamplingParams
from llama.errors import RecompileError
from llama.xla import backend, ops, programs, transfers
from llama.xla.counters import counters, fallback_ops, xla_compilations
from llama.xla.programs import UnsupportedOpError, compile_program

pytestmark = pytest.mark.slow

DUMP = """
import torch
from llama import EngineConfig, LLaMA, ModelArgs
from llama.engine.programs import Program
from llama.xla import ops, programs, transfers
from llama.xla.counters import counters, xla_compilations, fallback_ops
if {as_numbers}:
    ops.held_as = lambda dtype, device: dtype
if {undonated}:
    compile_program = programs.compile_program
    programs.compile_program = lambda name, fn, args, donated, **options: compile_program(name, fn, args, **options)
args = ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=320, multiple_of=32)
shapes = dict(max_batch_size=2, max_seq_len=96, buckets=(8, 1), key_buckets=(32,), cache_dtype={cache_dtype!r})
config = EngineConfig(**shapes, draft_lens=(3, 7), lookahead=(3, 2))
llm = LLaMA.build(tokenizer_path={tokenizer!r}, config=config, random_weights=args)
"""
# 3 layers, 2 slots, 2 key heads, 96 positions and 7 for padding, heads of 16; values in one block of 128 positions
CACHE = ("[3,2,2,103,16]", "[3,2,2,16,128]")
HELD_AS = {"float32": "f32", "bfloat16": "s16"}  # a cache of bfloat16 as its bits

DECODE = 'Program("decode", rows=2, key_len=96)'
WRITERS = [DECODE, 'Program("decode", rows=1, key_len=96)', 'Program("chunk", length=8, key_len=96)']
WRITERS += ['Program("copy", key_len=32)', 'Program("verify", rows=2, length=4, key_len=96)']
WRITERS += ['Program("verify", rows=1, length=8, key_len=96)', 'Program("lookahead", rows=2, length=7, key_len=96)']


def optimised_hlo(directory: Path, tokenizer: Path, *wanted: str, **options: object) -> dict[str, str]:
    """The optimised HLO of programs.

    Args:
        options: ``undonated``: without donation; ``as_numbers``: a cache of bfloat16 as such; ``cache_dtype``.
    """
    given = {"undonated": False, "as_numbers": False, "cache_dtype": "float32"} | options
    code = DUMP.format(tokenizer=str(tokenizer), **given)
    return dict(zip(wanted, dumped_programs(code, wanted, directory), strict=True))


@pytest.fixture(scope="module", params=HELD_AS)
def written(
    request: pytest.FixtureRequest, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """A cache's dtype, and the programs that write to it."""
    directory = tmp_path_factory.mktemp("hlo")
    return request.param, optimised_hlo(directory, tokenizer_path, *WRITERS, cache_dtype=request.param)


def cache_copies(hlo: str) -> list[str]:
    """Instructions that make a cache-sized tensor of any dtype other than by writing into the one they were given."""
    any_of_them = re.compile(rf"= \w+({'|'.join(map(re.escape, CACHE))})")
    made = [line for line in hlo.splitlines() if any_of_them.search(line) and " parameter(" not in line]
    allowed = re.compile(r"dynamic-update-slice|get-tuple-element|bitcast\(")
    return [line for line in made if not allowed.search(line)]


@pytest.mark.parametrize("program", WRITERS)
def test_the_cache_is_written_in_place(written: tuple[str, dict[str, str]], program: str) -> None:
    """Keys and values are aliased to their outputs and no copy of their size is made, nor is all of them converted:
    that would cost more than the step.
    """
    cache_dtype, programs = written
    hlo = programs[program]
    header = hlo.splitlines()[0]
    aliases = dict(re.findall(r"\{(\d+)\}: \((\d+), \{\}, ", header))
    parameters = re.sub(r"/\*.*?\*/", "", header[header.index("entry_computation_layout={(") :]).split("(", 1)[1]
    shapes = re.findall(r"(\w+\[[\d,]*\])", parameters)
    assert len(aliases) == len(CACHE)
    found = [shapes[int(aliases[str(place)])] for place in range(len(CACHE))]
    assert found == [HELD_AS[cache_dtype] + shape for shape in CACHE]
    assert cache_copies(hlo) == []


def test_the_copy_check_can_fail(tmp_path: Path, tokenizer_path: Path) -> None:
    """Without donation the alias is missing and XLA copies the cache: the check above sees it."""
    hlo = optimised_hlo(tmp_path, tokenizer_path, DECODE, undonated=True)[DECODE]
    assert "input_output_alias" not in hlo.splitlines()[0]
    assert cache_copies(hlo)


def test_numbers_of_bfloat16_would_be_converted(tmp_path: Path, tokenizer_path: Path) -> None:
    """Why a cache of bfloat16 is held as its bits (``ops.HALVES``): XLA:CPU converts all of it at every write."""
    wanted = DECODE, 'Program("copy", key_len=32)'
    found = optimised_hlo(tmp_path, tokenizer_path, *wanted, cache_dtype="bfloat16", as_numbers=True)
    for program, hlo in found.items():
        assert any(" convert(" in line for line in cache_copies(hlo)), program


def test_nothing_compiles_after_warm_up(make_llm: LLMFactory) -> None:
    """40 prompts of random lengths, temperatures, top-p and seeds, in batches of 1 to 3, by torch_xla's own counter."""
    llm = make_llm(max_batch_size=3, key_buckets=(32, 64), fail_on_recompile=True)
    llm.warm_up()
    before = xla_compilations(), counters.compiled
    chooser = random.Random(0)
    left = 40
    while left:
        count = min(left, chooser.randint(1, 3))
        left -= count
        prompts = [[1] + [chooser.randrange(3, 320) for _ in range(chooser.randint(0, 90))] for _ in range(count)]
        params = [
            SamplingParams(
                chooser.randint(1, 36),
                chooser.choice([0, 0.3, 1.7]),
                chooser.uniform(0.01, 1),
                chooser.randrange(2**63),
            )
            for _ in range(count)
        ]
        results = llm.generate(prompts, params=params)
        assert all(r.programs.compiled == 0 for r in results)
    assert (xla_compilations(), counters.compiled) == before


def test_the_counter_sees_a_compile(make_llm: LLMFactory) -> None:
    """The test above would notice: a new shape moves torch_xla's counter and ours."""
    device = make_llm().engine.runner.device
    before = xla_compilations(), counters.compiled
    x = transfers.upload(torch.ones(3, 41), device)
    program = compile_program("triple", lambda x: (x * 3,), [x])
    assert (xla_compilations(), counters.compiled) == (before[0] + 1, before[1] + 1)
    assert transfers.fetch(program(x)[0]).tolist() == torch.full((3, 41), 3.0).tolist()
    transfers.fetch(x.sum(dim=1) / 7)  # a lazy tensor outside any program compiles, too
    assert xla_compilations() == before[0] + 2


def test_fail_on_recompile_names_the_shape(make_llm: LLMFactory) -> None:
    """After a first call that warmed up short prompts, a longer one is refused and named; exit code 3 is its own."""
    llm = make_llm(seed=77, fail_on_recompile=True)
    llm.generate([[1] * 5], max_gen_len=4, temperature=0)
    llm.generate([[1] * 6], max_gen_len=4, temperature=0)
    with pytest.raises(RecompileError, match=r"chunk, chunk length 64, keys up to 128") as error:
        llm.generate([[1] * 70], max_gen_len=4, temperature=0)
    assert error.value.exit_code == 3
    assert llm.generate([[1] * 5], max_gen_len=4, temperature=0)[0].programs.compiled == 0


def test_a_surprise_in_the_device_is_noticed(make_llm: LLMFactory) -> None:
    """Under fail_on_recompile a computation that XLA compiles outside the engine's programs is an error, too."""
    llm = make_llm(seed=78, fail_on_recompile=True, read_every=1)
    llm.generate([[1] * 5], max_gen_len=4, temperature=0)
    pieces = llm.pieces([[1] * 5], [SamplingParams(4, 0)])
    next(pieces)
    transfers.fetch(transfers.upload(torch.ones(5, 43), llm.engine.runner.device).cumsum(dim=1))
    with pytest.raises(RecompileError, match="outside the engine's programs"):
        list(pieces)


def test_an_operation_that_xla_lacks_is_refused(make_llm: LLMFactory) -> None:
    """torch_xla would run it on the host while tracing and bake the result in: wrong for every later input."""
    x = transfers.upload(torch.rand(4, 4), make_llm().engine.runner.device)
    for _ in range(2):  # also where the process has met the operation before
        with pytest.raises(UnsupportedOpError, match="aten::"):
            compile_program("bits", lambda x: (x.view(torch.int32) + 1,), [x])
    program = compile_program("bits", lambda x: (ops.float_bits(x) + 1,), [x])
    assert transfers.fetch(program(x)[0]).tolist() == (transfers.fetch(x).view(torch.int32) + 1).tolist()


def test_programs_cause_no_fallback(make_llm: LLMFactory) -> None:
    """No operation of a step leaves the device."""
    before = fallback_ops()
    make_llm(seed=79).warm_up()
    assert fallback_ops() == before


def test_donated_memory_is_taken_over_and_weights_are_not_copied(make_llm: LLMFactory) -> None:
    """A program's weights are the model's own tensors: a change of one is seen by the next run, without a compile."""
    device = make_llm().engine.runner.device
    weight = transfers.upload(torch.ones(2, 2), device)
    x = transfers.upload(torch.ones(2, 2), device)
    program = compile_program("add", lambda x: (x + weight, x), [x])
    total, same = program(x)
    assert transfers.fetch(total).tolist() == [[2.0, 2.0]] * 2
    assert same is x  # an argument that is returned unchanged is passed through


@pytest.mark.alone
def test_a_run_is_not_waited_for_when_the_next_is_started() -> None:
    """What a run took over is dropped while it goes on, as the engine drops the state of the step before."""
    device = backend.init()
    weight = transfers.upload(torch.randn(1500, 1500) / 1500, device)
    state = transfers.upload(torch.randn(1500, 1500), device)

    def several(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for _ in range(10):
            x = weight @ x
        return (x,)

    program = compile_program("several", several, (state,), donated=(0,))
    spent, starts = [], []
    for _ in range(12):
        began = time.perf_counter()
        (state,) = program(state)
        starts.append(time.perf_counter() - began)
        transfers.fetch(state)
        spent.append(time.perf_counter() - began)
    assert sorted(starts)[-2] < 0.3 * sorted(spent)[6]


def test_a_process_without_memory_mappings_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA would crash with a segmentation fault: the error comes before, and says how to go on."""
    x = transfers.upload(torch.ones(3), backend.init())
    limit = tmp_path / "max_map_count"
    monkeypatch.setattr(programs, "MOST_MAPS", limit)
    limit.write_text("2010\n")
    with pytest.raises(programs.TooManyProgramsError, match=r"vm.max_map_count allows 2010, .*max_map_count=8040"):
        compile_program("one too many", lambda x: (x + 1,), [x])
    limit.write_text("1000000\n")
    compile_program("one more", lambda x: (x + 1,), [x])
