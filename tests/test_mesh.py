"""Several devices as one mesh: what they compute is what one device computes, they communicate what the plan says, and
each holds its part. A process has one mesh, so each runs in one of its own (tests/mesh_child.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from commands import ROOT, dumped_programs, finished

from llama import EngineConfig, ModelArgs, checkpoint
from llama.checkpoint.reshard import reshard
from llama.config import DEMO_DIR
from llama.engine.programs import Program
from llama.errors import ConfigError
from llama.sharding import Mesh, collectives

pytestmark = pytest.mark.slow

CHILD = Path(__file__).with_name("mesh_child.py")
EVERYTHING = ("controls", "details", "scores", "prefixes", "widths", "threads", "narrow", "memory")
# tensor_parallel and data_parallel: what is run there
MESHES: dict[tuple[int, int], tuple[str, ...]] = {
    (2, 1): ("controls", "memory"),
    (4, 1): ("controls", "details", "narrow", "memory"),
    (8, 1): ("controls", "scores", "memory"),
    (2, 2): EVERYTHING,
    (1, 4): ("widths", "prefixes"),
    (4, 2): ("scores", "prefixes"),
}
TOLERANCE = 1e-4


@cache
def results(tensor: int, data: int, *cases: str) -> dict[str, Any]:
    """What a process on a mesh returns. LLVM's optimisation, which is most of a compile, knows nothing of meshes."""
    command = [sys.executable, str(CHILD), str(tensor), str(data), *cases]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_alike(found: Any, expected: Any) -> None:
    """Integers and texts are equal, floats within the tolerance."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_alike(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=TOLERANCE / 10, abs=TOLERANCE)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("mesh", "case"), [(mesh, case) for mesh, cases in MESHES.items() for case in cases if case != "memory"]
)
def test_a_mesh_computes_what_one_device_computes(mesh: tuple[int, int], case: str) -> None:
    """Ids equal, log-probabilities, logits and hidden states within 1e-4, for every control, dtype and way of use."""
    found, expected = results(*mesh, *MESHES[mesh])[case], results(1, 1, *EVERYTHING)[case]
    if case == "prefixes":  # what is found depends on which group has a free slot
        assert sum(found.pop("cached")) > 0
        expected = {name: value for name, value in expected.items() if name != "cached"}
    assert_alike(found, expected)


@pytest.mark.parametrize("mesh", [mesh for mesh, cases in MESHES.items() if "memory" in cases])
def test_a_device_holds_its_part(mesh: tuple[int, int]) -> None:
    """Weights fall as 1 / T but for the norms, the cache as 1 / (T M) down to one key head."""
    tensor, data = mesh
    weights, kv_cache = results(*mesh, *MESHES[mesh])["memory"]
    whole, whole_cache = results(1, 1, *EVERYTHING)["memory"]
    assert weights <= 1.05 * whole / min(tensor, 2) if tensor == 2 else weights <= 1.35 * whole / tensor
    heads = min(tensor, 2)  # there are two key heads
    assert kv_cache == whole_cache / (heads * data)


def test_every_drafter_works() -> None:
    """On the demo model, with a draft model of its own shape: the same texts, and drafts that came true."""
    found, expected = results(2, 2, "drafts")["drafts"], results(1, 1, "drafts")["drafts"]
    assert_alike(found, expected)
    assert sum(each["accepted"] > 0 for each in found.values()) >= 4


def checkpoint_of(directory: Path, args: ModelArgs) -> Path:
    """A checkpoint in Meta's format with random weights."""
    directory.mkdir()
    params = {"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads}
    params |= {"vocab_size": args.vocab_size, "multiple_of": args.multiple_of, "norm_eps": args.norm_eps}
    (directory / "params.json").write_text(json.dumps(params))
    torch.save(dict(checkpoint.random_tensors(args, seed=3)), directory / "consolidated.00.pth")
    shutil.copy(DEMO_DIR / "tokenizer.model", directory)
    return directory


def test_files_of_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in one file and in two, on four devices, and one for four ranks on one device."""
    whole = checkpoint_of(tmp_path / "1", ModelArgs(64, 2, 8, 4, 1024, multiple_of=32))
    for parts in (2, 4):
        reshard(whole, tmp_path / str(parts), parts)
        shutil.copy(whole / "tokenizer.model", tmp_path / str(parts))
    monkeypatch.setenv("MESH_FILES", ":".join(str(tmp_path / name) for name in ("1", "2", "4")))
    found, expected = results(4, 1, "files")["files"], results(1, 1, "files")["files"]
    assert_alike(found, expected)
    for texts in found.values():
        assert texts[0] == texts[1] == texts[2]


def test_loading_holds_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model goes to four devices the process holds at most 1.25 times its weights."""
    shape = ModelArgs(dim=768, n_layers=8, n_heads=12, n_kv_heads=4, vocab_size=1024, multiple_of=256)
    monkeypatch.setenv("MESH_FILES", str(checkpoint_of(tmp_path / "model", shape)))
    most, weights = results(4, 1, "loading")["loading"]
    assert weights > 200e6
    assert weights < most <= 1.25 * weights


# --- what is communicated ---------------------------------------------------------------------------------------------

ARGS = ModelArgs(dim=64, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=1026, multiple_of=32)
MAKE = """
import os
os.environ |= {{"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "{mesh.devices}"}}
from llama import EngineConfig, LLaMA, ModelArgs
from llama.engine.programs import Program
config = EngineConfig(max_batch_size=4, max_seq_len=96, buckets=(8, 1), key_buckets=(32,), draft_lens=(3,),
    tensor_parallel={mesh.tensor}, data_parallel={mesh.data})
llm = LLaMA.build(config=config, random_weights={args!r})
"""
PROGRAMS = {
    "decode": Program("decode", rows=4, key_len=96),
    "chunk": Program("chunk", length=8, key_len=96),
    "verify": Program("verify", rows=4, length=4, key_len=96),
    "copy": Program("copy", key_len=64),
    "move": Program("move"),
}


@cache
def optimised(mesh: Mesh) -> dict[str, str]:
    """The optimised HLO of the programs on a mesh."""
    with TemporaryDirectory() as directory:
        wanted = [repr(program) for program in PROGRAMS.values()]
        return dict(
            zip(PROGRAMS, dumped_programs(MAKE.format(mesh=mesh, args=ARGS), wanted, Path(directory)), strict=True)
        )


def communicated(hlo: str) -> Counter[tuple[str, bool, int]]:
    """Collectives of a program: kind, whether it is in the loop over layers, and numbers of the result."""
    found: Counter[tuple[str, bool, int]] = Counter()
    where = ""
    for line in hlo.splitlines():
        if line.endswith("{"):
            where = line
        match = re.search(
            r"= \(?\w+\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)", line
        )
        if match:
            sizes = [int(size) for size in match[1].split(",") if size]
            count = 1
            for size in sizes:
                count *= size
            found[match[2], "Body" in where, count] += 1
    return found


@pytest.mark.parametrize("mesh", [Mesh(1, 4), Mesh(2, 2)], ids=str)
@pytest.mark.parametrize("kind", list(PROGRAMS))
def test_programs_communicate_what_the_plan_names(mesh: Mesh, kind: str) -> None:
    """Two all-reduces a layer, the embedding's and the head's, and nothing over the cache or a weight."""
    program = PROGRAMS[kind]
    tokens = max(program.rows // mesh.data, 1) * max(program.length, 1)
    expected: Counter[tuple[str, bool, int]] = Counter()
    for each in collectives(ARGS, mesh) if kind in ("decode", "chunk", "verify") else ():
        if each.where != "head" or kind != "chunk":
            expected[each.kind, each.count == ARGS.n_layers, tokens * each.elements] += 1
    assert communicated(optimised(mesh)[kind]) == expected


def test_the_cache_is_written_in_place() -> None:
    """On a mesh, too, each device's part is aliased to its output, and no copy of it is made."""
    hlo = optimised(Mesh(1, 4))["decode"]
    assert re.search(r"input_output_alias=\{ \{0\}: [^{]*\{\}, may-alias\), \{1\}:", hlo.splitlines()[0])
    # 3 layers, 4 slots, one of two key heads, heads of 8; keys of 96 positions and 7, values in one block
    part = r"= f32\[3,4,1,(103,8|8,128)\]"
    made = [line for line in hlo.splitlines() if re.search(part, line) and " parameter(" not in line]
    assert made
    allowed = re.compile(r"dynamic-update-slice|get-tuple-element|bitcast\(")
    assert [line for line in made if not allowed.search(line)] == []


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tensor_parallel": -1}, "tensor_parallel: got -1, expected a whole number, 0 or more"),
        ({"tensor_parallel": 2.5}, "tensor_parallel: got 2.5, expected a whole number, 0 or more"),
        ({"data_parallel": 0}, "data_parallel: got 0, expected a whole number, 1 or more"),
        ({"data_parallel": 2, "max_batch_size": 3}, "max_batch_size: got 3, which data_parallel 2 does not divide"),
        ({"data_parallel": 2, "max_batch_size": 4, "widths": (1, 4)}, "widths: got [1, 4], expected multiples of"),
    ],
)
def test_impossible_numbers_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineConfig(**flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("devices", "flags", "message"),
    [
        (1, "--tensor_parallel 4", "4 devices together, but there are 1"),
        (4, "--tensor_parallel 2", "expected 1 with --data_parallel 4, or 2 with --data_parallel 2, or 4 with"),
        (4, "--tensor_parallel 3", "n_heads 6 with n_kv_heads 2 cannot be divided among so many devices"),
        (4, "--tensor_parallel 4 --mp True", "--tensor_parallel and --mp: got 4 and True, expected one of them"),
        (4, "--tensor_parallel 0", "--tensor_parallel: got 0, expected at least 1"),
        (4, "--data_parallel 4 --max_batch_size 6", "--max_batch_size: got 6, which --data_parallel 4 does not divide"),
    ],
)
def test_the_command_line_names_what_works(
    monkeypatch: pytest.MonkeyPatch, devices: int, flags: str, message: str
) -> None:
    monkeypatch.setenv("CPU_NUM_DEVICES", str(devices))
    outcome = finished(["-m", "llama.cli", "generate", "--quiet", *flags.split()])
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.message


