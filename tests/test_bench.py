"""The benchmark commands: what they count, how they show it, and that what is compared is the same work. Speeds are not
tested.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run, finished, refused_at_once

from llama.bench import kernels, mixed, report
from llama.bench.peers import HuggingFaceRunner
from llama.bench.workload import HEADS, SHAPES, Times, Workload
from llama.compiled.model import Transformer
from llama.errors import ConfigError
from llama.xla import reports as hlo

pytestmark = pytest.mark.slow

WORK = Workload("tiny", prompt_len=20, gen_len=11, batch=2)


def test_a_workload_survives_the_pipe() -> None:
    for work in (WORK, Workload(buckets=(8, 1), dtype="int8", ckpt_dir="x")):
        assert Workload.from_json(work.to_json()) == work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "13b"}, "shape: got '13b'"),
        ({"gen_len": 1}, "gen_len: got 1, expected at least 2"),
        ({"batch": 0}, "batch: got 0"),
        ({"prompt_len": 100, "gen_len": 30, "max_seq_len": 128}, "got 128, expected at least prompt_len 100"),
    ],
)
def test_impossible_workloads_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload(**changes)


def test_shapes_are_what_their_names_say() -> None:
    """Parameters counted by the model itself."""
    counts = {}
    for name in ("110m", "1.1b", "7b"):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in Transformer(SHAPES[name], 2).parameters())
    assert counts == {"110m": 134_105_856, "1.1b": 1_100_048_384, "7b": 6_738_415_616}


def rows() -> list[dict[str, Any]]:
    """Two programs' rows with known times."""
    ours = report.summarise(
        WORK, "ours", {"read_bytes": 4e6, "host_ms": 0.5}, [Times(0.1, 0.2, [(1, 0.0), (5, 0.1), (9, 0.2)])] * 3, 1e9
    )
    return [ours, report.summarise(WORK, "hf", {}, [Times(0.1, 0.3), Times(0.1, 0.4), Times(0.1, 0.5)], 1e9)]


def test_what_is_counted() -> None:
    """Two rows of 20 prompt tokens and 10 decode steps; medians; the share of 1 GB/s that 4 MB in 20 ms are."""
    ours, peer = rows()
    assert ours["prefill_tok_s"] == pytest.approx(2 * 20 / 0.1)
    assert ours["decode_tok_s"] == pytest.approx(2 * 10 / 0.2)
    assert ours["step_ms"] == pytest.approx(20)
    assert ours["bandwidth_share"] == pytest.approx(4e6 / 0.02 / 1e9)
    assert ours["job_s"] == pytest.approx(0.3)
    assert peer["decode_tok_s"] == pytest.approx(2 * 10 / 0.4)
    assert peer["decode_spread"] > 0
    (compared,) = report.ratios([ours, peer])
    assert compared == pytest.approx(
        {"against": "hf", "batch": 2, "decode": 2.0, "prefill": 1.0, "job_time": 0.6}, nan_ok=False
    )


