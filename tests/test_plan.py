"""`llama-xla plan` for several devices: its bytes against arithmetic by hand and against what is allocated, its times
against the formula by hand, and the page that describes it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, Outcome, Run, refused_at_once
from safetensors.numpy import save_file

from llama import EngineConfig, ModelArgs, planning
from llama.compiled import cache, memory
from llama.compiled.model import Linear, Transformer
from llama.config import DEMO_DIR, DTYPES
from llama.errors import CheckpointError, ConfigError
from llama.planning import ACCELERATORS, GIB, Accelerator, DevicePlan
from llama.settings import read_params, read_planned
from llama.sharding import Mesh

SHAPES = ROOT / "docs" / "examples" / "shapes"
PAGE = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
PARAMETERS = {"llama1-65b": 65_285_660_672, "llama2-70b": 68_976_648_192, "llama3.1-405b": 405_853_388_800}
NORMS = {"llama1-65b": 161 * 8192, "llama2-70b": 161 * 8192, "llama3.1-405b": 253 * 16384}
SMALL = ModelArgs(dim=64, n_layers=3, n_heads=8, n_kv_heads=4, vocab_size=321, multiple_of=32)


def planned(run: Run, *flags: str) -> dict[str, object]:
    """The object that a plan of devices prints."""
    outcome = run("plan", *flags, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    (found,) = outcome.objects
    return found


def device_plan(
    args: ModelArgs, mesh: Mesh, figures: Accelerator, slots: int = 1, storage: str = "bfloat16"
) -> DevicePlan:
    config = EngineConfig(max_batch_size=slots, data_parallel=mesh.data)
    return DevicePlan(args, mesh, config, storage, "bfloat16", figures)


# --------------------------------------------------------------------------------------- bytes of public models


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_public_models_are_divided_without_rest(name: str, tensor: int) -> None:
    """Two bytes for each parameter; all but the norms are divided by T, which divides everything here."""
    args = read_params(SHAPES / name)
    assert planning.parameter_count(args) == PARAMETERS[name]
    divided = PARAMETERS[name] - NORMS[name]
    assert planning.weight_bytes(args, "bfloat16", tensor) == 2 * (divided // tensor + NORMS[name])


def test_more_devices_than_key_heads_hold_them_twice() -> None:
    """Llama 2 70B on 16 devices: 8 key heads, so each is held by two, in the weights and in the cache."""
    args = read_params(SHAPES / "llama2-70b")
    keys_and_values = 2 * 80 * 1024 * 8192
    norms = NORMS["llama2-70b"]
    divided = PARAMETERS["llama2-70b"] - norms - keys_and_values
    assert planning.weight_bytes(args, "bfloat16", 16) == 2 * (divided // 16 + keys_and_values // 8 + norms)
    config = EngineConfig(max_seq_len=2048)
    rows = [planning.row_bytes(args, config, "bfloat16", tensor) for tensor in (1, 8, 16, 64)]
    assert rows[0] == 80 * 8 * 128 * (2048 + 7 + 17 * 128) * 2
    assert rows[1:] == [rows[0] // 8] * 3


def test_int8_has_scales_for_output_features() -> None:
    """Llama 2 70B on 8 devices: scales are divided with the column-parallel weights and whole with the others."""
    args = read_params(SHAPES / "llama2-70b")
    in_linear = PARAMETERS["llama2-70b"] - NORMS["llama2-70b"] - 32000 * 8192
    scales = 80 * ((8192 + 2 * 1024 + 2 * 28672) // 8 + 2 * 8192) + 32000 // 8
    rest = 32000 * 8192 // 8 + NORMS["llama2-70b"]
    assert planning.weight_bytes(args, "int8", 8) == in_linear // 8 + 4 * scales + 4 * rest


def test_the_whole_is_split_and_nothing_else() -> None:
    """Of every weight, the parts of all devices are the whole, padding and shared heads apart."""
    for row in device_plan(SMALL, Mesh(tensor=4), Accelerator()).weights:
        assert row.axis is None or row.whole[1 - row.axis] == row.local[1 - row.axis]
        together = 4 * row.local[row.axis] if row.axis is not None else row.local[0]
        whole = row.whole[row.axis or 0]
        assert together == (324 if whole == 321 else whole)


# ------------------------------------------------------------------------------------------ one implementation


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_weights_are_those_of_the_model(tied: bool, dtype: torch.dtype) -> None:
    """Against the parameters of a model on the meta device, its linear layers with scales under int8."""
    args = replace(SMALL, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(args, 2)
    in_linear = {id(m.weight) for m in model.modules() if isinstance(m, Linear)}
    expected = 0
    for parameter in model.parameters():
        if dtype != torch.int8:
            expected += parameter.numel() * dtype.itemsize
        elif id(parameter) in in_linear:
            expected += parameter.numel() + 4 * parameter.shape[0]
        else:
            expected += 4 * parameter.numel()
    assert memory.weight_bytes(args, dtype) == expected
    assert planning.weight_bytes(args, str(dtype).removeprefix("torch.")) == expected


@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_the_plan_of_one_device_is_that_of_loading(slots: int, storage: str) -> None:
    """compiled/memory.py and the command count the same, prefixes included; the cache is what is allocated."""
    config = EngineConfig(max_batch_size=slots, max_seq_len=300, prefix_cache_bytes=2**21)
    theirs = memory.plan_memory(SMALL, config, getattr(torch, storage), torch.float32, 2**30)
    kept = cache.kept_rows(SMALL, config, torch.float32)
    assert kept > 1
    assert planning.plan_memory(SMALL, config, storage, "float32", 2**30, kept_rows=kept) == theirs
    allocated = cache.allocate(SMALL, config, torch.float32, torch.device("cpu"))
    assert theirs.cache + theirs.prefixes == sum(each.nbytes for each in allocated)


def test_loading_plans_for_each_device() -> None:
    """With the engine's numbers of devices: a quarter of the heads, and half of the slots and prefixes, on each."""
    config = EngineConfig(max_batch_size=4, prefix_cache_bytes=2**23, max_seq_len=300)
    split = replace(config, data_parallel=2, tensor_parallel=4, widths=())
    one, each = (memory.plan_memory(SMALL, c, torch.float32, torch.float32, None) for c in (config, split))
    assert each.cache == one.cache // 8
    assert each.weights < one.weights / 3
    whole = planning.row_bytes(SMALL, config, "float32")
    assert one.prefixes // whole == 2**23 // whole > 2
    kept = cache.kept_rows(SMALL, split, torch.float32)
    assert each.prefixes == -(-kept // 2) * whole // 4


def test_what_is_advised_for_several_devices_fits() -> None:
    """Slots by the groups' number, and bytes of prefixes of all devices together."""
    config = EngineConfig(
        max_batch_size=8, data_parallel=2, tensor_parallel=4, prefix_cache_bytes=2**24, max_seq_len=300
    )
    dtypes = torch.float32, torch.float32
    needed = memory.plan_memory(SMALL, config, *dtypes, None)
    available = needed.total - needed.prefixes // 2
    with pytest.raises(ConfigError, match="does not fit") as error:
        memory.check_fits(SMALL, config, *dtypes, available)
    (advised,) = re.findall(r"prefix_cache_bytes (\d+) at most", str(error.value))
    row = planning.row_bytes(SMALL, config, "float32")
    fits = [
        memory.plan_memory(SMALL, replace(config, prefix_cache_bytes=value), *dtypes, available).fits
        for value in (int(advised), int(advised) + 2 * row)
    ]
    assert fits == [True, False]
    rest = needed.total - needed.prefixes
    with pytest.raises(ConfigError, match="does not fit") as error:
        memory.check_fits(SMALL, replace(config, prefix_cache_bytes=0), *dtypes, rest - 1)
    (slots,) = re.findall(r"max_batch_size (\d+) at most", str(error.value))
    assert int(slots) % 2 == 0


def test_the_dtypes_are_those_of_loading() -> None:
    for dtype in DTYPES:
        config = EngineConfig(dtype=dtype)
        for on_cpu in (False, True):
            storage, activation = planning.choose_dtypes(config, on_cpu=on_cpu)
            assert memory.dtypes_for(config, on_cpu=on_cpu) == (storage, getattr(torch, activation))
            assert dtype in ("auto", storage.label)


# --------------------------------------------------------------------------------------------- what fits


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    """Of each group; all groups have it."""
    args, mesh = read_params(SHAPES / "llama2-70b"), Mesh(data=3, tensor=8)
    most = device_plan(args, mesh, ACCELERATORS["v5p"], 3).largest_batch
    assert most is not None
    assert most % 3 == 0
    assert device_plan(args, mesh, ACCELERATORS["v5p"], most).memory.fits
    assert not device_plan(args, mesh, ACCELERATORS["v5p"], most + 3).memory.fits


def test_what_does_not_fit_is_told_what_would() -> None:
    """Llama 3.1 405B in bfloat16: 812 GB need 64 devices of 16 GiB, of those numbers that its heads allow."""
    args = read_params(SHAPES / "llama3.1-405b")
    plan = device_plan(args, Mesh(tensor=8), ACCELERATORS["v5e"])
    assert not plan.memory.fits
    assert (plan.largest_batch, plan.smallest_split) == (0, 64)
    assert device_plan(args, Mesh(tensor=64), ACCELERATORS["v5e"]).memory.fits
    assert not device_plan(args, Mesh(tensor=32), ACCELERATORS["v5e"]).memory.fits
    assert device_plan(args, Mesh(), Accelerator(memory=float(GIB))).smallest_split is None


# ------------------------------------------------------------------------------------------------- times


def test_times_by_hand() -> None:
    """Llama 2 70B in bfloat16 on 8 devices with 4 slots each, at round figures."""
    args = read_params(SHAPES / "llama2-70b")
    figures = Accelerator(bandwidth=1e12, link=1e11, flops=1e14)
    found = device_plan(args, Mesh(data=2, tensor=8), figures, 8).prediction
    assert found is not None
    norms, embedding = NORMS["llama2-70b"], 32000 * 8192
    numbers = (PARAMETERS["llama2-70b"] - embedding - norms) // 8 + norms
    kv_cache = 4 * 2 * 80 * 1 * 128 * 2048 * 2
    assert found.read_bytes == 2 * numbers + kv_cache
    assert found.read_s == pytest.approx((2 * numbers + kv_cache) / 1e12)
    assert found.compute_s == pytest.approx(2 * numbers * 4 / 1e14)
    sent = 2 * 7 / 8 * 161 * 8192 * 2 + 7 / 8 * 32000 * 4
    assert found.communicate_s == pytest.approx(4 * sent / 1e11)
    assert found.step_s == pytest.approx(found.read_s + found.communicate_s)
    assert found.tokens_per_s == pytest.approx(8 / found.step_s)
    assert found.collectives == 162


def test_many_slots_are_bound_by_arithmetic() -> None:
    """A step takes the longer of reading and computing; without a figure of operations, reading."""
    figures = Accelerator(bandwidth=1e15, link=1e12, flops=1e12)
    plans = [
        device_plan(SMALL, Mesh(tensor=2), each, 64).prediction for each in (figures, figures._replace(flops=None))
    ]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].compute_s is not None
    assert plans[0].step_s == plans[0].compute_s + plans[0].communicate_s
    assert plans[1].compute_s is None
    assert plans[1].step_s == plans[1].read_s + plans[1].communicate_s


