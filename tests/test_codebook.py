"""Learnt codes: exact where they compare, right on average, and never another group's business."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_cache import build_cache

from had_pipe.cache import Cache, Codec, Statistics, codebook
from had_pipe.cache.codebook import Codebook
from had_pipe.cache.codec import calibrate, code_nbytes, fidelity
from had_pipe.errors import CacheCorrupt, RecipeError

Floats = npt.NDArray[np.float32]


def correlated(seed: int, groups: int, channels: int, *, decay: float = 0.8) -> Floats:
    """Channels of std about 1 that have much in common, as a language model's have."""
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(channels, channels)))[0]
    size = np.arange(1, channels + 1) ** -decay
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(groups, channels)) * size) @ turn
    return (z * math.sqrt(channels / (size**2).sum())).astype(np.float32)


LEARNT = Codebook.fit(correlated(0, 3000, 24), 5)
WIDE = Codebook.fit(correlated(0, 6000, 96), code_nbytes("tiny", 96))

groups_of_24 = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.just(24)),
    elements=st.floats(-1e6, 1e6, width=32),
)


@settings(max_examples=60, deadline=None)
@given(z=groups_of_24, power=st.sampled_from([-120, -30, 0, 20, 100]))
def test_numpy_and_torch_write_equal_bytes(z: Floats, power: int) -> None:
    z = np.ldexp(z, power).astype(np.float32)

    code, scale = LEARNT.encode(z)
    code_t, scale_t = LEARNT.encode(torch.from_numpy(z))

    assert (code.dtype, scale.dtype) == (np.uint8, np.float16)
    assert code.shape == (len(z), 5)
    assert code.max() < 255
    assert ((scale > 0) & np.isfinite(scale)).all()
    assert np.isfinite(LEARNT.decode(code, scale)).all()
    assert code_t.numpy().tobytes() == code.tobytes()
    assert scale_t.numpy().tobytes() == scale.tobytes()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_group_is_encoded_alike_alone_and_among_any_others(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z: Any = correlated(1, 257, 96)
    z = torch.from_numpy(z) if library == "torch" else z
    code, scale = (np.asarray(a) for a in WIDE.encode(z))

    monkeypatch.setattr(codebook, "_AT_ONCE", 96 * 7)
    for some in (slice(0, 1), slice(200, 257), slice(None, None, 3), slice(5, 6), slice(0, 257)):
        alone, its_scale = (np.asarray(a) for a in WIDE.encode(z[some]))
        assert alone.tobytes() == code[some].tobytes()
        assert its_scale.tobytes() == scale[some].tobytes()


def test_encoding_follows_the_page_in_whole_numbers() -> None:
    z_ND = correlated(2, 12, 24) * np.float32(3.7)
    z_ND[3] *= np.float32(1e-3)
    z_ND[4] *= np.float32(2**17)
    code, scale = LEARNT.encode(z_ND)
    rotation = [[int(r * 2**20) for r in row] for row in LEARNT.rotation.astype(float).tolist()]
    assert (np.array(rotation) / 2**20 == LEARNT.rotation).all()

    for n, z in enumerate(z_ND.astype(float).tolist()):
        power = math.frexp(max(map(abs, z)))[1]
        whole = [round(math.ldexp(x, 24 - power)) for x in z]
        # Python's integers do not round.
        y = [
            math.ldexp(sum(a * b for a, b in zip(whole, row, strict=True)), power - 44)
            for row in rotation
        ]
        w = [a / float(s) for a, s in zip(y, LEARNT.spread, strict=True)]
        largest = max(map(abs, w))
        square = sum(round(a / largest * 2**15) ** 2 for a in w)
        size = largest * (math.sqrt(square / 24) / 2**15)
        expected = np.float16(np.float32(min(size, 65504)))
        assert scale[n] == expected
        for d in range(24):
            here = np.float32(y[d] / float(expected)) * float(LEARNT.stretch[d])
            levels = LEARNT.level[:255, d].astype(float)
            chosen = levels[code[n, LEARNT.byte[d]]]
            nearest = float(np.abs(levels - here).min())
            assert abs(chosen - here) <= nearest + 1e-6 * (1 + abs(here))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_decoding_agrees_with_a_plain_loop(library: str) -> None:
    code, scale = LEARNT.encode(correlated(3, 6, 24))
    arrays: list[Any] = [code, scale]
    if library == "torch":
        arrays = [torch.from_numpy(array) for array in arrays]

    decoded = np.asarray(LEARNT.decode(*arrays))

    assert decoded.dtype == np.float32
    for n, c in itertools.product(range(6), range(24)):
        x = math.fsum(
            float(LEARNT.level[code[n, LEARNT.byte[d]], d])
            * float(scale[n])
            * float(LEARNT.rotation[d, c])
            for d in range(24)
        )
        assert decoded[n, c] == pytest.approx(x, abs=1e-5)


def test_every_value_of_a_byte_names_levels_and_every_combination_has_one() -> None:
    for at in range(5):
        inside = np.flatnonzero(LEARNT.byte == at)
        counts = [len(np.unique(LEARNT.level[:, d])) for d in inside]
        product = math.prod(counts)
        assert 1 < product <= 255
        rows = {tuple(row) for row in LEARNT.level[:product, inside].tolist()}
        assert len(rows) == product


def test_decoded_components_lie_on_the_line_through_the_true_ones() -> None:
    z = correlated(4, 20_000, 96)
    y = z.astype(np.float64) @ WIDE.rotation.T.astype(np.float64)
    decoded = WIDE.decode(*WIDE.encode(z)).astype(np.float64) @ WIDE.rotation.T

    slope = (y * decoded).sum(axis=0) / (y**2).sum(axis=0)

    coded = np.ptp(WIDE.level[:255], axis=0) > 0
    assert coded.sum() > 80
    assert slope[coded] == pytest.approx(1, abs=0.12)
    assert float((y * decoded).sum() / (y**2).sum()) == pytest.approx(1, abs=0.02)


def test_what_channels_have_in_common_makes_two_bits_enough() -> None:
    z = correlated(5, 4000, 96)

    found = fidelity(z, WIDE.decode(*WIDE.encode(z)))

    # Two bits of each channel by itself would be off by 0.34 of a std: Max, 1960.
    assert found["channel_rmse"] < 0.25
    assert found["worst_channel_rmse"] < 0.34
    assert found["worst_cosine"] > 0.85


def test_four_levels_of_a_normal_variable_are_maxs_stretched() -> None:
    value = np.sort(np.random.default_rng(0).normal(size=200_000).astype(np.float32))

    found, stretch = codebook._levels(value, 4)

    # Max (1960), table I: 0.4528 and 1.510 lose 0.1175 of the variance.
    assert stretch == pytest.approx(1 / 0.8825, rel=0.01)
    assert found == pytest.approx(np.array([-1.51, -0.4528, 0.4528, 1.51]) / 0.8825, rel=0.03)


def test_levels_go_to_where_they_help_most() -> None:
    noise, bits = codebook._noise(), np.log2(np.arange(1, 256))
    for size in ([9.0, 1.0, 0.2], [1.0, 1.0, 1.0], [100.0, 0.01, 0.01], [5.0, 4.0, 0.001]):
        count = codebook._fill_byte(np.array(size), noise, bits)
        best = min(
            sum(s * noise[n - 1] for s, n in zip(size, (a, b, c), strict=True))
            for a in range(1, 256)
            for b in range(1, 255 // a + 1)
            for c in [255 // (a * b)]
        )
        assert math.prod(count.tolist()) <= 255
        assert float((np.array(size) * noise[count - 1]).sum()) <= 1.15 * best


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 31, 513])
@pytest.mark.parametrize("name", ["compact", "tiny"])
def test_any_number_of_channels_is_coded(name: Any, channels: int) -> None:
    sample = correlated(6, 400, channels)[None] * 3 + 1
    statistics = Statistics.of(sample)

    codec = Codec.fit(name, "float32", statistics, sample)
    value, scale = codec.encode(sample, statistics.mean, statistics.std)
    decoded = codec.decode(value, scale, statistics.mean, statistics.std)

    assert value.shape == (1, 400, code_nbytes(name, channels))
    assert decoded.shape == sample.shape
    if channels == 513:
        nbytes = value.shape[-1] + scale.itemsize
        assert nbytes <= {"compact": 2, "tiny": 1}[name] * 2 * channels / 8
        assert fidelity(sample, decoded)["channel_rmse"] < 0.25


def test_dead_channels_and_mad_values_do_not_spoil_the_others() -> None:
    sample = correlated(8, 4000, 64)
    sample[:, 5] = 3.25
    sample[17, 6] = 1e8
    sample[:, 7] = sample[:, 7] * 1000 + 5000
    statistics = Statistics.of(sample)
    codec = Codec.fit("compact", "float32", statistics, sample[None])
    tested = correlated(9, 1000, 64)
    tested[:, 5] = 3.25
    tested[:, 7] = tested[:, 7] * 1000 + 5000

    stored = codec.encode(tested[None], statistics.mean, statistics.std)
    decoded = codec.decode(*stored, statistics.mean, statistics.std)[0]

    error = np.sqrt(((decoded - tested) ** 2).mean(axis=0)) / np.maximum(tested.std(axis=0), 1e-6)
    others = [d for d in range(64) if d not in (5, 6)]
    assert error[others].max() < 0.2
    assert np.abs(decoded[:, 5] - 3.25).max() < 0.05


def test_a_teacher_that_says_one_thing_only_is_stored_as_that() -> None:
    sample = np.full((1, 20, 16), 2.0, dtype=np.float32)
    statistics = Statistics.of(sample)
    codec = Codec.fit("tiny", "float32", statistics, sample)

    for array in (np.asarray, torch.from_numpy):
        mean, std = array(statistics.mean), array(statistics.std)
        stored = codec.encode(array(sample), mean, std)
        assert (np.asarray(codec.decode(*stored, mean, std)) == 2).all()


def test_given_statistics_are_kept_and_the_codec_measured_on_windows_it_has_not_seen() -> None:
    sample = correlated(11, 60 * 40, 32).reshape(60, 40, 32)
    given_to = Statistics(np.full(32, 0.5, np.float32), np.full(32, 2.0, np.float32))

    found = calibrate("tiny", "float32", sample, given=given_to)

    assert found.statistics is given_to
    known, tested = sample[:45], sample[45:]
    alone = Codec.fit("tiny", "float32", given_to, known)
    stored = alone.encode(tested, given_to.mean, given_to.std)
    decoded = alone.decode(*stored, given_to.mean, given_to.std)
    assert found.fidelity == fidelity(tested, decoded)
    assert found.fidelity["groups"] == 15 * 40


def test_a_group_larger_than_all_others_keeps_its_direction() -> None:
    z = correlated(10, 50, 96)

    code, scale = WIDE.encode(z)
    larger, its_scale = WIDE.encode(z * np.float32(64))

    assert larger.tobytes() == code.tobytes()
    assert its_scale.astype(float) == pytest.approx(scale.astype(float) * 64, rel=2**-10)


def test_what_is_learnt_does_not_depend_on_the_number_of_threads() -> None:
    code = (
        "import hashlib, numpy as np\n"
        "from had_pipe.cache.codebook import _principal\n"
        "sample = np.random.default_rng(0).normal(size=(1500, 256)).astype(np.float32)\n"
        "print(hashlib.sha256(_principal(sample).tobytes()).hexdigest())\n"
    )
    # The eigenvectors of so many channels do differ, unless care is taken.
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(digests) == 1


def test_a_cache_whose_components_name_other_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Codebook.fit

    def wrong(sample: Floats, nbytes: int) -> Codebook:
        found = fit(sample, nbytes).arrays
        return Codebook(**{**found, "byte": found["byte"] + np.uint16(nbytes)})

    monkeypatch.setattr(Codebook, "fit", staticmethod(wrong))
    path = build_cache(tmp_path / "cache", codec="tiny", channels=32, parts=0)

    with pytest.raises(CacheCorrupt, match="does not name each of the 6 bytes"):
        Cache.open(path, incomplete=True)


def test_more_channels_than_sums_are_exact_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="8,193 channels as 'tiny', which takes at most 8,192"):
        build_cache_plan_only(tmp_path / "cache", channels=8193)


def build_cache_plan_only(path: Path, *, channels: int) -> None:
    from had_pipe.cache import Plan

    plan = Cache.open(build_cache(path, windows=4, valid=0, part=4)).plan.model_dump(mode="json")
    Plan.new({**plan, "codec": "tiny", "teacher": {**plan["teacher"], "channels": channels}})
