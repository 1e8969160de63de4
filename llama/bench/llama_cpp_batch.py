"""llama.cpp's own batches, by the C API of llama-cpp-python: several sequences in one ``llama_batch``.

The work is that of llama.cpp's own benchmark of batches (``llama-batched-bench``): prompts are not shared and are
evaluated in batches of ``BATCH`` tokens, which may end one prompt and begin the next; then each step decodes one token
of every row. Its defaults stay: a float16 cache, and for each row cells of its own. Cells that all rows share
(``kv_unified``) were no faster.

Flash attention is off, as in llama-cpp-python's ``Llama``. With it prompts took 2 to 12 % less time, and steps far into
the cache much more. Tokens per second of 110m in float32, in the CPU time of one thread, with and without it: 8 rows
after 64 positions 129 and 125, one row after 900 positions 32 and 44, after 2,000 positions 21 and 40.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama.environment import cores
from llama.errors import ConfigError, setting

BATCH = 512  # prompt tokens in one llama_decode
CACHE_DTYPE = "float16"  # llama.cpp's default


def llama_cpp_library() -> Any:
    """The module ``llama_cpp``, which logs errors only.

    Raises:
        ConfigError: llama-cpp-python or gguf is not installed.
    """
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except ImportError as error:
        raise ConfigError(
            f"{setting('compare')} llama.cpp needs llama-cpp-python and gguf: pip install 'llama-xla[bench]'"
        ) from error
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return llama_cpp


class LlamaCppBatch:
    """A model of llama.cpp and the sequences in its cache, with greedy choices.

    Args:
        path: a GGUF file. It is read into memory, not mapped, and may be removed afterwards.
        rows: how many sequences.
        positions: how many tokens each of them may have.

    Attributes:
        vocab_size: of the model.
        lengths: how many tokens of each row are in the cache.

    Raises:
        ConfigError: more rows than llama.cpp serves, or it cannot load the file or make a cache of this size; or see
            ``llama_cpp_library``.
    """

    def __init__(self, path: Path, rows: int, positions: int) -> None:
        self._library = library = llama_cpp_library()
        most = min(library.llama_max_parallel_sequences(), BATCH)
        if rows > most:
            raise ConfigError(f"batch: got {rows}, expected at most {most}, which llama.cpp decodes at once")
        model_params = library.llama_model_default_params()
        model_params.use_mmap = False
        model = library.llama_model_load_from_file(os.fsencode(path), model_params)
        if not model:
            raise ConfigError(f"{setting('compare')} llama.cpp: it cannot load {path.name}, which was written for it")
        context = library.llama_init_from_model(model, self._context_params(rows, positions))
        if not context:
            library.llama_model_free(model)
            raise ConfigError(
                f"{setting('compare')} llama.cpp: it cannot make a cache of {rows} x {positions} positions; take "
                f"fewer by {setting('batch')} or {setting('max_seq_len')}"
            )
        batch = library.llama_batch_init(BATCH, 0, 1)
        self._close = weakref.finalize(self, _free, library, batch, context, model)
        self._context, self._batch = context, batch
        self._memory = library.llama_get_memory(context)
        self.vocab_size: int = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self.lengths = [0] * rows
        self._tokens, self._positions, self._wanted, counts = (
            np.ctypeslib.as_array(getattr(batch, name), (BATCH,)) for name in ("token", "pos", "logits", "n_seq_id")
        )
        counts[:] = 1  # each token belongs to one sequence

    def _context_params(self, rows: int, positions: int) -> Any:
        params = self._library.llama_context_default_params()
        params.n_ctx = rows * -(-positions // 256) * 256  # a row's part of it is a multiple of 256
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = rows
        params.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = cores()
        return params

    def clear(self) -> None:
        """Empty the cache."""
        self._library.llama_memory_clear(self._memory, False)
        self.lengths = [0] * len(self.lengths)

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens of each row that has more."""
        for row, held in enumerate(self.lengths):
            if held > length:
                self._library.llama_memory_seq_rm(self._memory, row, length, -1)
                self.lengths[row] = length

    def evaluate(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Append at least one token to every row; return the likeliest token after each, by row.

        Raises:
            ConfigError: llama.cpp fails, such as for want of memory.
        """
        flat = [
            (token, self.lengths[row] + place, row, place == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        chosen: list[int] = []
        for start in range(0, len(flat), BATCH):
            part = flat[start : start + BATCH]
            tokens, positions, rows, wanted = zip(*part, strict=True)
            self._tokens[: len(part)], self._positions[: len(part)] = tokens, positions
            self._wanted[: len(part)] = wanted
            for place, row in enumerate(rows):
                self._batch.seq_id[place][0] = row
            chosen += self._decode(len(part), sum(wanted)).tolist()
        self.lengths = [held + len(prompt) for held, prompt in zip(self.lengths, prompts, strict=True)]
        return chosen

    def steps(self, tokens: Sequence[int], count: int) -> np.ndarray:
        """Append one token to every row and choose the next, ``count`` times.

        Args:
            tokens: of each row, the first to append.

        Returns:
            [count, rows] int64: the likeliest token after each.

        Raises:
            ConfigError: see ``evaluate``.
        """
        rows = len(self.lengths)
        for row in range(rows):
            self._batch.seq_id[row][0] = row
        self._wanted[:rows] = 1
        self._tokens[:rows], self._positions[:rows] = tokens, self.lengths
        chosen = np.empty((count, rows), np.int64)
        for number in range(count):
            self._tokens[:rows] = chosen[number] = self._decode(rows, rows)
            self._positions[:rows] += 1
        self.lengths = [held + count for held in self.lengths]
        return chosen

    def _decode(self, count: int, outputs: int) -> np.ndarray:
        """Run the first ``count`` tokens of the batch; return the choice at each wanted one, [outputs] int64."""
        self._batch.n_tokens = count
        code = self._library.llama_decode(self._context, self._batch)
        if code:
            raise ConfigError(f"{setting('compare')} llama.cpp: llama_decode returned {code}, expected 0")
        if not outputs:
            return np.empty(0, np.int64)
        logits = self._library.llama_get_logits(self._context)  # of the wanted tokens alone, in the batch's order
        chosen: np.ndarray = np.ctypeslib.as_array(logits, (outputs, self.vocab_size)).argmax(axis=1)
        return chosen

    def close(self) -> None:
        """Free the batch, the cache and the model; once is enough."""
        self._close()


def _free(library: Any, batch: Any, context: Any, model: Any) -> None:
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