def test_a_tied_embedding_is_read_once() -> None:
    """As the head; without a tie the embedding is not read."""
    tied, head = (
        device_plan(replace(SMALL, tie_word_embeddings=tie), Mesh(), ACCELERATORS["v4"]).prediction
        for tie in (True, False)
    )
    assert tied is not None
    assert head is not None
    assert tied.read_bytes == head.read_bytes
    assert tied.communicate_s == 0.0


def test_one_device_needs_no_link() -> None:
    assert device_plan(SMALL, Mesh(data=4), Accelerator(bandwidth=1e9), 4).prediction is not None
    assert device_plan(SMALL, Mesh(tensor=2), Accelerator(bandwidth=1e9)).prediction is None
    assert device_plan(SMALL, Mesh(), Accelerator(memory=1e9)).prediction is None


# ------------------------------------------------------------------------------------------- the command line


def test_the_object_has_what_the_lines_say(run: Run) -> None:
    """Bytes of the parts, and a total that is their sum."""
    flags = ["--tensor_parallel", "8", "--ckpt_dir", str(SHAPES / "llama2-70b"), "--accelerator", "v5e"]
    found = planned(run, *flags)
    text = run("plan", *flags).out
    held = found["held"]
    assert isinstance(held, dict)
    assert found["memory"] == {"total": sum(held.values()), "available": 16 * 2**30}
    assert found["fits"] is False
    assert found["smallest_tensor_parallel"] == 16
    assert "does not fit" in text
    assert "smallest tensor_parallel that fits: 16" in text
    assert f"{found['parameters']:,} parameters" in text
    weights = found["weights"]
    assert isinstance(weights, list)
    assert sum(row["size"] for row in weights) == sum(held[part] for part in planning.PARTS)
    for row in weights:
        assert re.search(rf"^{re.escape(row['name'])} .* {row['size']:,}$", text, flags=re.MULTILINE)
    assert "predicted from public bandwidth figures, not measured" in text
    assert "times: need" not in text


