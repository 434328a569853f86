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
    "compact": Golden(
        cache_id="658ccef6a1196dc2f8bb7c60381c91feb92bd68e0ec709e63466601497daf17b",
        plan_id="764c2a1907bdfa3dc0224f5368e43e388a930c9ebbf15ddaafbe20ce384c659d",
        views=(0,),
        kmer_id=[1563, 1128, 1113, 1966, 2654, 149, 1235, 4065],
        masked=[1],
        reversed=[False, False, False, True, False],
        start=192,
        value=[115, 104, 229, 165, 162, 167],
        scale=1.8203125,
        decoded=[
            0.41621828079223633,
            3.456613540649414,
            2.4778311252593994,
            2.218118906021118,
            -2.2434377670288086,
            5.732154846191406,
            -1.7216641902923584,
            8.579903602600098,
            -1.5357539653778076,
            6.090380668640137,
            -0.2739706337451935,
            -0.9783104062080383,
            -3.064082384109497,
            -2.581599712371826,
            6.077524662017822,
            4.701119422912598,
        ],
    ),
    "tiny": Golden(
        cache_id="a70869ef4a5b4e4709acb343763fac1c2ed06925509c0de7b6ab5bc5972b585e",
        plan_id="1688edfb03bd316183fee3144daff6094b306c63c7357135bad57b22df724882",
        views=(0,),
        kmer_id=[1563, 1128, 1113, 1966, 2654, 149, 1235, 4065],
        masked=[1],
        reversed=[False, False, False, True, False],
        start=192,
        value=[166, 71],
        scale=1.8203125,
        decoded=[
            -0.40905851125717163,
            1.9535025358200073,
            3.6397368907928467,
            4.438764572143555,
            2.3638651371002197,
            3.9672582149505615,
            -3.6220014095306396,
            7.657188415527344,
            -1.9296921491622925,
            9.44762897491455,
            -3.703775405883789,
            0.25035977363586426,
            -1.0185869932174683,
            -5.912479877471924,
            0.29433152079582214,
            1.6946955919265747,
        ],
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
    rounding = 1e-5 if cache.codec.codebook is not None else 0
    # Sums over components may be taken in any order; all else is exact.
    assert decoded[4, 2].tolist() == pytest.approx(golden.decoded, rel=0, abs=rounding)


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
