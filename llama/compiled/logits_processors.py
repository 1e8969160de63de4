"""Per-row logits processing before a token is drawn: penalties, bias and bans.

Compiled into the program ``full``, row by row, like ``sampling``. Occurrences are counted anew in each step from the
tokens on the device, a scatter of one addition a position: no counts are carried along.

Shapes: B batch rows, S max_seq_len, V vocabulary, W = ceil(V / 32) words of 32 bits each.
"""

from __future__ import annotations

import torch

from llama.compiled.sampling import LARGEST
from llama.compiled.state import LogitsControls

INF = float("inf")


def process_logits(
    logits: torch.Tensor, controls: LogitsControls, stop_ids: torch.Tensor, tokens: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    """Apply each row's bias, penalties and bans; a row without any keeps its logits bit for bit.

    Args:
        logits: [B, V] float32.
        controls: of each row.
        stop_ids: [B, n] int32, -1 fills up.
        tokens: [B, S] int32, prompt and generated tokens.
        length: [B] int32, how many of them are known.

    Returns:
        [B, V] float32, -inf for what may not come. Where nothing would be left, only ``controls.allowed`` holds.
    """
    vocab_size = logits.shape[-1]
    in_prompt, allowed = (members(words, vocab_size) for words in (controls.in_prompt, controls.allowed))
    counts = output_counts(tokens, controls.prompt_len, length, vocab_size)
    ids, added = _additions(controls, stop_ids, tokens, length)
    logits = logits + torch.zeros_like(logits).scatter_add(1, ids.long(), added)
    logits = penalised(logits, in_prompt, counts, controls)
    candidates = torch.where(allowed, logits, -INF)
    nothing_left = (
        candidates.amax(dim=-1, keepdim=True) < -LARGEST
    )  # torch_xla's amax begins at float32's lowest number, not at -inf
    return torch.where(nothing_left & allowed, 0.0, candidates)


def penalised(
    logits: torch.Tensor, in_prompt: torch.Tensor, counts: torch.Tensor, controls: LogitsControls
) -> torch.Tensor:
    """Logits with the penalties for what has occurred.

    ``repetition`` divides positive logits of tokens in the prompt or the output and multiplies others (Keskar et al.
    2019, CTRL; as transformers and vLLM). ``presence`` is subtracted once and ``frequency`` for each time that a token
    is in the output (OpenAI, vLLM).

    Args:
        logits: [B, V] float32.
        in_prompt: [B, V] bool, the token occurs in the prompt.
        counts: [B, V] float32, how often it occurs in the output.

    Returns:
        [B, V] float32.
    """
    repetition, presence, frequency = (
        each.unsqueeze(-1) for each in (controls.repetition, controls.presence, controls.frequency)
    )
    in_output = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | in_output, repeated, logits)
    return logits - torch.where(in_output, presence + frequency * counts, 0.0)


def output_counts(
    tokens: torch.Tensor, prompt_len: torch.Tensor, length: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """How often each token is among those at positions ``prompt_len`` to ``length``: [B, V] float32."""
    places = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    generated = (places >= prompt_len.unsqueeze(-1)) & (places < length.unsqueeze(-1))
    zeros = torch.zeros(tokens.shape[0], vocab_size, device=tokens.device)
    return zeros.scatter_add(1, tokens.long(), generated.float())


def members(words: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Sets of tokens out of their bits: [B, W] int32 to [B, V] bool."""
    one = torch.ones(32, dtype=torch.int32, device=words.device)
    bit = one << torch.arange(32, dtype=torch.int32, device=words.device)  # made in the program: no tensor of the host
    return ((words.unsqueeze(-1) & bit) != 0).flatten(1)[:, :vocab_size]


def _additions(
    controls: LogitsControls, stop_ids: torch.Tensor, tokens: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is added to single tokens' logits: the bias, and -inf for a bad word's last token and for a stop that
    comes too early.

    Returns:
        [B, n] int32 token ids and [B, n] float32; what does not apply adds 0 to token 0.
    """
    banned = completes_bad_word(controls.bad_words, tokens, length)
    last = controls.bad_words[:, :, -1]
    too_early = (stop_ids >= 0) & (length < controls.first_stop).unsqueeze(-1)
    ids = torch.cat((controls.bias_ids, torch.where(banned, last, 0), torch.where(too_early, stop_ids, 0)), dim=-1)
    added = torch.cat((controls.bias, torch.where(banned, -INF, 0.0), torch.where(too_early, -INF, 0.0)), dim=-1)
    return ids, added


def completes_bad_word(bad_words: torch.Tensor, tokens: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Whether the last token of each bad word would complete it now: [B, n, m] int32 to [B, n] bool."""
    back = torch.arange(
        1 - bad_words.shape[-1], 0, dtype=torch.int32, device=tokens.device
    )  # positions before the next one
    places = length.unsqueeze(-1) + back  # [B, m - 1]
    recent = torch.where(places >= 0, tokens.gather(1, places.clamp(min=0).long()), -2).unsqueeze(1)
    before = bad_words[:, :, :-1]
    return ((before == -1) | (before == recent)).all(dim=-1) & (bad_words[:, :, -1] >= 0)
