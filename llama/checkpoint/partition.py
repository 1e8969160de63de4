"""Cut weights into model-parallel shards and join them again, with fairscale's arithmetic."""

from __future__ import annotations

import torch

from llama.checkpoint import names
from llama.checkpoint.quantize import ZERO
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.sharding import device_axis, local_shape, span, weight_of_scales, whole_shape

ZEROS = ZERO | ZERO << 4  # a byte of int4


def piece(size: int, rank: int, parts: int) -> tuple[int, int]:
    """Return the offset and length of one rank's part of ``size``, which ``parts`` divides."""
    from fairscale.nn.model_parallel.utils import VocabUtility, divide_and_check_no_remainder

    first, last = VocabUtility.vocab_range_from_per_partition_vocab_size(
        divide_and_check_no_remainder(size, parts), rank, parts
    )
    return first, last - first


def cut(tensor: torch.Tensor, rank: int, parts: int, axis: int | None) -> torch.Tensor:
    """Return one rank's part of a whole weight, as a view; the whole if ``axis`` is None."""
    if axis is None:
        return tensor
    first, length = piece(tensor.shape[axis], rank, parts)
    return tensor.narrow(axis, first, length)


def check_divisible(args: ModelArgs, parts: int, embedding_axis: int) -> None:
    """Check that every weight can be cut into ``parts``.

    Raises:
        CheckpointError: names the sizes that cannot be divided.
    """
    sizes = {
        "n_heads": args.n_heads,
        "the feed-forward width": args.hidden_dim,
        "vocab_size": args.vocab_size,
        "dim": args.dim,
    }
    if args.tie_word_embeddings and embedding_axis == 1:
        del sizes["vocab_size"]
    remainders = [f"{name} {size}" for name, size in sizes.items() if size % parts]
    if args.kv_heads % parts and parts % args.kv_heads:
        remainders.append(f"n_kv_heads {args.kv_heads}")
    if remainders:
        raise CheckpointError(
            f"cannot be split into {parts}: {', '.join(remainders)} cannot be divided; expected a divisor of them all"
        )


def replicates_heads(weight: names.Weight, args: ModelArgs, parts: int) -> bool:
    """Whether several shards hold the same key/value head, because there are more shards than heads."""
    return names.is_key_or_value(weight) and parts > args.kv_heads and parts % args.kv_heads == 0


def device_parts(name: str, tensor: torch.Tensor, args: ModelArgs, parts: int) -> tuple[list[torch.Tensor], int | None]:
    """What each of T devices holds of a weight, or of a quantised weight's scales, and the axis that it is split along.

    Args:
        name: Meta's.
        tensor: the whole; of groups none is cut (storage.py).
        args: of the whole model.
        parts: T, which ``sharding.check`` has accepted.

    Returns:
        Views, but where something is filled up with zeros. One part and None where every device holds the whole.
    """
    weight = weight_of_scales(name)
    axis = device_axis(weight)
    if axis is None or axis == tensor.dim() or parts == 1:  # scales of rows have no axis 1
        return [tensor], None
    numbers = whole_shape(weight, args)[axis] // tensor.shape[axis]  # 2 in a byte of int4, a group for its scale
    shape = list(tensor.shape)
    shape[axis] = local_shape(weight, args, parts)[axis] // numbers
    found = []
    for rank in range(parts):
        first, length = (each // numbers for each in span(weight, args, parts, rank))
        part = tensor.narrow(axis, first, length)
        if list(part.shape) != shape:
            part, held = tensor.new_full(shape, ZEROS if tensor.dtype == torch.uint8 else 0), part
            part.narrow(axis, 0, length).copy_(held)
        found.append(part)
    return found, axis
