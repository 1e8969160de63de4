"""Cut weights into model-parallel shards and join them again, with fairscale's arithmetic."""

from __future__ import annotations

import torch

from llama.checkpoint import names
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.sharding import device_axis, local_shape, span, weight_of_scales


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
    """What each of T devices holds of a weight, or of an int8 weight's scales, and the axis that it is split along.

    Args:
        name: Meta's.
        tensor: the whole.
        args: of the whole model.
        parts: T, which ``sharding.check`` has accepted.

    Returns:
        Views, but where something is filled up with zeros. One part and None where every device holds the whole.
    """
    shape = local_shape(name, args, parts)
    axis = device_axis(weight_of_scales(name))
    if axis is None or axis == len(shape) or parts == 1:  # scales have no axis 1
        return [tensor], None
    found = []
    for rank in range(parts):
        first, length = span(name, args, parts, rank)
        part = tensor.narrow(axis, first, length)
        if part.shape != shape:
            part, held = tensor.new_zeros(shape), part
            part.narrow(axis, 0, length).copy_(held)
        found.append(part)
    return found, axis
