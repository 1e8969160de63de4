"""What loading costs: resident memory within a quarter of the model's bytes in every format, and no copy where none is
needed.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import TINY, random_weights, write_meta
from commands import PROCESS_TIMEOUT_S, ROOT

from llama import ModelArgs
from llama.checkpoint.reshard import convert, reshard
from llama.xla import backend, transfers

pytestmark = pytest.mark.slow

BIG = ModelArgs(dim=1024, n_layers=16, n_heads=16, n_kv_heads=4, vocab_size=4000)  # 0.7 GB of float32
MOST = 1.25  # times the loaded model's bytes: the bar
MEASURE = """
import os
os.environ["PJRT_DEVICE"] = "CPU"
import json, sys
from pathlib import Path
import torch
from llama import checkpoint
from llama.xla import backend, transfers
from llama.compiled.model import Transformer

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

device = backend.init()
torch.ones(1).to(device).cpu()  # the client and all that it imports
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
source = checkpoint.open_checkpoint(Path(sys.argv[1]))
with torch.device("meta"):
    model = Transformer(source.args, 8)
loaded = sum(checkpoint.place(model, checkpoint.checked(source), getattr(torch, sys.argv[2]), device))
backend.wait()
peak = status("VmHWM") - before
print(json.dumps({"loaded": loaded, "peak": peak}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 0.7 GB in every format; its files leave with the module."""
    from transformers import LlamaConfig, LlamaForCausalLM

    top = tmp_path_factory.mktemp("loading")
    write_meta(top / "meta", BIG, [random_weights(BIG)])
    reshard(top / "meta", top / "split", 4)
    convert(top / "meta", top / "own")
    sizes = {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 4000,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=BIG.hidden_dim))
    model.save_pretrained(top / "huggingface")
    model.save_pretrained(top / "huggingface3", max_shard_size="300MB")
    assert len(list((top / "huggingface3").glob("*.safetensors"))) == 3
    return top


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in ("meta", "split", "own", "huggingface", "huggingface3")]
    + [("huggingface", "bfloat16"), ("own", "bfloat16")],
)
def test_peak_memory_of_loading(made: Path, name: str, dtype: str) -> None:
    """Measured by the kernel, in a process of its own, over what importing torch_xla and starting its client take."""
    command = [sys.executable, "-c", MEASURE, str(made / name), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] > 4e8 / (1 if dtype == "float32" else 2)
    assert found["peak"] <= MOST * found["loaded"], f"{found['peak'] / found['loaded']:.2f} times the model's bytes"


@pytest.mark.parametrize("name", ["meta", "split", "huggingface3"])
def test_loading_as_int8_never_holds_the_wide_model(made: Path, name: str) -> None:
    """From float32 files: well below what their weights take, whatever the layout; the rest is the process's own."""
    command = [sys.executable, "-c", MEASURE, str(made / name), "int8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wide = sum(path.stat().st_size for path in (made / name).iterdir() if path.suffix in (".pth", ".safetensors"))
    assert found["loaded"] < 0.3 * wide
    assert found["peak"] < 0.5 * wide


def test_own_files_begin_where_the_device_can_use_them(tmp_path: Path) -> None:
    """So that a float32 model on the CPU device is the mapped file itself."""
    write_meta(tmp_path / "meta", TINY, [random_weights(TINY)])
    for path in convert(tmp_path / "meta", tmp_path / "own", max_shard_size="100KB"):
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert (8 + length) % transfers.ALIGNMENT == 0


def test_adopted_tensors_are_not_copied() -> None:
    """What is written to the host's memory is seen on the CPU device, which a caller must therefore leave alone."""
    device = backend.init()
    host = torch.arange(64, dtype=torch.float32)
    adopted = transfers.adopt(host, device)
    host[5] = -1
    assert adopted.device.type == "xla"
    assert torch.equal(adopted.cpu(), host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_adopted_is_copied(dtype: torch.dtype) -> None:
    """A view at an odd address, and one whose rows are not in order."""
    device = backend.init()
    whole = torch.randn(65, 8).to(dtype)
    for view in (whole.reshape(-1)[1:], whole.t(), whole[1:, :3]):
        expected = view.clone()
        adopted = transfers.adopt(view, device)
        whole += 1
        assert torch.equal(adopted.cpu(), expected)
        whole -= 1
        whole.copy_(whole.to(dtype))


def test_an_adopted_tensor_keeps_its_memory() -> None:
    """The host's last reference may go."""
    device = backend.init()
    adopted = [transfers.adopt(torch.full((1024, 64), float(i)), device) for i in range(20)]
    assert all(bool((tensor.cpu() == i).all()) for i, tensor in enumerate(adopted))