def test_every_format_holds_the_same() -> None:
    found = rows()
    compared = report.ratios(found)
    assert json.loads(report.render(found, compared, "json")) == json.loads(json.dumps(found))
    assert [json.loads(line)["runner"] for line in report.render(found, compared, "jsonl").splitlines()] == [
        "ours",
        "hf",
    ]
    table = list(csv.DictReader(io.StringIO(report.render(found, compared, "csv"))))
    assert [float(row["step_ms"]) for row in table] == pytest.approx([20, 40])
    text = report.render(found, compared, "md")
    assert "| ours | tiny | float32 | 2 | 400.0 ± 0.0 | 100.0 ± 0.0 |" in text
    assert "ours / hf at batch 2: decode 2.00 x, prefill 1.00 x, whole job in 0.60 of the time" in text


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(rows()[:1], 1e9, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_peer_holds_the_same_weights() -> None:
    """transformers' model under the same workload: our seeded tensors by its names."""
    from llama.bench.peers import weights_of

    default = torch.get_default_dtype()
    runner = HuggingFaceRunner(WORK)
    torch.set_default_dtype(default)
    held = runner._model.state_dict()
    _, tensors = weights_of(WORK)
    named = dict(tensors)
    assert torch.equal(held["model.layers.1.mlp.down_proj.weight"], named["layers.1.feed_forward.w2.weight"])
    assert torch.equal(held["lm_head.weight"], named["output.weight"])
    assert len(held) == len(named)
    times = runner.run()
    assert times.prefill_s > 0
    assert times.decode_s > 0
    with pytest.raises(ConfigError, match="no weight-only int8"):
        HuggingFaceRunner(Workload("tiny", dtype="int8"))


def test_bench_runs_ours_beside_transformers() -> None:
    """The whole command in processes of its own: a table, the ratios, and one JSON object as the last line."""
    outcome = finished(
        ["-m", "llama.cli", "bench", "--shape", "tiny", "-p", "12", "-n", "5", "-r", "2", "--compare", "hf"]
    )
    assert outcome.code == 0, outcome.err
    *table, last = outcome.out.splitlines()
    assert table[0].startswith("| program | model |")
    assert any(line.startswith("ours / hf at batch 1: decode") for line in table)
    found = json.loads(last)
    ours, peer = found["rows"]
    assert (ours["runner"], peer["runner"]) == ("ours", "hf")
    assert ours["programs"] == 3  # chunks of 8 and of 1 token, and one token with a head: the last chunk and every step
    assert ours["weight_bytes"] > 0
    assert ours["peak_bytes"] > ours["weight_bytes"]
    assert {"import_s", "load_s", "compile_s", "host_ms", "bandwidth_share", "first_token_ms"} <= ours.keys()
    assert found["read_ceiling_gb_s"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--shape", "9b"], ["shape", "'9b'", "110m"]),
        (["bench", "-o", "xml"], ["--output", "'xml'", "jsonl"]),
        (["bench", "--bucket_policy", "best"], ["--bucket_policy", "'best'", "pad"]),
        (["bench", "-r", "0"], ["repetitions", "0"]),
        (["bench", "--compare", "vllm"], ["--compare", "'vllm'", "llama.cpp"]),
        (["bench", "-p", "x"], ["--prompt_len", "'x'", "whole number"]),
        (["bench", "--plot", "/nowhere/at/all.png"], ["--plot", "no such directory"]),
        (["bench", "-q"], ["unexpected argument", "'-q'"]),
        (["kernels", "--shape", "demo"], ["--shape", "'demo'", "110m"]),
    ],
)
def test_bad_flags_are_refused(run: Run, arguments: list[str], words: list[str]) -> None:
    refused_at_once(run(*arguments), *words)


def test_kernels_times_every_lowering_and_marks_the_picked(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "MOST_LAYERS", 2)
    monkeypatch.setattr(kernels, "RUNS", 1)
    outcome = run("kernels", "--shape", "tiny", "--rows", "1,4", "--save", str(tmp_path / "table.md"))
    assert outcome.code == 0, outcome.err
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in outcome.out.splitlines()[2:]]
    assert {(line[0], line[1], line[2]) for line in lines if line[6] == "yes" and ":" not in line[2]} == {
        (dtype, rows, lowering)
        for dtype, one, few in (
            ("float32", "one_row", "loop"),
            ("bfloat16", "one_row", "tiled"),
            ("int8", "int16", "int16"),
        )
        for rows, lowering in (("1", one), ("4", few))
    }
    assert {line[2] for line in lines if line[2].startswith("attention")} == {
        f"attention: {name}" for name in kernels.ATTENTION
    }
    layers = {(line[2], line[6]) for line in lines if line[2].startswith("layers")}
    assert layers == {("layers: loop", "yes"), ("layers: unrolled", ""), ("layers: layer program", "")}
    assert (tmp_path / "table.md").read_text() == outcome.out


def test_every_formulation_of_attention_is_the_same() -> None:
    q, keys, values = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=1.0)
    in_blocks = values.unflatten(2, (5, 8)).transpose(3, 4)
    for name, attend in kernels.ATTENTION.items():
        assert torch.allclose(attend(q, keys, in_blocks if name == "blocks" else values), expected, atol=1e-5)