def test_the_slots_default_to_one_on_each_copy(run: Run) -> None:
    found = planned(run, "--data_parallel", "4")
    assert (found["max_batch_size"], found["mesh"]) == (4, {"data": 4, "tensor": 1, "devices": 4})
    assert found["collectives"] == []
    assert found["predicted"] is None
    assert found["fits"] is None
    assert "communication in a run: none" in run("plan", "--data_parallel", "4").out


def test_own_figures_replace_the_accelerator_s(run: Run) -> None:
    flags = ["--tensor_parallel", "2", "--accelerator", "v4"]
    public, own = planned(run, *flags), planned(run, *flags, "--bandwidth", "600", "--memory", "0.5")
    assert own["memory"]["available"] == 2**29  # type: ignore[index]
    assert own["predicted"]["read_s"] == pytest.approx(2 * public["predicted"]["read_s"])  # type: ignore[index]
    assert own["predicted"]["communicate_s"] == public["predicted"]["communicate_s"]  # type: ignore[index]
    assert "public" in public["predicted"]["source"]  # type: ignore[index]
    assert "given" in own["predicted"]["source"]  # type: ignore[index]


def test_the_cpu_device_computes_in_float32(run: Run) -> None:
    found = planned(run, "--tensor_parallel", "2", "--accelerator", "cpu", "--dtype", "bfloat16")
    assert (found["dtype"], found["activation_dtype"]) == ("bfloat16", "float32")
    assert planned(run, "--tensor_parallel", "2", "--accelerator", "cpu")["dtype"] == "float32"
    assert planned(run, "--tensor_parallel", "2")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tensor_parallel 3", ["--tensor_parallel: got 3", "n_kv_heads 2", "expected one of 1, 2"]),
        ("--tensor_parallel 0", ["--tensor_parallel: got 0", "positive whole number"]),
        ("--tensor_parallel two", ["--tensor_parallel: got 'two'", "whole number"]),
        ("--data_parallel -2", ["--data_parallel: got -2", "positive whole number"]),
        ("--data_parallel 3 --max_batch_size 4", ["--max_batch_size: got 4", "--data_parallel 3", "such as 6"]),
        ("--tensor_parallel 99999999999999999999", ["--tensor_parallel: got 99999999999999999999"]),
        ("--prompt_len 5 --tensor_parallel 2", ["--prompt_len", "--tensor_parallel", "leave one of them out"]),
        ("--prompt_len 5 --dtype int8", ["--prompt_len", "--dtype", "leave one of them out"]),
        ("--buckets 8,1", ["--prompt_len", "--tensor_parallel", "needed"]),
        ("--accelerator v9", ["--accelerator: got 'v9'", "v4, v5e, v5p, v6e, cpu"]),
        ("--bandwidth -1", ["--bandwidth: got -1.0", "positive finite"]),
        ("--memory nan", ["--memory: got nan", "positive finite"]),
        ("--memory 1e308", ["--memory: got 1e+308", "positive finite"]),
        ("--tensor_parallel 2 --bandwidth 100", ["--bandwidth: got 100.0", "--link"]),
        ("--tensor_parallel 2 --link 100", ["--link: got 100.0", "--bandwidth"]),
        ("--vocab_size 7", ["--vocab_size: got 7", "has 1024", "leave it out"]),
        ("--tensor_paralel 2", ["did you mean --tensor_parallel?"]),
        ("--ckpt_dir nowhere", ["nowhere has neither params.json nor config.json", "no such directory"]),
    ],
)
def test_what_cannot_be_planned_is_refused(run: Run, flags: str, words: list[str]) -> None:
    refused_at_once(run("plan", *flags.split()), *words)


