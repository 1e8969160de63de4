"""Other programs as Runners, on the same random weights, shape, dtype and number of threads.

transformers runs eagerly with its own cache; llama.cpp runs through llama-cpp-python on a GGUF file that is written for
the occasion, with its own cache, which is float16. Both decode greedily by their lowest calls, which flatters them a
little: no text is made and no token is checked.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama.bench.llama_cpp_batch import CACHE_DTYPE, LlamaCppBatch, llama_cpp_library
from llama.bench.workload import WEIGHTS_SEED, Times, Workload
from llama.checkpoint import open_checkpoint, random_tensors
from llama.checkpoint.gguf_file import to_gguf
from llama.checkpoint.names import to_hugging_face
from llama.config import ModelArgs
from llama.errors import ConfigError, setting


def weights_of(work: Workload) -> tuple[ModelArgs, Iterator[tuple[str, torch.Tensor]]]:
    """The shape and the weights that every runner takes, by Meta's names."""
    if work.directory is not None:
        source = open_checkpoint(work.directory)
        return source.args, source.tensors()
    args = work.args
    assert args is not None  # no directory: random weights
    return args, random_tensors(args, WEIGHTS_SEED)


def transformers_model(work: Workload, positions: int) -> Any:
    """transformers' LlamaForCausalLM on a workload's weights.

    Raises:
        ConfigError: int8 or int4, which it has no comparable form of; or it is not installed.
    """
    if work.dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"{setting('compare')} hf: transformers has no weight-only {work.dtype} on the CPU to compare with; take "
            "bfloat16 or float32"
        )
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"{setting('compare')} hf needs transformers: pip install 'llama-xla[bench]'") from error
    dtype = torch.float32 if work.dtype == "float32" else torch.bfloat16
    args, tensors = weights_of(work)
    config = transformers.LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=positions,
        tie_word_embeddings=args.tie_word_embeddings,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    # query and key rows stay in Meta's order: other numbers, the same work
    state = {str(to_hugging_face(name)): tensor.to(dtype) for name, tensor in tensors}
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval()


class HuggingFaceRunner:
    """transformers' LlamaForCausalLM.

    Raises:
        ConfigError: see ``transformers_model``.
    """

    def __init__(self, work: Workload) -> None:
        began = time.perf_counter()
        self._model = transformers_model(work, work.positions)
        import transformers

        args = self._model.config
        self._work = work
        self._ids = torch.tensor([work.prompt(row, args.vocab_size) for row in range(work.batch)])
        self.facts: dict[str, Any] = {
            "load_s": time.perf_counter() - began,
            "version": f"transformers {transformers.__version__}",
            "cache_dtype": str(self._model.dtype).removeprefix("torch."),
        }
        self.run()

    def run(self) -> Times:
        """Prefill and decode once."""
        from transformers import DynamicCache

        # transformers 5.24 renamed the argument, and warns of the old name
        known = inspect.signature(self._model.forward).parameters
        held = {"cache" if "cache" in known else "past_key_values": DynamicCache(config=self._model.config)}
        with torch.inference_mode():
            began = time.perf_counter()
            out = self._model(input_ids=self._ids, use_cache=True, logits_to_keep=1, **held)
            token = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(self._work.gen_len - 1):
                out = self._model(input_ids=token, use_cache=True, **held)
                token = out.logits[:, -1:].argmax(-1)
            return Times(first - began, time.perf_counter() - first)


class LlamaCppRunner:
    """llama.cpp through the C API of llama-cpp-python, as many rows as the workload has.

    One row goes the same way as several, which is faster than ``Llama.eval`` and ``Llama.sample``: they list all
    candidates for a sampler at each step. At 110m in float32, in the CPU time of one thread, they decoded 48 tokens per
    second against 54. The cache is float16, which is llama.cpp's default.

    Attributes:
        chosen: [rows][gen_len], the token ids of the last run.

    Raises:
        ConfigError: see ``LlamaCppBatch``.
    """

    def __init__(self, work: Workload) -> None:
        library = llama_cpp_library()
        self._work = work
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            write_gguf(work, path)
            began = time.perf_counter()
            self._sequences = LlamaCppBatch(path, work.batch, work.positions)
        self._prompts = [work.prompt(row, self._sequences.vocab_size) for row in range(work.batch)]
        self._held = 0  # tokens of the cache that are the prompts'
        self.chosen: list[list[int]] = []
        self.facts: dict[str, Any] = {
            "load_s": time.perf_counter() - began,
            "version": f"llama-cpp-python {library.__version__}",
            "cache_dtype": CACHE_DTYPE,
        }
        self.run()

    def run(self) -> Times:
        """Prefill and decode once."""
        self._sequences.clear()
        self._held = 0
        return self.decode_at(self._work.prompt_len)

    def decode_at(self, position: int) -> Times:
        """Prefill the first tokens of the prompts up to a position, and decode from there.

        What the cache holds of the prompts stays.
        """
        kept = min(position - 1, self._held)
        began = time.perf_counter()
        self._sequences.cut(kept)
        tokens = self._sequences.evaluate([prompt[kept:position] for prompt in self._prompts])
        self._held = position
        first = time.perf_counter()
        later = self._sequences.steps(tokens, self._work.gen_len - 1)
        times = Times(first - began, time.perf_counter() - first)
        self.chosen = [[token, *column] for token, column in zip(tokens, later.T.tolist(), strict=True)]
        return times

    def close(self) -> None:
        """Free the model and its cache."""
        self._sequences.close()


def write_gguf(work: Workload, path: Path) -> None:
    """Write a workload's weights for llama.cpp, with a vocabulary of placeholders.

    int8 becomes Q8_0; int4 becomes Q4_0, with Q8_0 for embedding and head, which are int8 in our int4, too.

    Raises:
        ConfigError: a weight's width is no multiple of the 32 numbers of such a block.
    """
    import gguf

    args, tensors = weights_of(work)
    writer = gguf.GGUFWriter(str(path), "llama")
    kinds = {
        "float32": gguf.GGMLQuantizationType.F32,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "int8": gguf.GGMLQuantizationType.Q8_0,
        "int4": gguf.GGMLQuantizationType.Q4_0,
    }
    kind_of_name = {"int4": dict.fromkeys(("tok_embeddings.weight", "output.weight"), gguf.GGMLQuantizationType.Q8_0)}
    writer.add_context_length(work.positions)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("llama")
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *(f"t{i}" for i in range(259, args.vocab_size)),
    ][: args.vocab_size]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * args.vocab_size)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (args.vocab_size - 259)][: args.vocab_size])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in tensors:
        kind = kinds[work.dtype] if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        kind = kind_of_name.get(work.dtype, {}).get(name, kind)
        try:
            data = gguf.quantize(tensor.float().numpy(), kind)
        except gguf.QuantError as error:
            raise ConfigError(
                f"{setting('compare')} llama.cpp: {name} {list(tensor.shape)} cannot become {kind.name} ({error}); "
                f"take {setting('dtype')} float32 or bfloat16"
            ) from error
        writer.add_tensor(to_gguf(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
