"""A plan of devices (planning.py) as text, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama.planning import GIB, DevicePlan, gib, parameter_count
from llama.sharding import EMBEDDING, padded_vocab
from llama.storage import ITEMSIZE

COLUMNS_DRAWN = 16
COLOURS = {
    "embedding": "#222255",
    "attention": "#4477aa",
    "feed_forward": "#44aa99",
    "head": "#8877bb",
    "cache": "#ddaa33",
    "activations": "#cc6677",
}


def lines(plan: DevicePlan, notes: list[str]) -> Iterator[str]:
    """Yield what people read of a plan.

    Args:
        notes: assumptions beside the plan's own.
    """
    args, mesh, config = plan.args, plan.mesh, plan.config
    yield f"mesh     {mesh.devices} devices: data_parallel {mesh.data} x tensor_parallel {mesh.tensor}"
    yield (
        f"model    {parameter_count(args):,} parameters: dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
        f"{args.kv_heads} key heads, feed-forward {args.hidden_dim}, vocabulary {args.vocab_size}"
    )
    yield (
        f"engine   weights {plan.weights_as}, activations {plan.activation}, cache {plan.memory.cache_dtype}, "
        f"max_seq_len {config.max_seq_len}, max_batch_size {config.max_batch_size}"
    )
    yield ""
    yield from _weight_lines(plan)
    yield ""
    yield from _memory_lines(plan)
    yield ""
    yield from _collective_lines(plan)
    yield ""
    yield from _prediction_lines(plan)
    yield ""
    yield "assumptions"
    for note in [*notes, *assumptions(plan)]:
        yield f"  - {note}"


def _weight_lines(plan: DevicePlan) -> Iterator[str]:
    yield f"{'weight':33}{'layers':>6}  {'axis':5}{'whole':16}{'on a device':16}{'bytes':>16}"
    for row in plan.weights:
        axis = "-" if row.axis is None else str(row.axis)
        shapes = f"{_shape(row.whole):16}{_shape(row.local):16}"
        count = row.count if "{}" in row.name else ""
        yield f"{row.name:33}{count:>6}  {axis:5}{shapes}{row.size:>16,}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _memory_lines(plan: DevicePlan) -> Iterator[str]:
    memory = plan.memory
    yield "bytes on each device"
    for name, size in [*plan.held.items(), ("total", memory.total)]:
        yield f"  {name.replace('_', '-'):13}{gib(size):>10}"
    if memory.available is None:
        return
    yield f"  {'memory':13}{gib(memory.available):>10}  {'fits' if memory.fits else 'does not fit'}"
    yield f"  largest max_batch_size that fits: {plan.largest_batch or 'none'}"
    if not memory.fits:
        yield f"  smallest tensor_parallel that fits: {plan.smallest_split or 'none'}"


def _collective_lines(plan: DevicePlan) -> Iterator[str]:
    if not plan.collectives:
        yield "communication in a run: none"
        return
    yield f"{'communication in a run':25}{'count':>6}{'numbers':>9}{'bytes a token':>15}"
    itemsize, total = ITEMSIZE[plan.activation], 0
    for each in plan.collectives:
        size = each.token_bytes(itemsize)
        total += size
        label = f"{each.kind} {each.where.replace('_', '-')}"
        yield f"  {label:23}{each.count:>6}{each.elements:>9}{size:>15,}"
    yield f"  {'total':23}{sum(each.count for each in plan.collectives):>6}{'':9}{total:>15,}"


def _prediction_lines(plan: DevicePlan) -> Iterator[str]:
    found = plan.prediction
    if found is None:
        yield "times: need --accelerator, or --bandwidth (and --link for several devices)"
        return
    yield f"decode step of every slot, {_predicted(plan)}"
    yield f"  {'read weights and cache':25}{1e3 * found.read_s:>10.3f} ms"
    if found.compute_s is not None:
        yield f"  {'compute':25}{1e3 * found.compute_s:>10.3f} ms"
    yield f"  {'communicate':25}{1e3 * found.communicate_s:>10.3f} ms"
    yield f"  {'step':25}{1e3 * found.step_s:>10.3f} ms"
    yield f"  {'tokens a second':25}{found.tokens_per_s:>10.1f}"


def _predicted(plan: DevicePlan) -> str:
    return f"predicted from {'public' if plan.accelerator.is_public else 'the given'} bandwidth figures, not measured"


def assumptions(plan: DevicePlan) -> list[str]:
    """What a plan takes for granted, in sentences."""
    mesh, config, figures = plan.mesh, plan.config, plan.accelerator
    found = [
        f"activations are an upper estimate: a chunk of {config.buckets[0]} tokens in every slot, nothing reused",
    ]
    if mesh.data > 1:
        found.append(f"{mesh.data} copies of the model share the {config.max_batch_size} slots, {plan.slots} on each")
    vocab = padded_vocab(plan.args.vocab_size, mesh.tensor)
    if vocab > plan.args.vocab_size:
        found.append(f"the vocabulary is padded from {plan.args.vocab_size} to {vocab} rows")
    if mesh.tensor > plan.args.kv_heads:
        found.append(f"{mesh.tensor // plan.args.kv_heads} devices hold the same key head")
    if plan.is_quantised:
        wide = "norms" if plan.storage_of(EMBEDDING).is_quantised else "embedding and norms"
        found.append(f"{wide} are float32, as a float32 checkpoint has them")
    if figures.memory is not None:
        found.append("all memory of a device is free; its runtime, the programs and the rotary table take some of it")
    if plan.prediction is None:
        return found
    step = "step = max(read, compute) + communicate" if figures.flops else "step = read + communicate; no compute"
    found.append(f"{step}; reading at {_speed(figures.bandwidth)}, every slot's cache full")
    if mesh.tensor > 1:
        found.append(
            f"rings at {_speed(figures.link)} out of each device, all its links busy, and no latency: each microsecond "
            f"that a collective takes beside its bytes adds {plan.prediction.collectives / 1e3:.3f} ms to a step"
        )
    return found


def _speed(rate: float | None) -> str:
    return f"{(rate or 0) / 1e9:.0f} GB/s"


def as_json(plan: DevicePlan, notes: list[str]) -> dict[str, Any]:
    """The same as plain values: bytes, seconds, numbers."""
    memory, found = plan.memory, plan.prediction
    itemsize = ITEMSIZE[plan.activation]
    return {
        "mesh": {"data": plan.mesh.data, "tensor": plan.mesh.tensor, "devices": plan.mesh.devices},
        "parameters": parameter_count(plan.args),
        "dtype": plan.weights_as,
        "activation_dtype": plan.activation,
        "cache_dtype": memory.cache_dtype,
        "max_seq_len": plan.config.max_seq_len,
        "max_batch_size": plan.config.max_batch_size,
        "weights": [asdict(row) for row in plan.weights],
        "held": plan.held,
        "memory": {"total": memory.total, "available": memory.available},
        "fits": None if memory.available is None else memory.fits,
        "largest_batch": plan.largest_batch,
        "smallest_tensor_parallel": plan.smallest_split,
        "collectives": [{**asdict(each), "token_bytes": each.token_bytes(itemsize)} for each in plan.collectives],
        "predicted": None
        if found is None
        else {**asdict(found), "step_s": found.step_s, "tokens_per_s": found.tokens_per_s, "source": _predicted(plan)},
        "assumptions": [*notes, *assumptions(plan)],
    }


def draw(plan: DevicePlan, title: str, path: Path) -> None:
    """Draw the devices as columns, what each holds stacked in them, against its memory.

    Args:
        title: names the model.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    from llama.bench.report import pyplot, save

    mesh, memory = plan.mesh, plan.memory
    count, most = min(mesh.devices, COLUMNS_DRAWN), max(memory.total, memory.available or 0)
    unit, name_of_unit = (GIB, "GiB") if most >= GIB else (2**20, "MiB")
    figure, axes = pyplot().subplots(figsize=(3.2 + 0.5 * max(count, 8), 4.8), layout="constrained")
    bottom = 0.0
    for name, size in plan.held.items():
        label = f"{name.replace('_', '-')}, {gib(size)}"
        axes.bar(range(count), [size / unit] * count, 0.8, bottom=bottom, color=COLOURS[name], label=label)
        bottom += size / unit
    if memory.available is not None:
        label = f"memory, {gib(memory.available)}"
        axes.axhline(memory.available / unit, color="#222222", linestyle="--", label=label)
    for edge in range(mesh.tensor, count, mesh.tensor):
        axes.axvline(edge - 0.5, color="#888888", linewidth=1, linestyle=":")
    axes.set(xlim=(-0.7, count - 0.3), ylim=(0, 1.08 * most / unit), xticks=range(count), ylabel=name_of_unit)
    axes.set_xlabel("device" + (f" (the first {count} of {mesh.devices}, all alike)" if count < mesh.devices else ""))
    shape = f"data_parallel {mesh.data} x tensor_parallel {mesh.tensor}"
    verdict = "" if memory.available is None else ", fits" if memory.fits else ", does not fit"
    figure.suptitle(f"{title}, {plan.weights_as}, {shape}: {gib(memory.total)} each{verdict}", fontsize=10, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: (not labels[place].startswith("memory"), -place))
    shown = [[each[place] for place in order] for each in (handles, labels)]
    figure.legend(*shown, loc="outside right center", frameon=False, fontsize=9)
    save(figure, path)