def test_the_largest_numbers_end_at_once(run: Run) -> None:
    """Neither a list of devices nor a search is as long as the numbers."""
    flags = ["--data_parallel", str(2**31 - 1), "--memory", "1e290", "--bandwidth", "1e-290"]
    found = planned(run, *flags)
    assert found["mesh"]["devices"] == 2**31 - 1  # type: ignore[index]
    assert found["largest_batch"] > 1e200  # type: ignore[operator]
    assert run("plan", *flags).code == 0


def test_no_torch_is_imported(tmp_path: Path) -> None:
    """Whatever the plan shows; the tokenizer that settles a vocabulary is torch-free, too."""
    pytest.importorskip("matplotlib")
    (tmp_path / "params.json").write_text(
        json.dumps({**json.loads((DEMO_DIR / "params.json").read_text()), "vocab_size": -1})
    )
    (tmp_path / "tokenizer.model").write_bytes((DEMO_DIR / "tokenizer.model").read_bytes())
    flags = [
        "--tensor_parallel",
        "2",
        "--ckpt_dir",
        str(tmp_path),
        "--accelerator",
        "v4",
        "--plot",
        str(tmp_path / "a.png"),
    ]
    code = f"""
import sys
from llama.cli import main
try:
    main(["plan", *{flags!r}])
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "as many rows as the tokenizer has ids, 1024" in done.stdout
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --------------------------------------------------------------------------------------------- settings


def params_of(args: ModelArgs, directory: Path, **changes: object) -> Path:
    (directory / "params.json").write_text(json.dumps({**args.to_params(), **changes}))
    return directory


def test_a_vocabulary_comes_from_where_it_is_known(run: Run, tmp_path: Path) -> None:
    """The flag, a safetensors header, or a tokenizer; with none of them the flag is asked for."""
    directory = params_of(SMALL, tmp_path, vocab_size=-1)
    flags = ["--tensor_parallel", "2", "--ckpt_dir", str(directory)]
    refused_at_once(run("plan", *flags), "params.json has vocab_size -1", "give --vocab_size")
    assert planned(run, *flags, "--vocab_size", "321")["weights"][0]["whole"] == [321, 64]  # type: ignore[index]
    save_file({"tok_embeddings.weight": np.zeros((322, 64), np.float16)}, directory / "model.safetensors")
    assert planned(run, *flags)["weights"][0]["whole"] == [322, 64]  # type: ignore[index]
    refused_at_once(run("plan", *flags, "--vocab_size", "321"), "--vocab_size: got 321", "has 322")
    save_file({"tok_embeddings.weight": np.zeros((), np.float16)}, directory / "model.safetensors")
    refused_at_once(run("plan", *flags), "params.json has vocab_size -1")


def test_int8_weights_are_seen_in_the_header(run: Run, tmp_path: Path) -> None:
    directory = params_of(SMALL, tmp_path)
    flags = ["--tensor_parallel", "2", "--ckpt_dir", str(directory)]
    assert planned(run, *flags)["dtype"] == "bfloat16"
    weight = {"layers.0.attention.wq.weight": np.zeros((64, 64), np.int8)}
    save_file({**weight, "layers.0.attention.wq.scale": np.ones(64, np.float32)}, directory / "model.safetensors")
    assert planned(run, *flags)["dtype"] == "int8"
    assert planned(run, *flags, "--dtype", "float32")["dtype"] == "float32"


def test_a_config_json_is_planned(run: Run, tmp_path: Path) -> None:
    """Hugging Face's settings, without weights; a rotary scaling that ends somewhere limits the positions."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 321,
        "rms_norm_eps": 1e-5,
        "intermediate_size": 192,
        "sliding_window": 512,
        "max_position_embeddings": 1024,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--tensor_parallel", "4", "--ckpt_dir", str(tmp_path)]
    refused_at_once(run("plan", *flags), "--max_seq_len: got 2048", "more than 1024 positions")
    found = planned(run, *flags, "--max_seq_len", "1024")
    args = ModelArgs(dim=64, n_layers=3, n_heads=8, n_kv_heads=4, vocab_size=321, ffn_hidden_dim=192)
    assert found["parameters"] == planning.parameter_count(args)