HLO = """HloModule m, input_output_alias={ {0}: (1, {}, must-alias), {2}: (3, {}, must-alias) }, \
entry_computation_layout={}

%inner (p: f32[4]) -> f32[4] {
  ROOT %copy.9 = f32[4]{0} copy(%p)
}

ENTRY %main (a: f32[4], b: s8[2,3]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %copy.1 = f32[4]{0} copy(%a)
  %fusion.2 = bf16[2,8]{1,0} fusion(%a), kind=kLoop, calls=%inner
  %bitcast_dynamic-update-slice_fusion = f32[1000]{0} fusion(%a), kind=kLoop, calls=%inner
  ROOT %fusion.3 = f32[4]{0} fusion(%copy.1), kind=kLoop, calls=%inner
}
"""


def test_programs_are_summed_up(tmp_path: Path) -> None:
    """Operations of the entry only; what is updated in place is not counted as written."""
    path = tmp_path / "module_0001.x.cpu_after_optimizations.txt"
    path.write_text(HLO)
    found = hlo.summarise(path)
    assert found.operations == {"fusion": 3, "copy": 1}
    assert found.copies == 16
    assert found.aliases == 2
    assert found.largest == [("fusion", 32 + 16), ("copy", 16)]
    assert found.scratch == 0
    report = (
        "allocation 3: size 300, preallocated-temp:\n value: x\nallocation 4: size 80, parameter 1, shape |f32[20]|:\n"
    )
    (tmp_path / "module_0001.x.cpu_after_optimizations-buffer-assignment.txt").write_text(report)
    assert "4 operations, 2 aliases, 16 bytes copied, 300 of scratch" in next(hlo.report(tmp_path))


def test_a_trace_and_the_programs_are_written(tmp_path: Path) -> None:
    """The flags of generate, in a process of its own because XLA reads its flags once."""
    flags = [
        "--prompt",
        "The cat",
        "--max_gen_len",
        "6",
        "--profile",
        str(tmp_path / "trace"),
        "--dump_hlo",
        str(tmp_path / "hlo"),
    ]
    outcome = finished(["-m", "llama.cli", "generate", *flags])
    assert outcome.code == 0, outcome.err
    (trace,) = tmp_path.glob("trace/**/*.trace.json.gz")
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("fusion" in name for name in names)
    assert list(tmp_path.glob("trace/**/*.xplane.pb"))
    summary = (tmp_path / "hlo/summary.txt").read_text()
    copied = re.findall(r"2 aliases, ([\d,]+) bytes copied", summary)
    # keys and values are donated and nothing is copied but a loop's counts
    assert copied
    assert max(int(each.replace(",", "")) for each in copied) < 1000
    assert re.search(r"[1-9][\d,]* of scratch", summary)  # XLA reports it under the name that is looked for


def test_programs_can_be_dumped_before_xla_starts_only(run: Run, tmp_path: Path) -> None:
    import torch_xla  # noqa: F401

    refused_at_once(run("generate", "--prompt", "x", "--dump_hlo", str(tmp_path)), "dump_hlo", "new process")


def test_ways_to_choose_a_token_side_by_side(run: Run) -> None:
    """A decode step with each head, every control in use, as multiples of the first; one that does not exist is
    refused.
    """
    flags = ["--shape", "tiny", "-p", "8", "-n", "4", "-r", "1", "--vocab_size", "2000", "--batch", "2"]
    wanted = [word for head in HEADS for word in ("--heads", head)]
    outcome = run("bench", *flags, *wanted)
    assert outcome.code == 0, outcome.err
    lines = re.findall(
        r"^batch 2, a step with head (\w+): ([\d.]+) ms, ([\d.]+) x greedy$", outcome.out, flags=re.MULTILINE
    )
    assert [name for name, _, _ in lines] == ["greedy", "sample", "full", "logprobs"]
    (row,) = json.loads(outcome.out.splitlines()[-1])["rows"]
    assert row["vocab_size"] == 2000
    assert all(ms > 0 for ms in row["heads_ms"].values())
    refused_at_once(run("bench", *flags, "--heads", "best"), "--heads", "'best'", "greedy, sample, full, logprobs")


