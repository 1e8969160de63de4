"""Medusa heads: computed as published, read from either kind of file, counted from the tensors, refused by name; and
the script that trains them.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TINY, edit_json
from commands import ROOT
from safetensors.torch import load_file, save_file

from llama.checkpoint.files import TensorFile
from llama.checkpoint.medusa import load_medusa, open_medusa
from llama.checkpoint.quantize import quantize
from llama.compiled.medusa import MedusaHeads
from llama.compiled.model import Linear
from llama.config import DEMO_DIR, ModelArgs
from llama.errors import CheckpointError
from llama.xla import backend, programs, transfers
from llama.xla.linear import Rules, ruled

sys.path.insert(0, str(ROOT / "scripts"))

DIM, VOCAB = TINY.dim, TINY.vocab_size
CPU = torch.device("cpu")
FILES = ("medusa_lm_head.pt", "medusa_lm_head.safetensors", "model.safetensors")

Weights = dict[str, torch.Tensor]


def random_heads(n_heads: int = 3, n_layers: int = 1, dtype: torch.dtype = torch.float32) -> Weights:
    """Weights by the published names, large enough for every part to show in the logits."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return (0.2 * torch.randn(shape, generator=generator)).to(dtype)

    made: Weights = {}
    for head in range(n_heads):
        for block in range(n_layers):
            made[f"{head}.{block}.linear.weight"] = random(DIM, DIM)
            made[f"{head}.{block}.linear.bias"] = random(DIM)
        made[f"{head}.{n_layers}.weight"] = random(VOCAB, DIM)
    return made


def write(directory: Path, weights: Weights, name: str = FILES[0], **config: Any) -> Path:
    """A directory with one file of heads, and a config.json where it has something to say."""
    directory.mkdir(exist_ok=True)
    if name.endswith(".pt"):
        torch.save(weights, directory / name)
    else:
        save_file({key: tensor.clone() for key, tensor in weights.items()}, directory / name)
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def loaded(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> MedusaHeads:
    return load_medusa(open_medusa(directory), TINY, dtype, CPU, **options)


def naive(weights: Weights, hidden: torch.Tensor) -> list[torch.Tensor]:
    """The logits of every head, as the paper has them: W2 (x + silu(W1 x + b)), with as many blocks as there are."""
    logits = []
    for head in range(1 + max(int(name.split(".")[0]) for name in weights)):
        x, block = hidden, 0
        while f"{head}.{block}.linear.weight" in weights:
            weight, bias = (weights[f"{head}.{block}.linear.{leaf}"].float() for leaf in ("weight", "bias"))
            y = x @ weight.t() + bias
            x, block = x + y / (1 + torch.exp(-y)), block + 1
        logits.append(x @ weights[f"{head}.{block}.weight"].float().t())
    return logits


def hidden_states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(8))


# ---- what they compute


@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_logits_are_those_of_the_formula(tmp_path: Path, n_layers: int) -> None:
    """Every head's, of hidden states of any leading shape."""
    weights = random_heads(n_layers=n_layers)
    heads = loaded(write(tmp_path / "heads", weights))
    for shape in ((5,), (2, 3)):
        hidden = hidden_states(*shape)
        found = heads(hidden)
        assert [tuple(logits.shape) for logits in found] == [(*shape, VOCAB)] * 3
        for logits, expected in zip(found, naive(weights, hidden), strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_parameters_have_the_published_names() -> None:
    """So that a file needs no table of names, and a trained module can be saved as it is."""
    assert set(MedusaHeads(2, 2, DIM, VOCAB).state_dict()) == set(random_heads(2, 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.int8, 0.015)])