def test_settings_of_two_formats_are_told_apart_by_the_weights(tmp_path: Path) -> None:
    """Mistral ships a params.json of its own beside config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        **{"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 9},
        **{"rms_norm_eps": 1e-5, "intermediate_size": 192},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    params_of(SMALL, tmp_path)
    with pytest.raises(CheckpointError, match=r"both params\.json and config\.json, expected one"):
        read_planned(tmp_path)
    save_file(
        {"model.embed_tokens.weight": np.zeros((9, 64), np.float16)}, tmp_path / "model-00001-of-00002.safetensors"
    )
    assert read_planned(tmp_path).settings.file == tmp_path / "config.json"
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "consolidated.00.pth").touch()
    assert read_planned(tmp_path).settings.file == tmp_path / "params.json"


def test_damaged_files_are_one_line(run: Run, tmp_path: Path) -> None:
    directory = params_of(SMALL, tmp_path)
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)
    flags = ["--tensor_parallel", "2", "--ckpt_dir", str(directory)]
    refused_at_once(run("plan", *flags), "model.safetensors is not a safetensors file, or a damaged one")
    (directory / "model.safetensors").unlink()
    (directory / "params.json").write_text('{"dim": 64')
    refused_at_once(run("plan", *flags), "params.json is not readable as JSON")


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(2, 8), Mesh(64, 4)], ids=str)
@pytest.mark.parametrize("figures", [ACCELERATORS["v5e"], Accelerator()], ids=["limit", "none"])
def test_the_picture_stacks_what_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh, figures: Accelerator
) -> None:
    """Each column is as high as the total, in front of the line of the memory; at most 16 are drawn."""
    pytest.importorskip("matplotlib")
    from llama.bench import report
    from llama.cli import device_plan as module

    figures_drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures_drawn.append(figure))
    plan = device_plan(SMALL if mesh.tensor < 8 else replace(SMALL, n_kv_heads=8), mesh, figures, mesh.data)
    module.draw(plan, "small", tmp_path / "a.png")
    (axes,) = figures_drawn[0].axes
    count = min(mesh.devices, 16)
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    unit = {"GiB": GIB, "MiB": 2**20}[axes.get_ylabel()]
    assert len(axes.patches) == count * len(plan.held)
    assert max(tops) == pytest.approx(plan.memory.total / unit)
    limits = [line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("memory")]
    assert limits == ([16.0] if figures.memory else [])
    assert axes.get_ylim()[1] > max(*tops, *limits, 0)
    assert ("all alike" in axes.get_xlabel()) == (mesh.devices > 16)
    report.pyplot().close(figures_drawn[0])


@pytest.mark.parametrize("path", ["nowhere/a.png", "a.nothing"])
def test_a_picture_that_cannot_be_written_is_one_line(run: Run, tmp_path: Path, path: str) -> None:
    """The plan has been printed by then."""
    pytest.importorskip("matplotlib")
    outcome = run("plan", "--tensor_parallel", "2", "--plot", str(tmp_path / path))
    assert outcome.code == 2
    assert outcome.out.startswith("mesh ")
    assert outcome.message.startswith(f"llama-xla: --plot: {tmp_path / path} cannot be written: ")


# --------------------------------------------------------------------------------------------- docs/devices.md


def shown(kind: str) -> list[tuple[str, str]]:
    """(command, block) of each marked block of the page."""
    return re.findall(
        rf"^<!-- {kind}: (llama-xla plan [^\n]*) -->\n```text\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL
    )


def run_as_shown(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> Outcome:
    monkeypatch.chdir(ROOT)
    return run(*command.split()[1:])


@pytest.mark.parametrize(("command", "block"), shown("output"))
def test_outputs_of_the_page_are_real(run: Run, monkeypatch: pytest.MonkeyPatch, command: str, block: str) -> None:
    assert run_as_shown(run, monkeypatch, command) == Outcome(0, block, "")


@pytest.mark.parametrize(("command", "block"), shown("refused"))
def test_refusals_of_the_page_are_real(run: Run, monkeypatch: pytest.MonkeyPatch, command: str, block: str) -> None:
    assert run_as_shown(run, monkeypatch, command) == Outcome(2, "", block)


def test_the_page_has_such_blocks() -> None:
    """Or the tests above would have nothing to run."""
    assert (len(shown("output")), len(shown("refused"))) == (1, 1)


def test_the_table_of_accelerators_is_the_code_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", PAGE, flags=re.MULTILINE)
    figures = {name: tuple(map(int, values)) for name, *values in rows}
    assert figures == {
        name: (each.memory / GIB, each.bandwidth / 1e9, each.link / 1e9, each.flops / 1e12)  # type: ignore[operator]
        for name, each in ACCELERATORS.items()
        if name != "cpu"
    }
