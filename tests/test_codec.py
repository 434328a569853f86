"""The codec: what int8 may lose, what exact may not, and the same bits in NumPy and torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_cache import build_cache

from had_pipe.cache import Cache, Codec, Statistics
from had_pipe.cache import codec as codec_module
from had_pipe.cache.codec import CodecName, fidelity

INT8 = Codec("int8", "float32")
Floats = npt.NDArray[np.float32]

CLIPPED = 127 * 2.0**-25
"""What rounding a scale among float16's coarsest numbers can cost 127 of it, in stds."""


def normal(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def statistics(embedding: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    found = Statistics.of(embedding)
    return found.mean, found.std


embeddings = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(-1e6, 1e6, width=32),
)


@settings(max_examples=150, deadline=None)
@given(embedding=embeddings, seed=st.integers(0, 5), spread=st.sampled_from([1e-3, 1.0, 1e3]))
def test_int8_is_off_by_half_a_step_at_most(embedding: Floats, seed: int, spread: float) -> None:
    mean, std = statistics(normal(seed, 50, embedding.shape[-1]) * spread + seed)

    value, scale = INT8.encode(embedding, mean, std)
    decoded = INT8.decode(value, scale, mean, std).astype(np.float64)

    assert value.dtype == np.int8
    assert scale.dtype == np.float16
    assert value.min() >= -127
    assert (scale > 0).all()
    assert np.isfinite(scale).all()
    step = scale.astype(np.float64)[..., None] * std
    largest = np.abs(embedding).max() + np.abs(mean).max() + step.max() * 127
    allowed = step / 2 * (1 + 2**-10) + CLIPPED * std + largest * 2**-21
    allowed = np.where(scale[..., None] == np.float16(65504), np.inf, allowed)
    assert (np.abs(decoded - embedding) <= allowed).all()


@settings(max_examples=100, deadline=None)
@given(embedding=embeddings, seed=st.integers(0, 5))
def test_numpy_and_torch_give_equal_bits(embedding: Floats, seed: int) -> None:
    mean, std = statistics(normal(seed, 50, embedding.shape[-1]))
    tensors = (torch.from_numpy(mean), torch.from_numpy(std))

    value, scale = INT8.encode(embedding, mean, std)
    value_t, scale_t = INT8.encode(torch.from_numpy(embedding), *tensors)

    assert value_t.numpy().tobytes() == value.tobytes()
    assert scale_t.numpy().tobytes() == scale.tobytes()
    for space in ("raw", "normalised"):
        ours = INT8.decode(value, scale, mean, std, space=space)
        theirs = INT8.decode(value_t, scale_t, *tensors, space=space)
        assert theirs.numpy().tobytes() == ours.tobytes()


def test_int8_follows_the_page_element_by_element() -> None:
    embedding, (mean, std) = normal(1, 2, 3, 5) * 4, statistics(normal(2, 40, 5))

    value, scale = INT8.encode(embedding, mean, std)

    for place in np.ndindex(2, 3):
        z = [
            np.float32((np.float32(x) - m) / s)
            for x, m, s in zip(embedding[place], mean, std, strict=True)
        ]
        expected = np.float16(max(abs(one) for one in z) / np.float32(127))
        assert scale[place] == expected
        # Python's round() is half to even, as the page says.
        steps = [round(float(np.float32(one / np.float32(expected)))) for one in z]
        assert value[place].tolist() == [min(max(step, -127), 127) for step in steps]


def test_an_outlier_channel_does_not_spoil_the_others() -> None:
    embedding = normal(3, 4, 64, 32)
    embedding[..., 7] = embedding[..., 7] * 1000 + 5000
    mean, std = statistics(embedding)

    found = fidelity(embedding, INT8.decode(*INT8.encode(embedding, mean, std), mean, std))

    assert found["worst_channel_rmse"] < 0.012


def test_a_dead_channel_is_decoded_to_what_it_was() -> None:
    embedding = normal(4, 4, 64, 32)
    embedding[..., 5] = 3.25
    mean, std = statistics(embedding)

    decoded = INT8.decode(*INT8.encode(embedding, mean, std), mean, std)

    assert std[5] == pytest.approx(0.01 * np.median(embedding.reshape(-1, 32).std(axis=0)), rel=0.1)
    assert np.abs(decoded[..., 5] - 3.25).max() < 1e-6


def test_a_teacher_that_says_one_thing_only_has_a_std_above_zero() -> None:
    found = Statistics.of(np.full((10, 4), 2.0, dtype=np.float32))

    assert (found.std > 0).all()
    assert (found.mean == 2).all()


def test_a_group_at_the_mean_decodes_to_the_mean() -> None:
    mean, std = normal(5, 8), np.abs(normal(6, 8)) + 0.1

    value, scale = INT8.encode(np.tile(mean, (1, 2, 1)), mean, std)

    assert not value.any()
    assert (scale == np.float16(2.0**-24)).all()
    assert (INT8.decode(value, scale, mean, std) == mean).all()


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e12, 3e38])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_scale_is_never_zero_nor_infinite(size: float, library: str) -> None:
    embedding = np.full((1, 1, 4), size, dtype=np.float32) * np.float32([1, -1, 0.5, 0])
    arrays: list[Any] = [embedding, np.zeros(4, np.float32), np.ones(4, np.float32)]
    if library == "torch":
        arrays = [torch.from_numpy(array) for array in arrays]

    value, scale = INT8.encode(*arrays)
    decoded = np.asarray(INT8.decode(value, scale, *arrays[1:]))

    assert 0 < float(scale[0, 0]) <= 65504
    assert np.isfinite(decoded).all()
    assert (np.sign(decoded) * np.sign(embedding) >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exact_gives_every_bit_back(dtype: Literal["float32", "float16", "bfloat16"]) -> None:
    bits = np.random.default_rng(7).integers(0, 2**16, (3, 4, 1000), dtype=np.uint16)
    codec = Codec("exact", dtype)
    # Every pattern of two bytes: subnormals, infinities, NaN and minus zero among them.
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    raw = bits.view(np.uint32) if dtype == "float32" else bits
    tensor = torch.from_numpy(raw).view(kinds[dtype])
    mean, std = np.zeros(tensor.shape[-1], np.float32), np.ones(tensor.shape[-1], np.float32)

    value, scale = codec.encode(tensor, torch.from_numpy(mean), torch.from_numpy(std))

    assert scale is None
    stored = value.numpy()
    assert stored.tobytes() == raw.tobytes()
    decoded = codec.decode(stored, None, mean, std)
    assert decoded.dtype == np.float32
    expected = tensor.float().numpy()
    quiet = ~np.isnan(expected)
    assert (np.isnan(decoded) == ~quiet).all()
    assert (decoded[quiet].view(np.uint32) == expected[quiet].view(np.uint32)).all()
    also = codec.decode(value, None, torch.from_numpy(mean), torch.from_numpy(std)).numpy()
    assert (also[quiet].view(np.uint32) == expected[quiet].view(np.uint32)).all()


@pytest.mark.parametrize("at_once", [1, 30, 1 << 16])
@pytest.mark.parametrize("space", ["raw", "normalised"])
def test_decoding_a_few_groups_at_a_time_is_the_formula_bit_for_bit(
    at_once: int, space: Literal["raw", "normalised"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into memory of the caller, of which nothing else is touched."""
    monkeypatch.setattr(codec_module, "_DECODED_AT_ONCE", at_once)
    rng = np.random.default_rng(4)
    mean, std = statistics(normal(5, 50, 9) * 3 + 1)
    scale = np.abs(normal(6, 4, 5)).astype(np.float16) + np.float16(0.01)
    int8 = rng.integers(-127, 128, (4, 5, 9)).astype(np.int8)
    bits = (normal(7, 4, 5, 9).view(np.uint32) >> 16).astype(np.uint16)
    half = normal(8, 4, 5, 9).astype(np.float16)
    z = int8.astype(np.float32) * scale.astype(np.float32)[..., None]
    cases: list[tuple[Codec, npt.NDArray[Any], npt.NDArray[np.float16] | None, Floats]] = [
        (INT8, int8, scale, z * std + mean if space == "raw" else z)
    ]
    for dtype, stored, x in (
        ("bfloat16", bits, (bits.astype(np.uint32) << 16).view(np.float32)),
        ("float16", half, half.astype(np.float32)),
        ("float32", normal(9, 4, 5, 9), normal(9, 4, 5, 9)),
    ):
        expected = x if space == "raw" else (x - mean) / std
        cases.append((Codec("exact", dtype), stored, None, expected))
    for codec, stored, scales, expected in cases:
        around = np.full((6, 5, 9), 7, dtype=np.float32)
        given = codec.decode(stored, scales, mean, std, space=space, out=around[1:5])
        assert np.shares_memory(given, around)
        assert given.tobytes() == around[1:5].tobytes() == expected.tobytes()
        assert (around[[0, 5]] == 7).all()
        new = codec.decode(stored, scales, mean, std, space=space)
        assert new.tobytes() == expected.tobytes()
        assert not np.shares_memory(new, stored)
        other = codec.decode(stored[::2], None if scales is None else scales[::2], mean, std)
        assert other.tobytes() == codec.decode(stored, scales, mean, std)[::2].tobytes()


def test_normalised_space_is_raw_less_mean_by_std() -> None:
    embedding, (mean, std) = normal(8, 2, 3, 5), statistics(normal(9, 40, 5) * 3 + 1)
    learnt = Codec.fit("compact", "float32", Statistics(mean, std), normal(9, 1, 40, 5))
    for codec in (INT8, Codec("exact", "float32"), learnt):
        value, scale = codec.encode(embedding, mean, std)
        raw = codec.decode(value, scale, mean, std).astype(np.float64)
        normalised = codec.decode(value, scale, mean, std, space="normalised")
        assert np.abs(normalised - (raw - mean) / std).max() < 1e-5


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        *(("int8", "float32"), ("compact", "float32"), ("tiny", "float16")),
        *(("exact", "float32"), ("exact", "float16"), ("exact", "bfloat16")),
    ],
)
def test_the_lines_in_the_attributes_decode_what_lies_there(
    codec: CodecName,
    dtype: Literal["float32", "float16", "bfloat16"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = Cache.open(
        build_cache(
            tmp_path / "cache", windows=5, valid=0, part=2, codec=codec, dtype=dtype, channels=16
        )
    )
    block = cache.allocate(1)
    cache.read("train", 0, np.array([0]), block)
    expected = cache.codec.decode(block.value, block.scale, cache.mean, cache.std)[0]
    lines = cache.attributes["decode"]["numpy"]

    monkeypatch.chdir(cache.path)
    names: dict[str, Any] = {}
    exec(lines, names)

    assert len(lines.splitlines()) == 6
    assert names["x"].dtype == np.float32
    if cache.codec.codebook is None:
        assert names["x"].tobytes() == expected.tobytes()
    else:  # sums over components, in any order
        assert np.abs(names["x"] - expected).max() < 1e-5


def test_fidelity_agrees_with_a_plain_loop() -> None:
    x, y = normal(10, 3, 4, 6), normal(11, 3, 4, 6) * 0.1
    y += x
    groups, channels = x.reshape(-1, 6).tolist(), list(zip(*x.reshape(-1, 6).tolist(), strict=True))
    decoded = y.reshape(-1, 6).tolist()
    decoded_channels = list(zip(*decoded, strict=True))

    def rmse(a: Any, b: Any) -> float:
        mean = sum(a) / len(a)
        std = math.sqrt(sum((one - mean) ** 2 for one in a) / len(a))
        square = sum((one - two) ** 2 for one, two in zip(a, b, strict=True)) / len(a)
        return math.sqrt(square) / std

    def cosine(a: Any, b: Any) -> float:
        dot = sum(one * two for one, two in zip(a, b, strict=True))
        return dot / math.sqrt(sum(one**2 for one in a)) / math.sqrt(sum(two**2 for two in b))

    channel = [rmse(a, b) for a, b in zip(channels, decoded_channels, strict=True)]
    cosines = [cosine(a, b) for a, b in zip(groups, decoded, strict=True)]
    flat = [(a, b) for one, two in zip(groups, decoded, strict=True) for a, b in zip(one, two)]  # noqa: B905
    relative = math.sqrt(sum((b - a) ** 2 for a, b in flat) / sum(a**2 for a, _ in flat))

    assert fidelity(x, y) == pytest.approx(
        {
            "groups": 12,
            "relative": relative,
            "channel_rmse": sum(channel) / 6,
            "worst_channel_rmse": max(channel),
            "mean_cosine": sum(cosines) / 12,
            "worst_cosine": min(cosines),
        },
        rel=1e-9,
    )


def test_statistics_are_those_of_float64() -> None:
    # Values whose squares lose all sense in float32.
    sample = normal(12, 1000, 3) + 1e4

    found = Statistics.of(sample)

    for channel in range(3):
        column = [float(one) for one in sample[:, channel]]
        mean = math.fsum(column) / 1000
        std = math.sqrt(math.fsum((one - mean) ** 2 for one in column) / 1000)
        assert found.mean[channel] == pytest.approx(mean, rel=1e-7)
        assert found.std[channel] == pytest.approx(std, rel=1e-6)