def test_narrow_weights_are_near(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """Within a hundredth of the logits' size; biases stay exact."""
    weights = random_heads(n_layers=2)
    heads = loaded(write(tmp_path / "heads", weights), dtype)
    for name, module in heads.named_modules():
        if isinstance(module, Linear):
            assert module.weight.dtype == dtype
            assert (module.scale is not None) == (dtype == torch.int8)
            if dtype == torch.int8:
                assert torch.equal(module.weight, quantize(weights[f"{name}.weight"])[0])
    for name, parameter in heads.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, weights[name])
    hidden = hidden_states(6)
    for logits, expected in zip(heads(hidden), naive(weights, hidden), strict=True):
        assert logits.dtype == torch.float32
        assert (logits - expected).norm() <= tolerance * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_program_computes_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """Compiled on the device, for one row and for several, against the same weights on the host."""
    file, device = open_medusa(write(tmp_path / "heads", random_heads())), backend.init()
    heads, host = (load_medusa(file, TINY, dtype, where) for where in (device, CPU))
    for rows in (1, 3, 40):
        x = transfers.upload(hidden_states(rows), device)
        with ruled(Rules(activations="float32", prefill_products="float32")):
            program = programs.compile_program("medusa", lambda x: tuple(heads(x)), [x])
        for found, expected in zip(program(x), host(hidden_states(rows)), strict=True):
            torch.testing.assert_close(transfers.fetch(found), expected, rtol=1e-4, atol=1e-4)


# ---- files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_either_kind_of_file_loads_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """A pickle and safetensors of both names, in every type that checkpoints come in."""
    weights = random_heads(n_layers=2, dtype=dtype)
    for name in FILES:
        directory = write(tmp_path / name, weights, name)
        state = loaded(directory).state_dict()
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], weights[key].float()) for key in weights)


def test_safetensors_come_before_a_pickle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which holds no code; of a pickle the log warns. The model's own file in the same directory is left alone."""
    directory = write(tmp_path / "heads", random_heads(2), FILES[0])
    save_file({"lm_head.weight": torch.zeros(2, 2)}, directory / "model.safetensors")
    assert open_medusa(directory).path.name == "medusa_lm_head.pt"
    assert "is a pickle; load it from people you trust only" in caplog.text
    write(directory, random_heads(3), FILES[1])
    assert open_medusa(directory).path.name == "medusa_lm_head.safetensors"


def test_blocks_may_share_their_weights(tmp_path: Path) -> None:
    """FasterDecoding's older script repeats one block, and saves its tensors under the names of all."""
    weights = random_heads(2, 2)
    for head in range(2):
        for leaf in ("weight", "bias"):
            weights[f"{head}.1.linear.{leaf}"] = weights[f"{head}.0.linear.{leaf}"]
    heads = loaded(write(tmp_path / "heads", weights))
    torch.testing.assert_close(heads(hidden_states(3)), naive(weights, hidden_states(3)), rtol=1e-5, atol=1e-5)


def test_heads_are_counted_from_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The published config.json says 2 heads beside a file of 5; the log names both."""
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    file = open_medusa(write(tmp_path / "heads", random_heads(5), FILES[1], **config))
    assert (file.n_heads, file.n_layers, file.dim, file.vocab_size) == (5, 1, DIM, VOCAB)
    assert file.base_model == "lmsys/vicuna-7b-v1.3"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "medusa_num_heads is 2, but medusa_lm_head.safetensors holds 5" in record.getMessage()
    assert len(load_medusa(file, TINY, torch.float32, CPU)) == 5


def test_a_config_that_agrees_or_is_silent_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another model's config.json, too: the heads may lie beside their model's."""
    directory = write(tmp_path / "heads", random_heads(3), FILES[1], medusa_num_heads=3, medusa_num_layers=1)
    assert open_medusa(directory).base_model is None
    edit_json(directory / "config.json", medusa_num_heads=None, medusa_num_layers=None, hidden_size=64)
    open_medusa(directory)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_memory_is_known_before_loading(tmp_path: Path, dtype: torch.dtype) -> None:
    """To the byte."""
    directory = write(tmp_path / "heads", random_heads(2, 2))
    assert open_medusa(directory).nbytes(dtype) == sum(p.nbytes for p in loaded(directory, dtype).parameters())


# ---- refusals


def renamed(old: str, new: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[new] = weights.pop(old)

    return change


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: tensor})