@pytest.mark.parametrize("flags", ["--tensor_parallel 4", "--mp True", "--tensor_parallel 2 --data_parallel 2"])
def test_the_text_of_four_devices(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """The demo model, whose three query heads a key head are divided among two devices: as on one."""
    monkeypatch.setenv("CPU_NUM_DEVICES", "4")
    command = "-m llama.cli generate --quiet --prompt Once --prompt Tom --max_gen_len 40 --temperature 0"
    several = finished([*command.split(), *flags.split()])
    assert several == finished(command.split())
    assert several.code == 0


def child(code: str) -> str:
    """What code prints in a process of two CPU devices."""
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_hosts_that_run_one_program_take_the_same_steps() -> None:
    """Seeds that are not given are counted, drafts do not depend on clocks, and what clocks decide is refused."""
    out = child("""
from llama import DraftConfig, EngineConfig, LLaMA
from llama.errors import ConfigError
from llama.xla import mesh
mesh.host_count = lambda: 2
config = EngineConfig(max_seq_len=64, tensor_parallel=2)
llm = LLaMA.build(config=config, drafting=DraftConfig())
print([result.seed for result in llm.generate(["Once", "Tom"], 2, 1.0)], type(llm.engine.drafting.pace).__name__)
for wrong in ({"collect_s": 0.1}, {"tensor_parallel": 1, "data_parallel": 2, "max_batch_size": 2}):
    try:
        LLaMA.build(config=EngineConfig(**{"tensor_parallel": 2, "max_seq_len": 64, **wrong}))
    except ConfigError as error:
        print(error)
""")
    seeds, *refused = out.splitlines()
    assert seeds == "[1, 2] Pace"
    assert [line.split(",")[0].split(";")[0] for line in refused] == [
        "collect_s: got 0.1 on 2 hosts",
        "data_parallel: got 2 on 2 hosts",
    ]


def test_a_process_has_one_mesh() -> None:
    """A second model on another mesh is refused, and the first goes on."""
    out = child("""
from llama import EngineConfig, LLaMA
from llama.errors import ConfigError
llm = LLaMA.build(config=EngineConfig(max_seq_len=64, tensor_parallel=2))
before = llm.generate(["Once"], 4, 0.0)[0].token_ids
for config in (EngineConfig(max_seq_len=64), EngineConfig(max_seq_len=64, max_batch_size=2, data_parallel=2)):
    try:
        LLaMA.build(config=config)
    except ConfigError as error:
        print(error)
assert llm.generate(["Once"], 4, 0.0)[0].token_ids == before
from llama.engine.programs import Program
from llama.errors import EngineError
from llama.xla import mesh
import torch
runner = llm.engine.runner
args = [runner._example(name, Program("admit")) for name in Program("admit").takes]
place = Program("admit").takes.index("tokens")
args[place] = mesh.from_parts([torch.zeros(1, args[place].shape[1] // 2, dtype=torch.int32)] * 2, (None, "tensor"))
try:
    runner._programs[Program("admit")](*args)
except EngineError as error:
    print(error)
""")
    assert out.count("this process runs on 2 with 1 already, and a process has one mesh") == 2
    assert out.endswith("is split over the devices as {devices=[1,2]0,1}, expected {replicated}\n")
