"""Caches of released formats, kept since they were made: today's code reads them as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr

from had_pipe.cache import Cache, integrity

FOLDER = Path(__file__).parent / "data" / "cache-v1"


@dataclass(frozen=True)
class Golden:
    """Window 4 of train under view 0, and group 2 of it, as they were when the cache was made."""

    cache_id: str
    plan_id: str
    views: tuple[int, ...]
    kmer_id: list[int]
    masked: list[int]
    reversed: list[bool]
    start: int
    value: list[int]
    scale: float | None
    decoded: list[float]


GOLDEN = {
    "int8": Golden(
        cache_id="f9eaa792f49e5294ad1accc9392076c2b967720ed2566c8b936a67bca75ace4c",
        plan_id="f967ef9e07d1f437c81175ca197520fc46161b9355da1ab764f07598c5578cc7",
        views=(0, 1),
        kmer_id=[2559, 158, 4044, 2972, 2060, 3920, 2014, 2534],
        masked=[2],
        reversed=[False, False, False, False, False],
        start=192,
        value=[-30, 106, -58, 66, -127, 34],
        scale=0.0207672119140625,
        decoded=[
            -1.4313380718231201,
            4.4164042472839355,
            -2.4115047454833984,
            2.955336332321167,
            -5.443953514099121,
            1.5403543710708618,
        ],
    ),
    "bfloat16": Golden(
        cache_id="2ad212ed7f0267460f393573000020f81ce4a0b169b0d7164fda699b54a1d1de",
        plan_id="077d9a39ee1251ed1c757df5409869dd450e163dae4af19040763b34ed00d2f2",
        views=(0,),
        kmer_id=[3756, 3514, 602, 3063, 3347, 2746, 1100, 2577],
        masked=[0],
        reversed=[False, True, True, True, False],
        start=192,
        value=[49365, 16402, 49371, 49311, 49318, 48923],
        scale=None,
        decoded=[-6.65625, 2.28125, -6.84375, -4.96875, -5.1875, -0.60546875],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_cache_of_format_1_is_read_as_it_was_written(name: str) -> None:
    golden = GOLDEN[name]

    cache = Cache.open(FOLDER / name)
    block = cache.allocate(5)
    cache.read("train", 0, np.arange(5), block)
    decoded = cache.codec.decode(block.value, block.scale, cache.mean, cache.std)

    assert (cache.id, cache.plan.id) == (golden.cache_id, golden.plan_id)
    assert cache.views("train") == golden.views
    assert (cache.rows("train"), cache.rows("valid")) == (5, 2)
    assert block.kmer_id[4].tolist() == golden.kmer_id
    assert np.flatnonzero(block.mask[4]).tolist() == golden.masked
    assert block.reversed.tolist() == golden.reversed
    assert cache.locus("train", 4).start == golden.start
    assert block.value[4, 2].tolist() == golden.value
    assert (None if block.scale is None else float(block.scale[4, 2])) == golden.scale
    assert decoded[4, 2].tolist() == golden.decoded


@pytest.mark.parametrize("name", GOLDEN)
def test_a_cache_of_format_1_verifies(name: str) -> None:
    report = integrity.verify(FOLDER / name)

    assert report.sealed
    assert report.problems == ()
    assert report.cache_id == GOLDEN[name].cache_id


@pytest.mark.parametrize("name", GOLDEN)
def test_todays_zarr_reads_a_cache_of_format_1(name: str) -> None:
    value = zarr.open_array(FOLDER / name / "data.zarr", path="train/0/embedding/value", mode="r")
    assert np.asarray(value[4, 2]).tolist() == GOLDEN[name].value