def test_a_checkpoint_has_its_own_vocabulary() -> None:
    with pytest.raises(ConfigError, match="vocab_size: a checkpoint has its own"):
        Workload(shape="demo", vocab_size=5)


@pytest.mark.slow
def test_requests_of_mixed_lengths(run: Run) -> None:
    """All at once and arriving at random: every token counts, rates are positive, flags that it ignores are refused."""
    outcome = run("bench", "--shape", "tiny", "--mixed", "6", "--batch", "2", "-r", "1", "--buckets", "64,8,1")
    assert outcome.code == 0, outcome.err
    row = json.loads(outcome.out.splitlines()[-1])
    wanted = mixed.requests(6, 1024)
    assert row["tokens"] == sum(len(prompt) + generated for prompt, generated in wanted)
    assert all(5 <= len(prompt) <= 400 and 8 <= generated <= 200 for prompt, generated in wanted)
    assert mixed.requests(6, 1024) == wanted
    assert row["tok_s"] > row["generated_tok_s"] > 0
    assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"]
    assert row["arriving_tok_s"] > 0
    for flags in (("--compare", "hf"), ("--batch", "2,4"), ("--heads", "greedy")):
        refused_at_once(run("bench", "--shape", "tiny", "--mixed", "6", *flags), "--mixed", flags[0])
    refused_at_once(run("bench", "--shape", "tiny", "--mixed", "6", "--max_seq_len", "99"), "--max_seq_len", "600")


@pytest.mark.slow
def test_scoring_with_and_without_the_prefix_cache(tmp_path: Path, run: Run) -> None:
    """Every task by every way, items and shares counted, equal log-probabilities, and a picture."""
    shape = ("--shape", "tiny", "--vocab_size", "1024", "-r", "1", "--plot", str(tmp_path / "plot.png"))
    outcome = run("bench", "--scoring", "3", "--shots", "0,2", "--compare", "hf", *shape)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    rows = {(row["task"], row["way"]): row for row in found["rows"]}
    ways = ("cached", "not cached", "transformers")
    expected = {(task, way) for task in ("no overlap", "0 shots", "2 shots") for way in ways}
    assert set(rows) == expected | {("system prompt", way) for way in ways[:2]}
    assert rows["2 shots", "cached"]["items"] == 3
    assert rows["no overlap", "cached"]["found_share"] == 0
    # of twelve pairs of 85 tokens each runs its choice, three run their context, and one runs the demonstrations
    assert rows["2 shots", "cached"]["found_share"] > 0.7
    assert all(row["ms"] > 0 for row in rows.values())
    assert float(re.findall(r"differ by (\S+) at most", outcome.out)[0]) < 1e-3
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_what_scoring_refuses(run: Run) -> None:
    """Flags of other modes, several numbers of slots, nothing to score, and a cache that is too short."""
    scoring = ("bench", "--shape", "tiny", "--scoring", "3")
    for flags in (("--mixed", "3"), ("--warm_up",), ("--prompt_len", "9"), ("--drafter", "auto"), ("--gen_len", "3")):
        refused_at_once(run(*scoring, *flags), "--scoring", flags[0])
    refused_at_once(run(*scoring, "--batch", "1,2"), "--batch", "expected one")
    refused_at_once(run("bench", "--shape", "tiny", "--scoring", "0"), "--scoring", "expected 1 or more")
    refused_at_once(run(*scoring, "--shots", "-1"), "--shots", "expected 0 or more")
    refused_at_once(run(*scoring, "--max_seq_len", "99"), "--max_seq_len", "533")
    refused_at_once(run(*scoring, "--compare", "llama.cpp"), "--compare", "expected hf or none")
    refused_at_once(run("bench", "--shape", "tiny", "--shots", "3"), "--shots", "--scoring")
