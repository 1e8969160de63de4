"""The sampler on the host and on the XLA device, against published vectors, plain NumPy and exact probabilities.

``both`` runs a function uncompiled on host tensors and as a compiled program on the device, and asserts equal results:
what is claimed of one holds for the other. All seeds are fixed, so that no test has a random outcome.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
import torch

from llama import SamplingParams
from llama.compiled import sampling
from llama.xla import backend, ops, programs, transfers

Fn = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]

VOCAB = 331  # no multiple of the sampler's lanes
INF = float("inf")


def as_tuple(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@cache
def program(fn: Fn, *shapes: tuple[torch.Size, torch.dtype]) -> programs.Program:
    example = [transfers.upload(torch.zeros(shape, dtype=dtype), backend.init()) for shape, dtype in shapes]
    return programs.compile_program(str(fn), lambda *args: as_tuple(fn(*args)), example)


def on_device(fn: Fn, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A compiled program's results; compiled once for each function and shapes."""
    compiled = program(fn, *((arg.shape, arg.dtype) for arg in args))
    return tuple(transfers.fetch(out) for out in compiled(*(transfers.upload(arg, backend.init()) for arg in args)))


def both(fn: Fn, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The results on the host, which must be those on the device, bit for bit."""
    host = as_tuple(fn(*args))
    for ours, theirs in zip(host, on_device(fn, *args), strict=True):
        assert torch.equal(ours, theirs), (ours, theirs)
    return host


def words(values: Sequence[int] | np.ndarray) -> torch.Tensor:
    """32-bit words, given without a sign, as the int32 tensor of the same bits."""
    return torch.from_numpy(np.asarray(values, dtype=np.uint32).view(np.int32).copy())


def unsigned(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32)


def floats(values: Sequence[float] | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32).copy())


# --- the generator's parts --------------------------------------------------------------------------------------------

# Random123's kat_vectors, threefry 2x32 with 20 rounds: key, counter, result.
KNOWN_ANSWERS = (
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)


def threefry(
    k0: torch.Tensor, k1: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return sampling.threefry_2x32((k0, k1), (c0, c1))


def numpy_threefry(k0: np.ndarray, k1: np.ndarray, c0: np.ndarray, c1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32-20 in unsigned arithmetic."""
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = c0 + keys[0], c1 + keys[1]
    for i in range(20):
        turn = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        x0 = x0 + x1
        x1 = (x1 << np.uint32(turn) | x1 >> np.uint32(32 - turn)) ^ x0
        if i % 4 == 3:
            block = i // 4 + 1
            x0, x1 = x0 + keys[block % 3], x1 + keys[(block + 1) % 3] + np.uint32(block)
    return x0, x1


def test_threefry_known_answers() -> None:
    """The generator is Threefry-2x32-20 as published: a seed means the same text in every release and on every
    device.
    """
    keys, counters, answers = (np.array(column, dtype=np.uint32).T for column in zip(*KNOWN_ANSWERS, strict=True))
    found = both(threefry, *map(words, (*keys, *counters)))
    assert [unsigned(x).tolist() for x in found] == answers.tolist()
    assert [
        x.tolist() for x in numpy_threefry(*keys, *counters)
    ] == answers.tolist()  # the reference of the tests below


def test_threefry_many_words() -> None:
    """Beyond the published vectors: 4096 random keys and counters, half of whose words are negative as int32."""
    inputs = np.random.default_rng(1).integers(0, 2**32, (4, 4096), dtype=np.uint32)
    found = both(threefry, *map(words, inputs))
    assert all(np.array_equal(unsigned(x), y) for x, y in zip(found, numpy_threefry(*inputs), strict=True))


def all_rotations(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(ops.rotate_left(x, distance) for distance in range(1, 32))


def test_rotate_left() -> None:
    """Every distance, on words of both signs, against Python's integers: torch_xla's own ``>>`` fails for negative
    words.
    """
    values = [
        0,
        1,
        2,
        3,
        0x7FFFFFFF,
        0x80000000,
        0x80000001,
        0xFFFFFFFF,
        0xFFFFFFFE,
        0xAAAAAAAA,
        0x55555555,
        0xDEADBEEF,
    ]
    values += np.random.default_rng(2).integers(0, 2**32, 500).tolist()
    results = both(all_rotations, words(values))
    assert len(results) == 31
    for distance, result in enumerate(results, start=1):
        assert unsigned(result).tolist() == [(v << distance | v >> (32 - distance)) & 0xFFFFFFFF for v in values], (
            distance
        )


def test_float_bits() -> None:
    """The bit pattern is the number's own, from zero through the smallest numbers to infinity."""
    values = [0.0, -0.0, 1.0, -1.0, 0.1, 1e-30, 2.0**-126, 2.0**-127, 2.0**-149, 3.4028234663852886e38, INF, -INF]
    values += np.random.default_rng(3).normal(size=500).astype(np.float32).tolist()
    (bits,) = both(ops.float_bits, floats(values))
    assert bits.dtype == torch.int32
    assert bits.tolist() == [struct.unpack("<i", struct.pack("<f", v))[0] for v in values]


def numpy_uniform(seed: np.ndarray, position: np.ndarray, vocab_size: int) -> np.ndarray:
    """The uniform variable in (0, 1) behind each token's noise, in float64: [B, V]. Seeds [B, 2] and positions [B] as
    words.
    """
    ids = np.arange(vocab_size, dtype=np.uint32)[None]
    counters = np.broadcast_arrays(ids, position[:, None])
    bits, _ = numpy_threefry(*np.broadcast_arrays(seed[:, :1], seed[:, 1:], *counters)[:2], *counters)
    return (bits + 0.5) * 2.0**-32


def exponential(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return sampling.exponential_noise(seed, position, VOCAB)


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    """The variable of (seed, position, token id) is what NumPy makes of the three, exponentially distributed, and above
    0.
    """
    generator = np.random.default_rng(4)
    seed, position = (
        generator.integers(0, 2**32, (64, 2), dtype=np.uint32),
        generator.integers(0, 2**17, 64, dtype=np.uint32),
    )
    uniform = numpy_uniform(seed, position, VOCAB)
    args = words(seed), words(position)
    for noise in (exponential(*args), *on_device(exponential, *args)):
        assert (noise > 0).all()
        np.testing.assert_allclose(-np.expm1(-noise.double().numpy()), uniform, rtol=1e-6)


# --- the likeliest token ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 127, VOCAB, 1000])
def test_argmax(vocab_size: int) -> None:
    """The index is NumPy's, the lowest among equals: rows with many ties, with none, constant ones, and -inf all but in
    one place.
    """
    generator = np.random.default_rng(vocab_size)
    rows = np.concatenate(
        (
            generator.integers(-3, 1, (32, vocab_size)),
            generator.normal(size=(32, vocab_size)),
            np.full((2, vocab_size), [[-5.0], [0.0]]),
            np.where(np.arange(vocab_size) == generator.integers(0, vocab_size, (16, 1)), -1e30, -INF),
        )
    ).astype(np.float32)
    (chosen,) = both(sampling.argmax, torch.from_numpy(rows))
    assert chosen.dtype == torch.int32
    assert chosen.tolist() == rows.argmax(axis=1).tolist()


def every(rows: int) -> torch.Tensor:
    """All rows are sampled."""
    return torch.ones(rows, dtype=torch.bool)


# --- the nucleus ------------------------------------------------------------------------------------------------------


def numpy_nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """A row's nucleus by sorting: the heaviest tokens until they hold ``top_p`` of the weight, and what weighs as much
    as the last.
    """
    wanted = float(np.float32(top_p) * np.float32(weights.sum(dtype=np.float64)))
    heaviest = np.sort(weights.astype(np.float64))[::-1]
    last = int(
        np.searchsorted(np.cumsum(heaviest), wanted)
    )  # the first place where the sum is not below what is wanted
    return weights >= heaviest[min(last, len(heaviest) - 1)]


def exact_weights(rows: int, vocab_size: int, steps: int, seed: int) -> np.ndarray:
    """Random multiples of 1 / steps, a power of two, the heaviest 1: sums of them have no rounding error, in any
    order.
    """
    generator = np.random.default_rng(seed)
    weights = generator.integers(0, steps + 1, (rows, vocab_size)) / steps
    weights[generator.random((rows, vocab_size)) < generator.random((rows, 1))] = 0  # from dense rows to sparse ones
    weights[np.arange(rows), generator.integers(0, vocab_size, rows)] = 1
    return weights.astype(np.float32)


@pytest.mark.parametrize("steps", [1, 2, 8, 1024], ids=lambda steps: f"{steps}-levels")
@pytest.mark.parametrize("vocab_size", [5, VOCAB])
def test_top_p_mask_equals_sorting(vocab_size: int, steps: int) -> None:
    """256 rows with exact sums, from almost all tied to almost all distinct: the nucleus is the sorted one, ties kept
    together.
    """
    weights = exact_weights(256, vocab_size, steps, seed=steps)
    top_p = np.random.default_rng(steps).random(256).astype(np.float32)
    top_p[:32] = np.tile(
        [1.0, 0.5, 0.25, 1e-30], 8
    )  # all of it, shares that sums can hit exactly, and as good as nothing
    (kept,) = both(sampling.top_p_mask, torch.from_numpy(weights), torch.from_numpy(top_p), every(256))
    expected = np.stack(
        [numpy_nucleus(w, p) if p < 1 else np.ones(vocab_size, bool) for w, p in zip(weights, top_p, strict=True)]
    )
    assert np.array_equal(kept.numpy(), expected)


@pytest.mark.parametrize(
    ("weights", "top_p", "kept"),
    [
        ([1.0, 0.5, 0.25, 0.25], 0.5, [1, 0, 0, 0]),  # the heaviest holds exactly the half
        ([1.0, 0.5, 0.25, 0.25], 0.500001, [1, 1, 0, 0]),
        ([0.25, 0.25, 1.0, 0.5], 0.75, [0, 0, 1, 1]),
        ([0.25, 0.25, 1.0, 0.5], 0.76, [1, 1, 1, 1]),  # the two lightest weigh the same
        ([1.0, 1.0, 1.0, 1.0], 0.01, [1, 1, 1, 1]),
        ([0.5, 1.0, 0.5, 1.0], 1e-30, [0, 1, 0, 1]),
        ([0.5, 1.0, 0.5, 0.5 + 2.0**-24], 0.5, [0, 1, 0, 1]),  # neighbouring floats: the threshold's last bit decides
        ([0.0, 1.0, 0.0, 0.0], 0.9999999, [0, 1, 0, 0]),  # what cannot occur is in no nucleus
        ([0.0, 1.0, 0.0, 2.0**-20], 0.9999999, [0, 1, 0, 1]),
        ([0.0, 1.0, 0.0, 2.0**-20], 1.0, [1, 1, 1, 1]),  # but 1 asks for none
    ],
)
def test_top_p_mask_by_hand(weights: list[float], top_p: float, kept: list[int]) -> None:
    """Cases small enough to check by reading: the boundary itself, ties at it, one survivor, everything, nothing of
    weight 0.
    """
    (mask,) = both(sampling.top_p_mask, floats([weights]), floats([top_p]), every(1))
    assert mask[0].int().tolist() == kept


def test_top_p_mask_of_real_weights() -> None:
    """Weights as logits give them, whose sums round: the nucleus lies between those of slightly smaller and slightly
    larger shares.
    """
    generator = np.random.default_rng(6)
    logits = (generator.normal(size=(256, VOCAB)) * generator.uniform(0.1, 6, (256, 1))).astype(np.float32)
    logits[generator.random(logits.shape) < 0.1] = -INF
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    top_p = generator.uniform(0.05, 0.999, 256).astype(np.float32)
    (kept,) = both(sampling.top_p_mask, torch.from_numpy(weights), torch.from_numpy(top_p), every(256))
    for mask, w, p in zip(kept.numpy(), weights, top_p, strict=True):
        smaller, larger = numpy_nucleus(w, p * (1 - 1e-5)), numpy_nucleus(w, p * (1 + 1e-5))
        assert not (smaller & ~mask).any()
        assert not (mask & ~larger).any()
        assert not mask[w == 0].any()


# --- the other filters ------------------------------------------------------------------------------------------------


def numpy_top_k(distance: np.ndarray, top_k: int) -> np.ndarray:
    """A row's ``top_k`` nearest tokens by sorting, and what is as near as the last of them."""
    return distance <= np.sort(distance)[min(top_k, len(distance)) - 1] if top_k else np.ones(len(distance), bool)


def numpy_typical(distance: np.ndarray, typical_p: float) -> np.ndarray:
    """A row's typical tokens by sorting, in float64."""
    weights = np.exp(-distance.astype(np.float64))
    p = weights / weights.sum()
    with np.errstate(divide="ignore"):
        surprise = -np.log(p)
    entropy = (p[p > 0] * surprise[p > 0]).sum()
    unusual = np.abs(surprise - entropy)
    order = np.argsort(unusual, kind="stable")
    last = int(np.searchsorted(np.cumsum(p[order]), typical_p))
    return unusual <= unusual[order[min(last, len(p) - 1)]]


def random_distances(rows: int, seed: int, vocab_size: int = VOCAB) -> np.ndarray:
    """Distances with ties, from all distinct to nearly all equal; infinities in every row, and in some rows one
    survivor only.
    """
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, vocab_size)) * generator.uniform(0.1, 5, (rows, 1))
    logits[: rows // 2] = np.round(logits[: rows // 2] * 2) / 2
    logits[generator.random(logits.shape) < 0.1] = -INF
    logits[-8:] = np.where(np.arange(vocab_size) == generator.integers(0, vocab_size, (8, 1)), 1.0, -INF)
    logits[np.arange(rows), generator.integers(0, vocab_size, rows)] = (
        20.0  # in the last rows two survivors, or one twice
    )
    return (logits.max(axis=1, keepdims=True) - logits).astype(np.float32)


def test_top_k_mask_equals_sorting() -> None:
    distance = random_distances(256, seed=11)
    top_k = np.random.default_rng(11).integers(0, VOCAB + 20, 256).astype(np.int32)
    top_k[:64] = np.arange(64) % 8
    (kept,) = both(sampling.top_k_mask, floats(distance), torch.from_numpy(top_k), every(256))
    expected = np.stack([numpy_top_k(d, int(k)) for d, k in zip(distance, top_k, strict=True)])
    assert np.array_equal(kept.numpy() | np.isinf(distance), expected | np.isinf(distance))
    ties = (kept.numpy().sum(axis=1) > top_k) & (top_k > 0)
    assert ties.any()  # some rows keep more than k, because the last are equal


def test_typical_p_mask_equals_sorting() -> None:
    """Sums round: the set lies between those of slightly smaller and slightly larger shares."""
    distance = random_distances(256, seed=12)[
        128:
    ]  # ties of surprise are a matter of rounding: the distinct rows, and the survivors
    typical_p = np.random.default_rng(12).uniform(0.05, 0.99, 128).astype(np.float32)
    (kept,) = both(sampling.typical_p_mask, floats(distance), floats(np.exp(-distance)), floats(typical_p), every(128))
    for mask, d, p in zip(kept.numpy(), distance, typical_p, strict=True):
        assert not (numpy_typical(d, p * (1 - 1e-4)) & ~mask).any()
        assert not (mask & ~numpy_typical(d, p * (1 + 1e-4))).any()
        assert mask.any()


def survivors(distance: torch.Tensor, *wishes: torch.Tensor) -> torch.Tensor:
    return sampling.filtered(distance, sampling.Filters(torch.ones(len(distance), device=distance.device), *wishes)) > 0


def numpy_filtered(distance: np.ndarray, top_k: int, top_p: float, min_p: float, typical_p: float) -> np.ndarray:
    """All filters, one after the other, each of what the ones before have left: which tokens survive."""
    left = np.where(numpy_top_k(distance, top_k), distance, INF)
    if top_p < 1:
        left = np.where(numpy_nucleus(np.exp(-left), top_p), left, INF)
    left = np.where(np.exp(-left) >= np.float32(min_p), left, INF)
    if typical_p < 1:
        left = np.where(numpy_typical(left, typical_p), left, INF)
    return left < INF


def random_wishes(rows: int, seed: int) -> tuple[np.ndarray, ...]:
    """top_k, top_p, min_p and typical_p, each unused in a third of the rows."""
    generator = np.random.default_rng(seed)

    def mixed(values: np.ndarray, off: float, dtype: type) -> np.ndarray:
        return np.where(generator.random(rows) < 1 / 3, off, values).astype(dtype)

    return (
        mixed(generator.integers(1, 60, rows), 0, np.int32),
        mixed(generator.uniform(0.2, 0.99, rows), 1, np.float32),
        mixed(generator.uniform(0.001, 0.5, rows), 0, np.float32),
        mixed(generator.uniform(0.2, 0.99, rows), 1, np.float32),
    )


def test_filters_one_after_the_other() -> None:
    """512 rows with every mixture of filters: the survivors are those of NumPy, which sorts; the likeliest is among
    them.
    """
    distance = random_distances(1024, seed=13)[512:]
    wishes = random_wishes(512, seed=13)
    wishes_on = [torch.from_numpy(wish) for wish in wishes]
    kept = both(survivors, floats(distance), *wishes_on)[0].numpy()
    weights = sampling.filtered(floats(distance), sampling.Filters(torch.ones(512), *wishes_on))
    # cuts where sums round are told apart from errors by shares a little to either side
    lower, upper = (
        np.stack([numpy_filtered(d, int(k), p * f, m, t * f) for d, k, p, m, t in zip(distance, *wishes, strict=True)])
        for f in (1 - 1e-4, 1)
    )
    differs = (kept != upper).any(axis=1)
    assert differs.mean() < 0.01
    assert not (kept[differs] != lower[differs]).any(axis=1).sum() > 2
    assert kept.any(axis=1).all()
    no_typical = wishes[3] == 1
    assert kept[no_typical][distance[no_typical] == 0].all()
    np.testing.assert_allclose(weights.numpy()[kept], np.exp(-distance[kept]), rtol=1e-5)  # what is kept is unchanged


def test_defaults_filter_nothing() -> None:
    """Bit for bit, also tokens so unlikely that their weight is 0 in float32."""
    distance = random_distances(64, seed=14) * 30
    unused = torch.zeros(64, dtype=torch.int32), torch.ones(64), torch.zeros(64), torch.ones(64)
    assert (distance[distance < INF] > 200).any()
    weights = sampling.filtered(floats(distance), sampling.Filters(torch.ones(64), *unused))
    assert torch.equal(weights, (-floats(distance)).exp())
    assert torch.equal(both(survivors, floats(distance), *unused)[0], weights > 0)


def test_an_infinite_logit_is_the_likeliest() -> None:
    """+inf takes all the probability there is; beside it, and where every token is impossible, nothing becomes NaN."""
    logits = floats([[0.0, INF, 1.0, -INF], [-INF] * 4, [INF, 0.0, INF, 0.0]])
    wishes = torch.ones(3), torch.zeros(3, dtype=torch.int32), floats([0.9] * 3), floats([0.1] * 3), floats([0.9] * 3)
    (chosen,) = both(choose, logits, *wishes, words([[1, 2]] * 3), words([5, 6, 7]))
    assert chosen[0] == 1
    assert 0 <= chosen[1] < 4
    assert chosen[2] in (0, 2)


# --- the filters of transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p"])
def test_filters_are_those_of_transformers(name: str) -> None:
    """On logits without ties, each filter keeps what transformers' logits warper keeps."""
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

    warpers = {
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
        "typical_p": TypicalLogitsWarper,
    }
    unused = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    distance = floats(random_distances(128, seed=15)[64:120])
    for value in (1, 5, 50) if name == "top_k" else (0.05, 0.3, 0.7, 0.97):
        wishes = [
            torch.tensor([v] * len(distance), dtype=torch.int32 if n == "top_k" else torch.float32)
            for n, v in (unused | {name: value}).items()
        ]
        (kept,) = both(survivors, distance, *wishes)
        expected = warpers[name](value)(torch.zeros(1, 1, dtype=torch.long), -distance)
        assert torch.equal(kept, expected > -INF), value


# --- the choice -------------------------------------------------------------------------------------------------------


def choose(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    typical_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    return sampling.choose(logits, sampling.Filters(temperature, top_k, top_p, min_p, typical_p), seed, position)


def choose_plain(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """``sampling.choose`` with the other filters unused, as the programs of the head ``sample`` have it."""
    zeros = torch.zeros_like(temperature)
    return sampling.choose(logits, sampling.Filters(temperature, zeros.int(), top_p, zeros), seed, position)


def random_rows(rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    """The arguments of ``choose_plain`` for rows that differ in everything; one in four is greedy, and a tenth of the
    logits are -inf.
    """
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, VOCAB)) * generator.uniform(0.5, 8, (rows, 1))
    logits[generator.random(logits.shape) < 0.1] = -INF
    temperature = np.where(np.arange(rows) % 4 == 3, 0, generator.uniform(0.05, 2, rows))
    top_p = np.where(np.arange(rows) % 5 == 4, 1, generator.uniform(0.01, 1, rows))
    seeds = words(generator.integers(0, 2**32, (rows, 2), dtype=np.uint32))
    positions = words(generator.integers(1, 2**17, rows, dtype=np.uint32))
    return floats(logits), floats(temperature), floats(top_p), seeds, positions


def numpy_choice(logits: np.ndarray, temperature: float, top_p: float, uniform: np.ndarray) -> int:
    """One row's token in float64: the likeliest, or the winner of the exponential race within the sorted nucleus."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max()
    kept = numpy_nucleus(np.exp(scaled), top_p)
    return int(np.where(kept, scaled - np.log(-np.log1p(-uniform)), -INF).argmax())


def test_choose_equals_numpy() -> None:
    """1024 rows, greedy and sampled mixed: every token is the one that NumPy draws for the row's logits, wishes, seed
    and position.
    """
    rows = random_rows(1024, seed=7)
    (chosen,) = both(choose_plain, *rows)
    logits, temperature, top_p, seeds, positions = (t.numpy() for t in rows)
    uniform = numpy_uniform(seeds.view(np.uint32), positions.view(np.uint32), VOCAB)
    expected = [numpy_choice(*row) for row in zip(logits, temperature, top_p, uniform, strict=True)]
    assert chosen.tolist() == expected
    likeliest = logits.argmax(axis=1)
    assert (
        0.1 < (chosen.numpy() == likeliest)[temperature > 0].mean() < 0.9
    )  # rows that always took the likeliest would prove little


def test_temperature_0_is_argmax_among_sampled_rows() -> None:
    """A greedy row takes the lowest of its likeliest tokens whatever its seed and top_p, beside rows that are
    sampled.
    """
    logits, temperature, top_p, seeds, positions = random_rows(1024, seed=8)
    greedy = temperature == 0
    assert 0 < greedy.sum() < len(greedy)
    logits[greedy] = logits[greedy].clamp(max=1.0)  # many of them now share the lead
    assert ((logits == logits.amax(dim=1, keepdim=True)).sum(dim=1) > 1)[greedy].float().mean() > 0.9
    (chosen,) = both(choose_plain, logits, temperature, top_p, seeds, positions)
    assert chosen[greedy].tolist() == logits[greedy].numpy().argmax(axis=1).tolist()


def test_row_depends_on_itself_alone() -> None:
    """A row's token is the same alone, in another place of a batch, and beside other neighbours: text does not depend
    on batching.
    """
    rows = random_rows(8, seed=9)
    (chosen,) = both(choose_plain, *rows)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    (moved,) = both(choose_plain, *(t[order] for t in rows))
    assert torch.equal(moved, chosen[order])
    others = random_rows(8, seed=10)
    for i in range(8):
        alone = both(choose_plain, *(t[i : i + 1] for t in rows))[0]
        beside = both(
            choose_plain, *(torch.cat((o[:5], t[i : i + 1], o[6:])) for t, o in zip(rows, others, strict=True))
        )[0]
        assert chosen[i] == alone[0] == beside[5]


def test_every_part_of_seed_and_position_counts() -> None:
    """Changing either word of the seed, or the position, draws anew: no two of 256 equal rows share a stream by
    mistake.
    """
    flat = torch.zeros(256, VOCAB), torch.ones(256), torch.ones(256)
    count = torch.arange(256, dtype=torch.int32)
    zero = torch.zeros_like(count)
    for low, high, position in ((count, zero, zero), (zero, count, zero), (zero, zero, count)):
        (chosen,) = both(choose_plain, *flat, torch.stack((low, high), dim=1), position)
        assert len(set(chosen.tolist())) > 120  # 256 draws of 331 equal tokens hit 178 different ones on average


def test_impossible_tokens_are_never_chosen() -> None:
    """Tokens of logit -inf stay out at every temperature, also where only one token is left."""
    rows, allowed = 256, torch.arange(256) % VOCAB
    logits = torch.full((rows, VOCAB), -INF)
    logits[torch.arange(rows), allowed] = -7.0
    temperature = torch.linspace(0, 4, rows)
    seeds, positions = torch.stack((allowed, allowed), dim=1).int(), allowed.int()
    (chosen,) = both(choose_plain, logits, temperature, torch.ones(rows), seeds, positions)
    assert torch.equal(chosen.long(), allowed)


# --- frequencies ------------------------------------------------------------------------------------------------------

FALSE_ALARM = 1e-6
DRAWS, DRAWS_A_CALL = 20480, 2048
LOGITS = np.array([2.0, 1.9, 1.5, 1.5, 1.5, 1.0, 0.6, 0.5, 0.0, -0.3, -0.7, -1.0, -1.2, -2.0])


def critical_chi_square(degrees: int) -> float:
    """What a chi-square variable exceeds with probability 1e-6, by Wilson and Hilferty's cube of a normal variable.

    That lies a little above the exact value: the rate is really 1.6e-7 for 1 degree of freedom, 6.9e-7 for 13, 9e-7 for
        63.
    """
    z = NormalDist().inv_cdf(1 - FALSE_ALARM)
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + z * spread**0.5) ** 3


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def nucleus_distribution(temperature: float, top_p: float) -> np.ndarray:
    """The exact probabilities of LOGITS after temperature and top_p, in float64."""
    weights = np.exp((LOGITS - LOGITS.max()) / temperature)
    weights[~numpy_nucleus(weights, top_p)] = 0
    return weights / weights.sum()


def draw(temperature: float, top_p: float, vary: str) -> np.ndarray:
    """DRAWS tokens from LOGITS on the device: of one seed at consecutive positions, or of consecutive seeds at one
    position.
    """
    count = np.arange(DRAWS, dtype=np.uint32)
    seeds = np.stack((count if vary == "seed" else np.full_like(count, 12345), np.zeros_like(count)), axis=1)
    positions = count if vary == "position" else np.full_like(count, 17)
    same = (
        floats(np.tile(LOGITS, (DRAWS_A_CALL, 1))),
        floats([temperature] * DRAWS_A_CALL),
        floats([top_p] * DRAWS_A_CALL),
    )
    parts = [slice(i, i + DRAWS_A_CALL) for i in range(0, DRAWS, DRAWS_A_CALL)]
    return np.concatenate(
        [both(choose_plain, *same, words(seeds[part]), words(positions[part]))[0].numpy() for part in parts]
    )


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5), (1.0, 0.35)])
def test_frequencies_follow_the_nucleus_distribution(temperature: float, top_p: float, vary: str) -> None:
    """Chi-square of 20480 draws against the exact distribution; false-alarm rate 1e-6, once and for all as the seeds
    are fixed.

    Nothing outside the nucleus is drawn at all. As a control, a distribution whose temperature is off by a tenth is
    told apart.
    """
    exact = nucleus_distribution(temperature, top_p)
    counts = np.bincount(draw(temperature, top_p, vary), minlength=len(exact))
    inside = exact > 0
    critical = critical_chi_square(int(inside.sum()) - 1)
    assert counts[~inside].sum() == 0
    assert chi_square(counts[inside], DRAWS * exact[inside]) < critical
    if top_p > 0.9:  # a small nucleus is nearly flat at any temperature
        wrong = nucleus_distribution(temperature * 1.1, top_p)
        assert chi_square(counts, DRAWS * wrong) > critical


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_neighbouring_draws_are_independent(vary: str) -> None:
    """Pairs of consecutive positions, or seeds, are as frequent as the product of probabilities says (chi-square, rate
    1e-6).
    """
    exact = nucleus_distribution(1.0, 0.9)
    kinds = int((exact > 0).sum())
    assert (exact[:kinds] > 0).all()  # LOGITS descend: the nucleus is the first so many
    pairs = draw(1.0, 0.9, vary).reshape(-1, 2)
    counts = np.zeros((kinds, kinds))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    expected = len(pairs) * np.outer(exact[:kinds], exact[:kinds])
    assert expected.min() > 5  # below that, chi-square is no good approximation
    assert chi_square(counts, expected) < critical_chi_square(kinds**2 - 1)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "typical_p"),
    [(5, 1.0, 0.0, 1.0), (0, 1.0, 0.2, 1.0), (0, 1.0, 0.0, 0.5), (9, 0.8, 0.1, 0.9)],
)
def test_frequencies_follow_every_filter(top_k: int, top_p: float, min_p: float, typical_p: float) -> None:
    """Chi-square of 20480 draws against the exact distribution of what the filters leave; false-alarm rate 1e-6."""
    distance = LOGITS.max() - LOGITS
    kept = numpy_filtered(distance, top_k, top_p, min_p, typical_p)
    exact = np.where(kept, np.exp(-distance), 0)
    exact /= exact.sum()
    count = np.arange(DRAWS, dtype=np.uint32)
    wishes = [floats([v] * DRAWS_A_CALL) for v in (1.0, top_k, top_p, min_p, typical_p)]
    wishes[1] = wishes[1].int()
    drawn = []
    for i in range(0, DRAWS, DRAWS_A_CALL):
        part = slice(i, i + DRAWS_A_CALL)
        seeds = words(np.stack((np.full_like(count[part], 99), np.zeros_like(count[part])), axis=1))
        drawn.append(
            both(choose, floats(np.tile(LOGITS, (DRAWS_A_CALL, 1))), *wishes, seeds, words(count[part]))[0].numpy()
        )
    counts = np.bincount(np.concatenate(drawn), minlength=len(exact))
    assert counts[~kept].sum() == 0
    assert 1 < kept.sum() < len(kept)
    assert chi_square(counts[kept], DRAWS * exact[kept]) < critical_chi_square(int(kept.sum()) - 1)


# --- the edges of float32 ---------------------------------------------------------------------------------------------


def sharp_choice(token: int, temperature: float, top_p: float, seed: int, position: int) -> list[int]:
    """What ``choose`` takes, on the host and on the device, where ``token`` has all but nothing of the probability."""
    logits = torch.zeros(1, VOCAB)
    logits[0, token] = 40.0
    row = logits, torch.tensor([temperature]), torch.tensor([top_p]), words([[seed, 0]]), words([position])
    return [result.item() for result in (choose_plain(*row), *on_device(choose_plain, *row))]


@pytest.mark.parametrize(("seed", "position", "token"), [(488, 100, 272), (1407, 117, 4)])
def test_only_survivor_is_chosen_whatever_its_noise(seed: int, position: int, token: int) -> None:
    """Words from 0xFFFFFF80 on, one in 2 ** 25, are where float32 rounds to 1: the noise is finite there too, and the
    token chosen.
    """
    args = words([[seed, 0]]), words([position])
    assert numpy_uniform(*map(unsigned, args), VOCAB)[0, token] > 1 - 2**-25
    assert sharp_choice(token, 1.0, 0.5, seed, position) == [token, token]
    assert all(noise.isfinite().all() for noise in (exponential(*args), *on_device(exponential, *args)))


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [
        (1.0, 1e-37),
        (1.0, 1e-38),
        (1.0, 1e-40),
        (1.0, 1e-46),
        (1e-36, 0.9),
        (1e-37, 0.9),
        (1e-40, 0.9),
        (1e-46, 0.9),
    ],
)
def test_parameters_near_zero(temperature: float, top_p: float) -> None:
    """Whatever SamplingParams accepts, down to what float32 cannot hold: towards 0 both parameters come to the
    likeliest token.
    """
    SamplingParams(temperature=temperature, top_p=top_p)
    assert sharp_choice(token=5, temperature=temperature, top_p=top_p, seed=1, position=1) == [5, 5]


def test_a_filter_that_no_row_asks_for_is_not_computed() -> None:
    """The loop over bits is not entered: a row that does not ask keeps all tokens, beside rows that ask and alone,
    greedy or at 1.
    """
    distance = floats(random_distances(16, seed=16)[:4])
    top_k = torch.tensor([5, 0, 5, 5], dtype=torch.int32)
    sampled = torch.tensor([True, True, False, True])
    (kept,) = both(sampling.top_k_mask, distance, top_k, sampled)
    assert kept.all(dim=1).tolist() == [False, True, True, False]
    for k, s in ((torch.zeros_like(top_k), sampled), (top_k, torch.zeros_like(sampled))):
        (kept,) = both(sampling.top_k_mask, distance, k, s)
        assert kept.all()