REFUSED: dict[str, tuple[Callable[[Weights], Any], list[str]]] = {
    "a bias is missing": (lambda w: w.pop("1.0.linear.bias"), ["1 missing: 1.0.linear.bias"]),
    "a vocabulary layer is missing": (lambda w: w.pop("2.1.weight"), ["1 missing: 2.1.weight"]),
    "the first one is missing": (lambda w: w.pop("0.1.weight"), ["tensor 0.1.weight", "vocabulary layer", "missing"]),
    "a head is missing": (
        lambda w: [w.pop(name) for name in list(w) if name.startswith("1.")],
        ["3 missing: 1.0.linear.weight", "3 not known: 2.0.linear."],
    ),
    "an unknown name": (replaced("3.scale", torch.ones(2)), ["1 not known: 3.scale", "expected i.j.linear.weight"]),
    "an absurd number": (
        renamed("2.0.linear.bias", "999999999.0.linear.bias"),
        ["1 not known: 999999999.0.linear.bias"],
    ),
    "heads of different depth": (
        lambda w: w.update({"1.2.weight": w.pop("1.1.weight"), "1.1.linear.weight": torch.ones(DIM, DIM)}),
        ["head 0 has 1 residual blocks and head 1 has 2", "as many in every head"],
    ),
    "a block of another width": (
        replaced("1.0.linear.weight", torch.ones(DIM, 8)),
        [f"1 of another shape: 1.0.linear.weight [{DIM}, 8] instead of [{DIM}, {DIM}]"],
    ),
    "another vocabulary in one head": (
        replaced("2.1.weight", torch.ones(5, DIM)),
        [f"1 of another shape: 2.1.weight [5, {DIM}] instead of [{VOCAB}, {DIM}]"],
    ),
    "a vocabulary layer that is a vector": (
        replaced("0.1.weight", torch.ones(DIM)),
        [f"0.1.weight is [{DIM}]", "expected [vocab_size, dim]"],
    ),
    "integers": (
        replaced("1.1.weight", torch.ones(VOCAB, DIM, dtype=torch.int8)),
        ["1 of a type that is not computed with: 1.1.weight torch.int8"],
    ),
    "eight-bit floats": (
        replaced("1.1.weight", torch.ones(VOCAB, DIM).to(torch.float8_e4m3fn)),
        ["1 of a type that is not computed with: 1.1.weight"],
    ),
    "another model's weights": (
        lambda w: [w.pop(name) for name in list(w)] and w.update({"lm_head.weight": torch.ones(2, 2)}),
        ["holds no Medusa head (found: lm_head.weight)", "expected i.j.linear.weight"],
    ),
    "nothing": (lambda w: w.clear(), ["holds no Medusa head (found: no tensor)"]),
}


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_other_tensors_are_refused(
    tmp_path: Path, change: Callable[[Weights], Any], words: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their names, with what was expected, before any weight is read."""
    weights = random_heads()
    change(weights)
    directory = write(tmp_path / "heads", weights, name)
    monkeypatch.setattr(TensorFile, "read", None)
    with pytest.raises(CheckpointError) as error:
        open_medusa(directory)
    assert all(word in str(error.value) for word in [*words, f"{directory / name}"]), str(error.value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (ModelArgs(dim=128, n_layers=2, n_heads=8, vocab_size=VOCAB), [f"dim {DIM}, but the model has 128"]),
        (ModelArgs(dim=DIM, n_layers=2, n_heads=8, vocab_size=9), [f"vocab_size {VOCAB}, but the model has 9"]),
    ],
    ids=["width", "vocabulary"],
)
def test_heads_for_another_model_are_refused(
    tmp_path: Path, args: ModelArgs, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model that they are for, before any weight is read."""
    file = open_medusa(write(tmp_path / "heads", random_heads(), base_model_name_or_path="some/model"))
    monkeypatch.setattr(TensorFile, "read", None)
    with pytest.raises(CheckpointError) as error:
        load_medusa(file, args, torch.float32, CPU)
    assert all(word in str(error.value) for word in [*words, "config.json names some/model"]), str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """With the tensor's name, unless they are allowed."""
    weights = random_heads()
    weights["1.0.linear.bias"][3] = value
    directory = write(tmp_path / "heads", weights, FILES[1])
    with pytest.raises(CheckpointError, match=r"tensor 1\.0\.linear\.bias holds NaN or infinity.*allow_nan"):
        loaded(directory)
    assert len(loaded(directory, allow_nan=True)) == 3
    assert "tensor 1.0.linear.bias holds NaN or infinity" in caplog.text


def test_no_file_is_refused(tmp_path: Path) -> None:
    """With what was looked for and what is there."""
    with pytest.raises(CheckpointError, match=r"no such directory.*expected one of medusa_lm_head\.safetensors"):
        open_medusa(tmp_path / "absent")
    (tmp_path / "medusa.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found: medusa\.pt"):
        open_medusa(str(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    """One that was cut short, one of other bytes, and a pointer of Git LFS."""
    path = write(tmp_path / "heads", random_heads(), name) / name
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"damaged" * 9, b"version https://git-lfs.github.com/spec/v1\n", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            open_medusa(path.parent)
        assert str(path) in str(error.value)
        assert ("Git LFS" in str(error.value)) == content.startswith(b"version")


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "heads", random_heads())
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable as JSON"):
        open_medusa(directory)


def make(path: str) -> None:
    Path(path).mkdir()


class Code:
    """What a pickle would run."""

    def __init__(self, function: Callable[[str], None], path: Path) -> None:
        self.function, self.path = function, path

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (str(self.path),)


@pytest.mark.parametrize("function", [make, os.mkdir])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, function: Callable[[str], None]) -> None:
    """Neither a function of anybody's nor one of the modules that torch names as dangerous."""
    weights: dict[str, Any] = {**random_heads(), "9.9.weight": Code(function, tmp_path / "made")}
    with pytest.raises(CheckpointError, match=r"medusa_lm_head\.pt is not a checkpoint, or a damaged one"):
        open_medusa(write(tmp_path / "heads", weights))
    assert not (tmp_path / "made").exists()


# ---- training


def test_a_head_learns_its_own_token_within_its_document() -> None:
    """Heads that know every position's right answer, and nothing about a later document's, lose nothing; off by one,
    they lose much.
    """
    from train_medusa import head_losses

    bos, length = 1, 12
    whole = torch.tensor([[bos, 5, 6, 7, 8, 2, bos, 9, 10, 11, 12, 13, 14]])
    ends = [6] * 6 + [13] * 7  # the position after each token's document
    for shift in (0, 1):
        heads = MedusaHeads(3, 1, length, 20)
        for name, parameter in heads.named_parameters():
            torch.nn.init.zeros_(parameter)
            head = int(name.split(".")[0])
            for position in range(length if name.endswith(".1.weight") else 0):
                target = position + 2 + head + shift
                if target < ends[position]:
                    parameter[whole[0, target], position] = 50.0
        losses = head_losses(heads, torch.eye(length).unsqueeze(0), whole, bos)
        assert losses.shape == (3,)
        assert bool((losses < 1e-6).all()) == (shift == 0)


def test_new_heads_predict_what_the_model_does() -> None:
    """The blocks are the identity, and the vocabulary layers the model's own."""
    from train_demo_model import load
    from train_medusa import hidden_states as read, new_heads

    model = load(DEMO_DIR)
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        expected = model.head(model(ids, torch.arange(20).unsqueeze(0)))
        for logits in new_heads(model)(read(model, ids)):
            torch.testing.assert_close(logits, expected)


@pytest.mark.slow
def test_the_training_script_runs(tmp_path: Path) -> None:
    """A few steps make files that load beside the demo model, small enough for the repository, and their README."""
    out = tmp_path / "medusa"
    command = [sys.executable, str(ROOT / "scripts" / "train_medusa.py"), "--quick", "--out", str(out)]
    command += ["--ckpt_dir", str(DEMO_DIR)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 6  # kinds of documents
    assert {path.name for path in out.iterdir()} == {"medusa_lm_head.safetensors", "config.json", "README.md"}
    assert sum(path.stat().st_size for path in out.iterdir()) < 3_000_000
    assert "in a row" in (out / "README.md").read_text()
    assert {t.dtype for t in load_file(out / "medusa_lm_head.safetensors").values()} == {torch.bfloat16}
    args = ModelArgs.from_params(json.loads((DEMO_DIR / "params.json").read_text()))
    file = open_medusa(out)
    heads = load_medusa(file, args, torch.float32, CPU)
    assert [tuple(logits.shape) for logits in heads(torch.ones(2, args.dim))] == [(2, args.vocab_size)] * file.n_heads
